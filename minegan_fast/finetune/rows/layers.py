"""Layers on held weights: linear, convolutions, transposed ones and embeddings with the gradient of the selected rows.

    forward             y  = x * W + b
    weight gradient     dW_r = row_gradient(x, dy_r)  for the selected rows r

The layers of `layers/bilinear.py` carry the rows to every order of differentiation, so that penalties on gradients
(R1, WGAN-GP, path length) reach them. A layer without selected rows keeps no input.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._torch import PastSubclasses, transforms_active
from ...layers.bilinear import Conv, Linear, functions_of, layer_by_rows, scaled_layer_by_rows
from ...ops.demodulation import demodulation
from ...ops.modulated_conv2d import ModulatedWeight
from . import ddp
from .expressions import Expression, expression_of


def _run(op, x: Tensor, weight: Expression, bias: Tensor | None = None, held: Expression | None = None):
    """held: the expression of the bias, where it is held."""
    if weight.axis != op.axis:
        return NotImplemented
    dtype = _autocast_dtype(x)
    if weight.trained is not None:
        for link in weight.links:
            link.row_uses.add(op.name)
    if weight.factor is not None:
        if weight.trained is None:
            y = _run(op, x, weight._replace(factor=None))
            y = y * weight.factor.to(y.dtype)
        else:
            x, trained = (x, weight.trained) if dtype is None else (x.to(dtype), weight.trained.to(dtype))
            y = scaled_layer_by_rows(op, x, trained, weight.factor, weight.weight, weight.rows)
        if bias is None:
            return y
        bias = (bias if held is None else held.value("add")).to(y.dtype)
        return y + bias.view(-1, *[1] * (y.ndim - 2 if op.channel == 1 else 0))
    bias_trained = bias_rows = None
    if held is not None:
        bias, bias_trained, bias_rows = held.weight, held.trained, held.rows
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return layer_by_rows(op, x, weight.trained, weight.weight, weight.rows, bias, bias_trained, bias_rows)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _takes(input, held: Expression | None = None) -> bool:
    """Whether a layer by rows has these: an ordinary input, and a bias that is ordinary or held."""
    return (held is None or held.factor is None) and expression_of(input) is None


def _layer(input, weight, bias, ndim: int):
    e = expression_of(weight)
    held = None if bias is None else expression_of(bias)
    if e is None or not _takes(input, held) or e.weight.ndim != ndim:
        return NotImplemented

    if ndim == 2:
        _check_outputs(e, 0)

    def call(op, x):
        if isinstance(op, Conv) and op.transposed and op.groups != 1:
            return NotImplemented
        return _run(op, differentiable(x, e), e, bias, held)

    return call


def differentiable(input: Tensor, e: Expression) -> Tensor:
    """The input, with a graph where a frozen weight leaves the output without one. Path length differentiates by the
    output of a mapping network, which dense training lets it, whatever rows are selected there."""
    frozen = e.trained is None and any(link.wanted for link in e.links)
    if frozen and input.ndim <= 3 and input.is_floating_point() and not input.requires_grad:
        return input.detach().requires_grad_()
    return input


def _matmul(a, b):
    """x @ W with the neurons along the columns, and W @ x with them along the rows."""
    right, left = expression_of(b), expression_of(a)
    if left is None:
        _check_outputs(right, 1)
    if right is None:
        _check_outputs(left, 0)
    if right is not None and _takes(a) and right.weight.ndim == 2 and right.axis == 1:
        return _run(Linear(), differentiable(a, right), right.transposed())
    if left is not None and _takes(b) and left.weight.ndim == 2 and left.axis == 0 and b.ndim in (1, 2):
        y = _run(Linear(), differentiable(b, left).t(), left)
        return y.t()
    return NotImplemented


def _check_outputs(e: Expression | None, axis: int):
    """RuntimeError where a layer's outputs lie along `axis` of a square matrix, whose neurons were taken to lie along
    the other axis, because nothing told."""
    if e is not None and e.trained is not None and e.axis != axis and any(link.guessed for link in e.links):
        raise RuntimeError(
            f"a square weight {list(e.weight.shape)} is used as x @ W, so its neurons are its columns, and its rows "
            "were selected: give its module neuron_parameters() -> [[('weight', 1), ('bias', 0)]], or exclude it"
        )


def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    """bias + x @ W, as GPT-2's layers have it."""
    e, held = expression_of(mat2), expression_of(input)
    if expression_of(mat1) is None:
        _check_outputs(e, 1)
    if e is None or (beta, alpha) != (1, 1) or input.ndim != 1 or not _takes(mat1, held):
        return NotImplemented
    if e.weight.ndim != 2 or e.axis != 1:
        return NotImplemented
    return _run(Linear(), differentiable(mat1, e), e.transposed(), input, held)


