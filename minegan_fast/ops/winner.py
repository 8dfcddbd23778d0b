"""Which of N branches wins each sample of a batch, and the order that groups the batch by its winners.

For scores s [N, B], with NaN below every number:

    who_b    = the least i with s_ib = max over j of s_jb;  -1 where all s_jb are NaN
    counts_i = how many who_b are i
    nans_i   = how many s_ib are NaN
    order    = the samples that branch 0 wins, those that branch 1 wins, ..., those that none wins; each in the batch's
               order. So branch i won order[c : c + counts_i], with c the sum of the counts before.

Nothing here is differentiable. On a CPU the reference is all there is: some ten calls for N B numbers, beside the N
generators that made them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._op import Op
from .checks import check_tensor


class Winners(NamedTuple):
    """The tensors above, all int64."""

    who: Tensor  # [B]
    counts: Tensor  # [N]
    nans: Tensor  # [N]
    order: Tensor  # [B]


@Op
def winner_of_scores(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """who, counts, nans and order; scores [N >= 1, B] are contiguous."""
    N = len(scores)
    branch = torch.arange(N, device=scores.device)[:, None]
    valid = ~scores.isnan()
    best = scores.masked_fill(~valid, -torch.inf).amax(0)
    who = torch.where(valid & (scores == best), branch, N).amin(0)
    order = who.sort(stable=True).indices
    return torch.where(who < N, who, -1), (who == branch).sum(1), (~valid).sum(1), order


def winner(scores: Tensor) -> Winners:
    """The winners of a batch; the equations are at the top of this file.

    scores: [N >= 1, B], float32, float64, bfloat16 or float16; a gradient does not pass.

    The same scores give the same winners and the same order on every device. Raises TypeError and ValueError for scores
    that are not as said; RuntimeError where a backend is forced that is missing here.
    """
    check_tensor(scores, "scores")
    if scores.dim() != 2 or len(scores) == 0:
        raise ValueError(f"scores must be [branches, samples] of at least one branch, got {list(scores.shape)}")
    return Winners(*winner_of_scores(scores.detach().contiguous()))


@winner_of_scores.register("triton")
def _(kernels, scores):
    N, B = scores.shape
    who, counts, nans, order = (scores.new_empty(n, dtype=torch.int64) for n in (B, N, N, B))
    kernels.winner(scores, who, counts, nans, order)
    return who, counts, nans, order
