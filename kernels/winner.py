"""Triton kernel of winner. One program takes the whole batch: a training batch is small."""

import torch
import triton
import triton.language as tl

from ._sizes import power_of_2

_TILE = 1024  # scores that are looked at together
_RANKS = {"BR": 32, "BC": 32}  # samples whose places are found together, and those they are compared with
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


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
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A sample's place is how many come before it. Scans over so few numbers do not compile with every Triton."""
    n = tl.arange(0, BN)[None, :]
    counts, nans = tl.zeros((BB, BN), tl.int32), tl.zeros((BB, BN), tl.int32)
    for start in range(0, B, BB):
        b = start + tl.arange(0, BB)[:, None]
        inside = (n < N) & (b < B)
        s = tl.load(scores_ptr + n.to(tl.int64) * B + b, inside, other=0.0).to(WIDE)
        valid = inside & (s == s)
        best = tl.max(tl.where(valid, s, float("-inf")), 1, keep_dims=True)
        who = tl.min(tl.where(valid & (s == best), n, BN), 1, keep_dims=True)
        tl.store(who_ptr + b, tl.where(who < BN, who, -1).to(tl.int64), b < B)
        counts += ((n == who) & (b < B)).to(tl.int32)
        nans += (inside & (s != s)).to(tl.int32)
    tl.store(counts_ptr + n, tl.sum(counts, 0, keep_dims=True).to(tl.int64), n < N)
    tl.store(nans_ptr + n, tl.sum(nans, 0, keep_dims=True).to(tl.int64), n < N)
    tl.debug_barrier()  # other threads read the winners
    for start in range(0, B, BR):
        b = start + tl.arange(0, BR)[:, None]
        mine = tl.load(who_ptr + b, b < B, other=0).to(tl.int32)
        mine = tl.where(mine < 0, BN, mine)
        place = tl.zeros((BR, 1), tl.int32)
        for first in range(0, B, BC):
            c = first + tl.arange(0, BC)[None, :]
            other = tl.load(who_ptr + c, c < B, other=0).to(tl.int32)
            other = tl.where(other < 0, BN, other)
            before = (other < mine) | ((other == mine) & (c < b))
            place += tl.sum((before & (c < B)).to(tl.int32), 1, keep_dims=True)
        tl.store(order_ptr + place, b.to(tl.int64), b < B)


def tile(N: int) -> dict[str, int]:
    BN = power_of_2(N)
    return {"BN": BN, "BB": max(1, min(128, _TILE // BN)), **_RANKS}


def winner(scores, who, counts, nans, order) -> None:
    N, B = scores.shape
    wide = tl.float64 if scores.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(scores):
        winner_kernel[(1,)](scores, who, counts, nans, order, N, B, WIDE=wide, **tile(N), **_OPTIONS)
