"""Layers on held weights: linear, convolutions, transposed ones and embeddings with the gradient of the selected rows.

    forward             y  = x * W + b
    input gradient      dx = W ⋆ dy                   with d(dy) = d(dx) * W,  dW_r += row_gradient(d(dx), dy_r)
    weight gradient     dW_r = row_gradient(x, dy_r)  for the selected rows r

Layer and input gradient are each other's adjoint, and both carry the compact rows, so penalties on gradients (R1,
WGAN-GP, path length) reach them at any order. A layer without selected rows keeps no input. An op's own double backward
would compute the outer weight gradient as a convolution with an image-sized kernel; here it is a weight gradient.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..ops import dense_is_faster, row_gradient
from ..ops._op import backward_wants
from ..ops.transposed_conv2d import transposed_forward
from .rowwise import Expression, expression_of


@dataclass(frozen=True)
class _Linear:
    """x [..., I], W [O, I] -> [..., O]."""

    name = "linear"
    channel = -1
    axis = 0

    def forward(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def input_gradient(self, gy, weight, shape):
        return (gy @ weight).view(shape)

    def weight_gradient(self, x, gy, weight, rows):
        return row_gradient(x, gy)

    def geometry(self, weight):
        return ()


@dataclass(frozen=True)
class _Conv:
    """x [B, Ci, *S], W [Co, Ci / groups, *K], transposed [Ci, Co, *K] -> [B, Co, *P]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    channel = 1

    @property
    def name(self):
        return f"conv{'_transpose' if self.transposed else ''}{len(self.stride)}d"

    @property
    def axis(self):
        return 1 if self.transposed else 0

    @property
    def _arguments(self):
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def forward(self, x, weight, bias):
        if self == _UPSAMPLING and bias is None:
            return transposed_forward(x, weight)
        return torch.ops.aten.convolution(x, weight, bias, *self._arguments)

    def input_gradient(self, gy, weight, shape):
        x = gy.new_empty(1).expand(shape)  # only its shape is read
        return torch.ops.aten.convolution_backward(
            gy, x, weight, None, *self._arguments, (True, False, False)
        )[0]  # fmt: skip

    def weight_gradient(self, x, gy, weight, rows):
        group = None if self.groups == 1 else rows // (weight.shape[0] // self.groups)
        geometry = tuple(weight.shape[2:]), self.stride, self.padding, self.dilation, self.transposed, self.groups
        return row_gradient(x, gy, *geometry, group)

    def geometry(self, weight):
        return tuple(weight.shape[2:]), self.stride, self.transposed


_UPSAMPLING = _Conv((2, 2), (0, 0), (1, 1), 1, True, (0, 0))


def _selected(gy: Tensor, rows: Tensor, axis: int) -> Tensor:
    return gy if len(rows) == gy.shape[axis] else gy.index_select(axis, rows)


def _rows_of_weight(op, x, gy, weight, rows) -> Tensor:
    """dW of the rows, along the weight's own axis."""
    n = weight.shape[op.axis]
    if len(rows) < n and dense_is_faster(len(rows), n, x, *op.geometry(weight)):
        gradient = op.weight_gradient(x, gy, weight, torch.arange(n, device=rows.device)).index_select(0, rows)
    else:
        gradient = op.weight_gradient(x, _selected(gy, rows, op.channel), weight, rows)
    return gradient.movedim(0, op.axis)


