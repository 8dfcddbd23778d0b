"""How a penalty on its gradient runs a critic: with the same values, and a second order that costs what it has to.

Inside `second_order()` these functions of torch, on plain tensors, are Functions of this library:

    convolutions, transposed ones, F.linear     `layer`: the outer weight gradient of a penalty is a weight gradient
    relu, leaky_relu                            y = x m,  gx = gy m,  dgy = hx m;  m = 1 where y > 0, else the slope
    avg_pool2d                                  y = P x,  gx = P^T gy,  dgy = P hx

PyTorch makes the derivative of gx by x a tensor of zeros. It travels through the whole first pass, at the cost of an
input gradient and a weight gradient in each layer. Here it is None, and a Function that gets None computes nothing.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import (
    avg_pool2d,
    avg_pool2d_backward,
    is_tracing,
    leaky_relu_backward,
    saved_tensors_are_hooked,
    threshold_backward,
    transforms_active,
)
from ..ops._op import DTYPE_CODES
from .bilinear import functions_of, layer, needs_torch


class _Rectifier(Function):
    """ReLU where slope is None, else leaky ReLU. A slope of 0 would not do for ReLU: it gives zeros a sign."""

    @staticmethod
    def forward(ctx, x, slope, inplace):
        ctx.set_materialize_grads(False)
        ctx.slope = slope
        if inplace:
            ctx.mark_dirty(x)
            y = torch.relu_(x) if slope is None else F.leaky_relu_(x, slope)
        else:
            y = torch.relu(x) if slope is None else F.leaky_relu(x, slope)
        # As PyTorch's own: what follows may write into the output of a leaky ReLU, and not into that of a ReLU.
        ctx.save_for_backward(y if inplace or slope is None else x)
        return y

    @staticmethod
    def backward(ctx, gy):
        (side,) = ctx.saved_tensors
        return None if gy is None else _rectified(gy, side, ctx.slope), None, None


class _Rectified(Function):
    """gy m, linear in gy. `side` is the input or the output, of which only the sign is read."""

    @staticmethod
    def forward(ctx, gy, side, slope):
        ctx.set_materialize_grads(False)
        ctx.slope = slope
        ctx.save_for_backward(side)
        return _masked(gy, side, slope)

    @staticmethod
    def backward(ctx, hx):
        (side,) = ctx.saved_tensors
        return None if hx is None else _rectified(hx, side, ctx.slope), None, None


def _masked(gy, side, slope):
    if slope is None:
        return threshold_backward(gy, side, 0)
    return leaky_relu_backward(gy, side, slope, False)


def _rectified(gy, side, slope):
    return (_masked if needs_torch(gy) else _Rectified.apply)(gy, side, slope)


class _Pool(Function):
    @staticmethod
    def forward(ctx, x, arguments):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.arguments = x.shape, arguments
        return avg_pool2d(x, *arguments)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return None, None
        if needs_torch(gy):
            return avg_pool2d_backward(gy, gy.new_empty(ctx.shape), *ctx.arguments), None
        return _Pooled.apply(gy, ctx.shape, ctx.arguments), None


class _Pooled(Function):
    """P^T gy."""

    @staticmethod
    def forward(ctx, gy, shape, arguments):
        ctx.set_materialize_grads(False)
        ctx.arguments = arguments
        last = gy.ndim == 4 and not gy.is_contiguous() and gy.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, dtype=gy.dtype, device=gy.device, memory_format=layout)  # only its shape is read
        return avg_pool2d_backward(gy, x, *arguments)

    @staticmethod
    def backward(ctx, hx):
        if hx is None:
            return None, None, None
        return (avg_pool2d(hx, *ctx.arguments) if needs_torch(hx) else _Pool.apply(hx, ctx.arguments)), None, None


class _Present(Function):
    """The bias of a norm, passed on. Where the norm has no gradient for it, this backward gets zeros and returns them.

    PyTorch's norms give such a bias zeros too, since their own gradient is zeros there and not None.
    """

    @staticmethod
    def forward(ctx, bias):
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx, gb):
        return gb


def _is_plain(x) -> bool:
    return (type(x) is Tensor or type(x) is nn.Parameter) and x.dtype in DTYPE_CODES and x.layout is torch.strided


def _are_operands(x, weight, bias, dims: int) -> bool:
    """Whether these are plain tensors of one dtype and device, the weight with `dims` axes, and autocast is off."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    alike = all(_is_plain(t) and t.dtype == x.dtype and t.device == x.device for t in tensors)
    return alike and weight.ndim == dims and x.numel() > 0 and not torch.is_autocast_enabled(x.device.type)


