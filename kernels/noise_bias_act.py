"""Triton kernels of noise_bias_act. A tensor [B, C, P] is read as it lies in memory, positions or channels last."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2
from ._types import wide_dtype

_TILE = 1024  # elements, 8 a thread
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


# Neither a stride nor an alignment depends on these: a kernel is compiled once for all of them.
PLAIN = ["B", "splits", "steps"]
_MOST = 65535  # programs along the second axis of a grid


@triton.jit
def tile(step, splits, steps, C, P, channel_stride, position_stride, BC: tl.constexpr, BP: tl.constexpr):
    """Of this program's step: the sample, the offset of the sample in tensors [B, C], channels [BC, 1] and their mask,
    positions [1, BP] and theirs, the offset of the tile (64 bits) and offsets in it (32 bits).

    The grid has tiles of channels along its second axis; along the first, the splits of each sample's positions follow
    each other, of `steps` tiles each. So there is one division, of 32 bits."""
    pid = tl.program_id(0)
    b, p0, c0 = pid // splits, (pid % splits * steps + step) * BP, tl.program_id(1) * BC
    c = tl.arange(0, BC)[:, None]
    p = tl.arange(0, BP)[None, :]
    row = b.to(tl.int64) * C
    base = row * P + c0.to(tl.int64) * channel_stride + p0.to(tl.int64) * position_stride
    return b, row, c0 + c, c0 + c < C, p0 + p, p0 + p < P, base, c * channel_stride + p * position_stride


@triton.jit
def store_sums(sums_ptr, sums, which: tl.constexpr, SUMS: tl.constexpr, B, splits, C, BC: tl.constexpr):
    """Sums [BC] of this program's positions, to [splits, SUMS, B, C]."""
    pid = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = ((pid % splits).to(tl.int64) * SUMS + which) * B + pid // splits
    tl.store(sums_ptr + row * C + c, sums, c < C)


@triton.jit
def _noise(n_ptr, b, noise_batch, p, exists, like):
    """The noise of the positions p of sample b, in the shape of `like`."""
    return tl.load(n_ptr + b.to(tl.int64) * noise_batch + p, exists, other=0.0) + tl.zeros_like(like)


@triton.jit
def _factors(slope, gain, WIDE: tl.constexpr):
    """What m is above the kink and below it, and 1 / m."""
    gain = tl.full((1, 1), gain, WIDE)
    leak = tl.full((1, 1), slope, WIDE) * gain
    return gain, leak, 1.0 / gain, 1.0 / leak


@triton.jit(do_not_specialize=PLAIN)
def noise_bias_act_kernel(
    c_ptr, n_ptr, d_ptr, f_ptr, h_ptr, y_ptr, splits, C, P, channel_stride, position_stride, noise_batch, f_batch,
    h_batch, slope: tl.float64, gain: tl.float64, WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    b, row, c, in_c, p, in_p, base, at = tile(0, splits, 1, C, P, channel_stride, position_stride, BC, BP)
    gain, leak, _, _ = _factors(slope, gain, WIDE)
    u = tl.load(c_ptr + base + at, in_c & in_p).to(WIDE)
    if d_ptr is not None:
        u *= tl.load(d_ptr + row + c, in_c)
    if n_ptr is not None:
        u += tl.load(f_ptr + b * f_batch) * _noise(n_ptr, b, noise_batch, p, in_p, u)
    if h_ptr is not None:
        u += tl.load(h_ptr + b.to(tl.int64) * h_batch + c, in_c)
    y = u * tl.where(u > 0, gain, leak)
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), in_c & in_p)


