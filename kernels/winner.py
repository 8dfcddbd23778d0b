"""Triton kernel of winner. One program sorts the whole batch by counting: a training batch is small."""

import torch
import triton
import triton.language as tl

from ._sizes import power_of_2

_TILE = 2048  # scores that are looked at together
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _winners(scores_ptr, start, N, B, WIDE: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr):
    """Of the samples from start on: whether n wins b, [BB, BN], n = N standing for none; and whether its score is NaN."""
    n, b = tl.arange(0, BN)[None, :], start + tl.arange(0, BB)[:, None]
    inside = (n < N) & (b < B)
    s = tl.load(scores_ptr + n.to(tl.int64) * B + b, inside, other=float("nan")).to(WIDE)
    best = tl.max(tl.where(s == s, s, float("-inf")), 1, keep_dims=True)
    who = tl.min(tl.where(s == best, n, N), 1, keep_dims=True)
    return (n == who) & (b < B), inside & (s != s)


@triton.jit
def winner_kernel(
    scores_ptr,
    who_ptr,
    counts_ptr,
    nans_ptr,
    order_ptr,
    N,
    B,
    WIDE: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
):
    """Counts all winners, then gives every sample its place. The winners are found twice rather than read back."""
    n = tl.arange(0, BN)[None, :]
    counts, nans = tl.zeros((1, BN), tl.int32), tl.zeros((1, BN), tl.int32)
    for start in range(0, B, BB):
        won, missing = _winners(scores_ptr, start, N, B, WIDE, BN, BB)
        counts += tl.sum(won.to(tl.int32), 0, keep_dims=True)
        nans += tl.sum(missing.to(tl.int32), 0, keep_dims=True)
    tl.store(counts_ptr + n, counts.to(tl.int64), n < N)
    tl.store(nans_ptr + n, nans.to(tl.int64), n < N)
    place = tl.cumsum(counts, 1) - counts
    for start in range(0, B, BB):
        won, missing = _winners(scores_ptr, start, N, B, WIDE, BN, BB)
        b = start + tl.arange(0, BB)
        one = won.to(tl.int32)
        who = tl.sum(one * n, 1)
        tl.store(who_ptr + b, tl.where(who < N, who, -1).to(tl.int64), b < B)
        at = tl.sum(tl.where(won, place + tl.cumsum(one, 0) - 1, 0), 1)
        tl.store(order_ptr + at, b.to(tl.int64), b < B)
        place += tl.sum(one, 0, keep_dims=True)


def tile(N: int) -> dict[str, int]:
    BN = power_of_2(N + 1)  # a column more, for the samples that none wins
    return {"BN": BN, "BB": max(1, min(128, _TILE // BN))}


def winner(scores, who, counts, nans, order) -> None:
    N, B = scores.shape
    wide = tl.float64 if scores.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(scores):
        winner_kernel[(1,)](scores, who, counts, nans, order, N, B, WIDE=wide, **tile(N), **_OPTIONS)
