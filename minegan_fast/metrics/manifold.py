"""Improved precision and recall of two sets of features."""

import torch
from torch import Tensor

from ._inputs import as_pair, warn_of_few

_TILE = 1 << 21  # distances held at once
FEW = 100  # the standard error of a fraction is up to 0.05


def precision_recall(x, y, k: int = 3) -> tuple[float, float]:
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
    replacement have copies, whose radii are too small: no `bootstrap`.
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
    fakes, reals = _Points(x, center), _Points(y, center)
    precision = fakes.inside(reals, reals.radii(k)).double().mean()
    recall = reals.inside(fakes, fakes.radii(k)).double().mean()
    return float(precision), float(recall)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """By differences: exact where they are, and the same for the same pair in every call."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class _Points:
    """A sample z [N, D] float64 and what its distances are computed from."""

    def __init__(self, z: Tensor, center: Tensor):
        self.z, self.centred = z, z - center
        self.norms = self.centred.square().sum(1)

    def squares(self, rows: slice, other: "_Points") -> tuple[Tensor, Tensor]:
        """|a - b|^2 [r, M] of some rows to all of another sample, and a bound of its error and of `_distances`'."""
        norms = self.norms[rows, None] + other.norms
        squares = torch.addmm(norms, self.centred[rows], other.centred.T, alpha=-2)
        return squares, norms.mul_(8 * (self.z.shape[1] + 8) * torch.finfo(torch.float64).eps)

    def slices(self, other: "_Points"):
        step = max(1, _TILE // len(other.z))
        return [slice(i, min(i + step, len(self.z))) for i in range(0, len(self.z), step)]

    def radii(self, k: int) -> Tensor:
        """[N]: the distance of each to its k-th nearest other."""
        radii = []
        for rows in self.slices(self):
            z, index = self.z[rows], torch.arange(rows.start, rows.stop, device=self.z.device)[:, None]
            squares, bound = self.squares(rows, self)
            squares.scatter_(1, index, torch.inf)
            values, nearest = squares.topk(k, dim=1, largest=False)
            radius = torch.stack([_distances(z[:, None], self.z[j][:, None]).flatten() for j in nearest.T]).amax(0)
            limit = values[:, -1] + 2 * bound.amax(1)
            many = ((squares <= limit[:, None]).sum(1) > k).nonzero().flatten()
            if len(many):
                exact = _distances(z[many], self.z).scatter_(1, index[many], torch.inf)
                radius[many] = exact.kthvalue(k, dim=1).values
            radii.append(radius)
        return torch.cat(radii)

    def inside(self, other: "_Points", radii: Tensor) -> Tensor:
        """[N] bool: whether each lies in some ball around the other sample."""
        result = []
        for rows in self.slices(other):
            squares, bound = self.squares(rows, other)
            squares -= radii.square()
            surely = (squares <= -bound).any(1)
            perhaps = ((squares <= bound).any(1) & ~surely).nonzero().flatten()
            if len(perhaps):
                surely[perhaps] = (_distances(self.z[rows][perhaps], other.z) <= radii).any(1)
            result.append(surely)
        return torch.cat(result)