@triton.jit(do_not_specialize=PLAIN)
def noise_bias_act_backward_kernel(
    gy_ptr, y_ptr, n_ptr, d_ptr, f_ptr, h_ptr, gc_ptr, sums_ptr, B, splits, steps, C, P, channel_stride,
    position_stride, noise_batch, f_batch, h_batch, slope: tl.float64, gain: tl.float64, WIDE: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The sums are gd, gf, gh."""
    gain, leak, inverse_gain, inverse_leak = _factors(slope, gain, WIDE)
    d, f, h = tl.full((BC, 1), 1.0, WIDE), tl.zeros((1, 1), WIDE), tl.zeros((BC, 1), WIDE)
    of_c, of_n, of_1 = tl.zeros((BC, BP), WIDE), tl.zeros((BC, BP), WIDE), tl.zeros((BC, BP), WIDE)
    # All steps have one sample and the same channels.
    b, row, c, in_c, p, in_p, base, at = tile(0, splits, steps, C, P, channel_stride, position_stride, BC, BP)
    if d_ptr is not None:
        d = tl.load(d_ptr + row + c, in_c, other=1.0)
    if n_ptr is not None:
        f += tl.load(f_ptr + b * f_batch)
    if h_ptr is not None:
        h = tl.load(h_ptr + b.to(tl.int64) * h_batch + c, in_c, other=0.0)
    for step in range(steps):
        b, row, c, in_c, p, in_p, base, at = tile(step, splits, steps, C, P, channel_stride, position_stride, BC, BP)
        gy = tl.load(gy_ptr + base + at, in_c & in_p, other=0.0).to(WIDE)
        y = tl.load(y_ptr + base + at, in_c & in_p, other=0.0).to(WIDE)
        g = gy * tl.where(y > 0, gain, leak)
        tl.store(gc_ptr + base + at, (g * d).to(gc_ptr.dtype.element_ty), in_c & in_p)
        of_1 += g
        # t = d c: c was not kept, and y / m gives d c + f n + h back.
        t = y * tl.where(y > 0, inverse_gain, inverse_leak) - h
        if n_ptr is not None:
            n = _noise(n_ptr, b, noise_batch, p, in_p, g)
            of_n += g * n
            t -= f * n
        if d_ptr is not None:
            of_c += g * t
    store_sums(sums_ptr, tl.sum(of_c, 1) / tl.sum(d, 1), 0, 3, B, splits, C, BC)
    store_sums(sums_ptr, tl.sum(of_n, 1), 1, 3, B, splits, C, BC)
    store_sums(sums_ptr, tl.sum(of_1, 1), 2, 3, B, splits, C, BC)


@triton.jit(do_not_specialize=PLAIN)
def noise_bias_act_double_backward_kernel(
    hc_ptr, gy_ptr, y_ptr, n_ptr, k_ptr, dgy_ptr, dy_ptr, sums_ptr, B, splits, steps, C, P, channel_stride,
    position_stride, noise_batch, slope: tl.float64, gain: tl.float64, WIDE: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """k is d, e, f, h; the sum is that of m gy hc."""
    gain, leak, inverse_gain, inverse_leak = _factors(slope, gain, WIDE)
    total = tl.zeros((BC, BP), WIDE)
    for step in range(steps):
        b, row, c, in_c, p, in_p, base, at = tile(step, splits, steps, C, P, channel_stride, position_stride, BC, BP)
        mask = in_c & in_p
        k, n_k = k_ptr + row + c, B.to(tl.int64) * C  # the next coefficient of a channel lies n_k further on
        hc = tl.load(hc_ptr + base + at, mask, other=0.0).to(WIDE)
        gy = tl.load(gy_ptr + base + at, mask, other=0.0).to(WIDE)
        y = tl.load(y_ptr + base + at, mask, other=0.0).to(WIDE)
        m = tl.where(y > 0, gain, leak)
        e = tl.load(k + n_k, in_c)
        u = tl.load(k, in_c) * hc + e * (y * tl.where(y > 0, inverse_gain, inverse_leak))
        if n_ptr is not None:
            u += tl.load(k + 2 * n_k, in_c) * _noise(n_ptr, b, noise_batch, p, in_p, u)
        u += tl.load(k + 3 * n_k, in_c)
        tl.store(dgy_ptr + base + at, (m * u).to(dgy_ptr.dtype.element_ty), mask)
        tl.store(dy_ptr + base + at, (e * gy).to(dy_ptr.dtype.element_ty), mask)
        total += m * gy * hc
    store_sums(sums_ptr, tl.sum(total, 1), 0, 1, B, splits, C, BC)


def blocks(C: int, P: int, last: bool) -> dict[str, int]:
    """A tile that is as contiguous in memory as the layout allows."""
    inner, outer = (C, P) if last else (P, C)
    inner = min(_TILE if not last else 256, power_of_2(inner))
    outer = min(_TILE // inner, power_of_2(outer))
    tile = {"BC": inner, "BP": outer} if last else {"BC": outer, "BP": inner}
    while cdiv(C, tile["BC"]) > _MOST:
        tile = {"BC": 2 * tile["BC"], "BP": max(1, tile["BP"] // 2)}
    return tile


class Plan(NamedTuple):
    sizes: tuple[int, int, int, int]  # C, P, the strides of channels and of positions
    tile: dict[str, int]
    across: int  # tiles of channels
    tiles: int  # of positions
    steps: int  # tiles of a program that adds up
    splits: int  # such programs along the positions


@functools.cache
def _plan(B: int, C: int, P: int, last: bool) -> Plan:
    tile = blocks(C, P, last)
    across, tiles = cdiv(C, tile["BC"]), cdiv(P, tile["BP"])
    # Some 1024 programs fill a large GPU. The shape alone decides: the order of sums does not depend on the GPU.
    steps = min(power_of_2(cdiv(tiles * across * B, 1024)), power_of_2(tiles))
    return Plan((C, P, *((1, C) if last else (P, 1))), tile, across, tiles, steps, cdiv(tiles, steps))


def plan(x: torch.Tensor) -> Plan:
    B, C, H, W = x.shape
    return _plan(B, C, H * W, not x.is_contiguous())


def launch(kernel, x: torch.Tensor, tensors: tuple, shape: tuple[int, ...], *scalars) -> torch.Tensor:
    """Launches a kernel that takes `tensors`, a place for its sums over the positions, the sizes, and the rest.

    Gives the sums of that shape: those of the splits, added up.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return torch.zeros(shape, dtype=kind, device=x.device)
    B, it = len(x), plan(x)
    partial = torch.empty((it.splits, *shape), dtype=kind, device=x.device)
    with torch.cuda.device_of(x):
        kernel[(B * it.splits, it.across)](
            *tensors, partial, B, it.splits, it.steps, *it.sizes, *scalars, WIDE=wide_dtype(x.dtype), **it.tile,
            **_OPTIONS,
        )  # fmt: skip
    return partial[0] if it.splits == 1 else partial.sum(0)


def _noise_batch(n) -> int:
    return 0 if n is None or n.shape[0] == 1 else n.shape[2] * n.shape[3]


def _batches(n, f, h) -> tuple[int, int, int]:
    """How far the next sample is in the noise, in its strengths and in the biases: 0 where all have the same."""
    h_batch = 0 if h is None or h.shape[0] == 1 else h.shape[1]
    return _noise_batch(n), 0 if f is None or f.shape[0] == 1 else 1, h_batch


def noise_bias_act(c, n, d, f, h, slope: float, gain: float) -> torch.Tensor:
    y = torch.empty_like(c)
    if c.numel() == 0:
        return y
    it = plan(c)
    with torch.cuda.device_of(c):
        noise_bias_act_kernel[(len(c) * it.tiles, it.across)](
            c, n, d, f, h, y, it.tiles, *it.sizes, *_batches(n, f, h), slope, gain, WIDE=wide_dtype(c.dtype),
            **it.tile, **_OPTIONS,
        )  # fmt: skip
    return y


def noise_bias_act_backward(gy, y, n, d, f, h, slope: float, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    gc, tensors = torch.empty_like(gy), (gy, y, n, d, f, h)
    shape = 3, *y.shape[:2]
    return gc, launch(noise_bias_act_backward_kernel, y, (*tensors, gc), shape, *_batches(n, f, h), slope, gain)


def noise_bias_act_double_backward(hc, gy, y, n, k, slope: float, gain: float) -> tuple[torch.Tensor, ...]:
    dgy, dy = torch.empty_like(y), torch.empty_like(y)
    tensors, numbers = (hc, gy, y, n, k, dgy, dy), (_noise_batch(n), slope, gain)
    return dgy, dy, launch(noise_bias_act_double_backward_kernel, y, tensors, y.shape[:2], *numbers)
