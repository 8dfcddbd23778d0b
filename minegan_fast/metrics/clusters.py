"""Diversity of few-shot adaptation: how much the images differ that resemble the same target image."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._inputs import Array, as_tensor

_LIMIT = 16.0  # beyond it a float image is in [0, 255], not an unclamped generator's


class IntraClusterDiversity(NamedTuple):
    """What `intra_cluster_diversity` returns."""

    mean: float  # over the clusters that have at least two images
    std: float  # over the same clusters
    diversity: Tensor  # [K] float64, the mean pairwise distance within each cluster, NaN where it has fewer than two
    sizes: Tensor  # [K] int64, how many generated images are nearest to each target


def intra_cluster_diversity(
    images: Array,
    targets: Array,
    distance: Callable[[Tensor, Tensor], Tensor],
    batch: int = 64,
    pairs: int | None = 1000,
    seed: int = 0,
) -> IntraClusterDiversity:
    """Mean pairwise distance of generated images within clusters around the target images: intra-cluster LPIPS.

    Every image joins the cluster of its nearest target (the first, where several are equally near). The mean distance
    over the pairs i < j of a cluster is its diversity; the result is the mean over clusters, each counting the same,
    and their (population) standard deviation. 0: every image of a cluster is the same, a copy of its target perhaps.
    Higher: more diverse. The papers generate 1,000 images for 10 targets.

    images [N, ...], targets [K, ...]: tensors or arrays of one shape behind the first dimension, floating point
        ([-1, 1] for images) or uint8, which becomes x / 127.5 - 1. A batch at a time is moved to the device and dtype
        of a module; a function gets them where and as they are. Images [N, C, H, W] far beyond [-1, 1] raise
        ValueError. Features [N, D] are fine with a distance for them.
    distance: any perceptual module or function; distance(a, b) of two batches [B, ...] gives B numbers, of any shape:
        lpips.LPIPS() as it is. An nn.Module is evaluated in eval mode, its own modes are put back after; never with
        gradient or autocast. Assumed symmetric.
    batch: pairs evaluated at once. N*K + K*pairs are evaluated in all.
    pairs: of a cluster with more pairs, as many are drawn without replacement, fixed by `seed`; None: all are taken.
    A cluster of fewer than two images has no pair: it is left out, with a warning that counts such clusters, and
    `sizes` says which. A generator that left a target out therefore does not lose by it here: read `sizes` or recall
    as well. ValueError where no cluster has two.
    Source: Ojha et al., "Few-shot Image Generation via Cross-domain Correspondence", CVPR 2021.
    """
    if batch < 1 or (pairs is not None and pairs < 1):
        raise ValueError(f"batch and pairs must be at least 1, got {batch} and {pairs}")
    if not callable(distance):
        raise TypeError(f"distance must be a module or function of two batches, not {type(distance).__name__}")
    images, targets = _as_images(images, "images"), _as_images(targets, "targets")
    if images.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"images and targets must have one shape, got {list(images.shape[1:])} and {list(targets.shape[1:])}"
        )
    N, K = len(images), len(targets)
    with _evaluated(distance) as anchor:
        if anchor is None and images.device != targets.device:
            raise ValueError(f"images and targets must be on the same device, got {images.device} and {targets.device}")
        grid = torch.cartesian_prod(torch.arange(N), torch.arange(K))
        nearest = _distances(distance, images, targets, grid, batch, anchor).view(N, K).argmin(1)
        sizes = nearest.bincount(minlength=K)
        if sizes.max() < 2:
            raise ValueError(f"none of {K} clusters has two of the {N} images: generate more than {K}")
        random = np.random.default_rng(seed)
        diversity = torch.full((K,), torch.nan, dtype=torch.float64)
        for k in range(K):
            if sizes[k] >= 2:
                members = (nearest == k).nonzero().flatten()
                chosen = members[_draw_pairs(len(members), pairs, random)]
                diversity[k] = _distances(distance, images, images, chosen, batch, anchor).mean()
    alone = int((sizes < 2).sum())
    if alone:
        warnings.warn(
            f"{alone} of {K} targets are nearest to fewer than two of {N} images: these clusters are left out",
            stacklevel=2,
        )
    kept = diversity[sizes >= 2]
    return IntraClusterDiversity(float(kept.mean()), float(kept.std(correction=0)), diversity, sizes)


def _as_images(x, name: str) -> Tensor:
    x = as_tensor(x, name).detach()
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} must be [N, ...] with at least one image, got {list(x.shape)}")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point in [-1, 1] or uint8, not {x.dtype}")
    low, high = x.aminmax()
    if not torch.isfinite(high - low):
        bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise ValueError(f"{len(bad)} of {len(x)} {name} hold NaN or inf, the first is number {int(bad[0])}")
    if x.dim() == 4 and max(-low, high) > _LIMIT:
        raise ValueError(
            f"{name} reach from {low:.4g} to {high:.4g}, expected [-1, 1]: convert 0..255 by x / 127.5 - 1"
        )
    return x


@contextlib.contextmanager
def _evaluated(distance) -> Iterator[Tensor | None]:
    """Puts a module into eval mode and restores its flags after. Yields a tensor of its dtype and device."""
    if not isinstance(distance, nn.Module):
        with torch.no_grad():
            yield None
        return
    tensors = chain(distance.parameters(), distance.buffers())
    modes = [(module, getattr(module, "training", False)) for module in distance.modules()]
    distance.eval()
    try:
        with torch.no_grad():
            yield next((t for t in tensors if t.is_floating_point()), None)
    finally:
        for module, training in modes:
            module.training = training


def _distances(distance, x: Tensor, y: Tensor, pairs: Tensor, batch: int, anchor: Tensor | None) -> Tensor:
    """distance(x[i], y[j]) of pairs [P, 2] of (i, j): [P] float64 on the CPU."""
    values = []
    for chunk in pairs.split(batch):
        a, b = (_prepared(z[index.to(z.device)], anchor) for z, index in zip((x, y), chunk.T, strict=True))
        # Ambient autocast would make distances depend on the caller's precision.
        with torch.autocast(a.device.type, enabled=False):
            value = distance(a, b)
        if not isinstance(value, Tensor) or value.numel() != len(chunk):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"distance must give one number for each of {len(chunk)} pairs, got {got}")
        values.append(value.detach().flatten().to("cpu", torch.float64))
    values = torch.cat(values)
    finite = values.isfinite()
    if not finite.all():
        i, j = pairs[~finite][0].tolist()
        raise ValueError(f"distance gave NaN or inf for {int((~finite).sum())} pairs, the first is of {i} and {j}")
    return values


def _prepared(x: Tensor, anchor: Tensor | None) -> Tensor:
    x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
    return x if anchor is None else x.to(anchor.device, anchor.dtype)


def _draw_pairs(n: int, count: int | None, random: np.random.Generator) -> Tensor:
    """[P, 2]: pairs i < j of n >= 2, all of them or `count` different ones."""
    total = n * (n - 1) // 2
    few = count is not None and count < total
    index = random.choice(total, count, replace=False) if few else np.arange(total)
    j = ((1 + np.sqrt(1 + 8 * index)) / 2).astype(np.int64)  # pair (i, j) has the index j (j - 1) / 2 + i
    return torch.from_numpy(np.stack([index - j * (j - 1) // 2, j], 1))
