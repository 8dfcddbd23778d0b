"""Groups of features at once: every backend's distances and gradients against mmd2, a brute force, and finite steps."""

import pytest
import torch
from mmd_brute import brute_mmd2, sample

from minegan_fast.ops import MmdTarget, backends, mmd2, mmd_groups, use_backend
from minegan_fast.ops.mmd_groups import mmd_groups_pairs, mmd_groups_slopes

SIZES = [(2, 2, [1]), (7, 5, [3, 1, 20]), (3, 70, [40, 33]), (150, 9, [8, 130]), (40, 300, [17, 64, 5, 32])]
LADDERS = [1.0, [0.5, 1, 2, 4.0], [1.3, 3.0], [0.7]]


def groups(n, sizes, seed=0, shift=0.0, dtype=torch.float32, device="cpu"):
    return [sample(n, D, seed + 10 * g, shift, dtype).to(device) for g, D in enumerate(sizes)]


def bandwidths_of(sizes):
    """Of different number, in units of a typical distance."""
    ladders = [LADDERS[g % len(LADDERS)] for g in range(len(sizes))]
    return [
        [s * D**0.5 for s in ladder] if isinstance(ladder, list) else ladder * D**0.5
        for D, ladder in zip(sizes, ladders, strict=True)
    ]


def by_mmd2(xs, ys, bandwidths, unbiased=True):
    triples = zip(xs, ys, bandwidths, strict=True)
    return torch.stack([mmd2(x, y, bandwidth=b, unbiased=unbiased) for x, y, b in triples])


def close(found, expected, least=1e-9):
    assert (found.cpu().double() - expected).norm() <= 2e-5 * expected.norm() + least


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distances_and_gradients_are_those_of_mmd2_in_float64(size, unbiased, backend, device):
    N, M, sizes = size
    xs, ys = groups(N, sizes), groups(M, sizes, seed=1, shift=0.5)
    shared = min(N, M) // 2
    for x, y in zip(xs, ys, strict=True):
        y[:shared] = x[:shared]  # pairs that coincide
    bandwidths, weights = bandwidths_of(sizes), torch.linspace(1, 2, len(sizes))
    exact = [x.double().requires_grad_() for x in xs]
    with use_backend("reference"):
        expected = by_mmd2(exact, [y.double() for y in ys], bandwidths, unbiased)
        slopes = torch.autograd.grad(expected @ weights.double(), exact)
    leaves = [x.to(device).requires_grad_() for x in xs]
    target = MmdTarget([y.to(device) for y in ys], bandwidths, unbiased)
    found = mmd_groups(leaves, target)
    assert found.shape == (len(sizes),)
    assert found.dtype == torch.float32
    assert ((found.cpu().double() - expected).abs() <= 1e-8 + 1e-3 * expected.abs()).all()
    for a, b in zip(torch.autograd.grad(found @ weights.to(device), leaves), slopes, strict=True):
        assert a.shape == b.shape
        close(a, b)


@pytest.mark.parametrize("unbiased", [True, False])
def test_distances_are_those_of_a_brute_force(unbiased):
    sizes, bandwidths = [3, 1, 33], [1.7, [0.5, 1, 4.0], [5.0, 6.0]]
    for N, M in [(7, 5), (2, 9), (12, 2)]:
        xs, ys = groups(N, sizes, dtype=torch.float64), groups(M, sizes, seed=1, shift=0.4, dtype=torch.float64)
        expected = [brute_mmd2(x, y, "gaussian", b, unbiased) for x, y, b in zip(xs, ys, bandwidths, strict=True)]
        found = mmd_groups(xs, MmdTarget(ys, bandwidths, unbiased))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)


def test_one_sample_each_has_a_biased_distance(backend, device):
    x, y = sample(1, 4, dtype=torch.float32), sample(1, 4, seed=1, dtype=torch.float32)
    found = mmd_groups([x.to(device)], MmdTarget([y.to(device)], 2.0, unbiased=False))
    assert found.item() == pytest.approx(brute_mmd2(x, y, "gaussian", 2.0, False))


