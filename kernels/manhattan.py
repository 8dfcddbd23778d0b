"""Triton kernels of manhattan: distances and slopes of a tile of pairs, and the sums of signs."""

import torch
import triton
import triton.language as tl

from ._sizes import cdiv

_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
_TILE = {"BM": 64, "BN": 64}
_SIGNS = {"BM": 32, "BD": 64, "UNROLL": 4}


@triton.jit
def _sign(v):
    return (v > 0).to(tl.float32) - (v < 0).to(tl.float32)


@triton.jit
def _tile(across):
    """This program's tile, `across` of them in a row, by row and column: a grid's second axis takes 65535 at most."""
    return tl.program_id(0) // across, tl.program_id(0) % across


@triton.jit
def pairs_kernel(
    p_ptr, q_ptr, hp_ptr, hq_ptr, out_ptr, rows, columns, D, SLOPES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """p, hp [D, rows] and q, hq [D, columns]: what a tile reads of one dimension is one piece of memory."""
    tile_i, tile_j = _tile(tl.cdiv(columns, BN))
    i = (tile_i * BM + tl.arange(0, BM))[:, None]
    j = (tile_j * BN + tl.arange(0, BN))[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for d in range(D):
        at_p, at_q = tl.full((), d, tl.int64) * rows, tl.full((), d, tl.int64) * columns
        v = tl.load(p_ptr + at_p + i, i < rows, other=0.0) - tl.load(q_ptr + at_q + j, j < columns, other=0.0)
        if SLOPES:
            hp = tl.load(hp_ptr + at_p + i, i < rows, other=0.0)
            hq = tl.load(hq_ptr + at_q + j, j < columns, other=0.0)
            total += _sign(v) * (hp - hq)
        else:
            total += tl.abs(v)
    tl.store(out_ptr + i.to(tl.int64) * columns + j, total, (i < rows) & (j < columns))


@triton.jit
def signs_kernel(
    A_ptr, p_ptr, q_ptr, out_ptr, rows, columns, D, row_stride, column_stride,
    BM: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A program takes BM rows and BD dimensions, and all columns one after the other."""
    tile_i, tile_d = _tile(tl.cdiv(D, BD))
    i = (tile_i * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    d = tile_d * BD + tl.arange(0, BD)[None, :]
    p = tl.load(p_ptr + i * D + d, (i < rows) & (d < D), other=0.0)
    total = tl.zeros((BM, BD), tl.float32)
    for first in range(0, columns, UNROLL):
        for u in tl.static_range(UNROLL):
            j = tl.full((1, 1), first + u, tl.int64)
            exists = j < columns
            q = tl.load(q_ptr + j * D + d, (d < D) & exists, other=0.0)
            A = tl.load(A_ptr + i * row_stride + j * column_stride, (i < rows) & exists, other=0.0)
            total += A * _sign(p - q)
    tl.store(out_ptr + i * D + d, total, (i < rows) & (d < D))


def pairs(p, q, hp, hq) -> torch.Tensor:
    """[r, c]: distances, or with hp and hq their slopes."""
    out = p.new_empty(len(p), len(q))
    grid = (cdiv(len(p), _TILE["BM"]) * cdiv(len(q), _TILE["BN"]),)
    turned = [None if x is None else x.t().contiguous() for x in (p, q, hp, hq)]
    with torch.cuda.device_of(p):
        pairs_kernel[grid](*turned, out, len(p), len(q), p.shape[1], SLOPES=hp is not None, **_TILE, **_OPTIONS)
    return out


def signs(A, p, q) -> torch.Tensor:
    """[r, D]"""
    out = p.new_empty(p.shape)
    grid = (cdiv(len(p), _SIGNS["BM"]) * cdiv(p.shape[1], _SIGNS["BD"]),)
    with torch.cuda.device_of(p):
        signs_kernel[grid](A, p, q, out, len(p), len(q), p.shape[1], *A.stride(), **_SIGNS, **_OPTIONS)
    return out
