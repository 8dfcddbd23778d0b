"""Triton kernels of bias_act. A tensor is read as it lies in memory: [outer, C, inner], the bias running along C."""

import functools

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2
from ._types import wide_dtype

_TILE = 1024  # elements, 8 a thread: 16 make ptxas spill in the backward of channels-last tensors
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # db adds up the very dx that is stored


@triton.jit
def _activate(v, side, slope, gain):
    # A slope of 0 gives 0 below the kink, also for an infinite v; a NaN side lets v's NaN through.
    below = tl.where((slope == 0) & (side <= 0), 0.0, v * (slope * gain))
    return tl.where(side > 0, v * gain, below)


@triton.jit
def _tile(o0, c0, i0, outer, C, inner, BO: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr):
    """Offset of the tile (64 bits), offsets in it (32 bits), their mask; channels [1, BC, 1] and their mask. o0 has 64
    bits, c0 and i0 have as many as C and inner."""
    o = tl.arange(0, BO)[:, None, None]
    c = tl.arange(0, BC)[None, :, None]
    i = tl.arange(0, BI)[None, None, :]
    exists = c0 + c < C
    mask = (o0 + o < outer) & exists & (i0 + i < inner)
    return (o0 * C + c0.to(tl.int64)) * inner + i0, (o * C + c) * inner + i, mask, c0 + c, exists


# Neither a stride nor an alignment depends on these: a kernel is compiled once for all of them.
_PLAIN = ["outer", "steps"]


@triton.jit(do_not_specialize=_PLAIN)
def bias_act_kernel(
    x_ptr,
    b_ptr,
    y_ptr,
    out_ptr,
    outer,
    C,
    inner,
    slope: tl.float64,
    gain: tl.float64,
    HAS_B: tl.constexpr,
    HAS_Y: tl.constexpr,
    WIDE: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
):
    pid = tl.program_id(0)  # a division of 32 bits takes a fifth of the instructions of one of 64
    tiles_i, tiles_c = tl.cdiv(inner, BI), tl.cdiv(C, BC)
    i0, c0, o0 = pid % tiles_i * BI, pid // tiles_i % tiles_c * BC, (pid // tiles_i // tiles_c).to(tl.int64) * BO
    base, offsets, mask, channels, exists = _tile(o0, c0, i0, outer, C, inner, BO, BC, BI)
    v = tl.load(x_ptr + base + offsets, mask).to(WIDE)
    if HAS_B:
        v += tl.load(b_ptr + channels, exists).to(WIDE)
    if HAS_Y:
        side = tl.load(y_ptr + base + offsets, mask).to(WIDE)
    else:
        side = v
    out = _activate(v, side, tl.full((1, 1, 1), slope, WIDE), tl.full((1, 1, 1), gain, WIDE))
    tl.store(out_ptr + base + offsets, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_PLAIN)
def bias_act_backward_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    partial_ptr,
    outer,
    C,
    inner,
    steps,
    slope: tl.float64,
    gain: tl.float64,
    WIDE: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
):
    """A program takes `steps` tiles of the same BC channels and leaves their sum in a row of partial [splits, C]."""
    pid = tl.program_id(0)
    tiles_i, tiles_c = tl.cdiv(inner, BI), tl.cdiv(C, BC)
    c0, split = pid % tiles_c * BC, pid // tiles_c
    slope, gain = tl.full((1, 1, 1), slope, WIDE), tl.full((1, 1, 1), gain, WIDE)
    total = tl.zeros((BO, BC, BI), WIDE)
    for step in range(steps):
        tile = split * steps + step
        o0 = (tile // tiles_i).to(tl.int64) * BO
        base, offsets, mask, _, _ = _tile(o0, c0, tile % tiles_i * BI, outer, C, inner, BO, BC, BI)
        dy = tl.load(dy_ptr + base + offsets, mask, other=0.0).to(WIDE)
        y = tl.load(y_ptr + base + offsets, mask, other=0.0).to(WIDE)
        dx = _activate(dy, y, slope, gain)
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
        total += dx
    c = tl.arange(0, BC)
    tl.store(partial_ptr + split.to(tl.int64) * C + c0 + c, tl.sum(tl.sum(total, 2), 0), c0 + c < C)


@functools.cache
def _blocks(outer: int, C: int, inner: int) -> dict[str, int]:
    """A tile that is as contiguous in memory as the axis allows: first along inner, then along C, then along outer."""
    BI = min(_TILE, power_of_2(inner))
    BC = min(_TILE // BI, 128, power_of_2(C))
    BO = min(_TILE // (BI * BC), power_of_2(outer))
    while BO > 1 and BO * C * inner >= 2**31:
        BO //= 2
    return {"BO": BO, "BC": BC, "BI": BI}


@functools.cache
def _tiles(outer: int, C: int, inner: int) -> tuple[int, int, int, int]:
    """How many tiles there are across the channels and along the rest; steps of a program that sums, and splits."""
    blocks = _blocks(outer, C, inner)
    across, along = cdiv(C, blocks["BC"]), cdiv(outer, blocks["BO"]) * cdiv(inner, blocks["BI"])
    # Some 1024 programs fill a large GPU. The shape alone decides: the order of the sums does not depend on the GPU.
    steps = min(power_of_2(cdiv(along * across, 1024)), power_of_2(along))
    return across, along, steps, cdiv(along, steps)


def bias_act(x, b, y, axis: tuple[int, int, int], slope: float, gain: float) -> torch.Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    across, along, _, _ = _tiles(*axis)
    flags = {"HAS_B": b is not None, "HAS_Y": y is not None, "WIDE": wide_dtype(x.dtype)}
    with torch.cuda.device_of(x):
        bias_act_kernel[(across * along,)](x, b, y, out, *axis, slope, gain, **flags, **_blocks(*axis), **_OPTIONS)
    return out


def bias_act_backward(dy, y, axis: tuple[int, int, int], slope: float, gain: float) -> tuple[torch.Tensor, ...]:
    dx = torch.empty_like(dy)
    if dy.numel() == 0:
        return dx, dy.new_zeros(axis[1])
    across, _, steps, splits = _tiles(*axis)
    partial = torch.empty(splits, axis[1], dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    with torch.cuda.device_of(dy):
        bias_act_backward_kernel[(across * splits,)](
            dy, y, dx, partial, *axis, steps, slope, gain, WIDE=wide_dtype(dy.dtype), **_blocks(*axis), **_OPTIONS
        )
    return dx, (partial[0] if splits == 1 else partial.sum(0)).to(dy.dtype)