@pytest.mark.parametrize("unbiased", [True, False])
def test_first_and_second_order_gradients(unbiased):
    sizes = [3, 1, 5]
    target = MmdTarget(groups(4, sizes, seed=1, shift=0.3, dtype=torch.float64), [1.2, [0.8, 2.0], 3.0], unbiased)
    xs = [x.requires_grad_() for x in groups(3, sizes, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *xs: mmd_groups(xs, target), xs)
    assert torch.autograd.gradgradcheck(lambda *xs: mmd_groups(xs, target), xs)


def test_the_second_order_of_float32_is_that_of_mmd2(backend, device):
    sizes = [6, 40]
    xs, ys, bandwidths = groups(20, sizes), groups(30, sizes, seed=1, shift=0.3), bandwidths_of(sizes)

    def penalty(xs, distances):
        return sum(g.square().sum() for g in torch.autograd.grad(distances.square().sum(), xs, create_graph=True))

    exact = [x.double().requires_grad_() for x in xs]
    with use_backend("reference"):
        distances = by_mmd2(exact, [y.double() for y in ys], bandwidths)
        expected = torch.autograd.grad(penalty(exact, distances), exact)
    leaves = [x.to(device).requires_grad_() for x in xs]
    distances = mmd_groups(leaves, MmdTarget([y.to(device) for y in ys], bandwidths))
    for a, b in zip(torch.autograd.grad(penalty(leaves, distances), leaves), expected, strict=True):
        close(a, b)


def test_samples_close_together_and_far_from_the_target_keep_their_digits(backend, device):
    # Products of vectors of length 30 leave nothing of a squared distance of 1e-4.
    ys = groups(25, [20, 9], seed=1)
    xs = [1e-3 * x + 10 for x in groups(40, [20, 9])]
    exact = [x.double().requires_grad_() for x in xs]
    with use_backend("reference"):
        expected = by_mmd2(exact, [y.double() for y in ys], [5e-3, 5e-3])
        slopes = torch.autograd.grad(expected.sum(), exact)
    leaves = [x.to(device).requires_grad_() for x in xs]
    found = mmd_groups(leaves, MmdTarget([y.to(device) for y in ys], 5e-3))
    assert ((found.cpu().double() - expected).abs() <= 1e-8 + 1e-3 * expected.abs()).all()
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), slopes, strict=True):
        assert (a.cpu().double() - b).norm() <= 2e-2 * b.norm()


def test_a_batch_of_another_size_may_follow(backend, device):
    ys = groups(12, [5, 8], seed=1)
    target = MmdTarget([y.to(device) for y in ys], [2.0, 3.0])
    for N in (6, 11, 2):
        xs = groups(N, [5, 8], seed=N)
        torch.testing.assert_close(mmd_groups([x.to(device) for x in xs], target).cpu(), by_mmd2(xs, ys, [2.0, 3.0]))


def test_only_what_needs_a_gradient_gets_one(backend, device, monkeypatch):
    asked = []
    for op in (mmd_groups_pairs, mmd_groups_slopes):
        monkeypatch.setattr(
            op, "_run", lambda *args, run=op._run, **kwargs: (asked.append(args[-1]), run(*args, **kwargs))[1]
        )
    xs = groups(9, [4, 7, 5], device=device)
    target = MmdTarget(groups(12, [4, 7, 5], seed=1, device=device), 3.0)
    distances = mmd_groups(xs, target)
    assert not distances.requires_grad
    leaves = [x.clone().requires_grad_() for x in xs]
    with torch.no_grad():
        torch.testing.assert_close(mmd_groups(leaves, target), distances)
    expected = torch.autograd.grad(mmd_groups(leaves, target).sum(), leaves)
    (alone,) = torch.autograd.grad(mmd_groups([xs[0], leaves[1], xs[2]], target).sum(), leaves[1])
    torch.testing.assert_close(alone, expected[1])
    assert asked == [False, False, True, [True] * 3, True, [False, True, False]]