class _Layer(Function):
    @staticmethod
    def forward(ctx, x, part, bias, bias_part, weight, rows, bias_rows, op):
        ctx.op, ctx.shape = op, x.shape
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, part, weight, rows, bias_rows)
        return op.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):
        x, part, weight, rows, bias_rows = ctx.saved_tensors
        op, needs = ctx.op, (backward_wants(ctx, 0), backward_wants(ctx, 1), *ctx.needs_input_grad[2:])
        gx = gpart = gbias = gbias_part = None
        if needs[0]:
            gx = _InputGradient.apply(gy, part, weight, rows, op, ctx.shape)
        if needs[1]:
            gpart = _rows_of_weight(op, x, gy, weight, rows)
        if needs[2] or needs[3]:
            chosen = _selected(gy, bias_rows, op.channel) if needs[3] else gy
            channel = op.channel % gy.ndim
            total = chosen.sum([d for d in range(gy.ndim) if d != channel]) if gy.ndim > 1 else chosen
            gbias, gbias_part = (None, total) if needs[3] else (total, None)
        return gx, gpart, gbias, gbias_part, None, None, None, None


class _InputGradient(Function):
    @staticmethod
    def forward(ctx, gy, part, weight, rows, op, shape):
        ctx.op = op
        ctx.save_for_backward(gy if ctx.needs_input_grad[1] else None, part, weight, rows)
        return op.input_gradient(gy, weight, shape)

    @staticmethod
    def backward(ctx, ggx):
        gy, part, weight, rows = ctx.saved_tensors
        ggy = gpart = None
        if backward_wants(ctx, 0):
            ggy = _Layer.apply(ggx, part, None, None, weight, rows, None, ctx.op)
        if backward_wants(ctx, 1):
            gpart = _rows_of_weight(ctx.op, ggx, gy, weight, rows)
        return ggy, gpart, None, None, None, None


class _ScaledLayer(Function):
    """f · layer(x, W) with a factor f of all rows: its gradient ⟨dy, layer(x, W)⟩ = ⟨Wᵀ dy, x⟩ needs no output kept."""

    @staticmethod
    def forward(ctx, x, part, factor, weight, rows, op):
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(x, part, factor, weight, rows)
        return op.forward(x, (weight * factor).to(part.dtype), None)

    @staticmethod
    def backward(ctx, gy):
        x, part, factor, weight, rows = ctx.saved_tensors
        wanted = [backward_wants(ctx, i) for i in range(3)]
        gx = gpart = gfactor = None
        if wanted[0] or wanted[2]:
            unscaled = _InputGradient.apply(gy, part, weight.to(part.dtype), rows, ctx.op, ctx.shape)
            gx = unscaled * factor.to(gy.dtype) if wanted[0] else None
            gfactor = (unscaled * x).sum(dtype=factor.dtype) if wanted[2] else None
        if wanted[1]:
            gpart = _rows_of_weight(ctx.op, x, gy, weight, rows) * factor.to(gy.dtype)
        return gx, gpart, gfactor, None, None, None


def _run(op, x: Tensor, weight: Expression, bias):
    if weight.axis != op.axis:
        return NotImplemented
    held = None if bias is None else expression_of(bias)
    dtype = _autocast_dtype(x)
    if weight.part is not None:
        for link in weight.links:
            link.row_uses.add(op.name)
    if weight.factor is not None:
        if weight.part is None:
            y = _run(op, x, weight._replace(factor=None), None)
            y = y * weight.factor.to(y.dtype)
        else:
            x, part = (x, weight.part) if dtype is None else (x.to(dtype), weight.part.to(dtype))
            y = _ScaledLayer.apply(x, part, weight.factor, weight.dense, weight.rows, op)
        if bias is None:
            return y
        bias = (bias if held is None else held.value("add")).to(y.dtype)
        return y + bias.view(-1, *[1] * (y.ndim - 2 if op.channel == 1 else 0))
    bias_part = bias_rows = None
    if held is not None:
        bias, bias_part, bias_rows = held.dense, held.part, held.rows
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _Layer.apply(x, weight.part, bias, bias_part, weight.dense, weight.rows, bias_rows, op)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _takes(input, e: Expression | None, bias) -> bool:
    """Whether these are an ordinary input, a held weight and a bias that is ordinary or held."""
    held = None if bias is None else expression_of(bias)
    return e is not None and (held is None or held.factor is None) and expression_of(input) is None


