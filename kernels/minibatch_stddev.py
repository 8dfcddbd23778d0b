"""Triton kernels of minibatch_stddev. A program takes some elements of one feature in all samples of one group."""

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2
from ._types import wide_dtype

_TILE = 2048  # elements of all samples together, 16 a thread: they stay in registers from the mean to the result
_EPS = tl.constexpr(1e-8)
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def minibatch_stddev_kernel(
    x_ptr,
    given_ptr,
    D_ptr,
    y_ptr,
    out_ptr,
    partial_ptr,
    size,
    groups,
    C,
    pixels,
    features,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    PASS: tl.constexpr,
    WIDE: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
):
    """Of the PASS "forward" x -> y, "backward" dy = given -> dx = out, "second order" ddx = given -> ddy = y, gx = out.

    The first and the last leave sums in partial.
    """
    pid = tl.program_id(0)
    e = pid % tiles * BE + tl.arange(0, BE)[None, :]
    f = pid // tiles % features
    m = pid // tiles // features
    g = tl.arange(0, BG)[:, None]
    width = C // features
    if CHANNELS_LAST:
        at = e // width * C + f * width + e % width
        above = e // width * (C + features) + f * width + e % width
    else:
        at = f * width * pixels + e
        above = at
    sample = g.to(tl.int64) * groups + m
    at += sample * C * pixels
    above += sample * (C + features) * pixels
    mask = (g < size) & (e < width * pixels)
    count = tl.full((1, 1), size, WIDE)
    x = tl.load(x_ptr + at, mask, other=0.0)
    wide = x.to(WIDE)
    d = tl.where(mask, wide - tl.sum(wide, 0, keep_dims=True) / count, 0.0)
    s = tl.sqrt(tl.sum(d * d, 0, keep_dims=True) / count + tl.full((1, 1), _EPS, WIDE))
    averaged = s
    if PASS != "forward":
        scale = tl.load(D_ptr + m * features + f) / (tl.full((), width * pixels, WIDE) * count * s)
    if PASS == "forward":
        tl.store(y_ptr + above, x, mask)
    elif PASS == "backward":
        dy = tl.load(given_ptr + above, mask, other=0.0).to(WIDE)
        tl.store(out_ptr + at, (dy + scale * d).to(out_ptr.dtype.element_ty), mask)
    else:
        given = tl.load(given_ptr + at, mask, other=0.0)
        tl.store(y_ptr + above, given, mask)
        v = given.to(WIDE)
        averaged = tl.sum(d * v, 0, keep_dims=True) / (count * s)
        gx = scale * (v - tl.sum(v, 0, keep_dims=True) / count - averaged * d / s)
        tl.store(out_ptr + at, gx.to(out_ptr.dtype.element_ty), mask)
    if PASS != "backward":
        tl.store(partial_ptr + pid, tl.sum(tl.where(e < width * pixels, averaged, 0.0)))


@triton.jit
def append_kernel(
    y_ptr,
    partial_ptr,
    size,
    groups,
    C,
    pixels,
    features,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (m, f) adds up its partial sums and writes their mean into every pixel of its channel and its samples."""
    pid = tl.program_id(0)
    f, m = pid % features, pid // features
    total = tl.zeros((BT,), WIDE)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        total += tl.load(partial_ptr + pid * tiles + t, t < tiles, other=0.0)
    value = (tl.sum(total) / tl.full((), C // features * pixels, WIDE)).to(y_ptr.dtype.element_ty)
    for start in range(0, size * pixels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sample, p = (i // pixels).to(tl.int64) * groups + m, i % pixels
        if CHANNELS_LAST:
            at = p * (C + features) + C + f
        else:
            at = (C + f) * pixels + p
        tl.store(
            y_ptr + sample * (C + features) * pixels + at, tl.full((BLOCK,), value, value.dtype), i < size * pixels
        )


def tile(size: int, elements: int) -> dict[str, int]:
    BG = power_of_2(size)
    return {"BG": BG, "BE": max(1, min(_TILE // BG, power_of_2(elements)))}


def _launch(which: str, x, given, D, y, out, size, groups, C, pixels, features, channels_last: bool) -> None:
    if x.numel() == 0:
        return
    blocks = tile(size, C // features * pixels)
    tiles = cdiv(C // features * pixels, blocks["BE"])
    partial = None
    if which != "backward":
        wide = torch.promote_types(x.dtype, torch.float32)
        partial = torch.empty(groups * features * tiles, dtype=wide, device=x.device)
    shape = size, groups, C, pixels, features, tiles
    flags = {"CHANNELS_LAST": channels_last, "WIDE": wide_dtype(x.dtype)}
    with torch.cuda.device_of(x):
        minibatch_stddev_kernel[(groups * features * tiles,)](
            x, given, D, y, out, partial, *shape, PASS=which, **flags, **blocks, **_OPTIONS
        )
        if partial is not None:
            append_kernel[(groups * features,)](y, partial, *shape, BT=256, BLOCK=256, **flags, **_OPTIONS)


def minibatch_stddev(x, y, *shape) -> None:
    """shape: samples a group, groups, channels, pixels, features, whether channels come last."""
    _launch("forward", x, None, None, y, None, *shape)


def minibatch_stddev_backward(dy, D, x, dx, *shape) -> None:
    _launch("backward", x, dy, D, None, dx, *shape)


def minibatch_stddev_double_backward(ddx, D, x, ddy, gx, *shape) -> None:
    _launch("second order", x, ddx, D, ddy, gx, *shape)
