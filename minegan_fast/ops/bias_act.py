"""Bias, activation and gain in one pass: the layer between the convolutions of StyleGAN and StyleGAN2 (Karras et al. 2019, 2020).

    forward        y   = a(x + b) gain
    backward       dx  = dy m,  db = sum of dx over all axes but `dim`
    second order   ddy = (ddx + ddb) m                                    (cotangents ddx of dx and ddb of db)

with a(v) = v for v > 0, else slope v: relu has slope 0, leaky relu its alpha, linear 1; and m = gain where y > 0, else slope gain.
As gain > 0 and slope >= 0, y shows on which side x + b was: y is saved and not x, which the layer before it may free. m is piecewise
constant, so backward and second order are each other's adjoint, and every higher order is one of the two.
"""

import math

import torch
from torch.autograd import Function
from torch.nn import functional as F

from ._op import FLOATS, Op, forced_backend


@Op
def bias_act_forward(x: torch.Tensor, b: torch.Tensor | None, dim: int, slope: float, gain: float) -> torch.Tensor:
    v = x if b is None else x + _along(b, x, dim)
    y = v if slope == 1 else F.relu(v) if slope == 0 else F.leaky_relu(v, slope)
    return y * gain


@Op
def bias_act_backward(
    dy: torch.Tensor, y: torch.Tensor, dim: int, slope: float, gain: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.where(y > 0, dy * gain, dy * (slope * gain))
    return dx, _sum_to(dx, dim)


@Op
def bias_act_double_backward(
    ddx: torch.Tensor, ddb: torch.Tensor | None, y: torch.Tensor, dim: int, slope: float, gain: float
) -> torch.Tensor:
    v = ddx if ddb is None else ddx + _along(ddb, y, dim)
    return torch.where(y > 0, v * gain, v * (slope * gain))


def _along(b: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    return b.view([-1 if d == dim else 1 for d in range(x.dim())])


def _sum_to(dx: torch.Tensor, dim: int) -> torch.Tensor:
    return dx.sum([d for d in range(dx.dim()) if d != dim]) if dx.dim() > 1 else dx.clone()


class _BiasAct(Function):
    @staticmethod
    def forward(ctx, x, b, dim, slope, gain, backend):
        y = bias_act_forward(_dense(x), b, dim, slope, gain, backend=backend)
        ctx.args = (dim, slope, gain, backend)
        if slope != 1:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        dim, slope, gain, _ = ctx.args
        need_dx, need_db = ctx.needs_input_grad[:2]
        if slope == 1:
            dx = dy if gain == 1 else dy * gain
            return dx if need_dx else None, _sum_to(dx, dim) if need_db else None, None, None, None, None
        (y,) = ctx.saved_tensors
        if need_db:
            dx, db = _BiasActBackward.apply(dy, y, *ctx.args)
        else:
            dx, db = _BiasActDoubleBackward.apply(dy, None, y, *ctx.args), None
        return dx, db, None, None, None, None


class _BiasActBackward(Function):
    @staticmethod
    def forward(ctx, dy, y, dim, slope, gain, backend):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        ctx.args = (dim, slope, gain, backend)
        return bias_act_backward(_laid_out_like(y, dy), y, dim, slope, gain, backend=backend)

    @staticmethod
    def backward(ctx, ddx, ddb):
        (y,) = ctx.saved_tensors
        if ddx is None and ddb is None:
            return (None,) * 6
        if ddx is None:
            ddx, ddb = _along(ddb, y, ctx.args[0]).expand_as(y), None
        return _BiasActDoubleBackward.apply(ddx, ddb, y, *ctx.args), None, None, None, None, None


class _BiasActDoubleBackward(Function):
    @staticmethod
    def forward(ctx, ddx, ddb, y, dim, slope, gain, backend):
        ctx.save_for_backward(y)
        ctx.args = (dim, slope, gain, backend)
        return bias_act_double_backward(_laid_out_like(y, ddx), ddb, y, dim, slope, gain, backend=backend)

    @staticmethod
    def backward(ctx, dddy):
        (y,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            dx, db = _BiasActBackward.apply(dddy, y, *ctx.args)
        else:
            dx, db = _BiasActDoubleBackward.apply(dddy, None, y, *ctx.args), None
        return dx, db, None, None, None, None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return x if any(x.is_contiguous(memory_format=f) for f in formats) else x.contiguous()


def _laid_out_like(y: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return dy if dy.stride() == y.stride() else torch.empty_like(y).copy_(dy)


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float = 0.2,
    gain: float = 1.0,
) -> torch.Tensor:
    """act(x + b) * gain in one pass, differentiable any number of times.

    Args:
        x: any shape with at least one dimension; float32, float64, bfloat16 or float16. Contiguous and channels-last tensors are read as
            they are and keep their layout; any other is made contiguous first.
        b: [x.shape[dim]], same device, any of these dtypes (converted to x's); None for no bias.
        dim: the axis of x along which b runs; may be negative.
        act: "linear", "relu" or "lrelu" (leaky relu).
        alpha: slope of "lrelu" below zero, finite and >= 0; the others ignore it.
        gain: factor on the result, finite and > 0.

    Returns:
        A tensor of x's shape and dtype; x itself where there is nothing to do. Sums for b's gradient run in float32 (float64 for float64)
        in a fixed order: two runs give the same bits.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: a backend was forced that is missing or takes no such tensors.
    """
    if torch.overrides.has_torch_function_variadic(x, b):
        return torch.overrides.handle_torch_function(bias_act, (x, b), x, b, dim=dim, act=act, alpha=alpha, gain=gain)
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x must be a float32, float64, bfloat16 or float16 tensor, got {_kind(x)}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of x, whose shape is {list(x.shape)}, got {dim}")
    if act not in ("linear", "relu", "lrelu"):
        raise ValueError(f'act must be "linear", "relu" or "lrelu", got {act!r}')
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be finite and >= 0, got {alpha}")
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be finite and > 0, got {gain}")
    dim %= x.dim()
    if b is not None:
        if not isinstance(b, torch.Tensor) or b.dtype not in FLOATS:
            raise TypeError(f"b must be a float32, float64, bfloat16 or float16 tensor or None, got {_kind(b)}")
        if b.shape != (x.shape[dim],):
            raise ValueError(
                f"b must have shape [{x.shape[dim]}], the size of x {list(x.shape)} along dim {dim}, got {list(b.shape)}"
            )
        if b.device != x.device:
            raise ValueError(f"b must be on x's device {x.device}, got {b.device}; move it with b.to(x.device)")
        b = b.to(x.dtype)
    slope = 1.0 if act == "linear" else 0.0 if act == "relu" else float(alpha)
    if b is None and slope == 1 and gain == 1:
        return x
    return _BiasAct.apply(x, b, dim, slope, float(gain), forced_backend())


def _kind(x) -> str:
    return str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
