"""The op of a gradient's norm and its penalty on every backend, and interpolation with its draw."""

import pytest
import torch
from grids import fits_a_gpu, noted_grids
from hypothesis import given, settings
from hypothesis import strategies as st

from minegan_fast.ops import interpolate
from minegan_fast.ops.penalty import interpolate_drawn, penalty_backward, penalty_forward, penalty_on


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=4, dtype=torch.float64, seed=0, size=5):
    return torch.randn(batch, 2, size, size, generator=seeded(seed), dtype=torch.float64).to(dtype)


def test_interpolate_with_alpha():
    real, fake = images(seed=1), images(seed=2)
    alpha = torch.tensor([0.0, 0.25, 1.0, 0.7], dtype=torch.float64)
    mixed = interpolate(real, fake, alpha)
    assert torch.equal(mixed[0], fake[0])
    assert torch.equal(mixed[2], real[2])
    for i, a in enumerate(alpha.tolist()):
        torch.testing.assert_close(mixed[i], a * real[i] + (1 - a) * fake[i], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(interpolate(real, fake, alpha.view(4, 1, 1, 1)), mixed, rtol=0, atol=0)
    torch.testing.assert_close(interpolate(real, fake, 0.5), (real + fake) / 2)
    assert interpolate(real.flatten(1), fake.flatten(1), alpha).shape == (4, 50)


def test_interpolate_draws_one_uniform_alpha_a_sample():
    real, fake = torch.ones(2000, 1, 2, 2), torch.zeros(2000, 1, 2, 2)
    alpha = interpolate(real, fake, generator=seeded()).flatten(1)
    assert torch.equal(alpha, alpha[:, :1].expand(-1, 4))
    assert alpha.min() >= 0
    assert alpha.max() < 1
    # Mean and variance of U[0, 1) within 4 standard errors of 2,000 draws.
    assert abs(alpha[:, 0].mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(alpha[:, 0].var() - 1 / 12) < 4 * (1 / 180 / 2000) ** 0.5
    assert torch.equal(interpolate(real, fake, generator=seeded()).flatten(1), alpha)
    assert not torch.equal(interpolate(real, fake, generator=seeded(1)).flatten(1), alpha)


def test_interpolate_computes_half_precision_in_float32():
    real, fake = images(dtype=torch.bfloat16, seed=1), images(dtype=torch.bfloat16, seed=2)
    mixed = interpolate(real, fake, generator=seeded())
    exact = interpolate(real.float(), fake.float(), generator=seeded())
    assert torch.equal(mixed, exact.bfloat16())


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 5), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_interpolate_stays_between_its_ends(batch, shape, seed):
    real, fake = (torch.randn(batch, *shape, generator=seeded(seed + i)) for i in (0, 1000))
    mixed = interpolate(real, fake, generator=seeded(seed))
    # lerp rounds twice: one ulp of the larger end.
    slack = 2e-7 * torch.maximum(real.abs(), fake.abs())
    assert (mixed <= torch.maximum(real, fake) + slack).all()
    assert (mixed >= torch.minimum(real, fake) - slack).all()
    torch.testing.assert_close(interpolate(real, real, generator=seeded(seed)), real)


def test_interpolate_gradients():
    real, fake = images(2).requires_grad_(), images(2, seed=1).requires_grad_()
    alpha = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interpolate, (real, fake, alpha))
    assert torch.autograd.gradgradcheck(interpolate, (real, fake, alpha))


def layouts(g):
    """The same numbers laid out in memory in several ways."""
    wide = torch.cat([g, g], 1)[:, : g.shape[1]] if g.dim() > 2 else torch.stack([g, g], 1)[:, 0]
    yield from {
        "contiguous": g,
        "batch apart": wide,
        "batch inside": g.transpose(0, -1).contiguous().transpose(0, -1),
    }.items()
    if g.dim() == 4:
        yield "channels last", g.to(memory_format=torch.channels_last)
        yield "permuted", g.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    yield "expanded", g[:1].expand_as(g)
    yield "every second", torch.stack([g, g], -1)[..., 0]


