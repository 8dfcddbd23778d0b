"""Small networks, and the folders that public projects keep theirs in."""

import pytest
import torch
from held_networks import times
from torch import nn

from minegan_fast.models import BigGANDiscriminator, BigGANGenerator, StyleGAN2Discriminator, StyleGAN2Generator

SIZES = {4: 6, 8: 5, 16: 3}


@pytest.fixture(scope="module")
def stylegan2():
    torch.manual_seed(0)
    return StyleGAN2Generator(16, 9, mapping_layers=2, channels=SIZES), StyleGAN2Discriminator(16, channels=SIZES)


@pytest.fixture(scope="module")
def biggan():
    torch.manual_seed(1)
    g = BigGANGenerator(32, latent_dim=16, class_dim=5, num_classes=4, channel_width=2, attention=(16,))
    return g, BigGANDiscriminator(32, num_classes=4, channel_width=2, attention=(16,))


@pytest.fixture
def biggan_folder(tmp_path, biggan):
    """A folder as BigGAN-PyTorch leaves it, and the original MineGAN."""
    g, d = biggan
    settings = {"itr": 7, "config": {"G_activation": nn.ReLU(inplace=False), "num_epochs": 3}}

    def write(suffix="", factor=1.0):
        torch.save(times(g, factor), tmp_path / f"G_ema{suffix}.pth")
        torch.save(times(g, 3 * factor), tmp_path / f"G{suffix}.pth")
        torch.save(times(d, factor), tmp_path / f"D{suffix}.pth")
        torch.save(settings, tmp_path / f"state_dict{suffix}.pth")
        torch.save({f"linear{i}.weight": torch.ones(2, 2) for i in ("", *range(2, 9))}, tmp_path / f"M{suffix}.pth")
        (tmp_path / f"G_optim{suffix}.pth").write_bytes(b"never read")

    write()
    return tmp_path, write
