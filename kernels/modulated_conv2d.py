"""Triton kernels of the passes around modulated_conv2d's convolution."""

import torch
import triton
import triton.language as tl

from ._types import wide_dtype
from .noise_bias_act import _OPTIONS, PLAIN, launch, plan, store_sums, tile


@triton.jit(do_not_specialize=PLAIN)
def modulate_kernel(
    x_ptr, s_ptr, y_ptr, splits, C, P, channel_stride, position_stride,
    WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    _, row, c, in_c, _, in_p, base, at = tile(0, splits, 1, C, P, channel_stride, position_stride, BC, BP)
    y = tl.load(x_ptr + base + at, in_c & in_p).to(WIDE) * tl.load(s_ptr + row + c, in_c)
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), in_c & in_p)


@triton.jit(do_not_specialize=PLAIN)
def modulate_backward_kernel(
    gy_ptr, x_ptr, s_ptr, gx_ptr, gs_ptr, B, splits, steps, C, P, channel_stride, position_stride,
    WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BC, BP), WIDE)
    for step in range(steps):
        _, row, c, in_c, _, in_p, base, at = tile(step, splits, steps, C, P, channel_stride, position_stride, BC, BP)
        gy = tl.load(gy_ptr + base + at, in_c & in_p, other=0.0).to(WIDE)
        x = tl.load(x_ptr + base + at, in_c & in_p, other=0.0).to(WIDE)
        gx = gy * tl.load(s_ptr + row + c, in_c)
        tl.store(gx_ptr + base + at, gx.to(gx_ptr.dtype.element_ty), in_c & in_p)
        total += gy * x
    store_sums(gs_ptr, tl.sum(total, 1), 0, 1, B, splits, C, BC)


@triton.jit(do_not_specialize=PLAIN)
def modulate_double_backward_kernel(
    hx_ptr, gy_ptr, x_ptr, k_ptr, dgy_ptr, dx_ptr, ds_ptr, B, splits, steps, C, P, channel_stride, position_stride,
    WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """k is s, hs."""
    total = tl.zeros((BC, BP), WIDE)
    for step in range(steps):
        _, row, c, in_c, _, in_p, base, at = tile(step, splits, steps, C, P, channel_stride, position_stride, BC, BP)
        mask = in_c & in_p
        hx = tl.load(hx_ptr + base + at, mask, other=0.0).to(WIDE)
        gy = tl.load(gy_ptr + base + at, mask, other=0.0).to(WIDE)
        x = tl.load(x_ptr + base + at, mask).to(WIDE)
        s, hs = tl.load(k_ptr + row + c, in_c), tl.load(k_ptr + B.to(tl.int64) * C + row + c, in_c)
        tl.store(dgy_ptr + base + at, (s * hx + hs * x).to(dgy_ptr.dtype.element_ty), mask)
        tl.store(dx_ptr + base + at, (hs * gy).to(dx_ptr.dtype.element_ty), mask)
        total += hx * gy
    store_sums(ds_ptr, tl.sum(total, 1), 0, 1, B, splits, C, BC)


def modulate(x, s) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    it = plan(x)
    with torch.cuda.device_of(x):
        modulate_kernel[(len(x) * it.tiles, it.across)](
            x, s, y, it.tiles, *it.sizes, WIDE=wide_dtype(x.dtype), **it.tile, **_OPTIONS
        )
    return y


def modulate_backward(gy, x, s) -> tuple[torch.Tensor, torch.Tensor]:
    gx = torch.empty_like(x)
    return gx, launch(modulate_backward_kernel, x, (gy, x, s, gx), s.shape)


def modulate_double_backward(hx, gy, x, k) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dgy, dx = torch.empty_like(x), torch.empty_like(x)
    return dgy, dx, launch(modulate_double_backward_kernel, x, (hx, gy, x, k, dgy, dx), x.shape[:2])
