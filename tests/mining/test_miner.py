import pytest
import torch
from torch import nn

from minegan_fast.mining import Mined, Miner


class NoisyGenerator(nn.Module):
    """z [B, 5] (and a class embedding [B, 3]) -> [B, 5 or 8], with noise of its own from the global random state."""

    latent_dim = 5

    def forward(self, z, y=None, *, strength=1.0):
        z = z if y is None else torch.cat((z, y), 1)
        return z + strength * torch.randn_like(z)


def changed(miner):
    """The miner with a last layer that is no longer zero."""
    with torch.no_grad():
        for parameter in miner.parameters():
            parameter.normal_()
    return miner


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("activation", ["relu", "lrelu", "tanh", "linear"])
def test_a_residual_miner_starts_as_the_identity(depth, activation):
    miner = Miner(6, depth, width=9, activation=activation)
    u = torch.randn(7, 6)
    assert torch.equal(miner(u), u)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("lrelu", lambda x: torch.where(x > 0, x, 0.2 * x)),
        ("tanh", torch.tanh),
        ("linear", lambda x: x),
    ],
)
def test_the_miner_is_a_perceptron(activation, function, residual):
    miner = changed(Miner(4, 3, 7, activation=activation, residual=residual)).double()
    u = torch.randn(5, 4).double()
    p = list(miner.parameters())
    assert [tuple(w.shape) for w in p] == [(7, 4), (7,), (7, 7), (7,), (4, 7), (4,)]
    hidden = function(function(u @ p[0].T + p[1]) @ p[2].T + p[3])
    torch.testing.assert_close(miner(u), hidden @ p[4].T + p[5] + (u if residual else 0), rtol=0, atol=1e-12)


def test_sizes():
    miner = Miner(8, input_dim=3, residual=False)
    assert miner(torch.randn(2, 3)).shape == (2, 8)
    assert (miner.input_dim, miner.output_dim) == (3, 8)
    miner = Miner(8, depth=1, output_dim=5, residual=False)
    assert miner(torch.randn(2, 8)).shape == (2, 5)
    assert len(list(miner.parameters())) == 2
    again = Miner(**miner.config)
    assert again.config == miner.config
    again.load_state_dict(miner.state_dict())


def test_gradients_reach_the_last_layer_first_then_all():
    miner = Miner(6, depth=3)
    u = torch.randn(16, 6)
    optimizer = torch.optim.SGD(miner.parameters(), 0.1)
    for moving in ({"4.weight", "4.bias"}, {f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}):
        optimizer.zero_grad()
        (miner(u) - 1).square().sum().backward()
        assert {name for name, p in miner.layers.named_parameters() if p.grad.any()} == moving
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"input_dim": -1}, "input_dim must be at least 1, got -1"),
        ({"activation": "gelu"}, "must be one of relu, lrelu, tanh, linear, got 'gelu'"),
        ({"input_dim": 3}, "needs input_dim == output_dim, got 3 and 6; make them equal or pass residual=False"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Miner(**({"latent_dim": 6} | arguments))


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 6)])
def test_wrong_inputs_are_named(shape):
    with pytest.raises(ValueError, match=r"u must have shape \[B, 6\]"):
        Miner(6)(torch.zeros(shape))


def test_mined_is_the_generator_behind_the_miner():
    miner = changed(Miner(5))
    mined = Mined(NoisyGenerator(), miner)
    u = torch.randn(4, 5)
    assert torch.equal(mined(u, strength=0.0), miner(u))
    class_miner = changed(Miner(5, output_dim=3, residual=False))
    conditional = Mined(NoisyGenerator(), miner, class_miner)
    assert torch.equal(conditional(u, strength=0.0), torch.cat((miner(u), class_miner(u)), 1))
    assert {name.split(".")[0] for name, _ in conditional.named_parameters()} == {"miner", "class_miner"}


def test_mined_refuses_a_miner_of_another_size():
    with pytest.raises(ValueError, match="the miner gives 4 numbers, but the generator takes z of 5"):
        Mined(NoisyGenerator(), Miner(4))


def test_sample_is_reproducible_and_leaves_the_global_state_alone():
    mined = Mined(NoisyGenerator(), changed(Miner(5, input_dim=2, residual=False)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    seeded = torch.Generator().manual_seed(7)
    a, b = mined.sample(3, seeded), mined.sample(3, seeded)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = torch.Generator().manual_seed(7)
    assert torch.equal(mined.sample(3, again), a)
    assert torch.equal(mined.sample(3, again), b)
    assert not torch.equal(a, b)
    assert a.shape == (3, 5)
    assert not a.requires_grad


def test_sample_without_a_generator_draws_from_the_global_state():
    mined = Mined(NoisyGenerator(), Miner(5).double())
    torch.manual_seed(0)
    u = torch.randn(3, 5, dtype=torch.float64)
    expected = u + torch.randn_like(u)
    torch.manual_seed(0)
    assert torch.equal(mined.sample(3), expected)
    assert torch.equal(
        mined.sample(2, torch.Generator().manual_seed(1), strength=0.0).double(),
        torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )


def test_a_miner_without_input_dim_is_asked_for_one():
    mined = Mined(NoisyGenerator(), nn.Identity())
    assert mined(torch.ones(1, 5)).shape == (1, 5)
    with pytest.raises(ValueError, match="Identity has no input_dim; give it one, or call with your own u"):
        mined.sample(2)
    mined.miner.input_dim = 5
    assert mined.sample(2).shape == (2, 5)
