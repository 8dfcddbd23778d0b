"""transposed_conv2d against PyTorch's own."""

import sys

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.ops import transposed_conv2d

SIZES = [  # of x, of the weight
    ((2, 3, 5, 4), (3, 2, 3, 3)),
    ((1, 1, 1, 1), (1, 1, 3, 3)),
    ((2, 3, 4, 7), (3, 4, 5, 2)),
    ((2, 2, 3, 3), (2, 3, 4, 4)),
    ((2, 2, 3, 3), (2, 3, 1, 1)),
    ((0, 2, 3, 3), (2, 3, 3, 3)),
]


def theirs(x, weight):
    return F.conv_transpose2d(x, weight, stride=2)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("size", "weight_size"), SIZES)
def test_matches_pytorch(size, weight_size, last):
    x, weight = torch.randn(size, dtype=torch.float64), torch.randn(weight_size, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y, expected = transposed_conv2d(x, weight), theirs(x, weight)
    torch.testing.assert_close(y, expected)
    assert not last or not y.numel() or y.is_contiguous(memory_format=torch.channels_last)
    gy = torch.randn_like(y)
    torch.testing.assert_close(grad(y, (x, weight), gy), grad(expected, (x, weight), gy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    x, weight = torch.randn(2, 16, 6, 6), torch.randn(16, 8, 3, 3)
    exact = theirs(x.to(dtype).double(), weight.to(dtype).double())
    ours, pytorch = ((f(x.to(dtype), weight.to(dtype)) - exact).abs().max() for f in (transposed_conv2d, theirs))
    assert ours <= 2 * pytorch


def test_gradients_of_both_orders():
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(transposed_conv2d, (x, weight))
    assert gradgradcheck(transposed_conv2d, (x, weight))


def test_third_order():
    results = []
    for function in (transposed_conv2d, theirs):
        torch.manual_seed(0)
        x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
        value = (function(x, weight) ** 4).sum()
        for _ in range(3):
            gradients = grad(value, (x, weight), create_graph=True)
            value = sum((g**2).sum() for g in gradients)
        results.append(gradients)
    torch.testing.assert_close(*results)


def test_a_frozen_weight_keeps_no_input_and_an_inner_pass_takes_no_weight_gradient(monkeypatch):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert transposed_conv2d(x, torch.randn(3, 2, 3, 3)).grad_fn.saved_tensors[0] is None
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    y = transposed_conv2d(x * 1, weight)
    module = sys.modules["minegan_fast.ops.transposed_conv2d"]
    monkeypatch.setattr(module, "_weight_gradient", lambda *_: pytest.fail("not wanted"))
    grad(y.sum(), x, create_graph=True)
