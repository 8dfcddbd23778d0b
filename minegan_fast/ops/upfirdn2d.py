"""Resampling with a FIR filter in one pass: zeros between the samples, padding, filter, every down-th sample.

Along each axis, with k taps f, `before` samples of padding in front and `after` behind:

    forward        p[m] = x[(m - before) / up]    where up divides m - before and that sample exists, else 0
                   y[j] = gain sum over t of f[k - 1 - t] p[j down + t]                  (f[t] with flip)
                   j < (up X + before + after - k) // down + 1 = Y
    backward       dx   = the same op on dy: up and down exchanged, flip inverted,
                   before' = k - 1 - before,   after' = k + (X - 1) up - Y down - before'
    second order   ddy  = the same op on ddx: the forward

x, dx, ddx are [B, C, X_h, X_w], y, dy, ddy are [B, C, Y_h, Y_w]; the filter is a constant, [k_h, k_w], or [k] for its
outer product with itself. It is the resampling of StyleGAN (Karras et al. 2018, blur; 2020, appendix B), and with equal
taps nearest-neighbour upsampling and average pooling.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._op import DTYPE_CODES, Op, forced_backend, memory_format, refuse_transforms, run, wide_dtype
from .checks import check_beside, check_tensor

_AXES = ("vertical", "horizontal")


@Op
def upfirdn2d_forward(
    x: Tensor, kernel: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int], flip: bool, gain: float
) -> Tensor:
    """x is contiguous or channels-last, and so is the result; kernel is contiguous, float32 (float64 for float64)."""
    y = _empty_result(x, kernel, up, down, padding)
    if y.numel() == 0:
        return y
    B, C, H, W = x.shape
    stuffed = x.new_zeros(B, C, H * up[0], W * up[1], dtype=kernel.dtype)
    stuffed[:, :, :: up[0], :: up[1]] = x
    padded = F.pad(stuffed, [max(p, 0) for p in padding])
    left, right, top, bottom = (max(-p, 0) for p in padding)
    cropped = padded[:, :, top : padded.shape[2] - bottom, left : padded.shape[3] - right]
    weight = (kernel if kernel.dim() == 2 else torch.outer(kernel, kernel)) * gain
    weight = (weight if flip else weight.flip(0, 1)).expand(C, 1, -1, -1)
    with torch.autocast(x.device.type, enabled=False):
        return y.copy_(F.conv2d(cropped, weight, stride=list(down), groups=C))


class _Upfirdn2d(Function):
    @staticmethod
    def forward(ctx, x, kernel, up, down, padding, flip, gain, backend):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kernel)
        ctx.args = x.shape[2:], up, down, padding, flip, gain, backend
        ctx.format = memory_format(x)
        x = x.contiguous(memory_format=ctx.format)
        return upfirdn2d_forward(x, kernel, up, down, padding, flip, gain, backend=backend)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 8
        refuse_transforms("upfirdn2d", dy)
        (kernel,), (size, up, down, padding, flip, gain, backend) = ctx.saved_tensors, ctx.args
        taps = kernel.shape if kernel.dim() == 2 else 2 * kernel.shape
        before = [k - 1 - p for k, p in zip(taps, padding[2::-2], strict=True)]
        after = [
            k + (X - 1) * u - Y * d - b
            for k, X, u, Y, d, b in zip(taps, size, up, dy.shape[2:], down, before, strict=True)
        ]
        back = [before[1], after[1], before[0], after[0]]
        dy = dy.contiguous(memory_format=ctx.format)
        dx = run(_Upfirdn2d, dy, kernel, down, up, back, not flip, gain, backend)
        return dx, None, None, None, None, None, None, None


def upfirdn2d(
    x: Tensor,
    kernel: Tensor,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsamples, filters and downsamples every channel in one pass; differentiable any number of times in x.

    up - 1 zeros follow each sample, `padding` zeros surround the whole (or are cut off, where negative), `kernel` is
    convolved with it without further padding, and of the result every down-th sample is kept, beginning with the first:
    [B, C, H, W] -> [B, C, H', W'],  H' = (up H + top + bottom - kh) // down + 1.

        2x up     upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4.0)      4 taps of sum 1
        2x down   upfirdn2d(x, taps, down=2, padding=1)
        blur      upfirdn2d(x, taps3, padding=1)
        nearest   upfirdn2d(x, torch.ones(2), up=2, padding=(1, 0, 1, 0))

    Args:
        x: [B, C, H, W], H and W at least 1; float32, float64, bfloat16 or float16. Contiguous and channels-last ones
            are read as they are, and the result has their layout; any other is copied to a contiguous one first.
        kernel: [kh, kw], or the k taps of a separable filter, [k], which run along both axes; on x's device, of any of
            these dtypes. It is not differentiated.
        up, down: factors >= 1; one number, or (vertical, horizontal).
        padding: one number for all sides, or (left, right, top, bottom); negative ones crop the upsampled image.
        flip: correlate instead: the kernel as it is written, not turned by half a turn.
        gain: factor on the result, finite.

    Returns:
        A tensor of x's dtype. Sums are in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: an argument is not as said above, or nothing is left of the image; the message names it.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here or takes no such tensor.
        NotImplementedError: inside a transform of torch.func, vmap, grad or jacrev say.
    """
    if has_torch_function_variadic(x, kernel):
        return handle_torch_function(
            upfirdn2d, (x, kernel), x, kernel, up=up, down=down, padding=padding, flip=flip, gain=gain
        )
    check_tensor(x, "x")
    check_beside(kernel, "kernel", x, "x")
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise ValueError(f"x must have shape [B, C, H >= 1, W >= 1], got {list(x.shape)}")
    if kernel.dim() not in (1, 2) or kernel.numel() == 0:
        raise ValueError(f"kernel must have shape [kh, kw] or [k], no size 0, got {list(kernel.shape)}")
    if kernel.requires_grad:
        raise ValueError("kernel must not require a gradient: the filter is a constant here; pass kernel.detach()")
    if not abs(gain) < math.inf:
        raise ValueError(f"gain must be finite, got {gain}")
    up, down = _numbers("up", up, 2, 1), _numbers("down", down, 2, 1)
    padding = _numbers("padding", padding, 4, None)
    kind = wide_dtype(x.dtype)
    kernel = (kernel if kernel.dtype == kind else kernel.to(kind)).contiguous()
    for axis, size in zip(_AXES, _result_size(x, kernel, up, down, padding), strict=True):
        if size < 1:
            raise ValueError(
                f"nothing is left along the {axis} axis: x {list(x.shape)}, up {up} and padding {padding} give less "
                f"than the kernel {list(kernel.shape)} covers; pad more"
            )
    refuse_transforms("upfirdn2d")
    return run(_Upfirdn2d, x, kernel, up, down, padding, bool(flip), float(gain), forced_backend())


