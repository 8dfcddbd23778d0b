"""Small networks of several kinds, whose stages and features tests look for, and images for them."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class Shared(nn.Module):
    """One ReLU for all layers, one layer twice, batch norm, a classifier behind a global mean."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 12, 16)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in itertools.pairwise(widths))
        self.norm, self.relu, self.again = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.convs[0](x)))
        x = self.relu(self.convs[1](x))
        x = self.again(self.again(x))
        x = self.relu(self.convs[2](x))
        return self.fc(self.pool(x).flatten(1))


class Gated(nn.Module):
    """A block that halves the map, with squeeze and excitation, whose maps have one pixel."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 2, 1)
        self.squeeze, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x):
        x = self.narrow(F.relu(self.wide(x)))
        return x * self.gate(self.squeeze(x)).sigmoid()


class Wrapper(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


class GreyFeatures(nn.Module):
    """Images of one channel -> [B, 8], by two stages, the same in every process."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh())
            self.body = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh())

    def forward(self, x):
        return self.body(self.stem(x)).mean((2, 3))


def images(resolution=32, channels=3, count=2):
    return torch.rand(count, channels, resolution, resolution, generator=torch.Generator().manual_seed(5)) * 2 - 1


def gated():
    return nn.Sequential(*(Gated(i, o) for i, o in ((3, 8), (8, 12), (12, 16))), nn.Conv2d(16, 1, 4))


def vgg():
    """Without padding the maps lose a few pixels a layer."""
    layers = []
    for i, o in ((3, 8), (8, 12), (12, 16)):
        layers += [nn.Conv2d(i, o, 3), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(16 * 9, 10))


def hourglass():
    """Its maps become large again."""
    down = [nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 8), (8, 12), (12, 16))]
    return nn.Sequential(*down, nn.Upsample(scale_factor=2), nn.Conv2d(16, 12, 3, 1, 1))
