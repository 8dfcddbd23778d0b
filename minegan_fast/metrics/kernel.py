"""Kernel distances between two sets of features, KID and KMMD: unbiased, so meaningful for few images too."""

import math
import warnings

import torch

from ..ops.mmd import median_distance, mmd2
from ._inputs import as_pair


def kid(x, y, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel inception distance: unbiased MMD^2 with the kernel (a.b / D + 1)^3, over random subsets.

    x [N, D], y [M, D]: features of the fakes and of the reals, N, M >= 2. Every subset takes `subset_size` rows of each
    without replacement; `seed` fixes them. Where a sample is smaller, subset_size falls to min(N, M) with a warning.
    Returns the mean and the (population) standard deviation over the subsets; 0.0 where every subset is the whole of
    both. Not scaled by 1000. The kernel is not scale-free: features with large values give large KIDs.
    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    x, y = as_pair(x, y, least=2)
    N, M = len(x), len(y)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"kid needs subsets >= 1 and subset_size >= 2, got {subsets} and {subset_size}")
    size = min(subset_size, N, M)
    if size < subset_size:
        warnings.warn(
            f"subset_size {subset_size} is more than the smaller sample has: {size} is used, and the deviation over "
            f"subsets says little about the uncertainty",
            stacklevel=2,
        )
    if size == N == M:
        subsets = 1
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows = torch.randperm(N, generator=generator)[:size].to(x.device)
        columns = torch.randperm(M, generator=generator)[:size].to(x.device)
        values.append(mmd2(x[rows], y[columns], kernel="polynomial"))
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def kmmd(x, y, sigma: float = 1.0) -> float:
    """Kernel MMD: unbiased MMD^2 with a gaussian kernel of bandwidth sigma * (median distance of the real features).

    x [N, D], y [M, D]: features of the fakes and of the reals, N, M >= 2. The median of |y_i - y_j|_2 over i < j makes
    it scale-free: the same for features in other units. Between 0 and about 2; slightly negative values are noise
    around 0. The papers that report a KMMD do not define theirs: numbers are comparable only within one definition and
    one extractor.
    """
    x, y = as_pair(x, y, least=2)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a finite number > 0, got {sigma!r}")
    return float(mmd2(x, y, bandwidth=sigma * median_distance(y)))
