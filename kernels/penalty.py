"""Triton kernels of penalty: norms of samples, the penalty on them, its gradient; and interpolation with its draw."""

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2
from ._types import wide_dtype

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = 2048  # elements that a program reads at a time
MOST = 32  # blocks that a program of the forward adds up
TABLE = 1024  # partial sums that the last step takes at a time


@triton.jit
def _sample(programs):
    """The sample of this program, which is one of so many of its sample, and which of these it is; 64 bits each.

    A grid has one axis: along another one a GPU takes 65535 programs at most."""
    pid = tl.program_id(0).to(tl.int64)
    return pid // programs, pid % programs


@triton.jit
def squares_kernel(
    g_ptr, partial_ptr, length, stride, splits, WIDE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """partial[b, split] of the sum of squares of sample b."""
    b, split = _sample(splits)
    lanes = tl.zeros((BLOCK,), WIDE)
    for step in range(STEPS):
        i = (split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(g_ptr + b * stride + i, i < length, other=0.0).to(WIDE)
        lanes += v * v
    tl.store(partial_ptr + b * splits + split, tl.sum(lanes.to(tl.float64), 0))


@triton.jit
def norm_of(partial_ptr, b, mask, splits, inverse: tl.float64, SPLITS: tl.constexpr):
    sums = tl.zeros((b.shape[0], SPLITS), tl.float64)
    for first in range(0, splits, SPLITS):
        k = first + tl.arange(0, SPLITS)[None, :]
        sums += tl.load(partial_ptr + b[:, None] * splits + k, mask[:, None] & (k < splits), other=0.0)
    q = tl.sum(sums, 1)
    return q, tl.sqrt(q * inverse)


@triton.jit
def penalty_kernel(
    partial_ptr, mean_ptr, penalty_ptr, lengths_ptr, scale_ptr, new_mean_ptr, count, splits, center: tl.float64,
    decay: tl.float64, inverse: tl.float64, share: tl.float64, SQUARED: tl.constexpr, TABLE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program, after the sums; inverse = 1 / parts, share = 2 / count: here they would be in float32."""
    total = tl.zeros((TABLE,), tl.float64)
    squares = tl.zeros((TABLE,), tl.float64)
    for first in range(0, count, TABLE):
        b = first + tl.arange(0, TABLE)
        q, r = norm_of(partial_ptr, b, b < count, splits, inverse, SPLITS)
        total += r
        squares += q
    mean = tl.sum(total, 0) * share * 0.5
    origin = center
    if mean_ptr is not None:
        origin = tl.load(mean_ptr).to(tl.float64)
    a = origin + decay * (mean - origin)
    result = tl.zeros((TABLE,), tl.float64)
    for first in range(0, count, TABLE):
        b = first + tl.arange(0, TABLE)
        mask = b < count
        q, r = norm_of(partial_ptr, b, mask, splits, inverse, SPLITS)
        d = tl.where(mask, r - a, 0.0)
        result += d * d
        slope = share * (d - decay * (mean - a))
        scale = tl.where(r > 0, slope * inverse / tl.where(r > 0, r, 1.0), 0.0)
        if SQUARED:
            scale = tl.zeros((TABLE,), tl.float64) + share
        tl.store(lengths_ptr + b, r, mask)
        tl.store(scale_ptr + b, scale, mask)
    if SQUARED:
        result = squares
    tl.store(penalty_ptr, tl.sum(result, 0) * share * 0.5)
    tl.store(new_mean_ptr, a)


@triton.jit
def penalty_backward_kernel(
    g_ptr, scale_ptr, dpenalty_ptr, dg_ptr, length, stride, out_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    b, block = _sample(tl.cdiv(length, BLOCK))
    i = block * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale_ptr + b) * tl.load(dpenalty_ptr)
    v = tl.load(g_ptr + b * stride + i, i < length, other=0.0).to(WIDE)
    tl.store(dg_ptr + b * out_stride + i, factor * v, i < length)


@triton.jit(do_not_specialize=["seed", "low", "high"])
def interpolate_kernel(
    real_ptr, fake_ptr, out_ptr, seed, low, high, length, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """low, high: the two halves of the generator's offset. The interpolation is torch.lerp's."""
    b, block = _sample(tl.cdiv(length, BLOCK))
    i = block * BLOCK + tl.arange(0, BLOCK)
    zero = b.to(tl.uint32) * 0
    drawn, _, _, _ = tl.philox(seed, b.to(tl.uint32), zero + low.to(tl.uint32), zero + high.to(tl.uint32), zero)
    alpha = tl.uint_to_uniform_float(drawn).to(WIDE)
    real = tl.load(real_ptr + b * stride + i, i < length, other=0.0).to(WIDE)
    fake = tl.load(fake_ptr + b * stride + i, i < length, other=0.0).to(WIDE)
    difference = real - fake
    near = fake + alpha * difference
    far = real - difference * (1.0 - alpha)
    tl.store(out_ptr + b * stride + i, tl.where(alpha < 0.5, near, far), i < length)


def table(count: int, splits: int) -> dict[str, int]:
    """Samples, and partial sums of each, that the last step reads together."""
    rows = min(128, power_of_2(count))
    return {"TABLE": rows, "SPLITS": min(TABLE // rows, power_of_2(splits))}


def penalty(g, mean, penalty, lengths, scale, new_mean, count, length, stride, center, decay, parts, squared) -> None:
    steps = min(MOST, max(1, cdiv(count * length, 2048 * BLOCK)))  # some 2048 programs, if it is that large
    splits = cdiv(length, steps * BLOCK)
    partial = torch.empty(count * splits, dtype=torch.float64, device=g.device)
    with torch.cuda.device_of(g):
        squares_kernel[(count * splits,)](
            g, partial, length, stride, splits, WIDE=wide_dtype(g.dtype), STEPS=steps, BLOCK=BLOCK, **_OPTIONS
        )
        penalty_kernel[(1,)](
            partial, mean, penalty, lengths, scale, new_mean, count, splits, center, decay, 1 / parts, 2 / count,
            SQUARED=squared, **table(count, splits), **_OPTIONS,
        )  # fmt: skip


def penalty_backward(g, scale, dpenalty, dg, count, length, stride, out_stride) -> None:
    with torch.cuda.device_of(g):
        penalty_backward_kernel[(count * cdiv(length, BLOCK),)](
            g, scale, dpenalty, dg, length, stride, out_stride, WIDE=wide_dtype(g.dtype), BLOCK=BLOCK, **_OPTIONS
        )


def interpolate(real, fake, out, seed: int, offset: int, count, length, stride) -> None:
    with torch.cuda.device_of(real):
        interpolate_kernel[(count * cdiv(length, BLOCK),)](
            real, fake, out, seed, offset & 0xFFFFFFFF, offset >> 32, length, stride, WIDE=wide_dtype(real.dtype),
            BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