def _numbers(name: str, value: int | Sequence[int], count: int, least: int | None) -> list[int]:
    if type(value) is int and (least is None or value >= least):
        return [value] * count
    numbers = [value] * count if isinstance(value, (int, torch.SymInt)) else value
    sequence = isinstance(numbers, (list, tuple)) and len(numbers) == count
    if not sequence or not all(isinstance(n, (int, torch.SymInt)) and (least is None or n >= least) for n in numbers):
        kind = "an integer" if least is None else f"an integer >= {least}"
        order = "(vertical, horizontal)" if count == 2 else "(left, right, top, bottom)"
        raise ValueError(f"{name} must be {kind} or {count} of them, {order}, got {value!r}")
    return list(numbers)


def _result_size(x, kernel, up, down, padding) -> list[int]:
    taps = kernel.shape if kernel.dim() == 2 else 2 * kernel.shape
    around = padding[2] + padding[3], padding[0] + padding[1]
    return [(X * u + p - k) // d + 1 for X, u, p, k, d in zip(x.shape[2:], up, around, taps, down, strict=True)]


def _empty_result(x, kernel, up, down, padding) -> Tensor:
    size = *x.shape[:2], *_result_size(x, kernel, up, down, padding)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


# Launchers. x is dense, kernel is contiguous and of the type in which sums are: upfirdn2d and _Upfirdn2d saw to it.


def _geometry(x: Tensor, y: Tensor, kernel: Tensor, up, down, padding) -> tuple[Sequence[int], ...]:
    """[outer, inner] of x as it lies in memory, [outer, H, W, inner]; sizes of x, of y, of the kernel; the rest."""
    B, C = x.shape[:2]
    outer = [B, C] if memory_format(x) == torch.channels_last else [B * C, 1]
    return outer, x.shape[2:], y.shape[2:], kernel.shape, up, down, padding[2::-2]


@upfirdn2d_forward.register("cpp")
def _(native, x, kernel, up, down, padding, flip, gain):
    y = _empty_result(x, kernel, up, down, padding)
    geometry = _geometry(x, y, kernel, up, down, padding)
    addresses = x.data_ptr(), kernel.data_ptr(), y.data_ptr()
    native.upfirdn2d_cpu(DTYPE_CODES[x.dtype], *addresses, *geometry, flip, gain, torch.get_num_threads())
    return y


@upfirdn2d_forward.register("triton")
def _(kernels, x, kernel, up, down, padding, flip, gain):
    y = _empty_result(x, kernel, up, down, padding)
    kernels.upfirdn2d(x, kernel, y, *_geometry(x, y, kernel, up, down, padding), flip, gain)
    return y
