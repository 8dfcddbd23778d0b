"""Fisher and agreement of a batch equal those of its samples one by one where their uses are followed."""

import pytest
import torch
from one_by_one import assert_equal, loss_of, one_by_one, scored
from sample_networks import data
from scored_networks import NETWORKS, make
from torch.nn import functional as F

from minegan_fast.finetune.samples import uses
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_is_its_samples(name, reduction):
    net, batches = make(name), [data(4), data(3, seed=2)]
    scores, named = scored(net, batches, lambda net, x: loss_of(net, x, reduction), reduction=reduction)
    assert named == set()
    assert_equal(scores, one_by_one(make(name), batches))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_samples_of_a_batch_agree_as_they_do_alone(name):
    batches = [data(4), data(3, seed=2)]
    scores, named = scored(make(name), batches, criterion="agreement")
    assert named == set()
    assert_equal(scores, one_by_one(make(name), batches, criterion="agreement"))


@pytest.mark.parametrize("criterion", ["fisher", "agreement"])
@pytest.mark.parametrize("name", ["conv2d", "twice", "weight norm", "linear on sequences"])
def test_some_samples_at_a_time(name, criterion, monkeypatch):
    monkeypatch.setattr(uses, "CHUNK_BYTES", 1)
    scores, _ = scored(make(name), [data(5)], criterion=criterion)
    assert_equal(scores, one_by_one(make(name), [data(5)], criterion=criterion))


def generator():
    torch.manual_seed(0)
    net = StyleGAN2Generator(16, latent_dim=8, channel_base=64, channel_max=12, mapping_layers=2).double()
    for name, p in net.named_parameters():
        if "noise" in name or "bias" in name:
            torch.nn.init.normal_(p, std=0.1)
    return net


def images(net, z):
    return net(z[:, 0, 0].repeat(1, 2)[:, :8], noise="constant")


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_stylegan2_is_exact(network):
    """The modulated weight meets the samples twice: in the convolution, and squared and summed in the demodulation."""
    if network == "generator":
        net, x, loss = generator(), data(4), lambda net, z: images(net, z).square().sum() / len(z)
    else:
        torch.manual_seed(0)
        net = StyleGAN2Discriminator(16, channel_base=64, channel_max=12).double()
        x, loss = (
            torch.randn(4, 3, 16, 16, dtype=torch.float64),
            lambda net, x: F.softplus(net.final_linear[1](net.features(x, group=1))).mean(),
        )
    scores, named = scored(net, [x], loss)
    assert named == set()
    assert_equal(scores, one_by_one(net, [x], loss))


def test_random_noise_is_followed():
    net = generator()
    noise = [torch.randn(4, *b.shape[1:], dtype=torch.float64) for b in net.noises.buffers()]
    z = torch.randn(4, 8, dtype=torch.float64)
    scores, named = scored(
        net, [torch.arange(4)], lambda net, i: net(z[i], noise=[n[i] for n in noise]).square().mean()
    )
    assert named == set()
    expected = one_by_one(net, [torch.arange(4)], lambda net, i: net(z[i], noise=[n[i] for n in noise]).square().mean())
    assert_equal(scores, expected)
