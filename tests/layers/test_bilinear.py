"""layer and layer_by_rows against PyTorch's own functions, their derivatives of all orders, and gradients not there."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minegan_fast.layers.bilinear import Conv, Linear, convolve, layer, layer_by_rows, scaled_layer_by_rows


def conv(n, stride=1, padding=0, dilation=1, groups=1, output_padding=None):
    numbers = [(number,) * n for number in (stride, padding, dilation, output_padding or 0)]
    return Conv(*numbers[:3], groups, output_padding is not None, numbers[3])


CASES = {  # op, size of x, of the weight, of the bias, PyTorch's function
    "linear": (Linear(), (3, 4), (5, 4), 5, F.linear),
    "linear 3d": (Linear(), (2, 3, 4), (5, 4), 5, F.linear),
    "linear vector": (Linear(), (4,), (5, 4), 5, F.linear),
    "conv1d": (conv(1, 2, 1), (2, 3, 8), (4, 3, 3), 4, lambda *a: F.conv1d(*a, 2, 1)),
    "conv2d": (conv(2, 1, 1), (2, 3, 5, 4), (4, 3, 3, 3), 4, lambda *a: F.conv2d(*a, 1, 1)),
    "conv2d stride, grouped": (
        conv(2, 2, 1, 2, 2), (2, 4, 9, 8), (6, 2, 3, 3), 6, lambda *a: F.conv2d(*a, 2, 1, 2, 2),
    ),
    "conv3d": (conv(3), (2, 2, 3, 4, 3), (3, 2, 2, 2, 2), 3, F.conv3d),
    "transposed": (
        conv(2, 2, 1, 1, 1, 1), (2, 3, 4, 3), (3, 4, 3, 3), 4, lambda *a: F.conv_transpose2d(*a, 2, 1, 1),
    ),
    "transposed, grouped": (
        conv(2, 2, 0, 1, 2, 0), (2, 4, 4, 3), (4, 2, 3, 3), 4, lambda *a: F.conv_transpose2d(*a, 2, groups=2),
    ),
}  # fmt: skip


def tensors(name, dtype=torch.float64):
    op, *sizes, channels, function = CASES[name]
    made = [torch.randn(size, dtype=dtype).requires_grad_() for size in (*sizes, (channels,))]
    return op, function, made


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_all_derivatives(name, has_bias):
    op, function, given = tensors(name)
    given = given[: 2 + has_bias]
    rest = () if has_bias else (None,)
    y = layer(op, *given)
    torch.testing.assert_close(y, function(*given, *rest), rtol=1e-12, atol=1e-12)
    gy = torch.randn_like(y).requires_grad_()
    cotangents, results = [torch.randn_like(t) for t in given], []
    for call in (lambda *a: layer(op, *a), lambda *a: function(*a, *rest)):
        first = torch.autograd.grad(call(*given), given, gy, create_graph=True)
        second = torch.autograd.grad(first, (gy, *given[:2]), cotangents, create_graph=True)
        third = ()
        if name != "transposed":  # PyTorch has no third order with an output padding
            third = torch.autograd.grad(sum(t.square().sum() for t in second), (gy, *given[:2]))
        results.append([*first, *second, *third])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d stride, grouped", "transposed"])
def test_numerical_derivatives(name):
    op, _, given = tensors(name)
    assert torch.autograd.gradcheck(lambda *a: layer(op, *a), given)
    assert torch.autograd.gradgradcheck(lambda *a: layer(op, *a), given)


def test_channels_last_stays_so():
    op, _, (x, weight, bias) = tensors("conv2d", torch.float32)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for w in (weight, weight.detach()):  # without its gradient x is not kept
        y = layer(op, x, w, bias)
        (gx,) = torch.autograd.grad(y, x, y.detach())
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert gx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d stride, grouped", "transposed"])
def test_rows_get_the_gradient_of_rows(name):
    op, _, (x, weight, bias) = tensors(name)
    rows = torch.tensor([0, 3])
    part = weight.detach().index_select(op.axis, rows).requires_grad_()
    bias_part = bias.detach()[rows].requires_grad_()
    y = layer_by_rows(op, x, part, weight.detach(), rows, bias.detach(), bias_part, rows)
    expected = layer(op, x, weight, bias)
    assert torch.equal(y, expected)
    gy = torch.randn_like(y).requires_grad_()
    results = []
    for out, w, b in ((y, part, bias_part), (expected, weight, bias)):
        gx, gw, gb = torch.autograd.grad(out, (x, w, b), gy, create_graph=True)
        (second,) = torch.autograd.grad(gx.square().sum(), w, create_graph=True)
        results.append((gw, gb, second))
    (gw, gb, second), (dense_w, dense_b, dense_second) = results
    torch.testing.assert_close(gw, dense_w.index_select(op.axis, rows))
    torch.testing.assert_close(gb, dense_b[rows])
    torch.testing.assert_close(second, dense_second.index_select(op.axis, rows))
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = scaled_layer_by_rows(op, x, part, factor, weight.detach(), rows)
    torch.testing.assert_close(y, layer(op, x, weight * factor))


@pytest.mark.parametrize("name", ["linear", "linear 3d", "linear vector", "conv1d", "conv2d", "conv2d stride, grouped"])
def test_gradients_of_several_cotangents_keep_their_graph(name):
    """is_grads_batched, as a vectorised Jacobian has it."""
    op, function, (x, weight, bias) = tensors(name)
    rows = torch.tensor([0, 3])
    part = weight.detach().index_select(op.axis, rows).requires_grad_()
    gy = torch.randn(2, *function(x, weight, bias).shape, dtype=torch.float64, requires_grad=True)
    results = []
    for y, w in (
        (layer(op, x, weight, bias), weight),
        (layer_by_rows(op, x, part, weight.detach(), rows), part),
        (function(x, weight, bias), weight),
    ):
        leaves = (gy, x, w)
        first = torch.autograd.grad(y, leaves[1:], gy, create_graph=True, is_grads_batched=True)
        cotangents = [torch.stack([torch.ones_like(t), t.detach().cos()]) for t in first]
        second = torch.autograd.grad(first, leaves, cotangents, create_graph=True, is_grads_batched=True)
        results.append([*first, *second, *torch.autograd.grad(sum(t.square().sum() for t in second), leaves)])
    for ours, theirs in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(results[1][0], results[2][0])
    torch.testing.assert_close(results[1][1], results[2][1].index_select(op.axis + 1, rows))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_scaled_layers_gradients_of_several_cotangents_keep_their_graph(name):
    op, function, (x, weight, _) = tensors(name)
    factor, rows = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.arange(len(weight))
    results = []
    for y in (scaled_layer_by_rows(op, x, weight, factor, weight.detach(), rows), function(x, weight * factor, None)):
        gy = torch.stack([torch.ones_like(y), torch.ones_like(y).cumsum(0)])
        first = torch.autograd.grad(y, (x, weight, factor), gy, create_graph=True, is_grads_batched=True)
        total = sum(t.square().sum() for t in first)
        results.append([*first, *torch.autograd.grad(total, (x, weight, factor))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class Nothing(torch.autograd.Function):
    """The identity, whose gradient is not there."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return None


