"""Distances in tiles: by products where their rounding decides nothing, by differences where it would."""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1 << 21  # distances held at once


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances by differences, which are the same for the same pair in every call, and 0 for a copy."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class Points:
    """A sample z [N, D] float64 and what its distances are computed from."""

    def __init__(self, z: Tensor, center: Tensor):
        self.z, self.centred = z, z - center
        self.norms = self.centred.square().sum(1)

    def squares(self, rows: slice, other: "Points") -> tuple[Tensor, Tensor]:
        """|a - b|^2 [r, M] of some rows to all of `other`, and a bound of the errors of it and of `distances`."""
        norms = self.norms[rows, None] + other.norms
        squares = torch.addmm(norms, self.centred[rows], other.centred.T, alpha=-2)
        return squares, norms.mul_(8 * (self.z.shape[1] + 8) * torch.finfo(torch.float64).eps)

    def slices(self, other: "Points") -> Iterator[slice]:
        """Slices of the rows, each so long that its tile of distances to `other` has at most TILE entries."""
        step = max(1, TILE // len(other.z))
        for i in range(0, len(self.z), step):
            yield slice(i, min(i + step, len(self.z)))