def _linear(input, weight, bias=None):
    e = expression_of(weight)
    if not _takes(input, e, bias) or e.dense.ndim != 2:
        return NotImplemented
    frozen = e.part is None and any(link.trainable and link.wanted for link in e.links)
    if frozen and input.ndim == 2 and not input.requires_grad:
        # Scripts differentiate by the output of a mapping network (path length), which dense training would let them.
        input = input.detach().requires_grad_()
    return _run(_Linear(), input, e, bias)


def _tuple(value, n: int) -> tuple[int, ...]:
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    return value * n if len(value) == 1 else value


def _conv(n: int):
    def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        e = expression_of(weight)
        if not _takes(input, e, bias) or e.dense.ndim != n + 2:
            return NotImplemented
        if input.ndim == n + 1:
            y = conv(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups)
            return y if y is NotImplemented else y.squeeze(0)
        stride, dilation = _tuple(stride, n), _tuple(dilation, n)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, e.dense.shape[2:], strict=True)]
            if any(s != 1 for s in stride):
                return NotImplemented
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):  # the longer side is behind
                input = F.pad(input, [extra for t in reversed(total) for extra in (0, t % 2)])
        op = _Conv(stride, _tuple(padding, n), dilation, groups, False, (0,) * n)
        return _run(op, input, e, bias)

    return conv


def _conv_transpose(n: int):
    def conv(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        e = expression_of(weight)
        if not _takes(input, e, bias) or e.dense.ndim != n + 2 or groups != 1 or input.ndim != n + 2:
            return NotImplemented
        arguments = (_tuple(a, n) for a in (stride, padding, dilation, output_padding))
        stride, padding, dilation, output_padding = arguments
        return _run(_Conv(stride, padding, dilation, 1, True, output_padding), input, e, bias)

    return conv


def _matmul(a, b):
    """x @ W with the neurons along the columns, and W @ x with them along the rows."""
    right = expression_of(b)
    if _takes(a, right, None) and right.dense.ndim == 2 and right.axis == 1:
        return _run(_Linear(), a, right.transposed(), None)
    left = expression_of(a)
    if _takes(b, left, None) and left.dense.ndim == 2 and left.axis == 0 and b.ndim in (1, 2):
        y = _run(_Linear(), b.t(), left, None)
        return y.t()
    return NotImplemented


def _mv(a, b):
    # which autocast leaves in float32 on a CPU
    with torch.autocast("cpu", enabled=False) if b.device.type == "cpu" else nullcontext():
        return _matmul(a, b)


def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """The selected rows, or columns, are looked up in their leaf, the others in the dense weight."""
    e = expression_of(weight)
    if e is None or e.part is None or e.dense.ndim != 2:
        return NotImplemented
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    for link in e.links:
        link.row_uses.add("embedding")
    y = F.embedding(input, e.dense)
    if e.axis == 1:
        y = y.index_copy(-1, e.rows, F.embedding(input, e.part))
    else:
        places = torch.full((len(e.dense),), -1, device=input.device)
        places = places.index_copy(0, e.rows, torch.arange(len(e.rows), device=input.device))[input]
        y = torch.where((places >= 0).unsqueeze(-1), F.embedding(places.clamp(min=0), e.part), y)
    return y if e.factor is None else y * e.factor.to(y.dtype)


_LAYERS = {
    F.linear: _linear,
    F.embedding: _embedding,
    **{function: _conv(n) for n, function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
    torch.conv_transpose1d: _conv_transpose(1),
    torch.conv_transpose2d: _conv_transpose(2),
    torch.conv_transpose3d: _conv_transpose(3),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, torch.Tensor.mm), _matmul),
    **dict.fromkeys((torch.mv, torch.Tensor.mv), _mv),
}


def layer(func, args, kwargs):
    """func(*args, **kwargs) with a gradient of the selected rows alone; NotImplemented where func is no such layer."""
    known = _LAYERS.get(func)
    if known is None or "out" in kwargs or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return NotImplemented
    return known(*args, **kwargs)
