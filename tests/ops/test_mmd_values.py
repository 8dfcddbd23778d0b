"""mmd2 against a float64 brute force that forms every pair, scikit-learn's kernels, and what must hold of any MMD."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmd_brute import KERNELS, brute_mmd2, sample

from minegan_fast.ops import mmd2
from minegan_fast.ops._features import median_distance


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidth", [None, 1.7, [0.5, 1, 4.0]], ids=["median", "float", "ladder"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_matches_brute_force(kernel, bandwidth, unbiased):
    for n, m, d in [(7, 5, 3), (2, 9, 1), (12, 2, 33)]:
        x, y = sample(n, d), sample(m, d, seed=1, shift=0.5)
        expected = brute_mmd2(x, y, kernel, bandwidth, unbiased)
        assert mmd2(x, y, kernel, bandwidth, unbiased).item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_sample_each_has_a_biased_estimate(kernel):
    x, y = sample(1, 4), sample(1, 4, seed=1)
    assert mmd2(x, y, kernel, 2.0, unbiased=False).item() == pytest.approx(brute_mmd2(x, y, kernel, 2.0, False))


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_keeps_to_the_stated_error(kernel):
    # Far from the origin and nearly the same distribution: what a naive float32 computation gets wrong.
    for shift in (0.0, 100.0):
        x = sample(300, 64, dtype=torch.float32) + shift
        y = sample(200, 64, seed=1, dtype=torch.float32) + shift + 0.01
        value, exact = mmd2(x, y, kernel), mmd2(x.double(), y.double(), kernel)
        assert value.dtype == torch.float32
        assert exact.dtype == torch.float64
        assert abs(value.double() - exact) <= 1e-8 + 1e-3 * abs(exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32_of_their_exact_values(dtype):
    x, y = sample(20, 8, dtype=dtype).requires_grad_(), sample(30, 8, seed=1, shift=0.3, dtype=dtype)
    value = mmd2(x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(mmd2(x.double(), y.double()).item(), rel=1e-6)
    assert x.grad.dtype == dtype
    assert x.grad.abs().max() > 0


def test_without_validation_nan_comes_out():
    assert mmd2(X.float() * float("nan"), X.float(), bandwidth=1.0, validate=False).isnan()


def test_the_wider_dtype_holds_for_both():
    x, y = sample(20, 8, dtype=torch.bfloat16).requires_grad_(), sample(30, 8, seed=1, shift=0.3, dtype=torch.float32)
    value = mmd2(x, y, bandwidth=2.0)
    assert value.dtype == torch.float32
    assert value.item() == mmd2(x.float(), y, bandwidth=2.0).item()
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == torch.bfloat16
    assert mmd2(y, y.double(), bandwidth=2.0, unbiased=False).dtype == torch.float64


def test_kernels_are_those_of_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = sample(40, 6), sample(30, 6, seed=1, shift=0.2)
    for kernel, function in [
        ("gaussian", lambda a, b: pairwise.rbf_kernel(a, b, gamma=1 / (2 * 1.3**2))),
        ("laplacian", lambda a, b: pairwise.laplacian_kernel(a, b, gamma=1 / 1.3)),
        ("polynomial", lambda a, b: pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / 6, coef0=1)),
        ("energy", lambda a, b: -pairwise.euclidean_distances(a, b)),
    ]:
        within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (function(x, x), function(y, y))]
        expected = sum(within) - 2 * function(x, y).mean()
        assert mmd2(x, y, kernel, 1.3).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_first_and_second_order_gradients(kernel, unbiased):
    x, y = sample(4, 3).requires_grad_(), sample(3, 3, seed=1, shift=0.4).requires_grad_()

    def loss(a, b):
        return mmd2(a, b, kernel, [0.8, 2.0], unbiased)

    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian"])
def test_the_median_bandwidth_is_a_constant_for_the_gradient(kernel):
    x, y = sample(5, 3).requires_grad_(), sample(4, 3, seed=1)
    bandwidth = median_distance(torch.cat([x, y]), 1.0 if kernel == "laplacian" else 2.0)
    (by_default,) = torch.autograd.grad(mmd2(x, y, kernel), x)
    (by_value,) = torch.autograd.grad(mmd2(x, y, kernel, bandwidth), x)
    torch.testing.assert_close(by_default, by_value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kernel", ["laplacian", "energy"])
def test_coincident_points_have_finite_first_and_second_gradients(kernel):
    x = sample(6, 3)
    x[1] = x[0]
    y = x[:4].clone()
    x.requires_grad_()
    y.requires_grad_()
    gradients = torch.autograd.grad(mmd2(x, y, kernel, 1.0), (x, y), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, y))
    assert all(g.isfinite().all() for g in (*gradients, *second))
    # A pair that coincides exerts no force: the gradient is that of the remaining pairs, here by symmetric differences
    # of which the two sides of the kink cancel.
    flat, step = x.detach(), 1e-6
    for index in [(0, 0), (1, 2), (5, 1)]:
        moved = [flat.clone(), flat.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (mmd2(moved[0], y, kernel, 1.0) - mmd2(moved[1], y, kernel, 1.0)) / (2 * step)
        assert gradients[0][index].item() == pytest.approx(slope.item(), abs=1e-6)


def test_gaussian_keeps_its_curvature_at_coincident_points():
    x = torch.zeros(2, 1, dtype=torch.float64)
    y = torch.zeros(2, 1, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda a: mmd2(a, y, bandwidth=1.0), x)
    # k = exp(-r^2/2): d2k/dx0^2 = -1. x0 is in 2 of the 2 ordered pairs within x, and in half of the cross pairs.
    expected = torch.tensor([[-1 + 1.0, 1.0], [1.0, -1 + 1.0]], dtype=torch.float64)
    torch.testing.assert_close(hessian.view(2, 2), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_diagonal_is_left_out_by_index(kernel):
    # Every row is the same: only an exclusion by value would take the pairs i != j for the diagonal.
    x = sample(1, 3).expand(4, 3)
    y = sample(3, 3, seed=1)
    assert mmd2(x, y, kernel, 1.0).item() == pytest.approx(brute_mmd2(x, y, kernel, 1.0, True), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_has_no_distance_from_itself(kernel):
    x = sample(50, 8, shift=3.0)
    assert mmd2(x, x.clone(), kernel, 1.0, unbiased=False).item() == pytest.approx(0, abs=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    n=st.integers(2, 9),
    m=st.integers(2, 9),
    d=st.integers(1, 6),
    unbiased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_invariances(kernel, n, m, d, unbiased, seed):
    x, y = sample(n, d, seed), sample(m, d, seed + 1001, shift=0.3)
    value = mmd2(x, y, kernel, 1.5, unbiased).item()
    close = pytest.approx(value, rel=1e-9, abs=1e-11)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert mmd2(x[order], y, kernel, 1.5, unbiased).item() == close
    assert mmd2(y, x, kernel, 1.5, unbiased).item() == close
    if not unbiased:
        assert value > -1e-12
    if kernel != "polynomial":
        assert mmd2(x + 10, y + 10, kernel, 1.5, unbiased).item() == close
    if kernel in ("gaussian", "laplacian"):
        assert mmd2(3 * x, 3 * y, kernel, 4.5, unbiased).item() == close
        assert mmd2(x, y, kernel, unbiased=unbiased).item() == pytest.approx(
            mmd2(3 * x, 3 * y, kernel, unbiased=unbiased).item(), rel=1e-9, abs=1e-11
        )


def test_unbiased_estimate_averages_to_zero_for_one_distribution():
    values = torch.stack([mmd2(sample(10, 2, seed), sample(10, 2, seed + 500), bandwidth=1.0) for seed in range(400)])
    # Standard error of the mean; the biased estimate would be off by about 2 (1 - E k) / 10, 20 of them.
    error = values.std() / 20
    assert values.mean().abs() < 4 * error
    assert error < 0.01


def test_bandwidth_may_be_a_tensor():
    x, y = sample(5, 2), sample(5, 2, seed=1)
    assert mmd2(x, y, bandwidth=torch.tensor([1.0, 2.0])).item() == mmd2(x, y, bandwidth=(1.0, 2.0)).item()
    assert mmd2(x, y, bandwidth=torch.tensor(2.0)).item() == mmd2(x, y, bandwidth=2.0).item()


def test_runs_in_float64_under_autocast():
    x, y = sample(20, 8, dtype=torch.float32), sample(20, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mmd2(x, y), mmd2(x, y))
        inside = [mmd2(x, y, kernel, 2.0) for kernel in KERNELS]
    assert inside == [mmd2(x, y, kernel, 2.0) for kernel in KERNELS]


X = sample(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[:1], X), ValueError, "at least 2 samples each, got 1 and 4"),
        ((X, X[:1]), ValueError, "at least 2 samples each, got 4 and 1"),
        ((X, X[:, :2]), ValueError, "same number of dimensions, got 3 and 2"),
        ((X[:0], X), ValueError, r"x must be \[samples, dimensions\].*\[0, 3\]"),
        ((X, X[:, :0]), ValueError, r"y must be \[samples, dimensions\].*\[4, 0\]"),
        ((X[0], X), ValueError, r"x must be \[samples, dimensions\].*\[3\]"),
        ((X, X.long()), TypeError, "y holds torch.int64"),
        ((X.to(torch.uint8), X), TypeError, "x holds torch.uint8"),
        ((X.numpy(), X), TypeError, "x must be a tensor of features, not ndarray"),
        ((X, X, "rbf"), ValueError, "unknown kernel 'rbf': one of gaussian, laplacian, polynomial, energy"),
        ((X, X, "gaussian", 0.0), ValueError, "bandwidth must be a finite number > 0"),
        ((X, X, "energy", None, True, True, "fp8"), ValueError, 'input_precision must be "tf32x3" or "tf32", got'),
        ((X, X, "gaussian", [1.0, -2.0]), ValueError, "bandwidth must be a finite number > 0"),
        ((X, X, "gaussian", []), ValueError, "non-empty sequence"),
        ((X, X, "gaussian", "2"), ValueError, "bandwidth must be a finite number > 0.*'2'"),
        ((X, X, "gaussian", 1e-200), ValueError, "its square too.*1e-200"),
        ((X, X, "gaussian", [1.0, 1e200]), ValueError, "its square too"),
        ((X, X, "gaussian", torch.tensor(1.0, requires_grad=True)), ValueError, "no gradient: give bandwidth.detach"),
        ((X, X, "laplacian", float("nan")), ValueError, "bandwidth must be a finite number > 0"),
        ((X[:1].expand(4, 3), X[:1].expand(3, 3)), ValueError, "median distance is 0.*give a bandwidth"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        mmd2(*arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_row_that_is_not_finite_is_named(value):
    y = X.clone()
    y[2, 1] = y[3, 0] = value
    with pytest.raises(ValueError, match="y holds NaN or inf in 2 of 4 rows, the first is row 2"):
        mmd2(X, y)


@pytest.mark.parametrize("bandwidth", [np.float32(1.5), np.array([1.5]), torch.tensor(1.5), (s for s in [1.5])])
def test_a_bandwidth_may_be_any_kind_of_number(bandwidth):
    assert mmd2(X, X + 1, bandwidth=bandwidth) == mmd2(X, X + 1, bandwidth=1.5)


@pytest.mark.parametrize("kernel", ["gaussian", "polynomial", "energy"])
def test_a_value_that_overflows_is_named(kernel):
    x = X.float() * 1e20
    with pytest.raises(ValueError, match=r"features from .*e\+20 to .*e\+20 leaves the range of torch.float32"):
        mmd2(x, x + 1e20, kernel)
    assert not mmd2(x, x + 1e20, kernel, validate=False).isfinite()


def assert_gradient_rounded_once(x, y, scale, *options):
    """That of low precision is as near to that of float64 as its dtype lets it be."""
    gradients = []
    for p in (x, x.double()):
        p = p.requires_grad_()
        (scale * mmd2(p, y.to(p.dtype), *options)).backward()
        gradients.append(p.grad)
    low, high = gradients
    assert (low.double() - high).norm() <= 2 * (high.to(low.dtype).double() - high).norm()


@pytest.mark.parametrize(("kernel", "bandwidth"), [("gaussian", 8.0), ("laplacian", 100.0), ("energy", None)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_scaled_before_they_are_rounded(kernel, bandwidth, dtype):
    x, y = sample(300, 16, dtype=dtype), sample(200, 16, seed=1, shift=0.5, dtype=dtype)
    assert_gradient_rounded_once(x, y, 65536.0, kernel, bandwidth)  # GradScaler's first scale, beyond float16


def test_pairs_and_diagonal_cancel_before_they_are_rounded():
    x, y = (sample(n, 3, seed=n, shift=100.0, dtype=torch.bfloat16) for n in (5, 7))
    assert_gradient_rounded_once(x, y, 1.0, "polynomial", None, False)


def test_mixed_devices_are_named():
    with pytest.raises(ValueError, match="same device, got cpu and meta"):
        mmd2(X, X.to("meta"))


CYCLES = """
import gc, torch
from minegan_fast.ops import mmd2

x, y = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
for kernel in ("gaussian", "laplacian", "polynomial", "energy"):
    for _ in range(2):  # at its first call PyTorch sets up things of its own
        gc.collect()
        gc.disable()
        (gradient,) = torch.autograd.grad(mmd2(x, y, kernel, 1.0), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)
        del gradient
        garbage = gc.collect()
        gc.enable()
    assert garbage == 0, (kernel, garbage)
"""


def test_the_graph_holds_no_reference_cycle():
    """In a process of its own: what other tests have set up leaves garbage too."""
    subprocess.run([sys.executable, "-c", CYCLES], check=True)
