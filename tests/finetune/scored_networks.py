"""Networks whose weights meet the samples in every way that is followed."""

import torch
from sample_networks import EqualLinear, Residual, Standardised, mlp, spectral
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from minegan_fast.ops import bias_act


class Affine(nn.Module):
    """Gain and bias as written by hand, a learned constant, noise, and a gain of no axis."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 3, 6, 6))
        self.gain = nn.Parameter(torch.randn(3, 1, 1))
        self.bias = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.strength = nn.Parameter(torch.tensor(0.3))
        self.activation = nn.Parameter(torch.randn(3))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x) - self.constant.expand(len(x), -1, -1, -1)
        y = self.gain * y + self.bias
        y += self.strength * x
        return bias_act(y / (2 + self.gain.square()), self.activation * 0.5, act="lrelu", gain=1.5)


class Twice(nn.Module):
    """A weight in two layers, once transposed, once squared and summed; a layer called twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        x = self.mix(torch.tanh(self.mix(x.mean((1, 3)))))
        y = F.linear(torch.tanh(F.linear(x, self.weight * 0.5)), self.weight.t())
        return y / (F.linear(x.square(), self.weight.square()) + 1).sqrt()


def normalised(norm, channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3), norm, nn.Tanh(), nn.Conv2d(channels, 2, 2))


def random_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        norm.weight.normal_()
    return norm


def sequences(*layers):
    return nn.Sequential(nn.Flatten(2), *layers)


NETWORKS = {
    "linear": mlp,
    "equalised": lambda: nn.Sequential(nn.Flatten(), EqualLinear(108, 6), nn.Tanh(), EqualLinear(6, 4)),
    "linear on sequences": lambda: sequences(nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)),
    "linear on images": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
    "conv1d": lambda: sequences(nn.Conv1d(3, 4, 5, stride=2, padding=3, dilation=2), nn.Tanh(), nn.Conv1d(4, 2, 1)),
    "conv2d": lambda: nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.Tanh(), nn.Conv2d(4, 5, 1)
    ),
    "conv2d groups": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2, padding="valid")
    ),
    "conv2d same, unevenly": lambda: nn.Sequential(nn.Conv2d(3, 4, (2, 4), padding="same"), nn.Tanh()),
    "padding modes": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect")
    ),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 3, (2, 3, 1), padding=1), nn.Tanh()),
    "transposed 1d": lambda: sequences(nn.ConvTranspose1d(3, 4, 4, 3, 1, output_padding=1), nn.Tanh()),
    "transposed 2d": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 6, 4, 2, 1, dilation=2), nn.Tanh(), nn.ConvTranspose2d(6, 4, 3, groups=2)
    ),
    "transposed 3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.ConvTranspose3d(1, 3, 2, 2)),
    "affine": Affine,
    "twice": Twice,
    "batch norm": lambda: normalised(random_statistics(nn.BatchNorm2d(4))).eval(),
    "layer norm": lambda: sequences(nn.Linear(36, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
    "group norm": lambda: normalised(nn.GroupNorm(2, 4)),
    "instance norm": lambda: normalised(nn.InstanceNorm2d(4, affine=True)),
    "standardised": lambda: nn.Sequential(Standardised(3, 4, 3), nn.Tanh(), Standardised(4, 3, 3)),
    "weight norm": lambda: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(108, 5))),
    "spectral norm": lambda: spectral(parametrizations.spectral_norm).eval(),
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4), Residual(4)).eval(),
}


def make(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()
