"""The whole recipe on a generator that this package does not know: `python examples/your_own_generator.py IMAGES OUT`.

Any module will do that has `latent_dim`, `resolution` and (where it is not 3) `image_channels`.
"""

import argparse

import torch
from torch import nn

import minegan_fast as mf


class Generator(nn.Module):
    """z [B, 32] -> images [B, 3, 16, 16] in [-1, 1]."""

    latent_dim, resolution = 32, 16

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64 * 16), nn.ReLU(), nn.Unflatten(1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.layers(z)


class Critic(nn.Module):
    """Images -> logits [B]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(64 * 16, 1),
        )  # fmt: skip

    def forward(self, images):
        return self.layers(images)[:, 0]


def main(images, out, **settings) -> mf.training.TransferResult:
    torch.manual_seed(0)
    generator, critic = Generator(), Critic()  # here you load your trained weights
    return mf.transfer(generator, images, out, critic=critic, density=0.1, features="pixels", **settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images")
    parser.add_argument("out")
    arguments = parser.parse_args()
    print(main(arguments.images, arguments.out, mining_steps=100, finetune_steps=100).metrics)
    adapted = mf.load_mined(arguments.out, Generator())  # the way back, in another program say
    print(adapted.sample(4).shape)
