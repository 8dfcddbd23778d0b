"""Triton kernel of row_gradient: x is read once, the small operand gy is shifted.

dW = x [C, q] G [q, columns], q the positions of x, a column a pair of a neuron and a tap of the kernel; G holds the
element of gy that x meets there, or 0. The positions are split among programs, whose sums are added in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2

_BLOCK_C, _BLOCK_Q = 128, 32
# Without a limit of its own ptxas spills a few registers for the sake of a second block on a multiprocessor.
_OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 255}


@triton.jit
def _meets(position, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, T: tl.constexpr):
    """Along one axis: where in gy the element is that x meets at `position` through `tap`, and whether it exists."""
    if T:
        at = position * STRIDE + (tap * DILATION - PADDING)
        return at, (at >= 0) & (at < size)
    at = position + (PADDING - tap * DILATION)
    if STRIDE == 1:
        return at, (at >= 0) & (at < size)
    return at // STRIDE, (at >= 0) & (at % STRIDE == 0) & (at < size * STRIDE)


@triton.jit
def row_gradient_kernel(
    x_ptr,
    gy_ptr,
    partial_ptr,
    B,
    C,
    columns,
    steps,
    x_batch,
    x_channel,
    x_position,
    S0,
    S1,
    S2,
    P0,
    P1,
    P2,
    k,
    DIMS: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes BLOCK_C channels, BLOCK_N columns and `steps` tiles of BLOCK_Q positions of one sample each.

    partial is [splits, k, C, TAPS], gy contiguous [B, k, P0, P1, P2], x's planes have one stride.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row, tap = n // TAPS, n % TAPS
    rows = (row * (P0 * P1 * P2))[None, :]
    tap2 = (tap % K2)[None, :]
    tap1 = (tap // K2 % K1)[None, :]
    tap0 = (tap // (K1 * K2))[None, :]
    q = tl.arange(0, BLOCK_Q)
    positions = S0 * S1 * S2
    tiles = tl.cdiv(positions, BLOCK_Q)
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for step in range(steps):
        tile = split * steps + step
        b = tile // tiles
        at = tile % tiles * BLOCK_Q + q
        exists = at < tl.where(b < B, positions, 0)
        x_at = x_ptr + b.to(tl.int64) * x_batch + (c.to(tl.int64) * x_channel)[:, None] + (at * x_position)[None, :]
        x = tl.load(x_at, (c < C)[:, None] & exists[None, :], other=0.0)
        g2, inside = _meets((at % S2)[:, None], tap2, P2, STRIDE[2], PADDING[2], DILATION[2], TRANSPOSED)
        g = g2
        if DIMS > 1:
            g1, inside1 = _meets((at // S2 % S1)[:, None], tap1, P1, STRIDE[1], PADDING[1], DILATION[1], TRANSPOSED)
            g += g1 * P2
            inside &= inside1
        if DIMS > 2:
            g0, inside0 = _meets((at // S2 // S1)[:, None], tap0, P0, STRIDE[0], PADDING[0], DILATION[0], TRANSPOSED)
            g += g0 * (P1 * P2)
            inside &= inside0
        g_at = gy_ptr + b.to(tl.int64) * (k * P0 * P1 * P2) + (rows + g)
        G = tl.load(g_at, inside & exists[:, None] & (n < columns)[None, :], other=0.0)
        total = tl.dot(x, G, total, input_precision=PRECISION)
    out = (split.to(tl.int64) * k + row[None, :]) * C * TAPS + c[:, None] * TAPS + tap[None, :]
    tl.store(partial_ptr + out, total, (c < C)[:, None] & (n < columns)[None, :])


def blocks(columns: int, half: bool) -> dict[str, int]:
    """Sizes of a program's tile: as wide as the registers hold with the three products of tf32x3."""
    width = min(128 if half else 64, max(16, power_of_2(columns)))
    return {"BLOCK_C": _BLOCK_C, "BLOCK_Q": _BLOCK_Q, "BLOCK_N": width}


def _tf32_allowed() -> bool:
    """PyTorch's setting for convolutions: since 2.9 it has a name of its own, and the old one may refuse to be read."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32


def row_gradient(x, gy, S, P, kernel, stride, padding, dilation, transposed: bool) -> torch.Tensor:
    """[k, C, taps] of x [B, C, positions], any strides, and contiguous gy [B, k, ...]; the rest has three axes."""
    (B, C, positions), k = x.shape, gy.shape[1]
    taps = math.prod(kernel)
    columns = k * taps
    tile = blocks(columns, x.dtype != torch.float32)
    tiles = B * cdiv(positions, tile["BLOCK_Q"])
    across = cdiv(C, tile["BLOCK_C"]), cdiv(columns, tile["BLOCK_N"])
    # Some 512 programs fill a large GPU. The shape alone decides: the order of the sums does not depend on the GPU.
    steps = cdiv(tiles, max(1, min(tiles, 512 // math.prod(across))))
    splits = cdiv(tiles, steps)
    partial = torch.empty(splits, k, C, taps, dtype=torch.float32, device=x.device)
    axes = {"STRIDE": tuple(stride), "PADDING": tuple(padding), "DILATION": tuple(dilation)}
    flags = {
        "DIMS": max(d for d in (1, 2, 3) if d == 1 or S[3 - d] * P[3 - d] * kernel[3 - d] > 1),
        "TRANSPOSED": transposed,
    }
    flags |= {"K1": kernel[1], "K2": kernel[2], "TAPS": taps}
    flags["PRECISION"] = "tf32" if _tf32_allowed() else "tf32x3"
    with torch.cuda.device_of(x):
        row_gradient_kernel[(*across, splits)](
            x, gy, partial, B, C, columns, steps, *x.stride(), *S, *P, k,
            **axes, **flags, **tile, **_OPTIONS,
        )  # fmt: skip
    return (partial[0] if splits == 1 else partial.sum(0)).to(x.dtype)
