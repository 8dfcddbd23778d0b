"""Triton kernels of mmd_groups: all groups' pairs in one launch, all their gradients in another."""

import functools

import torch
import triton
import triton.language as tl

from ._sizes import cdiv
from .mmd import _CLOSE, _OPTIONS

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
    B_ptr,
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
    """A program takes BM rows of x in a group, and BN columns, of x or of y. The diagonals of A are left at 0.

    Squared distances far below the squares are made anew from differences: products leave too few digits of them.
    """
    g = tl.program_id(2)
    start, D = _group(starts_ptr, g, ALIGNED)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    # The first programs along axis 0 take x's own columns, the others y's.
    tiles = tl.cdiv(N, BN)
    own = tl.program_id(0) < tiles
    if own:
        q_ptr = x_ptr + start
    else:
        q_ptr = y_ptr + start
    p_ptr = x_ptr + start
    columns = tl.where(own, N, M)
    j = (tl.program_id(0) - tl.where(own, 0, tiles)) * BN + tl.arange(0, BN)

    # |p - q|^2 = |p|^2 + |q|^2 - 2 <p, q>: the squares are added up while p and q are here for the products.
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
    # The pair of a row and itself does not count: its distance of 0 would make every tile on the diagonal exact.
    counts = inside & ((i[:, None] != j[None, :]) | (tl.program_id(0) >= tiles))
    if tl.max((counts & (t < limit * _CLOSE)).to(tl.int32)) > 0:
        rows_at, columns_at = i.to(tl.int64)[:, None] * stride, j.to(tl.int64)[None, :] * stride
        t = tl.zeros((BM, BN), tl.float32)
        for d in range(D):
            p = tl.load(p_ptr + rows_at + d, (i < N)[:, None], other=0.0)
            q = tl.load(q_ptr + columns_at + d, (j < columns)[None, :], other=0.0)
            t += (p - q) * (p - q)

    # f and f' are sums over the group's bandwidths, whose numbers c lie together.
    first, last = tl.load(firsts_ptr + g), tl.load(firsts_ptr + g + 1)
    f = tl.zeros((BM, BN), tl.float32)
    f1 = tl.zeros((BM, BN), tl.float32)
    for n in range(first, last):
        c = tl.load(numbers_ptr + n).to(tl.float32)
        e = tl.exp(c * t)
        f += e
        f1 += c * e
    # w or v of minegan_fast/ops/mmd_groups.py. n is float64, because n * n could overflow as an int32.
    n = N.to(tl.float64)
    within = n * (n - 1) if UNBIASED else n * n
    weight = tl.where(own, 1.0, -2.0) / (tl.where(own, within, n * M) * (last - first))
    total = tl.sum(tl.sum(tl.where(counts, f, 0 * limit), 1).to(tl.float64)) * weight  # NaN where x is not finite
    program = (g * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(totals_ptr + program, total)
    if GRADIENT:
        if own:
            out_ptr = A_ptr
        else:
            out_ptr = B_ptr
        at = (g.to(tl.int64) * N + i)[:, None] * columns + j[None, :]
        # A = -4 w f' and B = -2 v f': a pair within x is in the sum twice, as (i, j) and as (j, i).
        slope = (weight * tl.where(own, -4, -2)).to(tl.float32)
        tl.store(out_ptr + at, tl.where(counts, slope * f1, 0.0), inside)


@triton.jit(do_not_specialize=_SIZES)
def diagonal_kernel(A_ptr, B_ptr, N, M, BLOCK: tl.constexpr):
    """A program takes a row of a group's A and B, whose elements and the diagonal's then add up to 0."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        total += tl.load(A_ptr + row * N + j, j < N, other=0.0)
    for first in range(0, M, BLOCK):
        j = first + tl.arange(0, BLOCK)
        total += tl.load(B_ptr + row * M + j, j < M, other=0.0)
    tl.store(A_ptr + row * N + row % N, -tl.sum(total))


@triton.jit
def _add_product(acc, A_ptr, z_ptr, i, d, N, count, stride, D, ALIGNED: tl.constexpr, BK: tl.constexpr):
    """acc + A z, for A [N, count]."""
    for first in range(0, count, BK):
        j = first + tl.arange(0, BK)
        A = _tile(A_ptr, i, j, count, i < N, j < count, False)
        z = _tile(z_ptr, j, d, stride, j < count, d < D, ALIGNED)
        acc = tl.dot(A, z, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=_SIZES)
def slopes_kernel(
    x_ptr,
    y_ptr,
    A_ptr,
    B_ptr,
    g_ptr,
    starts_ptr,
    out_ptr,
    N,
    M,
    stride,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """A program takes BM rows and BD columns of a group."""
    g = tl.program_id(2)
    start, D = _group(starts_ptr, g, ALIGNED)
    if tl.program_id(0) * BD >= D:  # the grid is that of the widest group
        return
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    first = g.to(tl.int64) * N
    acc = tl.zeros((BM, BD), tl.float32)
    acc = _add_product(acc, A_ptr + first * N, x_ptr + start, i, d, N, N, stride, D, ALIGNED, BK)
    acc = _add_product(acc, B_ptr + first * M, y_ptr + start, i, d, N, M, stride, D, ALIGNED, BK)
    at = i.to(tl.int64)[:, None] * stride + start + d[None, :]
    tl.store(out_ptr + at, tl.load(g_ptr + g) * acc, (i < N)[:, None] & (d < D)[None, :])


def blocks(N: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of both kernels: small tiles where a batch is small, so that there are programs enough."""
    side, warps = (32, 4) if N <= 32 else (64, 8)
    pairs = {"BM": side, "BN": side, "BK": 1024 // side, "num_warps": warps, "num_stages": 2}
    return pairs, {"BM": side, "BD": 64, "BK": 16, "num_warps": 8, "num_stages": 2}


@functools.lru_cache(maxsize=64)
def _tables(sizes: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each group's columns, and its numbers, begin and the last one's end."""
    ends = [[sum(values[:g]) for g in range(len(values) + 1)] for values in (sizes, counts)]
    return tuple(torch.tensor(end, dtype=torch.int32, device=device) for end in ends)


def pairs(x, y, numbers, sizes, counts, unbiased: bool, gradient: bool):
    """(float64 [G, ...] whose sums are the groups', A, B)."""
    (N, stride), M, G = x.shape, len(y), len(sizes)
    starts, firsts = _tables(tuple(sizes), tuple(counts), x.device)
    tile, _ = blocks(N)
    rows, columns = cdiv(N, tile["BM"]), cdiv(N, tile["BN"]) + cdiv(M, tile["BN"])
    totals = torch.empty(G, rows * columns, dtype=torch.float64, device=x.device)
    A, B = (x.new_empty(G, N, n) if gradient else x.new_empty(0, 0, 0) for n in (N, M))
    with torch.cuda.device_of(x):
        pairs_kernel[(columns, rows, G)](
            x, y, starts, firsts, numbers, totals, A, B, N, M, stride, UNBIASED=unbiased, GRADIENT=gradient,
            ALIGNED=_aligned(sizes), **tile, **_OPTIONS,
        )  # fmt: skip
        if gradient:
            diagonal_kernel[(G * N,)](A, B, N, M, BLOCK=256, **_OPTIONS)
    return totals, A, B


def slopes(x, y, A, B, g, sizes):
    (N, stride), M, G = x.shape, len(y), len(sizes)
    starts, _ = _tables(tuple(sizes), (), x.device)
    _, tile = blocks(N)
    out = torch.empty_like(x)
    grid = cdiv(max(sizes), tile["BD"]), cdiv(N, tile["BM"]), G
    with torch.cuda.device_of(x):
        slopes_kernel[grid](
            x, y, A, B, g, starts, out, N, M, stride, ALIGNED=_aligned(sizes), **tile, **_OPTIONS
        )  # fmt: skip
    return out


def _aligned(sizes) -> bool:
    """Whether every group begins and ends at 16 bytes."""
    return all(size % 4 == 0 for size in sizes)
