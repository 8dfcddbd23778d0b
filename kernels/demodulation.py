"""Triton kernels of demodulation: the coefficients with the weight's norms, and the gradients of styles and rows.

A weight is [rows, I, K] with the strides row_stride, input_stride and tap_stride; all else is contiguous."""

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2
from ._types import wide_dtype

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_INPUTS, _SAMPLES, _OUTPUTS = 64, 16, 32  # of a tile
_PLAIN = ["B", "O"]  # a kernel is compiled once for all of them


@triton.jit(do_not_specialize=_PLAIN)
def demodulation_kernel(
    s_ptr, w_ptr, d_ptr, q_ptr, B, O, I, K, row_stride, input_stride, tap_stride, eps: tl.float64,
    WIDE: tl.constexpr, BB: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program computes d of one output and BB samples; the first ones store q as well."""
    o, b = tl.program_id(0).to(tl.int64), tl.program_id(1) * BB + tl.arange(0, BB)
    k = tl.arange(0, BK)[None, :]
    total = tl.full((BB,), eps, WIDE)
    for first in range(0, I, BI):
        i = first + tl.arange(0, BI)
        at = o * row_stride + i[:, None] * input_stride + k * tap_stride
        w = tl.load(w_ptr + at, (i < I)[:, None] & (k < K), other=0.0)
        q = tl.sum(w * w, 1)
        if tl.program_id(1) == 0:
            tl.store(q_ptr + o * I + i, q, i < I)
        s = tl.load(s_ptr + b[:, None] * I + i[None, :], (b < B)[:, None] & (i < I)[None, :], other=0.0)
        total += tl.sum(s * s * q[None, :], 1)
    tl.store(d_ptr + b.to(tl.int64) * O + o, 1.0 / tl.sqrt(total), b < B)


@triton.jit
def _slope(gd_ptr, d_ptr, at, exists):
    """-gd d^3, of which g is a half."""
    d = tl.load(d_ptr + at, exists, other=0.0)
    return -tl.load(gd_ptr + at, exists, other=0.0) * d * d * d


@triton.jit(do_not_specialize=_PLAIN)
def styles_kernel(
    gd_ptr, d_ptr, s_ptr, q_ptr, gs_ptr, O, I, WIDE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr
):  # fmt: skip
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI)
    total = tl.zeros((BI,), WIDE)
    for first in range(0, O, BO):
        o = first + tl.arange(0, BO)
        g = _slope(gd_ptr, d_ptr, b * O + o, o < O)
        q = tl.load(q_ptr + o.to(tl.int64)[:, None] * I + i[None, :], (o < O)[:, None] & (i < I)[None, :], other=0.0)
        total += tl.sum(g[:, None] * q, 0)
    tl.store(gs_ptr + b * I + i, total * tl.load(s_ptr + b * I + i, i < I), i < I)


@triton.jit(do_not_specialize=_PLAIN)
def rows_kernel(
    gd_ptr, d_ptr, s_ptr, w_ptr, rows_ptr, gw_ptr, B, O, I, K, row_stride, input_stride, tap_stride,
    WIDE: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program computes the gradient of BI inputs' taps in one row."""
    r = tl.program_id(0).to(tl.int64)
    o = r
    if rows_ptr is not None:
        o = tl.load(rows_ptr + r)
    i, k = tl.program_id(1) * BI + tl.arange(0, BI), tl.arange(0, BK)[None, :]
    total = tl.zeros((BI,), WIDE)
    for b in range(B):
        sample = tl.full((), b, tl.int64)
        s = tl.load(s_ptr + sample * I + i, i < I, other=0.0)
        total += _slope(gd_ptr, d_ptr, sample * O + o, o < O) * s * s
    mask = (i < I)[:, None] & (k < K)
    at = r * row_stride + i[:, None] * input_stride + k * tap_stride
    w = tl.load(w_ptr + at, mask, other=0.0)
    tl.store(gw_ptr + at, w * total[:, None], mask)


def blocks(I: int, K: int) -> dict[str, int]:
    return {"BI": min(_INPUTS, power_of_2(I)), "BK": power_of_2(K)}


def forward(s, weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    (B, I), (O, _, K) = s.shape, weight.shape
    d, q = s.new_empty(B, O), s.new_empty(O, I)
    BB = min(_SAMPLES, power_of_2(B))
    if O and I and K:
        with torch.cuda.device_of(s):
            demodulation_kernel[(O, max(1, cdiv(B, BB)))](
                s, weight, d, q, B, O, I, K, *weight.stride(), eps, WIDE=wide_dtype(s.dtype), BB=BB, **blocks(I, K),
                **_OPTIONS,
            )  # fmt: skip
    return d, q


def styles(gd, d, s, q) -> torch.Tensor:
    (B, I), O = s.shape, d.shape[1]
    gs, BI = torch.empty_like(s), min(_INPUTS, power_of_2(I))
    if gs.numel():
        with torch.cuda.device_of(s):
            wide = wide_dtype(s.dtype)
            styles_kernel[(B, cdiv(I, BI))](gd, d, s, q, gs, O, I, WIDE=wide, BO=_OUTPUTS, BI=BI, **_OPTIONS)
    return gs


def rows_gradient(gd, d, s, trained, rows, gw) -> None:
    """Writes gw, which has the strides of `trained`."""
    (B, O), (R, I, K) = d.shape, trained.shape
    tile = blocks(I, K)
    if gw.numel():
        with torch.cuda.device_of(s):
            rows_kernel[(R, cdiv(I, tile["BI"]))](
                gd, d, s, trained, rows, gw, B, O, I, K, *trained.stride(), WIDE=wide_dtype(s.dtype), **tile, **_OPTIONS
            )