def test_no_gradient_computes_nothing(monkeypatch):
    op, _, (x, weight, bias) = tensors("conv2d")
    y = layer(op, x, weight, bias)
    monkeypatch.setattr(Conv, "input_gradient", None)
    monkeypatch.setattr(Conv, "weight_gradient", None)
    gradients = torch.autograd.grad(Nothing.apply(y).sum(), (x, weight, bias), allow_unused=True)
    assert gradients[:2] == (None, None)
    assert torch.equal(gradients[2], torch.zeros_like(bias))


def test_only_what_is_asked_for_is_computed(monkeypatch):
    op, _, (x, weight, bias) = tensors("conv2d")
    y = layer(op, x * 1, weight, bias)
    monkeypatch.setattr(Conv, "weight_gradient", None)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    monkeypatch.undo()
    monkeypatch.setattr(Conv, "input_gradient", None)
    torch.autograd.grad(y.sum(), (weight, bias))


def test_convolve_reads_the_arguments_of_torch():
    x, kernel = torch.randn(2, 3, 8, 8), (3, 4)
    seen = []

    def call(op, x):
        seen.append((op, tuple(x.shape)))
        return x

    convolve(call, x, kernel, (2, 1), "valid", [2], 3)
    assert seen.pop() == (Conv((2, 1), (0, 0), (2, 2), 3, False, (0, 0)), (2, 3, 8, 8))
    convolve(call, x, kernel, padding="same", dilation=(3, 1))
    assert seen.pop() == (Conv((1, 1), (3, 1), (3, 1), 1, False, (0, 0)), (2, 3, 8, 9))
    assert convolve(call, x, kernel, 2, "same") is NotImplemented
    assert convolve(call, x[0], kernel, output_padding=1).shape == (3, 8, 8)
    assert seen.pop() == (Conv((1, 1), (0, 0), (1, 1), 1, True, (1, 1)), (1, 3, 8, 8))
    assert convolve(call, x[None], kernel) is NotImplemented


def test_a_half_precision_layer_trains_in_it():
    x, module = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True), nn.Conv2d(3, 4, 3).bfloat16()
    y = layer(conv(2), x, module.weight, module.bias)
    assert torch.equal(y, module(x))
    gradients = torch.autograd.grad(y.sum(), (x, module.weight, module.bias))
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3
