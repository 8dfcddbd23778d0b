"""Improved precision and recall of two sets of features."""

import torch
from torch import Tensor

from ._inputs import Array, as_pair, warn_of_few
from ._points import Points, distances

FEW = 100  # the standard error of a fraction is up to 0.05


def precision_recall(x: Array, y: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: (precision, recall), each in [0, 1].

    precision: the fraction of the fakes that lie in the reals' manifold; recall: the fraction of the reals that lie in
    the fakes'. The manifold of a set is the union of balls around its samples, each as wide as the euclidean distance
    to the k-th nearest of the *other* samples of the set; its surface belongs to it.
    x [N, D], y [M, D]: features of the fakes and of the reals, N, M > k; ValueError for fewer.

    Exact, also where distances tie: products in float64 decide what their rounding bound lets them decide, and
    differences the rest, so a sample that is a copy lies in a ball of radius 0. In tiles: memory is that of float64
    copies of the features, not N x M.
    Fewer than 100 samples in a set warn: the standard error of a fraction of so few can exceed 0.05, and balls around
    few samples are wide, which flatters. Values depend on N, M and k: compare equal ones. Samples drawn with
    replacement have copies, which narrow the balls: intervals of `bootstrap` lie too low.
    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, Eq. 1, 2.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    x, y = as_pair(x, y, dtype=torch.float64)
    for name, z in (("x", x), ("y", y)):
        if len(z) <= k:
            raise ValueError(f"{name} has {len(z)} sample(s), {k} nearest others need at least {k + 1}")
    warn_of_few({"x": len(x), "y": len(y)}, FEW, "precision and recall", "have errors beyond 0.05")
    center = (x.mean(0) + y.mean(0)) / 2
    fakes, reals = Points(x, center), Points(y, center)
    precision = _inside(fakes, reals, _radii(reals, k)).double().mean()
    recall = _inside(reals, fakes, _radii(fakes, k)).double().mean()
    return float(precision), float(recall)


def _radii(points: Points, k: int) -> Tensor:
    """[N]: the distance of each point to the k-th nearest of the others."""
    radii = []
    for rows in points.slices(points):
        z, index = points.z[rows], torch.arange(rows.start, rows.stop, device=points.z.device)[:, None]
        squares, bound = points.squares(rows, points)
        squares.scatter_(1, index, torch.inf)
        values, nearest = squares.topk(k, dim=1, largest=False)
        radius = torch.stack([distances(z[:, None], points.z[j][:, None]).flatten() for j in nearest.T]).amax(0)
        limit = values[:, -1] + 2 * bound.amax(1)
        many = ((squares <= limit[:, None]).sum(1) > k).nonzero().flatten()
        if len(many):
            exact = distances(z[many], points.z).scatter_(1, index[many], torch.inf)
            radius[many] = exact.kthvalue(k, dim=1).values
        radii.append(radius)
    return torch.cat(radii)


def _inside(points: Points, other: Points, radii: Tensor) -> Tensor:
    """[N] bool: whether each point lies in a ball around some point of the other sample."""
    result = []
    for rows in points.slices(other):
        squares, bound = points.squares(rows, other)
        squares -= radii.square()
        surely = (squares <= -bound).any(1)
        perhaps = ((squares <= bound).any(1) & ~surely).nonzero().flatten()
        if len(perhaps):
            surely[perhaps] = (distances(points.z[rows][perhaps], other.z) <= radii).any(1)
        result.append(surely)
    return torch.cat(result)