KINDS = {  # mean, center, decay, parts, squared
    "centred": (False, 1.0, 0.0, 1, False),
    "zero-centred": (False, 0.0, 0.0, 1, False),
    "squared": (False, 0.0, 0.0, 1, True),
    "path length": (True, 0.0, 0.01, 3, False),
}


def expected_penalty(g, mean, center, decay, parts, squared):
    """From the definition and autograd in float64: P, r, a, dg."""
    g = g.detach().double().clone().requires_grad_()
    q = torch.stack([one.square().sum() for one in g])
    r = torch.stack([v.sqrt() if v > 0 else v * 0 for v in q / parts])
    origin = center if mean is None else mean.double()
    a = origin + decay * (r.mean() - origin)
    P = q.mean() if squared else (r - a).square().mean()
    (dg,) = torch.autograd.grad(P, g)
    return P.detach(), r.detach(), torch.as_tensor(a).detach(), dg


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_their_penalty(backend, device, kind, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    has_mean, *args = KINDS[kind]
    wide = torch.promote_types(dtype, torch.float32)
    mean = torch.tensor(0.7, dtype=wide, device=device) if has_mean else None
    for shape in [(1, 1), (3, 7), (5, 3, 4, 5), (2, 3, 70, 61)]:
        base = (torch.randn(shape, generator=seeded(), dtype=torch.float64) / shape[1]).to(device, dtype)
        base[0] = 0 if shape[0] == 3 else base[0]
        for layout, g in layouts(base):
            leaf = g.detach().requires_grad_()  # with g's strides
            P, r, a = penalty_on(leaf, mean, *args)
            (dg,) = torch.autograd.grad(P, leaf, torch.tensor(1.5, dtype=wide, device=device))
            expected = expected_penalty(g, mean, *args)
            assert (P.dtype, r.dtype, a.dtype, dg.dtype) == (wide, wide, wide, dtype)
            tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}
            for got, want in zip((P, r, a), expected, strict=False):
                torch.testing.assert_close(
                    got.double(), want.double(), rtol=tolerance[wide], atol=tolerance[wide], msg=layout
                )
            want = 1.5 * expected[3]
            atol = max(2 * tolerance[wide], torch.finfo(dtype).eps) * float(want.abs().max())
            torch.testing.assert_close(dg.double(), want, rtol=0, atol=atol, msg=layout)


def test_channels_last_is_not_copied(backend, device):
    g = torch.randn(2, 3, 5, 4, device=device).to(memory_format=torch.channels_last)
    *_, s, _ = penalty_forward(g, None, 1.0, 0.0, 1, False)
    assert penalty_backward(g, s, s[0]).stride() == g.stride()


