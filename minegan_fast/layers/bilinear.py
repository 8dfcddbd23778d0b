"""Linear layers and convolutions whose derivatives of any order are layers and weight gradients again.

    layer             y  = L(x, W) + b      gx  = I(gy, W),   gW = G(x, gy),    gb = gy summed per channel
    input gradient    gx = I(gy, W)         dgy = L(hx, W),   dW = G(hx, gy)    for a cotangent hx of gx
    weight gradient   gW = G(x, gy)         dx  = I(gy, V),   dgy = L(x, V)     for a cotangent V of gW

L, I and G are bilinear with <L(x, W), gy> = <x, I(gy, W)> = <W, G(x, gy)>, so the table closes. PyTorch's own double
backward of a convolution writes G(hx, gy) as a convolution whose kernel has the size of an image, at twice its cost.

Where only some rows of W train (`trained`), `row_gradient` gives their gradient, and G of the other rows is not
computed. A gradient that is None stays None and costs nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .._torch import apply_function, convolution, convolution_backward, is_batched, without_view
from ..ops._op import backward_wants
from ..ops.row_gradient import dense_is_faster, gradient_of_rows
from ..ops.transposed_conv2d import transposed_forward


@dataclass(frozen=True)
class Linear:
    """x [..., I], W [O, I] -> [..., O].

    forward, input_gradient and weight_gradient are L, I and G, without derivatives; row_gradient is G of `rows`,
    [k, ...], from gy of all outputs, and sample_gradients that of every sample apart, [B, ...]. as_torch is L with
    PyTorch's own derivatives.
    """

    name = "linear"
    channel = -1
    axis = 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return y if x.ndim == 2 else without_view(y, (*x.shape[:-1], len(weight)))

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: Sequence[int], like: Tensor | None) -> Tensor:
        return without_view(gy.reshape(-1, gy.shape[-1]) @ weight, shape)

    def weight_gradient(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        return gy.reshape(-1, gy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])

    def row_gradient(self, x: Tensor, gy: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        gy = _selected(gy, rows, self.channel)
        with _exactly(x):
            return self.weight_gradient(x, gy, weight)

    def sample_gradients(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        return gy.reshape(len(x), -1, weight.shape[0]).mT @ x.reshape(len(x), -1, weight.shape[1])

    def geometry(self, weight: Tensor) -> tuple[()]:
        return ()

    def as_torch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Conv:
    """x [B, Ci, *S], W [Co, Ci / groups, *K], transposed [Ci, Co / groups, *K] -> [B, Co, *P]. Methods: as `Linear`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    channel = 1

    @property
    def name(self) -> str:
        return f"conv{'_transpose' if self.transposed else ''}{len(self.stride)}d"

    @property
    def axis(self) -> int:
        return 1 if self.transposed else 0

    @property
    def _arguments(self):
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self == _UPSAMPLING and bias is None:
            return transposed_forward(x, weight)
        return convolution(x, weight, bias, *self._arguments)

    def input_gradient(self, gy: Tensor, weight: Tensor, shape: Sequence[int], like: Tensor | None) -> Tensor:
        if like is None:
            like = _shaped(gy, shape)
        return convolution_backward(gy, like, weight, None, *self._arguments, (True, False, False))[0]

    def weight_gradient(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        return convolution_backward(gy, x, weight, None, *self._arguments, (False, True, False))[1]

    def row_gradient(self, x: Tensor, gy: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        group = None if self.groups == 1 else rows // (weight.shape[0] // self.groups)
        geometry = list(weight.shape[2:]), self.stride, self.padding, self.dilation, self.transposed, self.groups
        return gradient_of_rows(x, gy, *geometry, group, rows if len(rows) < gy.shape[1] else None)

    def sample_gradients(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        # The samples become the groups of one convolution, which has a weight for each of them. Only its shape is read.
        B = len(x)
        many = x.new_empty(()).expand(B * weight.shape[0], *weight.shape[1:])
        x, gy = (t.reshape(1, -1, *t.shape[2:]) for t in (x, gy))
        arguments = (*self._arguments[:-1], B * self.groups)
        return convolution_backward(gy, x, many, None, *arguments, (False, True, False))[1].view(B, *weight.shape)

    def geometry(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        return tuple(weight.shape[2:]), self.stride, self.transposed

    def as_torch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self._arguments)


_UPSAMPLING = Conv((2, 2), (0, 0), (1, 1), 1, True, (0, 0))


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several, as a gradient does where torch.autograd.grad was given is_grads_batched=True."""
    return not torch.compiler.is_compiling() and is_batched(tensor)


def _shaped(gy: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of that shape and of gy's layout, of which nothing else is read.

    On a GPU it is one element, expanded, unless gy is channels-last; elsewhere the backward would make it dense.
    """
    last = gy.dim() == 4 and not gy.is_contiguous() and not _is_batched(gy)
    last = last and gy.is_contiguous(memory_format=torch.channels_last)
    if gy.is_cuda and not last:
        return gy.new_empty(1).expand(shape)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=gy.dtype, device=gy.device, memory_format=layout)


def _exactly(x: Tensor):
    """A context without autocast. A backward may run under autocast, and its tensors must keep their dtypes."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _selected(gy: Tensor, rows: Tensor | None, axis: int) -> Tensor:
    return gy if rows is None or len(rows) == gy.shape[axis] else gy.index_select(axis, rows)


def needs_torch(*tensors: Tensor | None) -> bool:
    """Whether these are to go through torch's own operations: from a batched tensor no Function's graph comes out."""
    return torch.is_grad_enabled() and any(t is not None and _is_batched(t) for t in tensors)


def _whole(op, trained, weight, rows) -> Tensor:
    """The weight, where it matters with the graph of its rows."""
    if weight is None:
        return trained
    if trained is None or not torch.is_grad_enabled():
        return weight
    return weight.index_copy(op.axis, rows, trained.to(weight.dtype))


def _forward(op, x, trained, weight, rows) -> Tensor:
    if needs_torch(x, trained):
        with _exactly(x):
            return op.as_torch(x, _whole(op, trained, weight, rows), None)
    return _Layer.apply(x, trained, None, None, weight, rows, None, op)


def _gradient_of_rows(op, x, gy, trained, weight, rows) -> Tensor:
    """dW of the rows, along the weight's own axis. Where `weight` is None `trained` is the whole weight."""
    if needs_torch(x, gy):
        with _exactly(x):
            gradient = op.weight_gradient(x, gy, trained if weight is None else weight)
        return gradient if weight is None else gradient.index_select(op.axis, rows)
    if weight is None:
        return _WeightGradient.apply(x, gy, trained.detach(), op)
    n = weight.shape[op.axis]
    if len(rows) < n and dense_is_faster(len(rows), n, x, *op.geometry(weight)):
        gradient = op.row_gradient(x, gy, weight, torch.arange(n, device=rows.device)).index_select(0, rows)
    else:
        gradient = op.row_gradient(x, gy, weight, rows)
    return gradient.movedim(0, op.axis)


def _input_gradient(gy, trained, weight, rows, op, shape, like) -> Tensor:
    if torch.is_grad_enabled() and not needs_torch(gy, trained):
        return _InputGradient.apply(gy, trained, weight, rows, op, shape, like)
    with _exactly(gy):  # a first derivative, of which no second one is asked, or one in torch's own operations
        return op.input_gradient(gy, _whole(op, trained, weight, rows), shape, like)


class _Layer(Function):
    @staticmethod
    def forward(ctx, x, trained, bias, bias_trained, weight, rows, bias_rows, op):
        ctx.set_materialize_grads(False)
        ctx.op, ctx.shape = op, x.shape
        biases = bias_trained if bias_trained is not None else bias
        ctx.biases = biases if biases is None else (biases.numel(), biases.dtype)
        first = 1 + (trained is not None)
        ctx.places = 0, 1, first, first + (bias is not None)  # of the four among the inputs that are tensors
        ctx.rows, ctx.bias_rows = rows, bias_rows  # nobody writes to them, so they need no version
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, trained, weight)
        with _exactly(x):
            return op.forward(x, trained if weight is None else weight, bias)

    @staticmethod
    def backward(ctx, gy):
        x, trained, weight = ctx.saved_tensors
        op, rows = ctx.op, ctx.rows
        wants = [backward_wants(ctx, i, place) for i, place in enumerate(ctx.places)]
        gx = gtrained = total = None
        if gy is not None and wants[0]:
            like = x if x is None else x.detach()
            gx = _input_gradient(gy, trained, weight, rows, op, ctx.shape, like)
        if gy is not None and wants[1]:
            gtrained = _gradient_of_rows(op, x, gy, trained, weight, rows)
        if wants[2] or wants[3]:
            if gy is None:  # PyTorch gives zeros, not None, to a bias that a penalty does not depend on; so do we
                size, dtype = ctx.biases
                total = (trained if weight is None else weight).new_zeros(size, dtype=dtype)
            else:
                chosen = _selected(gy, ctx.bias_rows if wants[3] else None, op.channel)
                channel = op.channel % gy.ndim
                total = chosen.sum([d for d in range(gy.ndim) if d != channel]) if gy.ndim > 1 else chosen
        return gx, gtrained, total if wants[2] else None, total if wants[3] else None, None, None, None, None


class _InputGradient(Function):
    @staticmethod
    def forward(ctx, gy, trained, weight, rows, op, shape, like):
        ctx.set_materialize_grads(False)
        ctx.op = op
        ctx.save_for_backward(gy if ctx.needs_input_grad[1] else None, trained, weight, rows)
        with _exactly(gy):
            return op.input_gradient(gy, trained if weight is None else weight, shape, like)

    @staticmethod
    def backward(ctx, hx):
        gy, trained, weight, rows = ctx.saved_tensors
        dgy = dtrained = None
        if hx is not None and backward_wants(ctx, 0):
            dgy = _forward(ctx.op, hx, trained, weight, rows)
        if hx is not None and backward_wants(ctx, 1):
            dtrained = _gradient_of_rows(ctx.op, hx, gy, trained, weight, rows)
        return dgy, dtrained, None, None, None, None, None


class _WeightGradient(Function):
    """G. Of `weight` only the shape and the layout are read, which are those of the result."""

    @staticmethod
    def forward(ctx, x, gy, weight, op):
        ctx.set_materialize_grads(False)
        ctx.op = op
        needs = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x if needs[1] else None, gy if needs[0] else None)
        with _exactly(x):
            return op.weight_gradient(x, gy, weight)

    @staticmethod
    def backward(ctx, V):
        x, gy = ctx.saved_tensors
        dx = dgy = None
        if V is not None and backward_wants(ctx, 0):
            dx = _input_gradient(gy, V, None, None, ctx.op, ctx.shape, x if x is None else x.detach())
        if V is not None and backward_wants(ctx, 1):
            dgy = _forward(ctx.op, x, V, None, None)
        return dx, dgy, None, None


