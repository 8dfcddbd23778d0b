"""The demodulation coefficients against PyTorch's own functions: values, gradients by all and some rows, two orders."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from minegan_fast.ops.demodulation import (
    demodulation,
    demodulation_forward,
    demodulation_rows,
    demodulation_styles,
)

EPS = 1e-8
# B, I, O, k, rows (None: all of them), channels last
SHAPES = {
    "all": (3, 5, 4, 3, None, False),
    "some": (3, 70, 9, 3, (1, 8, 4), False),
    "channels_last": (2, 6, 5, 3, (0, 3), True),
    "points": (2, 33, 7, 1, (6,), False),
    "one": (1, 1, 1, 1, None, False),
    "many_samples": (35, 3, 2, 3, (1,), False),
    "many_outputs": (2, 4, 70, 1, None, False),
    "no_sample": (0, 3, 2, 3, (1,), False),
}


def make(name, dtype=torch.float32, device="cpu"):
    """s, the rows that train, all of the weight (None where those are all), which rows they are, and gd."""
    B, inputs, outputs, k, rows, last = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    s, weight, gd = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        for size in ((B, inputs), (outputs, inputs, k, k), (B, outputs))
    )
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    if rows is None:
        return s, weight, None, None, gd
    rows = torch.tensor(rows, device=device)
    return s, weight[rows], weight, rows, gd


def plain(s, trained, weight, rows, eps):
    whole = trained if weight is None else weight.index_copy(0, rows, trained)
    return torch.rsqrt(s.square() @ whole.square().sum((2, 3)).t() + eps)


def two_orders(function, s, trained, weight, rows, gd):
    """d, gs, gW; and the gradients by s, trained and gd of a sum of squares of gs and gW."""
    inputs = [t.detach().requires_grad_() for t in (s, trained, gd)]
    s, trained, gd = inputs
    d = function(s, trained, weight, rows, EPS)
    first = grad(d, (s, trained), gd, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), inputs)
    without = grad(function(s, trained, weight, rows, EPS), (s, trained), gd)  # no graph: the op's own backward
    return d, *first, *without, *second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_plain_pytorch(backend, device, name, dtype):
    arguments = make(name, dtype, device)
    ours = two_orders(demodulation, *arguments)
    theirs = two_orders(plain, *make(name, torch.float64, device))
    bound = 1e-10 if dtype == torch.float64 else 3e-5
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("name", ["all", "some"])
def test_gradients_of_any_order(backend, device, name):
    s, trained, weight, rows, _ = make(name, torch.float64, device)
    trained = trained[:, :2]
    s, weight = s[:, :2], weight if weight is None else weight[:, :2]
    inputs = s.requires_grad_(), trained.detach().requires_grad_()

    def function(s, trained):
        whole = weight if weight is None else weight.index_copy(0, rows, trained.detach())
        return demodulation(s, trained, whole, rows, EPS)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_summed_in_the_dtype_of_the_styles(backend, device, dtype):
    s, trained, _, _, gd = make("all", device=device)
    half = trained.to(dtype).requires_grad_()
    d = demodulation(s, half, None, None, EPS)
    exact = half.detach().float().requires_grad_()
    expected = demodulation(s, exact, None, None, EPS)
    assert torch.equal(d, expected)
    (gW,), (reference,) = grad(d, half, gd), grad(expected, exact, gd)
    assert gW.dtype == dtype
    torch.testing.assert_close(gW, reference.to(dtype))


def test_frozen_weights_and_styles(backend, device):
    s, trained, weight, rows, gd = make("some", device=device)
    frozen = demodulation(s.requires_grad_(), None, weight, None, EPS)
    assert torch.equal(frozen, demodulation(s, trained, weight, rows, EPS))
    (gs,) = grad(frozen, s, gd, create_graph=True)
    (expected,) = grad(plain(s, trained, weight, rows, EPS), s, gd, create_graph=True)
    torch.testing.assert_close(gs, expected)
    torch.testing.assert_close(*(grad(g.square().sum(), s)[0] for g in (gs, expected)))
    d = demodulation(s.detach(), trained.requires_grad_(), weight, rows, EPS)
    torch.testing.assert_close(grad(d, trained, gd), grad(plain(s.detach(), trained, weight, rows, EPS), trained, gd))


def test_a_style_of_zeros_gives_the_least_norm(backend, device):
    s, trained, _, _, _ = make("all", device=device)
    d = demodulation(torch.zeros_like(s), trained, None, None, 1e-4)
    torch.testing.assert_close(d, torch.full_like(d, 100.0))


def test_opcheck(backend, device):
    for name in SHAPES:
        s, trained, weight, rows, gd = make(name, device=device)
        trained, weight = (w if w is None else w.flatten(2) for w in (trained, weight))
        whole = trained if weight is None else weight
        d, q = demodulation_forward(s, whole, EPS)
        calls = (
            (demodulation_forward, (s, whole, EPS)),
            (demodulation_styles, (gd, d, s, q)),
            (demodulation_rows, (gd, d, s, trained, rows)),
        )
        for op, args in calls:
            torch.library.opcheck(op.library, args, test_utils=("test_schema", "test_faketensor"))