def test_a_backward_may_be_run_twice(backend, device):
    xs = [x.requires_grad_() for x in groups(6, [3, 5], device=device)]
    distances = mmd_groups(xs, MmdTarget(groups(5, [3, 5], seed=1, device=device), 2.0))
    first = torch.autograd.grad(distances[0], xs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * distances[0], xs)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    assert not first[1].any()  # of the other group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted(dtype, backend, device):
    ys, xs = groups(8, [4, 6], seed=1, shift=0.2, dtype=dtype, device=device), groups(6, [4, 6], dtype=dtype)
    xs = [x.to(device).requires_grad_() for x in xs]
    target = MmdTarget(ys, 2.0)
    distances = mmd_groups(xs, target)
    assert target.dtype == distances.dtype == torch.float32
    torch.testing.assert_close(distances, mmd_groups([x.float() for x in xs], MmdTarget([y.float() for y in ys], 2.0)))
    assert [g.dtype for g in torch.autograd.grad(distances.sum(), xs)] == [dtype, dtype]


def test_autocast_changes_nothing(backend, device):
    xs, target = groups(8, [40], device=device), MmdTarget(groups(9, [40], seed=1, device=device), 5.0)
    leaf = xs[0].requires_grad_()
    expected = torch.autograd.grad(mmd_groups(xs, target).sum(), leaf)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(mmd_groups(xs, target).sum(), leaf)
    assert torch.equal(*found, *expected)


def test_target_samples_that_are_all_equal(backend, device):
    y, x = torch.ones(5, 3, device=device), sample(4, 3, dtype=torch.float32).to(device)
    torch.testing.assert_close(mmd_groups([x], MmdTarget([y], 1.0)), mmd2(x, y, bandwidth=1.0)[None])
    assert mmd_groups([y], MmdTarget([y], 1.0)).item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found(value, backend, device):
    xs, target = groups(6, [4, 5], device=device), MmdTarget(groups(7, [4, 5], seed=1, device=device), 2.0)
    xs[1][3, 2] = value
    with pytest.raises(ValueError, match="group 1 of xs holds NaN or inf in 1 of 6 rows, the first is row 3"):
        mmd_groups(xs, target)
    assert mmd_groups(xs, target, validate=False).isnan().tolist() == [False, True]


@pytest.mark.parametrize("gradient", [False, True])
def test_no_infinite_distance_hides_what_is_not_finite(gradient, backend, device):
    # Of these t is infinite and exp(c t) is 0.
    x, y = torch.tensor([[-1.0], [float("inf")]], device=device), -torch.ones(2, 1, device=device)
    numbers = torch.tensor([-0.5], dtype=torch.float64, device=device)
    sums, _, _ = mmd_groups_pairs(x, y, torch.ones(1, 2, device=device), numbers, [0], [1], [1], False, gradient)
    assert sums.isnan().all()


def test_features_beyond_float32():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    xs, target = groups(6, [4, 5], device=device), MmdTarget(groups(7, [4, 5], seed=1, device=device), 2.0)
    xs[1] *= 1e30
    with use_backend("reference"):  # which works in float64
        assert mmd_groups(xs, target).isfinite().all()
    if device == "cuda" or "cpp" in backends()["mmd_groups"]:
        with pytest.raises(
            ValueError, match=r"features of group 1 from .*e\+30 to .* leaves the range of torch.float32"
        ):
            mmd_groups(xs, target)


def test_narrow_and_wide_bandwidths_underflow_quietly(backend, device):
    ladders = [1e-6, 1e6, [1e-6 * 2**k for k in range(8)]]
    xs, ys = groups(20, [5] * 3, device=device), groups(20, [5] * 3, seed=1, device=device)
    leaves = [x.requires_grad_() for x in xs]
    distances = mmd_groups(leaves, MmdTarget(ys, ladders, unbiased=False))
    with use_backend("reference"):
        expected = by_mmd2([x.double() for x in xs], [y.double() for y in ys], ladders, False)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-8)
    assert all(g.isfinite().all() for g in torch.autograd.grad(distances.sum(), leaves))


def test_compiled_as_one_graph():
    xs = [x.requires_grad_() for x in groups(9, [4, 7])]
    target = MmdTarget(groups(12, [4, 7], seed=1), [2.0, [3.0, 4.0]])

    def loss(xs):
        return (3 * mmd_groups(xs, target)).sum()

    torch.compiler.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(xs)
    torch.testing.assert_close(value, loss(xs))
    for a, b in zip(torch.autograd.grad(value, xs), torch.autograd.grad(loss(xs), xs), strict=True):
        torch.testing.assert_close(a, b)
