"""How far samples lie from each other, and from the nearest sample of another set."""

import torch
from torch import Tensor

from . import _points
from ._inputs import Array, as_features, as_pair
from ._points import Points, distances


def mean_variance(x: Array) -> float:
    """Mean over the D dimensions of the unbiased variance over the samples; x [N >= 2, D]. Higher: more diverse.

    Half the mean squared distance between two samples, per dimension. In squared units of the features: compare only
    values of one extractor. In float64.
    """
    return float(as_features(x, "x", 2, torch.float64).var(0).mean())


def diversity(x: Array) -> float:
    """Mean euclidean distance |x_i - x_j| over the pairs i < j; x [N >= 2, D]. Higher: more diverse.

    In float64, in tiles of the distance matrix.
    """
    x = as_features(x, "x", 2, torch.float64)
    x = x - x.mean(0)
    N = len(x)
    step = max(1, _points.TILE // N)
    total = sum(torch.cdist(x[i : i + step], x[i:]).triu(1).sum() for i in range(0, N, step))
    return float(total / (N * (N - 1) / 2))


def nearest(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    """Distance [N] (float64) and index [N] (int64) of the nearest row of y [M, D] for every row of x [N, D].

    Euclidean, in float64. Distances that products cannot tell apart are computed from differences, so the nearest is
    the nearest, and a copy has distance 0 exactly. Memory is that of float64 copies of the features, not N x M.
    """
    x, y = as_pair(x, y, dtype=torch.float64)
    center = y.mean(0)
    rows, columns = Points(x, center), Points(y, center)
    index = torch.cat([_nearest(rows, tile, columns) for tile in rows.slices(columns)])
    return (x - y[index]).norm(dim=1), index


def _nearest(x: Points, rows: slice, y: Points) -> Tensor:
    squares, bound = x.squares(rows, y)
    least, index = squares.min(1)
    close = squares <= (least + 2 * bound.amax(1))[:, None]
    several = (close.sum(1) > 1).nonzero().flatten()
    if len(several):
        index[several] = distances(x.z[rows][several], y.z).argmin(1)
    return index
