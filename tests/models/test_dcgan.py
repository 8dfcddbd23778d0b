"""DCGAN against the tutorial's layers written out, and its files as programs after the tutorial have them."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minegan_fast as mf
from minegan_fast.models import DCGANDiscriminator, DCGANGenerator, load_discriminator, load_generator, save_model

WIDTHS = (16, 8, 4)


def tutorial_generator(latent, widths, channels, dropout=(), bias=False):
    """The tutorial's `main`, whose first layers may be followed by dropout."""
    layers, cin = [], latent
    for i, width in enumerate(widths):
        layers += [nn.ConvTranspose2d(cin, width, 4, 1 if i == 0 else 2, 0 if i == 0 else 1, bias=bias)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(True)]
        layers += [nn.Dropout(0.5)] * (i in dropout)
        cin = width
    return nn.Sequential(*layers, nn.ConvTranspose2d(cin, channels, 4, 2, 1, bias=bias), nn.Tanh())


def tutorial_critic(widths, channels):
    layers = [nn.Conv2d(channels, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for cin, cout in itertools.pairwise(widths):
        layers += [nn.Conv2d(cin, cout, 4, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False), nn.Sigmoid())


def trained(network):
    """With statistics and gains as after a training."""
    with torch.no_grad():
        for name, t in [*network.named_parameters(), *network.named_buffers()]:
            if t.ndim == 1:
                t.copy_(torch.rand(t.shape) + 0.5 if "var" in name or "weight" in name else torch.randn(t.shape) * 0.3)
    return network.eval()


def state_of(network, prefix="main."):
    return {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}


def equations(state, z, positions):
    """The chain, layer by layer, from the file's tensors: (convolution, batch norm or None) positions."""
    x = z[:, :, None, None]
    for i, (conv, norm) in enumerate(positions):
        weight = state[f"main.{conv}.weight"]
        x = F.conv_transpose2d(x, weight, stride=1 if i == 0 else 2, padding=0 if i == 0 else 1)
        if norm is not None:
            mean, var = (state[f"main.{norm}.running_{k}"][:, None, None] for k in ("mean", "var"))
            gain, shift = (state[f"main.{norm}.{k}"][:, None, None] for k in ("weight", "bias"))
            x = F.relu((x - mean) / (var + 1e-5).sqrt() * gain + shift)
    return x.tanh()


@pytest.mark.parametrize("container", [None, "netG_state_dict", "model"])
@pytest.mark.parametrize("dropout", [(), (0,), (0, 2)])
def test_files_of_the_tutorial_and_after_it(tmp_path, container, dropout):
    torch.manual_seed(0)
    state = state_of(trained(tutorial_generator(10, WIDTHS, 3, dropout)))
    torch.save(state if container is None else {container: state, "epoch": 5}, tmp_path / "file")
    generator = load_generator(tmp_path / "file")
    assert (generator.resolution, generator.latent_dim, generator.num_classes) == (32, 10, 0)
    z, place, positions = torch.randn(4, 10), 0, []
    for i in range(3):
        positions.append((place, place + 1))
        place += 3 + (i in dropout)
    torch.testing.assert_close(generator(z), equations(state, z, [*positions, (place, None)]), rtol=1e-5, atol=1e-6)


def test_the_critic_gives_logits(tmp_path):
    torch.manual_seed(0)
    critic = trained(tutorial_critic(WIDTHS[::-1], 1))
    torch.save({"netD": state_of(critic), "netG": state_of(tutorial_generator(10, WIDTHS, 1))}, tmp_path / "file")
    loaded = load_discriminator(tmp_path / "file")
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    torch.testing.assert_close(loaded(images).sigmoid(), critic(images).flatten(), rtol=1e-5, atol=1e-6)
    assert mf.models.has_discriminator(tmp_path / "file")


@pytest.mark.parametrize("name", ["label_emb.weight", "embedding.weight", "label_embedding.weight", "emb.weight"])
def test_a_conditional_one(tmp_path, name):
    torch.manual_seed(0)
    network, embedding = trained(tutorial_generator(10 + 6, WIDTHS, 3, bias=True)), torch.randn(5, 6)
    torch.save(state_of(network) | {name: embedding}, tmp_path / "file")
    generator = load_generator(tmp_path / "file")
    assert (generator.latent_dim, generator.num_classes, generator.class_dim) == (10, 5, 6)
    z, y = torch.randn(3, 10), torch.tensor([4, 0, 2])
    expected = network(torch.cat((z, embedding[y]), 1)[:, :, None, None])
    torch.testing.assert_close(generator(z, y), expected)
    torch.testing.assert_close(generator(z, generator.class_embeddings()[y]), expected)
    with pytest.raises(ValueError, match="has 5 classes: give labels"):
        generator(z)
    mined = mf.Mined(generator, mf.Miner(10), mf.Miner(10, output_dim=6, affine=True))
    assert mined.sample(2).shape == (2, 3, 32, 32)


def documented():
    """The class that docs/checkpoints.md shows for labels in z."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    found = {"torch": torch}
    exec(re.search(r"class OneHot.*?(?=\n\n\nmf\.transfer)", text, re.DOTALL)[0], found)
    return found["OneHot"]


def test_labels_in_z_as_the_documents_have_them(tmp_path, capfd):
    torch.manual_seed(0)
    network, critic = trained(tutorial_generator(6 + 4, WIDTHS[:2], 1)), tutorial_critic(WIDTHS[1::-1], 1 + 4)
    torch.save({"netG": state_of(network), "netD": state_of(critic)}, tmp_path / "file")
    generator = documented()(load_generator(tmp_path / "file"), 4)
    z, y = torch.randn(3, 6), torch.tensor([3, 0, 2])
    expected = network(torch.cat((z, torch.eye(4)[y]), 1)[:, :, None, None])
    torch.testing.assert_close(generator(z, y), expected)
    torch.testing.assert_close(generator(z, generator.class_embeddings()[y]), expected)
    images = torch.randint(0, 256, (12, 1, 16, 16), dtype=torch.uint8)
    settings = {"mining_steps": 1, "finetune_steps": 1, "batch": 4, "loss": "nonsaturating", "features": "pixels",
                "eval_samples": 8, "score_samples": 4, "grid": 4, "snapshot_every": 2, "held_out": 0.0}  # fmt: skip
    result = mf.transfer(generator, images, tmp_path / "run", **settings, mined_class=3, progress=False)
    assert result.mined.class_miner.output_dim == 4
    mf.transfer(tmp_path / "file", images, tmp_path / "whole", **settings)
    said = capfd.readouterr()
    assert (
        "if the 4 further ones are maps of a label, a part of the generator's z is that label too"
        in said.out + said.err
    )


def test_networks_come_back_and_are_adapted(tmp_path):
    torch.manual_seed(0)
    g, d = DCGANGenerator(6, (8, 8), 1), DCGANDiscriminator((8, 8), 1)
    save_model(tmp_path / "file.safetensors", g, d)
    again = load_generator(tmp_path / "file.safetensors")
    assert again.config == g.config
    assert all(torch.equal(t, g.state_dict()[name]) for name, t in again.state_dict().items())
    images = torch.randint(0, 256, (12, 1, 16, 16), dtype=torch.uint8)
    result = mf.transfer(
        tmp_path / "file.safetensors", images, tmp_path / "run", mining_steps=2, finetune_steps=2, batch=4,
        method="minegan++", loss="nonsaturating", features="pixels", eval_samples=8, score_samples=4, grid=4,
        snapshot_every=2, progress=False,
    )  # fmt: skip
    assert result.sample(3).shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: (t[..., :3, :3] if t.ndim == 4 else t) for k, t in s.items()}, "3x3.* and not 4x4 throughout"),
        (lambda s: {k: t for k, t in s.items() if "main.3" not in k and "main.6" not in k}, "of which a DCGAN has 3"),
        (lambda s: s | {"main.1.weight": torch.ones(5)}, "does not fit a DCGANGenerator"),
    ],
)
def test_other_chains_are_named(tmp_path, change, message):
    state = state_of(tutorial_generator(10, WIDTHS[:2], 3))
    torch.save(change(state), tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        load_generator(tmp_path / "file")


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match=r"z must have shape \[B, 10\], got \[2, 9\]"):
        DCGANGenerator(10, (4, 4))(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="has no classes: give no labels"):
        DCGANGenerator(10, (4, 4))(torch.zeros(2, 10), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes have a class_dim"):
        DCGANGenerator(10, (4, 4), num_classes=3)
    with pytest.raises(ValueError, match=r"images must have shape \[B >= 1, 3, 16, 16\]"):
        DCGANDiscriminator((4, 4))(torch.zeros(2, 3, 8, 8))
