"""Bias, activation and gain in one pass: what follows a convolution in StyleGAN2 (Karras et al. 2020).

    forward        y   = a(x + b) gain
    backward       dx  = dy m,  db = sum of dx over all axes but `dim`
    second order   ddy = (ddx + ddb) m                         for cotangents ddx of dx and ddb of db

a(v) = v for v > 0, else slope v: relu has slope 0, leaky relu its alpha, linear 1; m = gain where y > 0, else slope
gain. As gain > 0 and slope >= 0, y tells on which side of the kink x + b was: y is saved, and x is free to go. m is
piecewise constant, so backward and second order are each other's adjoint, and every higher order is one of the two.
x, y, dx, dy, ddx, ddy have one shape; b, db, ddb have the shape [x.shape[dim]].
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._op import DTYPE_CODES, Op, backward_wants, device_and_stream, forced_backend, refuse_transforms, run, wide_dtype
from .checks import check_beside, check_factor, check_tensor

_SLOPES = {"linear": 1.0, "relu": 0.0}


@Op
def bias_act_forward(x: Tensor, b: Tensor | None, y: Tensor | None, dim: int, slope: float, gain: float) -> Tensor:
    """a(x + b) gain. Where y is given, its sign stands for that of x + b, which makes this the second order."""
    v = x if b is None else x + b.view(_along(dim, x))
    if y is not None:
        return torch.where(y > 0, v, v * slope if slope else 0.0) * gain
    return (v if slope == 1 else F.leaky_relu(v, slope) if slope else F.relu(v)) * gain


@Op
def bias_act_backward(dy: Tensor, y: Tensor, dim: int, slope: float, gain: float) -> tuple[Tensor, Tensor]:
    dx = torch.where(y > 0, dy, dy * slope if slope else 0.0) * gain
    return dx, _sum_to(dim, dx)


class _BiasAct(Function):
    @staticmethod
    def forward(ctx, x, b, dim, slope, gain, backend):
        ctx.set_materialize_grads(False)
        ctx.bias = b if b is None else (b.shape, b.dtype, b.device)
        y = bias_act_forward(_dense(x), b, None, dim, slope, gain, backend=backend)
        ctx.args = (dim, slope, gain, backend)
        ctx.save_for_backward(y if slope != 1 else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_transforms("bias_act", dy)
        (y,), (dim, _, gain, _) = ctx.saved_tensors, ctx.args
        need_dx, need_db = backward_wants(ctx, 0), backward_wants(ctx, 1)
        dx = db = None
        if dy is None:  # of a second order that does not depend on x; a bias has a gradient all the same
            db = torch.zeros(ctx.bias[0], dtype=ctx.bias[1], device=ctx.bias[2]) if need_db else None
        elif y is None:
            dx = dy if gain == 1 else dy * gain
            db = _sum_to(dim, dx) if need_db else None
        elif need_db:
            dx, db = run(_BiasActBackward, dy, y, *ctx.args)
        else:
            dx = run(_BiasActDoubleBackward, dy, None, y, *ctx.args)
        return dx if need_dx else None, db, None, None, None, None


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
        ddy = None
        if ddx is not None:
            ddy = run(_BiasActDoubleBackward, ddx, ddb, y, *ctx.args)
        elif ddb is not None:
            ddx = ddb.view(_along(ctx.args[0], y)).expand_as(y)
            ddy = run(_BiasActDoubleBackward, ddx, None, y, *ctx.args)
        return ddy, None, None, None, None, None


class _BiasActDoubleBackward(Function):
    @staticmethod
    def forward(ctx, ddx, ddb, y, dim, slope, gain, backend):
        ctx.save_for_backward(y)
        ctx.args = (dim, slope, gain, backend)
        ddb = ddb if ddb is None else ddb.contiguous()
        return bias_act_forward(_laid_out_like(y, ddx), ddb, y, dim, slope, gain, backend=backend)

    @staticmethod
    def backward(ctx, dddy):
        (y,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            dx, db = run(_BiasActBackward, dddy, y, *ctx.args)
        else:
            dx, db = run(_BiasActDoubleBackward, dddy, None, y, *ctx.args), None
        return dx, db, None, None, None, None, None


def bias_act(
    x: Tensor, b: Tensor | None = None, *, dim: int = 1, act: str = "linear", alpha: float = 0.2, gain: float = 1.0
) -> Tensor:
    """act(x + b) * gain in one pass, differentiable any number of times.

    Args:
        x: any shape; float32, float64, bfloat16 or float16. Contiguous and channels-last ones are read as they are, and
            the result has their layout; any other is copied to a contiguous one first.
        b: [x.shape[dim]], on x's device, of any of these dtypes (converted to x's: under autocast a float32 parameter
            meets half-precision activations); None for no bias.
        dim: the axis of x along which b runs, may be negative; ignored without b.
        act: "linear", "relu" or "lrelu" (leaky relu).
        alpha: slope of "lrelu" below zero, finite and >= 0; the others ignore it.
        gain: factor on the result, finite and > 0.

    Returns:
        A tensor of x's shape and dtype (x itself where there is nothing to compute). The gradient of b is summed in
        float32 (float64 for float64) and in a fixed order: the same inputs give the same bits.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message names it.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here or takes no such tensor.
        NotImplementedError: inside a transform of torch.func, vmap, grad or jacrev say.
    """
    if has_torch_function_variadic(x, b):
        return handle_torch_function(bias_act, (x, b), x, b, dim=dim, act=act, alpha=alpha, gain=gain)
    check_tensor(x, "x")
    if act not in ("linear", "relu", "lrelu"):
        raise ValueError(f'act must be "linear", "relu" or "lrelu", got {act!r}')
    check_factor(alpha, "alpha", zero=True)
    check_factor(gain, "gain")
    if b is not None:
        check_beside(b, "b", x, "x", optional=True)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be an axis of x, whose shape is {list(x.shape)}, got {dim}")
        if b.shape != x.shape[dim : dim + 1 or None]:
            raise ValueError(f"b must have shape [{x.shape[dim]}], x's size along dim {dim}, got {list(b.shape)}")
        b = (b if b.dtype == x.dtype else b.to(x.dtype)).contiguous()
    slope = _SLOPES.get(act, float(alpha))
    if b is None and slope == 1 and gain == 1:
        return x
    refuse_transforms("bias_act")
    return run(_BiasAct, x, b, dim % max(x.dim(), 1), slope, float(gain), forced_backend())


def _along(dim: int, x: Tensor) -> list[int]:
    return [-1 if d == dim else 1 for d in range(x.dim())]


def _sum_to(dim: int, dx: Tensor) -> Tensor:
    return dx.sum([d for d in range(dx.dim()) if d != dim]) if dx.dim() > 1 else dx.clone()


def _dense(x: Tensor) -> Tensor:
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return x if any(x.is_contiguous(memory_format=f) for f in formats) else x.contiguous()


def _laid_out_like(y: Tensor, dy: Tensor) -> Tensor:
    return dy if dy.stride() == y.stride() else torch.empty_like(y).copy_(dy)


# Launchers. x, y, dy are dense and laid out alike, b is contiguous: bias_act, _dense and _laid_out_like saw to it.


def _axis(x: Tensor, dim: int | None) -> tuple[int, int, int]:
    """x as it lies in memory: [outer, C, inner], C its axis `dim`, inner the stride of that; one channel for None."""
    n, C = x.numel(), 1 if dim is None else x.shape[dim]
    if n == 0:
        return 0, C, 1
    inner = n if dim is None or C == 1 else x.stride(dim)
    return n // (C * inner), C, inner


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


@bias_act_forward.register("cpp")
def _(native, x, b, y, dim, slope, gain):
    out = torch.empty_like(x)
    axis = _axis(x, None if b is None else dim)
    native.bias_act_cpu(DTYPE_CODES[x.dtype], *_addresses(x, b, y, out), *axis, slope, gain, torch.get_num_threads())
    return out


@bias_act_backward.register("cpp")
def _(native, dy, y, dim, slope, gain):
    dx, db = torch.empty_like(dy), dy.new_empty(dy.shape[dim])
    addresses, axis = _addresses(dy, y, dx, db), _axis(dy, dim)
    native.bias_act_backward_cpu(DTYPE_CODES[dy.dtype], *addresses, *axis, slope, gain, torch.get_num_threads())
    return dx, db


@bias_act_forward.register("triton")
def _(kernels, x, b, y, dim, slope, gain):
    return kernels.bias_act(x, b, y, _axis(x, None if b is None else dim), slope, gain)


@bias_act_backward.register("triton")
def _(kernels, dy, y, dim, slope, gain):
    return kernels.bias_act_backward(dy, y, _axis(dy, dim), slope, gain)


@bias_act_forward.register("cuda")
def _(native, x, b, y, dim, slope, gain):
    out = torch.empty_like(x)
    axis = _axis(x, None if b is None else dim)
    native.bias_act_cuda(DTYPE_CODES[x.dtype], *_addresses(x, b, y, out), *axis, slope, gain, *device_and_stream(x))
    return out


@bias_act_backward.register("cuda")
def _(native, dy, y, dim, slope, gain):
    axis = _axis(dy, dim)
    dx, db = torch.empty_like(dy), dy.new_empty(dy.shape[dim])
    splits = native.bias_act_backward_splits(*axis)
    partial = dy.new_empty(dy.shape[dim], splits, dtype=wide_dtype(dy.dtype))
    addresses = _addresses(dy, y, dx, db, partial)
    native.bias_act_backward_cuda(DTYPE_CODES[dy.dtype], *addresses, *axis, slope, gain, *device_and_stream(dy))
    return dx, db
