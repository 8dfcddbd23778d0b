"""Kernel distances between two sets of features, KID and KMMD: unbiased, so meaningful for few images too."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from ..ops._features import median_distance
from ..ops.mmd import check_value, mmd2, mmd2_of_subsets
from ._inputs import Array, as_pair, warn_of_few

FEW = 10  # fewer vary by as much as they measure


def kid(
    x: Array,
    y: Array,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    indices: tuple[Array, Array] | None = None,
) -> tuple[float, float]:
    """Kernel inception distance: unbiased MMD^2 with the kernel (a.b / D + 1)^3, over random subsets.

    x [N, D], y [M, D]: features of the fakes and of the reals, N, M >= 2. Every subset takes `subset_size` rows of each
    without replacement; `seed` fixes them, by the draws that torch-fidelity makes of its rng_seed (2020 by default).
    Where a sample is smaller, subset_size falls to min(N, M) with a warning.
    indices: the rows of x and of y in every subset, two integer arrays [subsets, subset_size], instead of draws.
    Returns the mean and the (population) standard deviation over the subsets; 0.0 where every subset is the whole of
    both. Not scaled by 1000. The kernel is not scale-free: features with large values give large KIDs.
    Fewer than 10 samples in a set warn: the value varies by as much as it measures.

    Where the subsets overlap so much that all pairs are fewer, every pair is computed once and counts in each subset
    that holds it. float32 features are multiplied in float32 and summed in float64; float64 stays float64.
    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    x, y = as_pair(x, y, least=2)
    N, M = len(x), len(y)
    if indices is not None:
        rows, columns = _check_indices(indices, N, M)
    else:
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"kid needs subsets >= 1 and subset_size >= 2, got {subsets} and {subset_size}")
        size = min(subset_size, N, M)
        if size < subset_size:
            warnings.warn(
                f"subset_size {subset_size} is more than the smaller sample has: {size} is used, and the deviation "
                f"over subsets says little about the uncertainty",
                stacklevel=2,
            )
        if size == N == M:
            subsets = 1
        rows, columns = _draw(N, M, subsets, size, seed)
    warn_of_few({"x": N, "y": M}, FEW, "KID", "varies by as much as it measures: give an interval (bootstrap)")
    values = mmd2_of_subsets(x, y, rows.to(x.device), columns.to(x.device))
    check_value(values, x, y)
    return float(values.mean()), float(values.std(correction=0))


def _draw(N: int, M: int, subsets: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of x and of y, [subsets, size] each. Each subset draws those of x and then those of y."""
    random = np.random.RandomState(seed)
    drawn = [[random.choice(n, size, replace=False) for n in (N, M)] for _ in range(subsets)]
    rows, columns = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    return rows, columns


def _check_indices(indices, N: int, M: int) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.as_tensor(part) for part in indices)
    for name, part, count in (("x", rows, N), ("y", columns, M)):
        if part.dim() != 2 or part.shape != rows.shape or part.shape[1] < 2 or part.dtype != torch.int64:
            raise ValueError(
                f"indices must be two int64 arrays [subsets, subset_size >= 2] of one shape, got {list(part.shape)} "
                f"of {part.dtype} for {name}"
            )
        if part.min() < 0 or part.max() >= count:
            raise ValueError(f"indices of {name} must lie in 0..{count - 1}, got {int(part.min())}..{int(part.max())}")
    return rows, columns


def kmmd(x: Array, y: Array, sigma: float = 1.0) -> float:
    """Kernel MMD: unbiased MMD^2 with a gaussian kernel of bandwidth sigma * (median distance of the real features).

    x [N, D], y [M, D]: features of the fakes and of the reals, N, M >= 2. The median of |y_i - y_j|_2 over i < j makes
    it scale-free: the same for features in other units. Between 0 and about 2; slightly negative values are noise
    around 0. The papers that report a KMMD do not define theirs: numbers are comparable only within one definition and
    one extractor. Fewer than 10 samples in a set warn: the value varies by as much as it measures.
    """
    x, y = as_pair(x, y, least=2)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a finite number > 0, got {sigma!r}")
    bandwidth = sigma * median_distance(y, remedy="the reals, y, have to differ")
    warn_of_few(
        {"x": len(x), "y": len(y)}, FEW, "KMMD", "varies by as much as it measures: give an interval (bootstrap)"
    )
    return float(mmd2(x, y, bandwidth=bandwidth))
