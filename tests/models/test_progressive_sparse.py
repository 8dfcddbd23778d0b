"""Sparse finetuning of Progressive GAN and StyleGAN: rows of the dense gradients, and scores of single samples."""

import copy

import pytest
import torch
from torch.nn import functional as F

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.layers import path_length_penalty, r1_penalty
from minegan_fast.models import PGANDiscriminator, PGANGenerator, StyleGANDiscriminator, StyleGANGenerator

SIZES = {"channel_base": 64, "channel_max": 8}


def build(cls, alpha=1.0):
    """A network whose biases and noise weights are not zero, and whose unused layers of the images do not train."""
    arguments = {PGANDiscriminator: {}, PGANGenerator: {"latent_dim": 11}, StyleGANDiscriminator: {"fused_from": 16}}
    arguments = arguments.get(cls, {"latent_dim": 11, "mapping_layers": 2, "fused_from": 16})
    net = cls(16, alpha=alpha, **SIZES, **arguments).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    layers = {PGANDiscriminator: "fromRGBLayers", PGANGenerator: "toRGBLayers", StyleGANDiscriminator: "from_rgb"}
    images = net.get_submodule(layers.get(cls, "generator.to_rgb"))
    top = images[::-1] if cls is not StyleGANDiscriminator else images
    for layer in top[1 if alpha == 1 else 2 :]:
        layer.requires_grad_(False)
    return net


def penalised(net):
    """A loss with R1 for a discriminator, with path length for StyleGAN."""
    if isinstance(net, PGANDiscriminator | StyleGANDiscriminator):
        x = torch.randn(4, 3, 16, 16).double()
        return F.softplus(net(x)).mean() + r1_penalty(net, x)
    z = torch.randn(3, 11).double()
    if isinstance(net, PGANGenerator):
        return net(z).square().mean()
    images, w = net(z, return_latents=True)
    return images.square().mean() + path_length_penalty(images, w)[0]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("cls", [PGANGenerator, PGANDiscriminator, StyleGANGenerator, StyleGANDiscriminator])
def test_selected_rows_get_the_dense_gradient(cls, alpha):
    """And it comes of the rows alone; but for the learned constant, which is no layer."""
    net = build(cls, alpha)
    ft = SparseFinetuner(copy.deepcopy(net))
    ft.select({layer.name: list(range(0, layer.neurons, 2)) for layer in ft.layers})
    for model in (net, ft.model):
        torch.manual_seed(5)
        penalised(model).backward()
    for layer in ft.layers:
        for member in layer.members:
            link = member.parameter.link
            expected = net.get_parameter(member.name).grad.movedim(link.axis, 0)[link.rows]
            torch.testing.assert_close(link.leaf.grad, expected, rtol=1e-10, atol=1e-12, msg=member.name)
            assert bool(expected.any())
    ways = {line.split()[0]: line for line in ft.summary().splitlines()[2:-1]}
    constant = {"generator.progression.0.conv1.input"} & ways.keys()
    assert {name for name, line in ways.items() if "dense" in line} == constant
    assert all("rows: " in line for name, line in ways.items() if name not in constant)


@pytest.mark.parametrize("cls", [PGANGenerator, PGANDiscriminator, StyleGANGenerator, StyleGANDiscriminator])
def test_one_backward_scores_every_sample(cls):
    net = build(cls)
    data = torch.randn(3, 11).double() if "Generator" in cls.__name__ else torch.randn(3, 3, 16, 16).double()
    noise = [torch.randn(3, 1, r, r).double() for r in (4, 8, 16)]

    def loss(net, which):
        if cls is StyleGANGenerator:
            y = net(data[which], noise=[drawn[which] for drawn in noise])
        else:
            y = net(data[which]) if cls is PGANGenerator else net.features(data[which], group=1)
        return y.square().flatten(1).sum(1).mean()

    scores = []
    for batches in ([slice(0, 3)], [slice(i, i + 1) for i in range(3)]):
        ft = SparseFinetuner(copy.deepcopy(net), criterion="fisher", exclude=["linear", "decisionLayer"])
        with ft.scoring():
            for which in batches:
                loss(ft.model, which).backward()
        scores.append(ft.scores())
    for name, score in scores[1].items():
        torch.testing.assert_close(scores[0][name], score, rtol=1e-10, atol=0.0, msg=name)
