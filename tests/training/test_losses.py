import math

import pytest
import torch

from minegan_fast.training.losses import LOSSES, critic_loss, generator_loss

REAL, FAKE = [2.0, -0.5, 0.3], [-1.5, 0.25]


def mean(values):
    return sum(values) / len(values)


def softplus(value):
    return math.log1p(math.exp(value))


EXPECTED = {
    "nonsaturating": (
        mean([softplus(-f) for f in FAKE]),
        mean([softplus(f) for f in FAKE]) + mean([softplus(-r) for r in REAL]),
    ),
    "wgan": (-mean(FAKE), mean(FAKE) - mean(REAL)),
    "hinge": (-mean(FAKE), mean([max(0, 1 + f) for f in FAKE]) + mean([max(0, 1 - r) for r in REAL])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values(name):
    real, fake = (torch.tensor(values, dtype=torch.float64) for values in (REAL, FAKE))
    assert generator_loss(name, fake).item() == pytest.approx(EXPECTED[name][0], rel=1e-12)
    assert critic_loss(name, real, fake[:, None]).item() == pytest.approx(EXPECTED[name][1], rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_generator_descends_where_the_critic_ascends(name):
    fake = torch.zeros(4, requires_grad=True)
    (up,) = torch.autograd.grad(generator_loss(name, fake), fake)
    (down,) = torch.autograd.grad(critic_loss(name, torch.zeros(4), fake), fake)
    assert (up < 0).all()
    assert (down > 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_arithmetic(name, dtype):
    real, fake = (torch.tensor(values, dtype=dtype) for values in (REAL, FAKE))  # all exact in dtype but 0.3
    with torch.autocast("cpu", torch.bfloat16):
        losses = generator_loss(name, fake), critic_loss(name, real, fake)
    exact = generator_loss(name, fake.double()), critic_loss(name, real.double(), fake.double())
    for loss, expected in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name):
    large = torch.tensor([1e4, -1e4], dtype=torch.float16)
    assert generator_loss(name, large).isfinite()
    assert critic_loss(name, large, large).isfinite()


def test_unknown_names_are_answered_with_the_known():
    for call in (lambda: generator_loss("lsgan", torch.zeros(2)), lambda: critic_loss("", *torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="choose one of nonsaturating, wgan, hinge"):
            call()
