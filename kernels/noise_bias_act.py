"""Triton kernels of noise_bias_act. A tensor [B, C, P] is read as it lies in memory, positions or channels last."""

import torch
import triton
import triton.language as tl

_TILE = 1024  # elements, 8 a thread
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def tile(step, B, C, P, channel_stride, position_stride, BC: tl.constexpr, BP: tl.constexpr, STEPS: tl.constexpr):
    """Of this program's step: sample, channels [BC, 1] and their mask, positions [1, BP] and theirs, the offset of the
    tile (64 bits) and offsets in it (32 bits)."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_c = tl.cdiv(C, BC)
    # Programs count tiles of channels first, then samples, then splits of the positions, of STEPS tiles each.
    c0, b, p0 = pid % tiles_c * BC, pid // tiles_c % B, (pid // tiles_c // B * STEPS + step) * BP
    c = tl.arange(0, BC)[:, None]
    p = tl.arange(0, BP)[None, :]
    base = b * C * P + c0 * channel_stride + p0 * position_stride
    return b, c0 + c, c0 + c < C, p0 + p, p0 + p < P, base, c * channel_stride + p * position_stride


@triton.jit
def store_sums(sums_ptr, total, which: tl.constexpr, SUMS: tl.constexpr, B, C, BC: tl.constexpr):
    """Sums of this program's positions, [BC, BP], to [splits, SUMS, B, C]."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_c = tl.cdiv(C, BC)
    c = pid % tiles_c * BC + tl.arange(0, BC)
    at = ((pid // tiles_c // B * SUMS + which) * B + pid // tiles_c % B) * C + c
    tl.store(sums_ptr + at, tl.sum(total, 1), c < C)


@triton.jit
def _wide(n):
    """A size in 64 bits; a size of 1 is a Python number in a compiled kernel."""
    return tl.full((), n, tl.int64)


@triton.jit
def _noise(n_ptr, b, noise_batch, p, exists, like):
    """The noise of the positions p of sample b, in the shape of `like`."""
    return tl.load(n_ptr + b * noise_batch + p, exists, other=0.0) + tl.zeros_like(like)


@triton.jit
def _factors(slope, gain, WIDE: tl.constexpr):
    """What m is above the kink and below it."""
    gain = tl.full((1, 1), gain, WIDE)
    return gain, tl.full((1, 1), slope, WIDE) * gain


@triton.jit
def noise_bias_act_kernel(
    c_ptr, n_ptr, k_ptr, y_ptr, B, C, P, channel_stride, position_stride, noise_batch, slope: tl.float64,
    gain: tl.float64, HAS_NOISE: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """k is d, f, h."""
    b, c, in_c, p, in_p, base, at = tile(0, B, C, P, channel_stride, position_stride, BC, BP, 1)
    gain, leak = _factors(slope, gain, WIDE)
    k, n_k = k_ptr + b * C + c, _wide(B) * C  # the next coefficient of a channel lies n_k further on
    u = tl.load(c_ptr + base + at, in_c & in_p).to(WIDE) * tl.load(k, in_c)
    if HAS_NOISE:
        u += tl.load(k + n_k, in_c) * _noise(n_ptr, b, noise_batch, p, in_p, u)
    u += tl.load(k + 2 * n_k, in_c)
    y = u * tl.where(u > 0, gain, leak)
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), in_c & in_p)


@triton.jit
def noise_bias_act_backward_kernel(
    gy_ptr, y_ptr, n_ptr, k_ptr, gc_ptr, sums_ptr, B, C, P, channel_stride, position_stride, noise_batch,
    slope: tl.float64, gain: tl.float64, HAS_NOISE: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """k is d, f, h; the sums are d gd, gf, gh."""
    gain, leak = _factors(slope, gain, WIDE)
    of_c, of_n, of_1 = tl.zeros((BC, BP), WIDE), tl.zeros((BC, BP), WIDE), tl.zeros((BC, BP), WIDE)
    for step in range(STEPS):
        b, c, in_c, p, in_p, base, at = tile(step, B, C, P, channel_stride, position_stride, BC, BP, STEPS)
        k, n_k = k_ptr + b * C + c, _wide(B) * C
        gy = tl.load(gy_ptr + base + at, in_c & in_p, other=0.0).to(WIDE)
        y = tl.load(y_ptr + base + at, in_c & in_p, other=0.0).to(WIDE)
        m = tl.where(y > 0, gain, leak)
        g = gy * m
        tl.store(gc_ptr + base + at, (g * tl.load(k, in_c)).to(gc_ptr.dtype.element_ty), in_c & in_p)
        # t = d c: c was not kept, and y / m gives d c + f n + h back.
        t = y / m - tl.load(k + 2 * n_k, in_c, other=0.0)
        if HAS_NOISE:
            n = _noise(n_ptr, b, noise_batch, p, in_p, g)
            t -= tl.load(k + n_k, in_c, other=0.0) * n
            of_n += g * n
        of_c += g * t
        of_1 += g
    store_sums(sums_ptr, of_c, 0, 3, B, C, BC)
    store_sums(sums_ptr, of_n, 1, 3, B, C, BC)
    store_sums(sums_ptr, of_1, 2, 3, B, C, BC)


@triton.jit
def noise_bias_act_double_backward_kernel(
    hc_ptr, gy_ptr, y_ptr, n_ptr, k_ptr, dgy_ptr, dy_ptr, sums_ptr, B, C, P, channel_stride, position_stride,
    noise_batch, slope: tl.float64, gain: tl.float64, HAS_NOISE: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """k is d, e, f, h; the sum is that of m gy hc."""
    gain, leak = _factors(slope, gain, WIDE)
    total = tl.zeros((BC, BP), WIDE)
    for step in range(STEPS):
        b, c, in_c, p, in_p, base, at = tile(step, B, C, P, channel_stride, position_stride, BC, BP, STEPS)
        k, n_k, mask = k_ptr + b * C + c, _wide(B) * C, in_c & in_p
        hc = tl.load(hc_ptr + base + at, mask, other=0.0).to(WIDE)
        gy = tl.load(gy_ptr + base + at, mask, other=0.0).to(WIDE)
        y = tl.load(y_ptr + base + at, mask, other=0.0).to(WIDE)
        m = tl.where(y > 0, gain, leak)
        e = tl.load(k + n_k, in_c)
        u = tl.load(k, in_c) * hc + e * (y / m)
        if HAS_NOISE:
            u += tl.load(k + 2 * n_k, in_c) * _noise(n_ptr, b, noise_batch, p, in_p, u)
        u += tl.load(k + 3 * n_k, in_c)
        tl.store(dgy_ptr + base + at, (m * u).to(dgy_ptr.dtype.element_ty), mask)
        tl.store(dy_ptr + base + at, (e * gy).to(dy_ptr.dtype.element_ty), mask)
        total += m * gy * hc
    store_sums(sums_ptr, total, 0, 1, B, C, BC)


def blocks(C: int, P: int, last: bool) -> dict[str, int]:
    """A tile that is as contiguous in memory as the layout allows."""
    inner, outer = (C, P) if last else (P, C)
    inner = min(_TILE if not last else 256, triton.next_power_of_2(inner))
    outer = min(_TILE // inner, triton.next_power_of_2(outer))
    return {"BC": inner, "BP": outer} if last else {"BC": outer, "BP": inner}


def geometry(x: torch.Tensor) -> tuple[list[int], dict[str, int]]:
    """B, C, P, the strides of channels and positions; and the tile."""
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    last = not x.is_contiguous()
    return [B, C, P, *((1, C) if last else (P, 1))], blocks(C, P, last)


def steps(x: torch.Tensor, tile: dict[str, int]) -> tuple[int, int, int]:
    """Steps of a program, splits of the positions, programs. Some 1024 programs fill a large GPU; the shape alone
    decides, so the order of sums does not depend on the GPU."""
    columns = triton.cdiv(x.shape[1], tile["BC"]) * x.shape[0]
    tiles = triton.cdiv(x.shape[2] * x.shape[3], tile["BP"])
    count = min(triton.next_power_of_2(triton.cdiv(tiles * columns, 1024)), triton.next_power_of_2(tiles))
    splits = triton.cdiv(tiles, count)
    return count, splits, splits * columns


def flags(x: torch.Tensor) -> dict[str, object]:
    return {"WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32}


def launch(kernel, x: torch.Tensor, tensors: tuple, like: torch.Tensor, *scalars, **constants) -> torch.Tensor:
    """Launches a kernel that takes `tensors`, a place for its sums over the positions, the sizes, and the rest.

    Gives the sums, of the shape and dtype of `like`: those of the splits, added up.
    """
    if x.numel() == 0:
        return torch.zeros_like(like)
    sizes, tile = geometry(x)
    count, splits, programs = steps(x, tile)
    partial = like.new_empty(splits, *like.shape)
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            *tensors, partial, *sizes, *scalars, STEPS=count, **constants, **flags(x), **tile, **_OPTIONS
        )
    return partial[0] if splits == 1 else partial.sum(0)


def _noise_batch(n) -> int:
    return 0 if n is None or n.shape[0] == 1 else n.shape[2] * n.shape[3]


def noise_bias_act(c, n, k, slope: float, gain: float) -> torch.Tensor:
    y = torch.empty_like(c)
    if c.numel() == 0:
        return y
    sizes, tile = geometry(c)
    programs = triton.cdiv(sizes[1], tile["BC"]) * sizes[0] * triton.cdiv(sizes[2], tile["BP"])
    with torch.cuda.device_of(c):
        noise_bias_act_kernel[(programs,)](
            c, n, k, y, *sizes, _noise_batch(n), slope, gain, HAS_NOISE=n is not None, **flags(c), **tile, **_OPTIONS
        )
    return y


def noise_bias_act_backward(gy, y, n, k, slope: float, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    gc, numbers = torch.empty_like(gy), (_noise_batch(n), slope, gain)
    tensors = gy, y, n, k, gc
    return gc, launch(noise_bias_act_backward_kernel, y, tensors, k, *numbers, HAS_NOISE=n is not None)


def noise_bias_act_double_backward(hc, gy, y, n, k, slope: float, gain: float) -> tuple[torch.Tensor, ...]:
    dgy, dy, numbers = torch.empty_like(y), torch.empty_like(y), (_noise_batch(n), slope, gain)
    tensors = hc, gy, y, n, k, dgy, dy
    return dgy, dy, launch(noise_bias_act_double_backward_kernel, y, tensors, k[0], *numbers, HAS_NOISE=n is not None)
