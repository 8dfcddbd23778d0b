"""Kernel means between several samples and the target: values and gradients against plain PyTorch in float64."""

import os
import sys

import pytest
import torch

from minegan_fast.ops import MmdTarget, backends, mmd_groups, use_backend
from minegan_fast.ops.kernel_means import kernel_means

SIZES, BANDWIDTHS = [5, 33], [[2.0, 4.0], 7.0]
BACKENDS = ["reference", *(["cpp"] if "cpp" in backends()["mmd"] else [])]
BACKENDS += ["triton"] * ("triton" in backends()["mmd"] and os.environ.get("TRITON_INTERPRET") == "1")


def samples(counts=(4, 7, 3), M=6, dtype=torch.float64):
    """Branches, one pair of points of which coincides, and a target."""
    branches = [[torch.randn(n, D).to(dtype) + i for D in SIZES] for i, n in enumerate(counts)]
    for x, z in zip(branches[0], branches[-1], strict=True):
        z[:1] = x[:1]
    return branches, [torch.randn(M, D).to(dtype) + 0.5 for D in SIZES]


def plain(branches, y, unbiased):
    """K and b by the definition."""

    def mean(p, q, same):
        total = p[0].new_zeros(())
        for a, c, sigma in zip(p, q, BANDWIDTHS, strict=True):
            sigmas = sigma if isinstance(sigma, list) else [sigma]
            t = (a[:, None] - c).square().sum(2)
            k = sum(torch.exp(-t / (2 * s * s)) for s in sigmas) / len(sigmas)
            pairs = k.numel()
            if same and unbiased:
                k, pairs = k * (1 - torch.eye(len(k), dtype=k.dtype)), pairs - len(k)
            total = total + k.sum() / pairs
        return total

    K = torch.stack([torch.stack([mean(p, q, i == j) for j, q in enumerate(branches)]) for i, p in enumerate(branches)])
    return K, torch.stack([mean(p, y, False) for p in branches])


def leaves_of(branches):
    for branch in branches:
        for x in branch:
            x.requires_grad_()
    return [x for branch in branches for x in branch]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("rows", [512, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(monkeypatch, dtype, rows, unbiased):
    """Also where strips begin amid a branch, for branches of different sizes."""
    monkeypatch.setattr(sys.modules[kernel_means.__module__], "_ROWS", rows)
    branches, y = samples(dtype=dtype)
    target, leaves = MmdTarget(y, BANDWIDTHS, unbiased), leaves_of(branches)
    weights, vector = torch.randn(3, 3).double(), torch.randn(3).double()
    exact = [[x.detach().double() for x in branch] for branch in branches]
    exact_leaves = leaves_of(exact)
    K, b = kernel_means(branches, target)
    expected, e = plain(exact, [x.double() for x in y], unbiased)
    assert K.dtype == b.dtype == torch.float64
    assert torch.equal(K, K.T)
    near = {"atol": 1e-12 if dtype == torch.float64 else 1e-6, "rtol": 0}
    torch.testing.assert_close(K, expected, **near)
    torch.testing.assert_close(b, e, **near)
    ours = torch.autograd.grad((K * weights).sum() + b @ vector, leaves)
    theirs = torch.autograd.grad((expected * weights).sum() + e @ vector, exact_leaves)
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), c, **near)
        assert a.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(backend):
    branches, y = samples((5, 9), dtype=torch.float32)
    leaves, target = leaves_of(branches), MmdTarget(y, BANDWIDTHS)
    exact = [[x.detach().double() for x in branch] for branch in branches]
    exact_leaves = leaves_of(exact)
    with use_backend(backend):
        K, b = kernel_means(branches, target)
    expected, e = plain(exact, [x.double() for x in y], True)
    torch.testing.assert_close(K, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(b, e, atol=1e-6, rtol=0)
    ours, theirs = torch.autograd.grad(K.sum() - b[1], leaves), torch.autograd.grad(expected.sum() - e[1], exact_leaves)
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), c, atol=1e-6, rtol=0)


@pytest.mark.parametrize("unbiased", [True, False])
def test_at_one_branch_the_quadratic_form_is_mmd_groups(unbiased):
    branches, y = samples(dtype=torch.float32)
    target = MmdTarget(y, BANDWIDTHS, unbiased)
    K, b = kernel_means(branches, target)
    for i, branch in enumerate(branches):
        found = K[i, i] - 2 * b[i] + target.own.sum()
        torch.testing.assert_close(found, mmd_groups(branch, target).sum().double(), atol=1e-6, rtol=0)


def test_a_branch_without_gradient_gets_none():
    branches, y = samples()
    wanted = branches[1][0].requires_grad_()
    K, b = kernel_means(branches, MmdTarget(y, BANDWIDTHS))
    (slope,) = torch.autograd.grad(K.sum() + b.sum(), wanted)
    leaves = leaves_of([[x.detach().clone() for x in branch] for branch in branches])
    other = [leaves[2 * i : 2 * i + 2] for i in range(3)]
    expected, e = plain(other, y, True)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum() + e.sum(), leaves[2])[0])
    with torch.no_grad():
        assert not kernel_means(branches, MmdTarget(y, BANDWIDTHS))[0].requires_grad


def test_half_precision_is_converted():
    branches, y = samples(dtype=torch.float32)
    target = MmdTarget(y, BANDWIDTHS)
    half = [[x.bfloat16().requires_grad_() for x in branch] for branch in branches]
    K, _ = kernel_means(half, target)
    assert torch.equal(K, kernel_means([[x.detach().float() for x in branch] for branch in half], target)[0])
    (slope,) = torch.autograd.grad(K.sum(), half[0][0])
    assert slope.dtype == torch.bfloat16


def test_second_derivatives_are_refused():
    branches, y = samples()
    leaves = leaves_of(branches)
    K, _ = kernel_means(branches, MmdTarget(y, BANDWIDTHS))
    with pytest.raises(NotImplementedError, match="no second derivative: leave create_graph=True out"):
        torch.autograd.grad(K.sum(), leaves[0], create_graph=True)


def test_wrong_arguments_are_named():
    branches, y = samples()
    target = MmdTarget(y, BANDWIDTHS)
    one, infinite = [x[:1] for x in branches[0]], [branches[0][0], branches[0][1] / 0]
    for call, error, message in (
        (lambda: kernel_means(branches, y), TypeError, "target must be an MmdTarget, not list"),
        (lambda: kernel_means([], target), ValueError, "branches is empty"),
        (lambda: kernel_means([branches[0][0]], target), TypeError, r"branches\[0\] must be a sequence"),
        (lambda: kernel_means([branches[0], y[::-1]], target), ValueError, r"branches\[1\] has groups of \[33, 5\]"),
        (lambda: kernel_means([one], target), ValueError, r"at least 2 samples of each branch, branches\[0\] has 1"),
        (lambda: kernel_means([infinite], target), ValueError, r"group 1 of branches\[0\] holds NaN or inf in 4 of 4"),
        (
            lambda: kernel_means([[x.to("meta") for x in y]], target),
            ValueError,
            "on the target's device, cpu, not meta",
        ),
        (
            lambda: kernel_means(branches, MmdTarget([x.float() for x in y], BANDWIDTHS)),
            TypeError,
            r"group 0 of branches\[0\] is float64, the target float32",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    assert kernel_means([one], MmdTarget(y, BANDWIDTHS, unbiased=False))[0].tolist() == [[pytest.approx(2.0)]]
    with pytest.raises(NotImplementedError, match="inside a transform"):
        torch.func.grad(lambda x: kernel_means([[x, branches[0][1]]], target)[0].sum())(branches[0][0])
