"""Triton kernels of mmd_groups: all groups' pairs in one launch, all their gradients in another."""

import functools

import torch
import triton
import triton.language as tl

from .mmd import _CLOSE

# Sizes that are 1 must not become constants of another type than the sizes that they meet in a branch.
_SIZES = ["N", "M", "stride"]


@triton.jit
def _group(starts_ptr, g, ALIGNED: tl.constexpr):
    """The first column of a group and how many there are; ALIGNED: all are multiples of 4."""
    start = tl.load(starts_ptr + g)
    D = tl.load(starts_ptr + g + 1) - start
    if ALIGNED:
        start, D = tl.multiple_of(start, 4), tl.multiple_of(D, 4)
    return start, D


@triton.jit
def _tile(ptr, rows, columns, stride, in_rows, in_columns, ALIGNED: tl.constexpr):
    if ALIGNED:
        stride = tl.multiple_of(stride, 4)
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(ptr + at, in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def pairs_kernel(
    x_ptr,
    y_ptr,
    starts_ptr,
    firsts_ptr,
    numbers_ptr,
    totals_ptr,
    A_ptr,
    N,
    M,
    stride,
    UNBIASED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program takes BM rows of x in a group, and BN columns, of x or of y. A [groups, N, N + M] holds both.

    Squared distances far below the squares are made anew from differences: products leave too few digits of them.
    """
    g = tl.program_id(2)
    start, D = _group(starts_ptr, g, ALIGNED)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    tiles = tl.cdiv(N, BN)
    own = tl.program_id(0) < tiles
    if own:
        q_ptr = x_ptr + start
    else:
        q_ptr = y_ptr + start
    p_ptr = x_ptr + start
    columns, offset = tl.where(own, N, M), tl.where(own, 0, N)
    j = (tl.program_id(0) - tl.where(own, 0, tiles)) * BN + tl.arange(0, BN)

    t = tl.zeros((BM, BN), tl.float32)
    pp = tl.zeros((BM, BK), tl.float32)
    qq = tl.zeros((BN, BK), tl.float32)
    for first in range(0, D, BK):
        d = first + tl.arange(0, BK)
        p = _tile(p_ptr, i, d, stride, i < N, d < D, ALIGNED)
        q = _tile(q_ptr, j, d, stride, j < columns, d < D, ALIGNED)
        t = tl.dot(p, tl.trans(q), t, input_precision="tf32x3")
        pp += p * p
        qq += q * q
    limit = tl.sum(pp, 1)[:, None] + tl.sum(qq, 1)[None, :]
    t = limit - 2 * t
    inside = (i < N)[:, None] & (j < columns)[None, :]
    counts = inside & ((i[:, None] != j[None, :]) | (offset > 0))
    if tl.max((counts & (t < _CLOSE * limit)).to(tl.int32)) > 0:
        rows_at, columns_at = i.to(tl.int64)[:, None] * stride, j.to(tl.int64)[None, :] * stride
        t = tl.zeros((BM, BN), tl.float32)
        for d in range(D):
            p = tl.load(p_ptr + rows_at + d, (i < N)[:, None], other=0.0)
            q = tl.load(q_ptr + columns_at + d, (j < columns)[None, :], other=0.0)
            t += (p - q) * (p - q)

    first, last = tl.load(firsts_ptr + g), tl.load(firsts_ptr + g + 1)
    f = tl.zeros((BM, BN), tl.float32)
    f1 = tl.zeros((BM, BN), tl.float32)
    for n in range(first, last):
        c = tl.load(numbers_ptr + n).to(tl.float32)
        e = tl.exp(c * t)
        f += e
        f1 += c * e
    n = N.to(tl.float64)
    within = n * (n - 1) if UNBIASED else n * n
    weight = tl.where(offset > 0, -2.0, 1.0) / (tl.where(offset > 0, n * M, within) * (last - first))
    total = tl.sum(tl.sum(tl.where(counts, f, 0 * limit), 1).to(tl.float64)) * weight  # NaN where x is not finite
    program = (g * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(totals_ptr + program, total)
    if GRADIENT:
        at = (g.to(tl.int64) * N + i)[:, None] * (N + M) + offset + j[None, :]
        slope = (weight * tl.where(offset > 0, 2, 4)).to(tl.float32)
        tl.store(A_ptr + at, tl.where(counts, slope * f1, 0.0), inside)


@triton.jit
def _add_products(acc, total, A_ptr, z_ptr, i, d, N, count, row, stride, D, ALIGNED: tl.constexpr, BK: tl.constexpr):
    """acc + A z and total + the sums of A's rows; A_ptr and z_ptr are at the first column and row of their part."""
    for first in range(0, count, BK):
        j = first + tl.arange(0, BK)
        A = _tile(A_ptr, i, j, row, i < N, j < count, False)
        z = _tile(z_ptr, j, d, stride, j < count, d < D, ALIGNED)
        acc = tl.dot(A, z, acc, input_precision="tf32x3")
        total += tl.sum(A, 1)
    return acc, total


@triton.jit(do_not_specialize=_SIZES)
def slopes_kernel(
    x_ptr,
    y_ptr,
    starts_ptr,
    A_ptr,
    out_ptr,
    N,
    M,
    stride,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """A program takes BM rows and BD columns of a group's gradient."""
    g = tl.program_id(2)
    start, D = _group(starts_ptr, g, ALIGNED)
    if tl.program_id(0) * BD >= D:
        return
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    A_ptr += g.to(tl.int64) * N * (N + M)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc, total = _add_products(acc, total, A_ptr, x_ptr + start, i, d, N, N, N + M, stride, D, ALIGNED, BK)
    acc, total = _add_products(acc, total, A_ptr + N, y_ptr + start, i, d, N, M, N + M, stride, D, ALIGNED, BK)
    x = _tile(x_ptr + start, i, d, stride, i < N, d < D, ALIGNED)
    at = i.to(tl.int64)[:, None] * stride + start + d[None, :]
    tl.store(out_ptr + at, total[:, None] * x - acc, (i < N)[:, None] & (d < D)[None, :])


def blocks(N: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of both kernels: small tiles where a batch is small, so that there are programs enough."""
    side, warps = (32, 4) if N <= 32 else (64, 8)
    pairs = {"BM": side, "BN": side, "BK": 32, "num_warps": warps, "num_stages": 3}
    return pairs, {"BM": side, "BD": 64, "BK": 16, "num_warps": 8, "num_stages": 2}


@functools.lru_cache(maxsize=64)
def _tables(sizes: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each group's columns, and its numbers, begin and the last one's end."""
    ends = [[sum(values[:g]) for g in range(len(values) + 1)] for values in (sizes, counts)]
    return tuple(torch.tensor(end, dtype=torch.int32, device=device) for end in ends)


def mmd_groups(x, y, numbers, sizes, counts, unbiased: bool, gradient: bool):
    """(float64 [G, ...] whose sums are the groups', the gradient or an empty tensor)."""
    (N, stride), M, G = x.shape, len(y), len(sizes)
    starts, firsts = _tables(tuple(sizes), tuple(counts), x.device)
    pairs, slopes = blocks(N)
    aligned = all(size % 4 == 0 for size in sizes)
    rows, columns = triton.cdiv(N, pairs["BM"]), triton.cdiv(N, pairs["BN"]) + triton.cdiv(M, pairs["BN"])
    totals = torch.empty(G, rows * columns, dtype=torch.float64, device=x.device)
    A = x.new_empty(G, N, N + M) if gradient else None
    slope = torch.empty_like(x) if gradient else x.new_empty(0, 0)
    with torch.cuda.device_of(x):
        pairs_kernel[(columns, rows, G)](
            x, y, starts, firsts, numbers, totals, A, N, M, stride, UNBIASED=unbiased, GRADIENT=gradient,
            ALIGNED=aligned, **pairs,
        )  # fmt: skip
        if gradient:
            grid = triton.cdiv(max(sizes), slopes["BD"]), rows, G
            slopes_kernel[grid](x, y, starts, A, slope, N, M, stride, ALIGNED=aligned, **slopes)
    return totals, slope