def test_sums_do_not_depend_on_threads(backend, device):
    g = torch.randn(3, 3, 200, 300, device=device)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            P, r, s, _ = penalty_forward(g, None, 1.0, 0.0, 1, False)
            results.append((P, r, s, penalty_backward(g, s, P)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_small_and_large_gradients(backend, device):
    for size in (1e-18, 1e18):
        g = torch.full((2, 300), size, device=device)
        r = penalty_forward(g, None, 0.0, 0.0, 1, False)[1]
        torch.testing.assert_close(r, torch.full_like(r, size * 300**0.5), rtol=1e-5, atol=0)


def test_the_penalty_is_differentiable_to_any_order(backend, device):
    g = torch.randn(3, 2, 3, generator=seeded(), dtype=torch.float64).to(device).requires_grad_()
    mean = torch.tensor(0.7, dtype=torch.float64, device=device)
    for has_mean, *args in KINDS.values():

        def function(g, args=args, m=mean if has_mean else None):
            return penalty_on(g, m, *args)[0]

        assert torch.autograd.gradcheck(function, g)
        assert torch.autograd.gradgradcheck(function, g)


def test_a_grid_fits_a_gpu_however_large_a_sample_is(monkeypatch):
    pytest.importorskip("triton")
    from minegan_fast.kernels import penalty as kernels

    grids = noted_grids(
        monkeypatch, kernels, ("squares_kernel", "penalty_kernel", "penalty_backward_kernel", "interpolate_kernel")
    )
    count, length = 3, 2**33
    g = torch.empty(0, device="meta")
    monkeypatch.setattr(torch, "empty", lambda *size, **options: g)
    kernels.penalty(g, None, g, g, g, g, count, length, length, 0.0, 0.0, 1, False)
    kernels.penalty_backward(g, g, g, g, count, length, length, length)
    kernels.interpolate(g, g, g, 0, 0, count, length, length)
    assert len(grids) == 4
    assert all(map(fits_a_gpu, grids))


def test_samples_of_several_blocks(backend, device):
    g = torch.randn(3, 5000, generator=seeded()).to(device)
    P, r, s, _ = penalty_forward(g, None, 1.0, 0.0, 1, False)
    torch.testing.assert_close(r, g.double().norm(dim=1).float())
    torch.testing.assert_close(penalty_backward(g, s, P), g * (P * s)[:, None])


def test_a_drawn_interpolation(backend, device):
    n = 2000 if backend in ("reference", "cpp") or device == "cuda" else 150  # the interpreter is slow
    zero, one = torch.zeros(n, 3, device=device), torch.ones(n, 3, device=device)
    alpha = interpolate_drawn(one, zero, 1234567890123, 8)
    assert torch.equal(alpha, alpha[:, :1].expand(-1, 3))
    alpha = alpha[:, 0]
    assert 0 <= alpha.min() < 0.1 < 0.9 < alpha.max() < 1
    assert abs(alpha.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(alpha.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    assert abs(torch.corrcoef(torch.stack([alpha[1:], alpha[:-1]]))[0, 1]) < 4 / n**0.5
    for seed, offset in ((1234567890124, 8), (1234567890123, 12), (1234567890123, 8 + (4 << 32))):
        other = interpolate_drawn(one, zero, seed, offset)[:, 0]
        assert abs(torch.corrcoef(torch.stack([alpha, other]))[0, 1]) < 4 / n**0.5
    real, fake = torch.randn(2, 5, 3, 4, 6, generator=seeded()).to(device)
    expected = torch.lerp(fake, real, alpha[:5].view(5, 1, 1, 1))
    for layout in (torch.contiguous_format, torch.channels_last):
        mixed = interpolate_drawn(real.to(memory_format=layout), fake.to(memory_format=layout), 1234567890123, 8)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=2**-23 * float(expected.abs().max()))
    long = interpolate_drawn(one[:3, :1].expand(3, 5000), zero[:3, :1].expand(3, 5000), 1234567890123, 8)
    assert torch.equal(long, alpha[:3, None].expand(3, 5000))
    mixed = interpolate_drawn(real.to(memory_format=torch.channels_last), fake, 1234567890123, 8)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2**-23 * float(expected.abs().max()))


def test_large_gradients(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("seconds in the interpreter")
    g = torch.randn(2, 3, 1_500_007, generator=seeded()).to(device)[:, 1:]
    s, dP = torch.tensor([0.5, -2.0], device=device), torch.tensor(3.0, device=device)
    torch.testing.assert_close(penalty_backward(g, s, dP), g * (s * dP)[:, None, None])


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_squares_neither_vanish_nor_overflow(backend, device, size):
    g = size * torch.randn(2, 40_000, generator=seeded()).to(device)
    if backend != "cpp":
        pytest.skip("squared in float32, as PyTorch users write it")
    _, r, _, _ = penalty_forward(g, None, 0.0, 0.0, 1, False)
    torch.testing.assert_close(r.double(), g.double().norm(dim=1), rtol=2e-6, atol=0)


def test_philox_is_the_published_one():
    """Random123's known answer for counter and key 0 begins with 6627e8d5."""
    alpha = interpolate_drawn.reference(
        torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), 0, 0
    )
    assert alpha.item() == pytest.approx(0x6627E8D5 / 2**31, abs=1e-7)


@pytest.mark.gpu
def test_interpolation_moves_the_generator():
    real, fake = torch.ones(64, 3, device="cuda"), torch.zeros(64, 3, device="cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    first, second = (interpolate(real, fake, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(interpolate(real, fake, generator=generator.manual_seed(3)), first)
    torch.cuda.manual_seed(5)
    first = interpolate(real, fake)
    torch.cuda.manual_seed(5)
    assert torch.equal(interpolate(real, fake), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = interpolate(real, fake)
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert not torch.equal(first, captured)
