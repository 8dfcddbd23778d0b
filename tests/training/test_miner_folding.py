"""What of a miner a generator holds: the same images where it holds it, and untouched miners where it cannot."""

import pytest
import torch

from minegan_fast.mining import Mined, Miner
from minegan_fast.models import BigGANGenerator, PGANGenerator, StyleGAN2Generator, StyleGANGenerator
from minegan_fast.training.miner_folding import affine_map, fold

SIZES = {"channel_base": 64, "channel_max": 8}


def generator(kind=StyleGAN2Generator, **sizes):
    torch.manual_seed(0)
    network = kind(8, 6, **SIZES | sizes).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return network.eval()


def miner(size=6, **arguments):
    made = Miner(size, **arguments).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return made.eval()


def noise_of(network):
    return {"noise": "none"} if hasattr(network, "mapping") else {}


@pytest.mark.parametrize("kind", [StyleGAN2Generator, StyleGANGenerator])
@pytest.mark.parametrize(
    "arguments", [{"depth": 1}, {"depth": 1, "residual": False}, {"depth": 3, "activation": "linear", "width": 4}]
)
def test_an_affine_miner_of_w_goes_into_the_styles(kind, arguments):
    network = generator(kind, mapping_layers=2, style_dim=5)
    mined = Mined(network, miner(5, **arguments), place="w").eval()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    held, left = fold(mined)
    assert left is None
    u = torch.randn(4, 6).double()
    torch.testing.assert_close(held(u, noise="none"), mined(u, noise="none"), rtol=1e-12, atol=1e-12)
    assert (held(u, noise="none") - network(u, noise="none")).abs().max() > 0.01, "the miner does nothing"
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    # Truncation towards the mean of the mapping's own w is truncation towards what the miner makes of it.
    w, mean = network.mapping(u), network.mean_latent()
    truncated = network(mined.miner(mean + 0.5 * (w - mean)), latents=True, noise="none")
    torch.testing.assert_close(held(u, noise="none", truncation=0.5), truncated, rtol=1e-12, atol=1e-12)


def test_a_mined_constant_is_held_bit_for_bit_beside_a_miner_that_bends():
    network = generator()
    constant = torch.randn_like(network.learned_constant)
    mined = Mined(network, miner(), place="w", constant=constant).eval()
    held, left = fold(mined)
    assert torch.equal(held.learned_constant, constant)
    assert left.constant is None
    u = torch.randn(4, 6).double()
    assert torch.equal(left(u, noise="none"), mined(u, noise="none"))
    assert left.generator is held


@pytest.mark.parametrize("kind", [StyleGAN2Generator, StyleGANGenerator, PGANGenerator])
@pytest.mark.parametrize("prior", ["none", "sphere"])
def test_the_identity_is_held_where_the_generator_normalises_z(kind, prior):
    mined = Mined(generator(kind), Miner(6).double(), prior=prior).eval()
    held, left = fold(mined)
    assert left is None
    u = torch.randn(4, 6).double()
    torch.testing.assert_close(held(u, **noise_of(held)), mined(u, **noise_of(held)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [StyleGAN2Generator, StyleGANGenerator, PGANGenerator])
def test_other_miners_of_z_stay_before_the_normalisation(kind):
    shifted = Miner(6).double()
    torch.nn.init.ones_(shifted.layers[-1].bias)
    for made in (miner(), miner(depth=1), miner(depth=3, activation="linear"), shifted):
        mined = Mined(generator(kind), made).eval()
        held, left = fold(mined)
        assert left.miner is made
        u = torch.randn(4, 6).double()
        assert torch.equal(left(u, **noise_of(held)), mined(u, **noise_of(held)))


def test_biggan_holds_no_sphere_and_no_mined_class():
    torch.manual_seed(0)
    network = BigGANGenerator(32, 12, class_dim=6, num_classes=5, channel_width=2, attention=()).eval()
    identity, classes = Miner(12).eval(), Miner(12, output_dim=6, affine=True).eval()
    assert fold(Mined(network, identity))[1] is None
    assert fold(Mined(network, identity, prior="sphere+moments"))[1].prior == "sphere+moments"
    left = fold(Mined(network, identity, classes))[1]
    assert (left.miner, left.class_miner) == (identity, classes)


def test_affine_maps():
    made = miner(4, depth=2, activation="linear", input_dim=4, output_dim=4)
    a, b = affine_map(made)
    u = torch.randn(20, 4).double()
    torch.testing.assert_close(made(u), u @ a.T + b)
    sized = miner(4, depth=1, input_dim=4, output_dim=7, affine=True)
    a, b = affine_map(sized)
    assert a.shape == (7, 4)
    torch.testing.assert_close(sized(u), u @ a.T + b)
    assert affine_map(miner(4)) is None
    assert affine_map(torch.nn.Linear(4, 4)) is None
    a, b = affine_map(Miner(4))
    assert torch.equal(a, torch.eye(4).double())
    assert not b.any()