class _ScaledLayer(Function):
    """f · layer(x, W) with one factor f. Its gradient ⟨dy, layer(x, W)⟩ = ⟨Wᵀ dy, x⟩ needs no saved output."""

    @staticmethod
    def forward(ctx, x, trained, factor, weight, rows, op):
        ctx.set_materialize_grads(False)
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(x, trained, factor, weight, rows)
        with _exactly(x):
            return op.forward(x, (weight * factor).to(trained.dtype), None)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return None, None, None, None, None, None
        x, trained, factor, weight, rows = ctx.saved_tensors
        wanted = [backward_wants(ctx, i) for i in range(3)]
        gx = gtrained = gfactor = None
        if wanted[0] or wanted[2]:
            unscaled = _input_gradient(gy, trained, weight.to(trained.dtype), rows, ctx.op, ctx.shape, x.detach())
            gx = unscaled * factor.to(gy.dtype) if wanted[0] else None
            gfactor = (unscaled * x).sum(dtype=factor.dtype) if wanted[2] else None
        if wanted[1]:
            gtrained = _gradient_of_rows(ctx.op, x, gy, trained, weight, rows) * factor.to(gy.dtype)
        return gx, gtrained, gfactor, None, None, None


def layer(op: Linear | Conv, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """op of plain tensors of one dtype and device, differentiable any number of times in each; weight as in `op`."""
    return apply_function(_Layer, x, weight, bias, None, None, None, None, op)


def layer_by_rows(
    op: Linear | Conv,
    x: Tensor,
    trained: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    bias: Tensor | None = None,
    bias_trained: Tensor | None = None,
    bias_rows: Tensor | None = None,
) -> Tensor:
    """op(x, weight, bias), differentiable any number of times in x and in the selected rows of weight and bias.

    trained: the `rows` of weight along op.axis, with a graph; None where none trains. bias_trained: likewise those of
        the bias; where it is None the gradient goes to the bias itself.
    """
    return apply_function(_Layer, x, trained, bias, bias_trained, weight, rows, bias_rows, op)


def scaled_layer_by_rows(
    op: Linear | Conv, x: Tensor, trained: Tensor, factor: Tensor, weight: Tensor, rows: Tensor
) -> Tensor:
    """op(x, factor * weight) for a 0-d factor, differentiable in x, in the rows and in the factor."""
    return apply_function(_ScaledLayer, x, trained, factor, weight, rows, op)


def _tuple(value, n: int) -> tuple[int, ...]:
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    return value * n if len(value) == 1 else value


Sizes: TypeAlias = int | Sequence[int]  # one number, or one for each axis


def convolve(
    call: Callable[[Conv, Tensor], Any],
    input: Tensor,
    kernel: Sequence[int],
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    output_padding: Sizes | None = None,
) -> Any:
    """call(op, x) for the arguments of one of torch's convolution functions, with x a batch.

    output_padding: that of a transposed convolution; None for one that is not transposed.

    Returns NotImplemented for an input of another number of axes, and where `call` does.
    """
    n = len(kernel)
    if input.ndim == n + 1:
        y = convolve(call, input.unsqueeze(0), kernel, stride, padding, dilation, groups, output_padding)
        return y if y is NotImplemented else y.squeeze(0)
    if input.ndim != n + 2:
        return NotImplemented
    stride, dilation = _tuple(stride, n), _tuple(dilation, n)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(s != 1 for s in stride):
            return NotImplemented
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):  # PyTorch pads one more behind than in front
            input = F.pad(input, [extra for t in reversed(total) for extra in (0, t % 2)])
    transposed = output_padding is not None
    output_padding = _tuple(output_padding if transposed else 0, n)
    return call(Conv(stride, _tuple(padding, n), dilation, groups, transposed, output_padding), input)


def functions_of(prepare: Callable) -> dict[Callable, Callable]:
    """{torch's function: ours} for linear layers, convolutions and transposed ones.

    prepare(input, weight, bias, ndim) looks at the tensors, ndim being how many axes a weight of that function has, and
    gives call(op, x), which computes the layer. Either may be NotImplemented: then torch's own function is left to run.
    """

    def linear(input, weight, bias=None):
        call = prepare(input, weight, bias, 2)
        return call if call is NotImplemented else call(Linear(), input)

    def conv(n: int):
        def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
            call = prepare(input, weight, bias, n + 2)
            if call is NotImplemented:
                return call
            return convolve(call, input, weight.shape[2:], stride, padding, dilation, groups)

        return conv

    def conv_transpose(n: int):
        def conv_transpose(
            input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
        ):  # fmt: skip
            call = prepare(input, weight, bias, n + 2)
            if call is NotImplemented:
                return call
            return convolve(call, input, weight.shape[2:], stride, padding, dilation, groups, output_padding)

        return conv_transpose

    convolutions = enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)
    transposed = enumerate((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), 1)
    return {F.linear: linear, **{f: conv(n) for n, f in convolutions}, **{f: conv_transpose(n) for n, f in transposed}}
