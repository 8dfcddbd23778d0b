"""How far samples lie from each other, and from the nearest sample of another set."""

import torch
from torch import Tensor

from ._inputs import as_features, as_pair

_TILE = 1 << 21  # distances held at once


def mean_variance(x) -> float:
    """Mean over the D dimensions of the unbiased variance over the samples; x [N >= 2, D]. Higher: more diverse.

    Half the mean squared distance between two samples, per dimension. In squared units of the features: compare only
    values of one extractor. In float64.
    """
    return float(as_features(x, "x", 2, torch.float64).var(0).mean())


def diversity(x) -> float:
    """Mean euclidean distance |x_i - x_j| over the pairs i < j; x [N >= 2, D]. Higher: more diverse.

    In float64, in tiles of the distance matrix.
    """
    x = as_features(x, "x", 2, torch.float64)
    x = x - x.mean(0)
    N = len(x)
    step = max(1, _TILE // N)
    total = sum(torch.cdist(x[i : i + step], x[i:]).triu(1).sum() for i in range(0, N, step))
    return float(total / (N * (N - 1) / 2))


def nearest(x, y) -> tuple[Tensor, Tensor]:
    """Distance [N] (float64) and index [N] (int64) of the nearest row of y [M, D] for every row of x [N, D].

    Euclidean, in float64. The distances are computed from differences, so a copy has distance 0 exactly.
    """
    x, y = as_pair(x, y, dtype=torch.float64)
    center = y.mean(0)
    step = max(1, _TILE // len(y))
    index = torch.cat([torch.cdist(rows - center, y - center).argmin(1) for rows in x.split(step)])
    return (x - y[index]).norm(dim=1), index