def _einsum(equation, *operands):
    """By the whole weights; only that a frozen one leaves its output differentiable."""
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    held = [e for e in map(expression_of, operands) if e is not None]
    frozen = [e for e in held if e.trained is None]
    if isinstance(equation, str) and len(held) == 1 and "->" in equation:
        inputs, outputs = equation.replace(" ", "").split("->")
        names = next(n for n, x in zip(inputs.split(","), operands, strict=False) if expression_of(x) is not None)
        if len(names) == 2 and sum(name in outputs for name in names) == 1:
            _check_outputs(held[0], int(names[1] in outputs))
    if not isinstance(equation, str) or not frozen:
        return NotImplemented
    operands = [
        e.value("einsum") if (e := expression_of(x)) is not None else differentiable(x, frozen[0]) for x in operands
    ]
    return torch.einsum(equation, *operands)


class _ModulatedRows(ModulatedWeight):
    """A modulated convolution's weight, of which some rows train."""

    def __init__(self, e: Expression):
        self.weight, self.e = e.weight, e

    def demodulation(self, s, eps):
        return demodulation(s, self.e.trained, self.e.weight, self.e.rows, eps)

    def convolve(self, x, stride, padding, transposed):
        e = self.e.to(x.dtype)
        if transposed:
            e = e.mapped(lambda w: w.transpose(0, 1), 1)
        op = Conv((stride, stride), (padding, padding), (1, 1), 1, transposed, (0, 0))
        return _run(op, x, e)


def modulated_rows(weight: Tensor) -> _ModulatedRows | None:
    """None where modulated_conv2d has to ask the weight step by step, as it does any other."""
    if not torch.is_grad_enabled() or transforms_active():
        return None
    ddp.tell_active()
    with PastSubclasses():
        e = expression_of(weight)
    if e is not None and e.weight.ndim == 5 and e.axis == 1 and len(e.weight) == 1:
        e = e.mapped(lambda w: w.squeeze(0), 0)
    if e is None or e.weight.ndim != 4 or e.axis != 0 or e.factor is not None:
        return None
    return _ModulatedRows(e)


def _mv(a, b):
    # which autocast leaves in float32 on a CPU
    with torch.autocast("cpu", enabled=False) if b.device.type == "cpu" else nullcontext():
        return _matmul(a, b)


def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """The selected rows, or columns, are looked up in their leaf, the others in the weight."""
    e = expression_of(weight)
    if e is None or e.trained is None or e.weight.ndim != 2:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    for link in e.links:
        link.row_uses.add("embedding")
    y = F.embedding(input, e.weight)
    if e.axis == 1:
        y = y.index_copy(-1, e.rows, F.embedding(input, e.trained, padding_idx).to(y.dtype))
    else:
        places = torch.full((len(e.weight),), -1, device=input.device)
        places = places.index_copy(0, e.rows, torch.arange(len(e.rows), device=input.device))
        if padding_idx is not None:
            places[padding_idx] = -1  # the row of padding gets no gradient
        places = places[input]
        trained = F.embedding(places.clamp(min=0), e.trained).to(y.dtype)
        y = torch.where((places >= 0).unsqueeze(-1), trained, y)
    return y if e.factor is None else y * e.factor.to(y.dtype)


_LAYERS = {
    **functions_of(_layer),
    F.embedding: _embedding,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, torch.Tensor.mm), _matmul),
    **dict.fromkeys((torch.mv, torch.Tensor.mv), _mv),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
    torch.einsum: _einsum,
}


def dispatch(func, args, kwargs):
    """func(*args, **kwargs) with a gradient of the selected rows alone; NotImplemented where func is no such layer."""
    known = _LAYERS.get(func)
    if known is None or "out" in kwargs or not torch.is_grad_enabled() or transforms_active():
        return NotImplemented
    return known(*args, **kwargs)
