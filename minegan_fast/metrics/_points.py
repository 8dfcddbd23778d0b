"""Distances in tiles: by products where their rounding decides nothing, by differences where it would."""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1 << 21  # distances held at once


def distances(a: Tensor, b: Tensor) -> Tensor:
    """By differences: exact where they are, and the same for the same pair in every call."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class Points:
    """A sample z [N, D] float64 and what its distances are computed from."""

    def __init__(self, z: Tensor, center: Tensor):
        self.z, self.centred = z, z - center
        self.norms = self.centred.square().sum(1)

    def squares(self, rows: slice, other: "Points") -> tuple[Tensor, Tensor]:
        """|a - b|^2 [r, M] of some rows to all of another sample, and a bound of its error and of `distances`'."""
        norms = self.norms[rows, None] + other.norms
        squares = torch.addmm(norms, self.centred[rows], other.centred.T, alpha=-2)
        return squares, norms.mul_(8 * (self.z.shape[1] + 8) * torch.finfo(torch.float64).eps)

    def slices(self, other: "Points") -> Iterator[slice]:
        """Of the rows, so that a tile has at most TILE distances."""
        step = max(1, TILE // len(other.z))
        for i in range(0, len(self.z), step):
            yield slice(i, min(i + step, len(self.z)))
