"""Penalties against their formulas written out per sample, their derivatives, and what training loops do to them."""

import gc
import os

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minegan_fast.layers import (
    LazyPenalty,
    dragan_penalty,
    gradient_penalty,
    lazy_adam,
    path_length_penalty,
    r1_penalty,
)
from minegan_fast.ops import interpolate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=4, dtype=torch.float64, seed=0, size=5):
    return torch.randn(batch, 2, size, size, generator=seeded(seed), dtype=torch.float64).to(dtype)


def smooth_critic(dtype=torch.float64, seed=0, column=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(27, 1)]
    return nn.Sequential(*layers, nn.Identity() if column else nn.Flatten(0)).to(dtype)


def per_sample_norms(critic, x):
    """|grad D(x_i)| from one backward a sample."""
    norms = []
    for i in range(len(x)):
        leaf = x[i : i + 1].detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
        norms.append(gradient.pow(2).sum().sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("center", [1.0, 0.0, 0.3])
def test_gradient_penalty_matches_its_formula(center, column):
    critic, real, fake = smooth_critic(column=column), images(seed=1), images(seed=2)
    penalty = gradient_penalty(critic, real, fake, center, generator=seeded(3))
    norms = per_sample_norms(critic, interpolate(real, fake, generator=seeded(3)))
    expected = (norms - center).pow(2).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    parameters = list(critic.parameters())
    got = torch.autograd.grad(penalty, parameters, allow_unused=True)
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert got[0].abs().max() > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("column", [False, True])
def test_r1_penalty_matches_its_formula(column):
    critic, real = smooth_critic(column=column), images()
    penalty, expected = r1_penalty(critic, real), per_sample_norms(critic, real).pow(2).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(value, critic[0].weight)[0] for value in (penalty, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_r1_of_a_linear_critic_is_the_squared_weight():
    weight = torch.arange(6.0)
    assert r1_penalty(lambda x: x @ weight, torch.randn(3, 6)).item() == weight.square().sum().item()


@pytest.mark.parametrize("penalty", ["gradient", "r1"])
def test_penalties_are_differentiable_twice_in_the_weights(penalty):
    x, y = images(2, size=3), images(2, size=3, seed=1)
    weight = torch.randn(18, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)

    def loss(w):
        def critic(z):
            return (z.flatten(1) @ w).tanh().sum(1)

        return r1_penalty(critic, x) if penalty == "r1" else gradient_penalty(critic, x, y, generator=seeded())

    assert torch.autograd.gradcheck(loss, weight)
    assert torch.autograd.gradgradcheck(loss, weight)


@pytest.mark.parametrize("center", [0.0, 1.0])
def test_a_flat_critic_gives_finite_gradients(center):
    weight = torch.zeros(50, requires_grad=True)
    real = torch.randn(4, 2, 5, 5)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ weight, real, -real, center)
    penalty.backward()
    assert penalty.item() == center**2
    assert torch.equal(weight.grad, torch.zeros(50))


class ConvolutionBackwards(TorchDispatchMode):
    """Which of (input, weight, bias) every convolution backward computes."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return function(*args, **(kwargs or {}))


def test_inner_pass_computes_no_weight_gradient():
    critic, real = smooth_critic(), images()
    with ConvolutionBackwards() as seen:
        r1_penalty(critic, real)
        gradient_penalty(critic, real, -real)
    assert seen.masks == [(True, False, False)] * 2


def test_inputs_are_left_alone():
    real, fake = images().requires_grad_(), images(seed=1).requires_grad_()
    critic = smooth_critic()
    (gradient_penalty(critic, real, fake) + r1_penalty(critic, fake)).backward()
    assert real.grad is None
    assert fake.grad is None
    plain = images()
    r1_penalty(critic, plain)
    assert not plain.requires_grad


def test_value_alone_under_no_grad():
    critic, real = smooth_critic(), images()
    with torch.no_grad():
        penalties = [r1_penalty(critic, real), gradient_penalty(critic, real, -real, generator=seeded())]
    assert [p.requires_grad for p in penalties] == [False, False]
    assert penalties[0].item() == pytest.approx(r1_penalty(critic, real).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalties_are_a_float32_island_under_autocast(dtype):
    critic, real, fake = smooth_critic(torch.float32), images(dtype=torch.float32), images(dtype=dtype, seed=1)
    seen = []
    critic[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    outside = [r1_penalty(critic, real), gradient_penalty(critic, real, fake.float(), generator=seeded())]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [r1_penalty(critic, real), gradient_penalty(critic, real, fake, generator=seeded())]
        sum(inside).backward()
    assert set(seen) == {(torch.float32, torch.float32)}
    assert [p.dtype for p in inside] == [torch.float32] * 2
    assert [p.item() for p in inside] == [p.item() for p in outside]
    assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)


def test_a_critic_with_bfloat16_weights_is_fed_bfloat16():
    critic, real = smooth_critic(torch.bfloat16), images(dtype=torch.bfloat16)
    penalty = r1_penalty(critic, real)
    exact = r1_penalty(critic.double(), real.double())
    assert penalty.dtype == torch.float32
    # Gradients of 50 elements with 8 bits of mantissa each.
    assert penalty.item() == pytest.approx(exact.item(), rel=2**-7)


def test_dragan_matches_its_definition():
    critic, real = smooth_critic(), images(seed=1)
    penalty = dragan_penalty(critic, real, 0.8, 0.3, generator=seeded(3))
    generator = seeded(3)
    noise = torch.rand(real.shape, generator=generator, dtype=torch.float64)
    alpha = torch.rand(4, 1, 1, 1, generator=generator, dtype=torch.float64)
    std = (real - real.mean()).square().mean().sqrt()
    norms = per_sample_norms(critic, real + alpha * 0.3 * std * noise)
    expected = (norms - 0.8).square().mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(value, critic[0].weight)[0] for value in (penalty, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_lazy_penalty_is_thepenalty_on_average():
    critic, real = smooth_critic(torch.float32), images(dtype=torch.float32)
    lazy = LazyPenalty(r1_penalty, every=4, weight=2.5)
    values = [lazy(step, critic, real) for step in range(8)]
    assert [v.requires_grad for v in values] == [True, False, False, False] * 2
    assert all(v.dtype == torch.float32 and v.shape == () for v in values)
    assert sum(values).item() == pytest.approx(8 * 2.5 * r1_penalty(critic, real).item(), rel=1e-6)
    lazy = LazyPenalty(gradient_penalty, 2, 10)
    value = lazy(2, critic, real, -real, center=0.5, generator=seeded())
    expected = gradient_penalty(critic, real, -real, 0.5, generator=seeded())
    assert value.item() == pytest.approx(20 * expected.item(), rel=1e-6)
    assert LazyPenalty(r1_penalty, 1, 0.0)(0, critic, images()).dtype == torch.float64
    for every, weight, message in (
        (0, 1.0, "every"),
        (1.5, 1.0, "every"),
        (1, -1.0, "weight"),
        (1, float("nan"), "weight"),
    ):
        with pytest.raises(ValueError, match=message):
            LazyPenalty(r1_penalty, every, weight)


def test_lazy_adam_moves_a_weight_as_far():
    assert lazy_adam(0.002, (0.0, 0.99), 16) == (0.002 * (16 / 17), (0.0, 0.99 ** (16 / 17)))
    lr, (b1, b2) = lazy_adam(0.1, (0.9, 0.99), 4)
    assert (b1**5, b2**5, 5 * lr) == pytest.approx((0.9**4, 0.99**4, 4 * 0.1))


def small_generator(latents):
    """[B, L, W] or [B, W] -> images [B, 2, 4, 6], smooth, every w of its own weight."""
    flat = latents.flatten(1)
    weight = torch.randn(flat.shape[1], 48, generator=seeded(7), dtype=flat.dtype)
    return (flat @ weight * 0.3).tanh().view(-1, 2, 4, 6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 5)], ids=["per_layer", "single"])
def test_path_length_matches_its_formula(shape):
    latents = torch.randn(shape, generator=seeded(), dtype=torch.float64, requires_grad=True)
    penalty, mean, lengths = path_length_penalty(small_generator(latents), latents, 0.8, 0.1, generator=seeded(5))

    noise = torch.randn(3, 2, 4, 6, generator=seeded(5), dtype=torch.float64) / 24**0.5
    jacobian = torch.autograd.functional.jacobian(small_generator, latents.detach())
    expected = []
    for i in range(3):
        projected = (noise[i][(...,) + (None,) * (latents.dim() - 1)] * jacobian[i, :, :, :, i]).sum((0, 1, 2))
        expected.append((projected.square().sum() / (shape[1] if len(shape) == 3 else 1)).sqrt())
    expected = torch.stack(expected)
    torch.testing.assert_close(lengths, expected, rtol=1e-12, atol=0)
    assert mean.item() == pytest.approx(0.8 + 0.1 * (expected.mean().item() - 0.8), rel=1e-12)
    assert penalty.item() == pytest.approx((expected - mean).square().mean().item(), rel=1e-12)
    assert not mean.requires_grad
    assert not lengths.requires_grad


def test_path_length_gradients():
    latents = torch.randn(2, 2, 3, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(6, 18, generator=seeded(1), dtype=torch.float64, requires_grad=True)

    def loss(w):
        leaf = latents.clone().requires_grad_()
        return path_length_penalty((leaf.flatten(1) @ w).tanh().view(2, 2, 3, 3), leaf, 0.5, generator=seeded(2))[0]

    assert torch.autograd.gradcheck(loss, weight)
    assert torch.autograd.gradgradcheck(loss, weight)


def test_path_length_mean_goes_to_the_mean_length():
    latents = torch.randn(8, 3, 5, generator=seeded(), requires_grad=True)
    mean, history = 0.0, []
    for step in range(400):
        _, mean, lengths = path_length_penalty(small_generator(latents), latents, mean, 0.1, generator=seeded(step))
        history.append(lengths.mean().item())
    # The running mean of 19 effective steps against the mean of all: 4 of its standard errors.
    spread = torch.tensor(history).std().item() * (0.1 / 1.9) ** 0.5
    assert abs(mean.item() - sum(history) / len(history)) < 4 * spread
    assert mean.shape == ()


def test_path_length_under_autocast_is_finite_and_float32():
    layer = nn.Linear(6, 32)
    latents = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = layer(latents).view(4, 2, 4, 4)
        assert made.dtype == torch.bfloat16
        penalty, mean, lengths = path_length_penalty(made, latents, torch.tensor(0.3))
        penalty.backward()
    assert (penalty.dtype, mean.dtype, lengths.dtype) == (torch.float32,) * 3
    assert penalty.isfinite()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().max() > 0


def test_path_length_of_a_constant_direction_is_finite():
    latents = torch.randn(2, 4, requires_grad=True)
    scale = torch.zeros((), requires_grad=True)
    penalty, _, lengths = path_length_penalty((latents * scale).view(2, 1, 2, 2), latents, 1.0)
    penalty.backward()
    assert torch.equal(lengths, torch.zeros(2))
    assert scale.grad == 0


def resident_mib():
    statm = "/proc/self/statm"
    if not os.path.exists(statm):
        pytest.skip("reads the resident memory from /proc")
    with open(statm) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_is_flat_over_a_thousand_steps():
    critic = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(392, 1))
    real, lazy = torch.randn(2, 3, 16, 16), LazyPenalty(r1_penalty, 4, 0.01)
    while gc.collect():
        pass
    gc.disable()
    try:
        for step in range(1000):
            if step == 50:
                before = resident_mib()
            loss = gradient_penalty(critic, real, -real) + lazy(step, critic, real)
            gradients = torch.autograd.grad(loss, [*critic.parameters()][:3])
        # One graph holds over 60 KiB, 950 of them over 57 MiB.
        assert resident_mib() - before < 15
        del loss, gradients
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_memory_is_flat_without_the_garbage_collector():
    critic = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Softplus(), nn.Conv2d(16, 1, 3), nn.Flatten())
    real, latents = torch.randn(8, 3, 36, 36), torch.randn(8, 3 * 36 * 36, requires_grad=True)

    def step():
        # No backward at the end: it would free the buffers and with them break most cycles.
        r1_penalty(lambda x: critic(x).mean(1), real)
        gradient_penalty(lambda x: critic(x).mean(1), real, -real)
        path_length_penalty(latents.tanh().view(8, 3, 36, 36), latents)

    while gc.collect():  # freed graphs of torch.compile's tests leave garbage that only the next collection sees
        pass
    gc.disable()
    try:
        for _ in range(5):
            step()
        before = resident_mib()
        for _ in range(40):
            step()
        # One graph holds over 2 MiB, 40 of them over 80.
        assert resident_mib() - before < 20
        assert gc.collect() == 0
    finally:
        gc.enable()


REAL = images()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interpolate(REAL, REAL[:2]), ValueError, r"same shape, got \[4, 2, 5, 5\] and \[2, 2, 5, 5\]"),
        (lambda: interpolate(REAL, REAL.float()), TypeError, "same dtype, got torch.float64 and torch.float32"),
        (lambda: interpolate(REAL, REAL.to("meta")), ValueError, "same device, got cpu and meta"),
        (lambda: interpolate(REAL.int(), REAL), TypeError, "real must be a floating-point tensor, not torch.int32"),
        (lambda: interpolate(REAL, [1.0]), TypeError, "fake must be a floating-point tensor, not list"),
        (lambda: interpolate(REAL[0, 0, 0], REAL), ValueError, r"real must be a batch \[B, ...\].*\[5\]"),
        (lambda: interpolate(REAL[:0], REAL[:0]), ValueError, r"with at least one element, got \[0, 2, 5, 5\]"),
        (lambda: interpolate(REAL, REAL, torch.ones(3)), ValueError, r"alpha \[3\] does not broadcast"),
        (lambda: interpolate(REAL, REAL, torch.ones(2, 4, 2, 5, 5)), ValueError, "does not broadcast"),
        (lambda: gradient_penalty(smooth_critic(), REAL, REAL[:2]), ValueError, "same shape"),
        (lambda: gradient_penalty(smooth_critic(), REAL, None), TypeError, "fake must be a floating-point tensor"),
        (lambda: r1_penalty(lambda x: x.mean(1), REAL), ValueError, r"return \[B\] or \[B, 1\] with B = 4"),
        (lambda: r1_penalty(lambda x: x.mean(), REAL), ValueError, r"return \[B\] or \[B, 1\] with B = 4, got \[\]"),
        (lambda: r1_penalty(lambda x: (x.mean(),), REAL), TypeError, "must return a tensor .* not tuple"),
        (lambda: r1_penalty(lambda x: x.detach().sum((1, 2, 3)), REAL), ValueError, "do not depend on its input"),
        (
            lambda: r1_penalty(lambda x: torch.ones(4, requires_grad=True) * 2, REAL),
            ValueError,
            "do not depend on its input",
        ),
        (lambda: path_length_penalty(REAL, torch.ones(4, 3)), ValueError, "images do not depend on latents"),
        (
            lambda: path_length_penalty(REAL.clone().requires_grad_(), torch.ones(4, 3, requires_grad=True)),
            ValueError,
            "images do not depend on latents",
        ),
        (lambda: path_length_penalty(REAL, torch.ones(3, 3)), ValueError, r"latents must be .* with B = 4"),
        (lambda: path_length_penalty(REAL, torch.ones(4, 1, 1, 3)), ValueError, "latents must be"),
        (lambda: path_length_penalty(REAL[0], torch.ones(2, 3)), ValueError, r"images must be \[B, C, H, W\]"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
