"""Small generators and critics for the tests of several GANs."""

import torch
from torch import nn

from minegan_fast.models import StyleGAN2Generator

SMALL = {"channel_base": 64, "channel_max": 4}


class Plain(nn.Module):
    """z [B, 5] -> [B, channels, size, size], with batch norm."""

    latent_dim = 5

    def __init__(self, size=8, channels=1):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 4 * 16), nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, channels, size // 4, size // 4)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, z):
        return self.last(self.norm(self.first(z).view(-1, 4, 4, 4)).relu()).tanh()


class Noisy(Plain):
    """Draws in every way that generators do."""

    def forward(self, z):
        images = super().forward(z)
        for noise in (
            torch.randn(len(z), 1, 8, 8, dtype=z.dtype), torch.randn((len(z), 1, 1, 1), dtype=z.dtype),
            torch.rand(size=(len(z), 1, 1, 1), dtype=z.dtype), torch.randn_like(images), torch.rand_like(images),
            z.new_empty(len(z), 1, 8, 8).normal_(0, 2), z.new_empty(len(z), 1, 8, 8).uniform_(-1, 2),
            torch.randn(1, 1, 8, 8, dtype=z.dtype), torch.randn(7, dtype=z.dtype).mean(),
        ):  # fmt: skip
            images = images + 0.3 * noise
        last = images.contiguous(memory_format=torch.channels_last).repeat(1, 3, 1, 1)
        return images + torch.randn_like(last)[:, 1:2]


def changed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def network(*shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 7), nn.Tanh(), nn.Linear(7, 1))


def stylegan2(**settings):
    generator = StyleGAN2Generator(8, latent_dim=6, style_dim=7, mapping_layers=2, image_channels=1, **SMALL)
    for name, parameter in generator.named_parameters():
        if "noise" in name:
            parameter.data.fill_(1.0)
    return generator.eval()