def _layer(input, weight, bias, ndim: int):
    if not _are_operands(input, weight, bias, ndim):
        return NotImplemented
    if ndim == 2 and (input.ndim == 0 or input.shape[-1] != weight.shape[1]):
        return NotImplemented
    return lambda op, x: layer(op, x, weight, bias)


def _rectifier(slope: float, inplace: bool):
    def rectifier(input, negative_slope=slope, inplace=inplace):
        # With a slope below 0 the output would not tell the side.
        if not _is_plain(input) or not isinstance(negative_slope, int | float) or not negative_slope >= 0:
            return NotImplemented
        return _Rectifier.apply(input, float(negative_slope), bool(inplace))

    return rectifier


def _relu(inplace: bool):
    def relu(input, inplace=inplace):
        return _Rectifier.apply(input, None, bool(inplace)) if _is_plain(input) else NotImplemented

    return relu


def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    if not _is_plain(input):
        return NotImplemented
    sizes = ([size] if isinstance(size, int) else list(size) for size in (kernel_size, stride or (), padding))
    return _Pool.apply(input, (*sizes, ceil_mode, count_include_pad, divisor_override))


def _norm(function, place: int):
    """A norm of torch whose bias goes through `_Present`. place: that of the bias among the arguments."""

    def norm(*args, **kwargs):
        bias = kwargs.get("bias") if len(args) <= place else args[place]
        if bias is None or not _is_plain(bias):
            return NotImplemented
        if len(args) <= place:
            return function(*args, **kwargs | {"bias": _Present.apply(bias)})
        return function(*args[:place], _Present.apply(bias), *args[place + 1 :], **kwargs)

    return norm


_FUNCTIONS = {
    **functions_of(_layer),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu(False)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu(True)),
    F.leaky_relu: _rectifier(0.01, False),
    F.leaky_relu_: _rectifier(0.01, True),
    F.avg_pool2d: _avg_pool2d,
    **{function: _norm(function, 4) for function in (F.batch_norm, F.instance_norm)},
    **{function: _norm(function, 3) for function in (F.layer_norm, F.group_norm)},
}


class _SecondOrder(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = _FUNCTIONS.get(func)
        if known is not None and _may_replace():
            y = known(*args, **kwargs)
            if y is not NotImplemented:
                return y
        return func(*args, **kwargs)


def _may_replace() -> bool:
    """Whether our Functions may take the place of PyTorch's.

    They may not where nothing is differentiated, nor where someone else watches or repeats what PyTorch's functions do:
    transforms, tracers, and hooks on saved tensors, by which checkpointing compares a repetition with the first run.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not is_tracing()
        and not saved_tensors_are_hooked()
    )


def second_order() -> AbstractContextManager[object]:
    """Inside this context a network is run for a loss that depends on its gradient; values are as outside.

    Weights get the gradients that they would get outside, to rounding, any number of times; a parameter on which the
    loss does not depend may have none instead of zeros. Tensors of other types (held weights of a SparseFinetuner among
    them), autocast, transforms of torch.func, compiled and traced code, checkpointed parts, and functions that are not
    in the table above are left as they are. Holds in the current thread.
    """
    return nullcontext() if torch.compiler.is_compiling() else _SecondOrder()
