"""A class-conditional generator of a user's own, and a critic for it."""

import torch
from torch import nn


class Conditional(nn.Module):
    """A user's class-conditional generator, with batch norm and spectral norm."""

    latent_dim, class_dim, num_classes, resolution, image_channels = 6, 5, 4, 8, 1

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 5)
        self.first = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(11, 64))
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, 1, 4, 2, 1)

    def class_embeddings(self):
        return self.table.weight

    def forward(self, z, y):
        y = y if y.is_floating_point() else self.table(y)
        x = self.first(torch.cat((z, y), 1)).view(-1, 4, 4, 4)
        return self.last(self.norm(x).relu()).tanh()


class Critic(nn.Sequential):
    """A critic with spectral norm, whose vectors move in every forward of its training."""

    def __init__(self):
        super().__init__(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 8, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(128, 1),
            nn.Flatten(0),
        )
