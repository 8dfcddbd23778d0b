"""Residual and plain generators, skip and plain discriminators of StyleGAN2, against their equations in float64."""

import math

import pytest
import torch
from models.test_stylegan2 import (
    assert_same_gradients,
    critic,
    dense,
    filtered,
    generator,
    lrelu,
    modulated_conv,
    reference_mapping,
    reference_stddev,
    relative,
    tensors_of,
    zeros_between,
)
from torch.nn import functional as F

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.layers import path_length_penalty, r1_penalty
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator


def equal_conv(p, name, x, padding=0, stride=1):
    weight = p[f"{name}.weight"]
    return F.conv2d(x, weight / math.sqrt(weight[0].numel()), padding=padding, stride=stride)


def one_image_synthesis(p, w, noise):
    """Of a residual network, or of a plain one, which has no short ways."""

    def styled(name, x, k, upsample=False):
        y = modulated_conv(p, f"{name}.conv", x, w[:, k], upsample) + p[f"{name}.noise.weight"] * noise[k]
        return lrelu(y + p[f"{name}.activate.bias"][:, None, None])

    x = styled("conv1", p["input.input"].repeat(len(w), 1, 1, 1), 0)
    for j in range((w.shape[1] - 2) // 2):
        y = styled(f"convs.{2 * j}", x, 2 * j + 1, upsample=True)
        y = styled(f"convs.{2 * j + 1}", y, 2 * j + 2)
        # the paper's order, of which ours is the other
        if f"skips.{j}.0.weight" in p:
            y = (y + equal_conv(p, f"skips.{j}.0", filtered(zeros_between(x), 2, 1, gain=4))) / math.sqrt(2)
        x = y
    return modulated_conv(p, "to_rgb.conv", x, w[:, -1], demodulate=False) + p["to_rgb.bias"]


def chain_critic(p, image, size):
    """Of a network without short ways, which reads the image at every resolution or, a plain one, once."""

    def act(name, x):
        return lrelu(x + p[f"{name}.bias"][:, None, None])

    x = act("convs.0.1", equal_conv(p, "convs.0.0", image))
    for i in range(1, int(math.log2(image.shape[2])) - 1):
        y = act(f"convs.{i}.conv1.1", equal_conv(p, f"convs.{i}.conv1.0", x, padding=1))
        y = act(f"convs.{i}.conv2.2", equal_conv(p, f"convs.{i}.conv2.1", filtered(y, 2, 2), stride=2))
        image = filtered(image, 1, 1)[:, :, ::2, ::2]
        if f"from_rgbs.{i - 1}.0.weight" in p:
            y = y + act(f"from_rgbs.{i - 1}.1", equal_conv(p, f"from_rgbs.{i - 1}.0", image))
        x = y
    x = act("final_conv.1", equal_conv(p, "final_conv.0", reference_stddev(x, size), padding=1))
    return dense(p, "final_linear.1", lrelu(dense(p, "final_linear.0", x.flatten(1))))[:, 0]


@pytest.mark.parametrize("architecture", ["resnet", "orig"])
@pytest.mark.parametrize("resolution", [8, 16])
def test_generators_of_one_image_follow_the_equations(resolution, architecture):
    g = generator(resolution, architecture=architecture, channels={4: 11, 8: 7})
    p, z = tensors_of(g), torch.randn(3, 10).double()
    noise = [p[f"noises.noise_{k}"] for k in range(g.num_layers - 1)]
    images, w = g(z, noise="constant", return_latents=True)
    expected_w = reference_mapping(p, z)[:, None].repeat(1, g.num_layers, 1)
    expected = one_image_synthesis(p, expected_w, noise)
    assert relative(images, expected) < 1e-10
    losses = []
    for x, latents in ((images, w), (expected, expected_w)):
        seeded = torch.Generator().manual_seed(0)
        losses.append(path_length_penalty(x, latents, mean=0.1, generator=seeded)[0] + x.square().mean())
    assert_same_gradients(g, *losses)


@pytest.mark.parametrize("architecture", ["skip", "orig"])
@pytest.mark.parametrize("resolution", [8, 16])
def test_critics_without_short_ways_follow_the_equations(resolution, architecture):
    d = critic(resolution, architecture=architecture, channels={8: 5, 4: 9})
    p, x = tensors_of(d), torch.randn(4, 3, resolution, resolution).double()
    assert relative(d(x), chain_critic(p, x, 4)) < 1e-10
    losses = [f(x).square().sum() + r1_penalty(f, x) for f in (d, lambda x: chain_critic(p, x, 4))]
    assert_same_gradients(d, *losses)


def test_config_builds_the_same_and_each_row_is_of_one_neuron():
    for model in (generator(8, architecture="resnet"), critic(8, architecture="skip")):
        assert type(model)(**model.config).state_dict().keys() == model.state_dict().keys()
        seen = [
            f"{module_name}.{name}"
            for module_name, module in model.named_modules()
            for neuron in getattr(module, "neuron_parameters", list)()
            for name, _ in neuron
        ]
        assert len(seen) == len(set(seen))
        assert {n for n, p in model.named_parameters() if p.ndim > 2} <= {*seen}


def test_sparse_finetuning_is_on_the_fast_path():
    for model, x in (
        (generator(8, architecture="resnet").float(), torch.randn(2, 10)),
        (critic(8, architecture="skip").float(), torch.randn(2, 3, 8, 8)),
    ):
        ft = SparseFinetuner(model, density=0.3, criterion="random")
        ft.select()
        model.to(memory_format=torch.channels_last)
        model(x).square().sum().backward()
        rows = [line for line in ft.summary().splitlines() if "conv" in line or "skips" in line or "rgb" in line]
        assert len(rows) >= 5
        assert not [line for line in rows if "dense" in line]
        ft.step()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_memory_format_and_type_of_a_whole_network(architecture, inside):
    """5-D weights, which torch.channels_last does not know, follow the type and the device only."""
    torch.manual_seed(0)
    g = StyleGAN2Generator(8, 10, mapping_layers=1, channel_max=6, architecture=architecture)
    z, weight = torch.randn(2, 10), g.conv1.conv.weight
    before, stride = g(z, noise="constant"), weight.stride()
    g(z).sum().backward()
    network = torch.nn.Sequential(torch.nn.Linear(10, 10), g) if inside else g
    assert network.to(memory_format=torch.channels_last) is network
    torch.testing.assert_close(g(z, noise="constant"), before)
    network.to(torch.float64, memory_format=torch.channels_last)
    assert (g.conv1.conv.weight is weight, weight.stride()) == (True, stride)
    assert {p.dtype for p in g.parameters()} == {p.grad.dtype for p in g.parameters() if p.grad is not None}
    assert g.input.input.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(g(z.double(), noise="constant").float(), before)
    meta = g.to("meta")
    assert (meta.conv1.conv.weight.device.type, meta.conv1.conv.weight.shape) == ("meta", weight.shape)


def test_unknown_architectures_are_named():
    for network in (StyleGAN2Generator, StyleGAN2Discriminator):
        with pytest.raises(ValueError, match='architecture must be "skip", "resnet" or "orig", got \'unet\''):
            network(8, architecture="unet")
