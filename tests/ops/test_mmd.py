"""Tiles of pairs: every backend's value, gradient and second order, their memory, and what is computed at all."""

import pytest
import torch
from mmd_brute import KERNELS, brute_mmd2, sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minegan_fast.ops import mmd2, use_backend
from minegan_fast.ops.mmd import _TILE, _offsets, mmd2_of_subsets, mmd_tile, plan_of, squarings

SIZES = [(7, 5, 3), (1, 6, 1), (40, 70, 33), (130, 3, 64), (20, 30, 200)]


def derivatives(x, y, *arguments):
    """mmd2, its gradients, and these along fixed cotangents."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = mmd2(x, y, *arguments)
    first = torch.autograd.grad(value, (x, y), create_graph=True)
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in first]
    return value, *first, *torch.autograd.grad(first, (x, y), along)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_backend_has_value_gradient_and_second_order_of_float64(kernel, size, backend, device):
    N, M, D = size
    x, y = sample(N, D, dtype=torch.float32), sample(M, D, seed=1, shift=0.4, dtype=torch.float32)
    y[: min(N, M) // 2] = x[: min(N, M) // 2]  # pairs that coincide
    bandwidths = [D**0.5 * s for s in (0.5, 1, 2, 4, 1.3)]
    with use_backend("reference"):
        expected = derivatives(x.double(), y.double(), kernel, bandwidths, False)
    found = derivatives(x.to(device), y.to(device), kernel, bandwidths, False)
    assert abs(found[0].cpu().double() - expected[0]) <= 1e-8 + 1e-3 * abs(expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.cpu().double() - b).norm() <= 2e-5 * b.norm() + (
            1e-5 if D == 1 else 3e-7
        )  # energy has no curvature along a line


@pytest.mark.parametrize("order", [-1, 0, 1, 2])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tile(kernel, diagonal, order, backend, device):
    p, q, hp, hq = (sample(n, 40, seed, dtype=torch.float32) for seed, n in enumerate((50, 70, 50, 70)))
    if diagonal:
        q[:50], hq[:50] = p, hp
    plan = plan_of(kernel, {"gaussian": [4, 8, 9.0], "laplacian": [30, 60.0]}.get(kernel, []), p, q, 50, 70, False)
    offsets = _offsets(p, hp, plan), _offsets(q, hq, plan)
    options = plan.squarings, kernel, plan.precision, -0.3, diagonal, order
    tensors = *(t.double() for t in (p, q, hp, hq, *offsets)), plan.numbers
    expected = mmd_tile.reference(*tensors, *options)
    found = mmd_tile(*(t.to(device) for t in (p, q, hp, hq, *offsets, plan.numbers)), *options)
    for a, b in [*zip(found, expected, strict=True)][order == 2 :]:
        assert a.shape == b.shape
        assert b.numel() == 0 or (a.cpu().double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("kernel", ["gaussian", "energy"])
@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_clusters_far_apart_keep_the_digits_of_what_is_within(kernel, spread, backend, device):
    # Products of vectors of length 10 leave nothing of a squared distance of 1e-8.
    x = sample(30, 20, dtype=torch.float64) * spread
    y = sample(25, 20, seed=1, dtype=torch.float64) * spread + 10
    x, y = x.float(), y.float()
    bandwidth = 5 * spread
    with use_backend("reference"):
        expected = derivatives(x.double(), y.double(), kernel, bandwidth)
    found = derivatives(x.to(device), y.to(device), kernel, bandwidth)
    assert abs(found[0].cpu().double() - expected[0]) <= 1e-8 + 1e-3 * abs(expected[0])
    for a, b in zip(found[1:3], expected[1:3], strict=True):
        assert (a.cpu().double() - b).norm() <= 2e-2 * b.norm()


def with_far_points(where, far):
    """300 points in N(0, 1)^64 and 250 of nearly the same distribution, and points far from all of them."""
    x, y = sample(300, 64, dtype=torch.float32), sample(250, 64, seed=1, shift=0.03, dtype=torch.float32)
    along, all_axes = torch.zeros(64), torch.full((64,), far)
    along[0] = far
    points = {
        "one": ([along], []),
        "one in y, along all axes": ([], [all_axes]),
        "one on each side": ([all_axes], [-all_axes]),
        "two that are close": ([all_axes], [all_axes + along.flip(0) / 1024]),
        "the same in both": ([along], [along]),
        "several": ([along * i for i in (1, -2, 0.7)], [along.flip(0) * i for i in (1, 3)]),
    }[where]
    return (torch.cat([s, *(point[None] for point in added)]) for s, added in zip((x, y), points, strict=True))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    ("where", "far"),
    [(where, far) for where in ("one", "one in y, along all axes") for far in (1e3, 1e6, 1e8)]
    + [(where, 1e5) for where in ("one on each side", "two that are close", "the same in both", "several")],
)  # fmt: skip
def test_far_points_leave_the_energy_distance_its_digits(where, far, unbiased, backend, device):
    x, y = with_far_points(where, far)
    with use_backend("reference"):
        exact = mmd2(x.double(), y.double(), "energy", unbiased=unbiased)
    value = mmd2(x.to(device), y.to(device), "energy", unbiased=unbiased).cpu()
    assert abs(value.double() - exact) <= 1e-8 + 1e-3 * abs(exact)


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "energy"])
def test_far_points_leave_gradients_their_digits(kernel, backend, device):
    x, y = (s[-16:] for s in with_far_points("several", 1e5))
    with use_backend("reference"):
        expected = derivatives(x.double(), y.double(), kernel, 12.0)
    found = derivatives(x.to(device), y.to(device), kernel, 12.0)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.cpu().double() - b).norm() <= 1e-4 * b.norm()


def test_a_sample_without_a_gradient_is_not_worked_for(backend, device):
    x, y = sample(60, 8, dtype=torch.float32).to(device), sample(50, 8, seed=1, dtype=torch.float32).to(device)
    both = derivatives(x, y, "gaussian", 2.0)
    for which in (0, 1):
        pair = [t.clone() for t in (x, y)]
        pair[which].requires_grad_()
        with TileOrders() as seen:
            (alone,) = torch.autograd.grad(mmd2(*pair, "gaussian", 2.0), pair[which])
        torch.testing.assert_close(alone, both[1 + which], rtol=1e-5, atol=1e-9)
        assert sorted(seen.orders) == [0, 1, 1]


class TileOrders:
    """The order of every tile that is computed."""

    def __enter__(self):
        self.orders, self.run = [], mmd_tile._run

        def noting(*args, **kwargs):
            self.orders.append(args[-1])
            return self.run(*args, **kwargs)

        mmd_tile._run = noting
        return self

    def __exit__(self, *error):
        del mmd_tile._run


def test_a_ladder_is_squared_where_it_is_one():
    assert squarings([-1.0, -4.0, -16.0]) == [0, 2, 2]
    assert squarings([-1.0, -2.0, -2.2, -4.4]) == [0, 1, 0, 1]
    assert squarings([-1.0, -64.0, -64.0]) == [0, 0, 0]
    x, y = sample(50, 6, dtype=torch.float32), sample(60, 6, seed=1, shift=0.2, dtype=torch.float32)
    ladder = [0.25 * 2**k for k in range(6)]
    averaged = sum(mmd2(x.double(), y.double(), bandwidth=s) for s in ladder) / len(ladder)
    assert mmd2(x, y, bandwidth=ladder).item() == pytest.approx(averaged.item(), rel=1e-5)


def test_narrow_and_wide_bandwidths_underflow_quietly(backend, device):
    x, y = sample(20, 5, dtype=torch.float32).to(device), sample(20, 5, seed=1, dtype=torch.float32).to(device)
    for bandwidth in (1e-6, 1e6, [1e-6 * 2**k for k in range(8)]):
        found = derivatives(x, y, "gaussian", bandwidth, False)
        with use_backend("reference"):
            expected = mmd2(x.double(), y.double(), "gaussian", bandwidth, False)
        assert found[0].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-8)
        assert all(t.isfinite().all() for t in found)


def test_a_third_order_is_refused():
    x, y = sample(4, 3).requires_grad_(), sample(5, 3, seed=1)
    (first,) = torch.autograd.grad(mmd2(x, y, bandwidth=1.0), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


def test_a_backward_may_be_run_twice():
    x, y = sample(6, 3, dtype=torch.float32).requires_grad_(), sample(5, 3, seed=1, dtype=torch.float32)
    value = mmd2(x, y, bandwidth=1.0)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    kept = first.clone()
    value.backward(retain_graph=True)
    value.backward()
    assert torch.equal(first, kept)
    assert torch.equal(x.grad, 2 * kept)


def test_compiled_as_one_graph():
    x, y = sample(30, 6, dtype=torch.float32).requires_grad_(), sample(20, 6, seed=1, dtype=torch.float32)

    def loss(x, y):
        return 3 * mmd2(x, y, "gaussian", [1.0, 2.0])

    torch.compiler.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(value, loss(x, y))
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(loss(x, y), x))


def test_subsets_are_those_of_one_at_a_time():
    x, y = sample(60, 9, dtype=torch.float32), sample(50, 9, seed=1, shift=0.1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for S, m in ((40, 12), (2, 12)):  # all pairs once, and subset by subset
        rows = torch.stack([torch.randperm(60, generator=generator)[:m] for _ in range(S)])
        columns = torch.stack([torch.randperm(50, generator=generator)[:m] for _ in range(S)])
        expected = [brute_mmd2(x[i], y[j], "polynomial", 1.0, True) for i, j in zip(rows, columns, strict=True)]
        found = mmd2_of_subsets(x, y, rows, columns)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_chunks_of_rows_do_not_change_the_result(kernel, monkeypatch):
    x, y = sample(23, 5).requires_grad_(), sample(31, 5, seed=1, shift=1.0).requires_grad_()

    def value_and_gradients():
        value = mmd2(x, y, kernel, 2.0)
        first = torch.autograd.grad(value, (x, y), create_graph=True)
        return value, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    whole = value_and_gradients()
    monkeypatch.setitem(_TILE, "cpu", (4, 9))
    for a, b in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tensor_is_larger_than_a_tile_or_the_samples(kernel, dtype, monkeypatch):
    monkeypatch.setitem(_TILE, "cpu", (60, 500))
    monkeypatch.setattr("minegan_fast.ops.manhattan._ELEMENTS", 30_000)
    x, y = sample(1000, 14, dtype=dtype).requires_grad_(), sample(1100, 14, seed=1, dtype=dtype)
    with LargestTensor() as largest:
        (gradient,) = torch.autograd.grad(mmd2(x, y, kernel, 1.0), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)
    assert 29_000 < largest.elements <= 30_000
