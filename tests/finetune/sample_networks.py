"""Small float64 networks with every way of using a weight, and a plain optimizer of rows to compare with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from minegan_fast.finetune import SparseFinetuner

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)


class Fails(torch.autograd.Function):
    """A backward that ends the pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise KeyError("stop")


class EqualLinear(nn.Module):
    """Equalised learning rate: the weight is scaled where it is used."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = inputs**-0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Modulated(nn.Module):
    """Modulated and demodulated convolution with the weight [1, out, in, k, k]; the bias sits in another module."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))
        self.conv.modulation = EqualLinear(inputs, inputs)
        self.activate = nn.Module()
        self.activate.bias = nn.Parameter(torch.zeros(outputs))
        self.strength = nn.Parameter(torch.full((1,), 0.1))

    def neuron_parameters(self):
        return [[("conv.weight", 1), ("activate.bias", 0)]]

    def forward(self, x):
        n, c, h, w = x.shape
        style = self.conv.modulation(x.mean((2, 3))).view(n, 1, c, 1, 1)
        weight = self.conv.weight * style
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        y = F.conv2d(x.reshape(1, n * c, h, w), weight.flatten(0, 1), padding=1, groups=n).view(n, -1, h, w)
        return F.leaky_relu(y + self.strength * torch.linspace(-1, 1, w).to(x) + self.activate.bias.view(-1, 1, 1), 0.2)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.tanh(x + self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x))))))


class Tied(nn.Module):
    """One tensor in two layers, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed((x.flatten(1)[:, :4].abs() * 100).long() % 7).mean(1)
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(h)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x.flatten(2)[:, :, :8])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.lstm(x.flatten(2)[:, :, :6])[0]


class Constant(nn.Module):
    """A learned constant, a 0-dimensional parameter and a bare list of parameters."""

    def __init__(self):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, 3, 6, 6))
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.shifts = nn.ParameterList([nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.randn(1))])

    def forward(self, x):
        return torch.tanh(self.gain * (x * self.input + self.shifts[0]) + self.shifts[1])


def spectral(use):
    conv, linear = use(nn.Conv2d(3, 5, 3, padding=1)), use(nn.Linear(5 * 36, 4))
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear)


def old_spectral_norm(module):
    return nn.utils.spectral_norm(module)


class Halve(nn.Module):
    def forward(self, w):
        return w / 2


def parametrized():
    linear = parametrizations.weight_norm(nn.Linear(108, 5))
    parametrize.register_parametrization(linear, "bias", Halve())
    return nn.Sequential(nn.Flatten(), linear)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.Tanh(), nn.Linear(7, 5))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 5, 4, 2, 1),
        nn.Tanh(),
        nn.ConvTranspose2d(5, 5, 3, groups=5),
    )


NETWORKS = {
    "mlp": mlp,
    "convolutions": convolutions,
    "equalised": lambda: nn.Sequential(nn.Flatten(), EqualLinear(108, 6), nn.Tanh(), EqualLinear(6, 4)),
    "modulated": lambda: nn.Sequential(Modulated(3, 5), Modulated(5, 4)),
    "standardised": lambda: nn.Sequential(Standardised(3, 4, 3), nn.Tanh(), Standardised(4, 3, 3)),
    "resnet": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4), Residual(4)),
    "spectral": lambda: spectral(parametrizations.spectral_norm),
    "old_spectral": lambda: spectral(old_spectral_norm),
    "weight_norm": parametrized,
    "tied": Tied,
    "transformer": Attention,
    "lstm": Recurrent,
    "constant": Constant,
}
# An embedding has no input gradient; attention and LSTM on the CPU have no second derivative.
FIRST_ORDER = {"tied", "transformer", "lstm"}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().double()


def data(batch: int = 3, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss(net, x, penalties=True):
    """A loss with, where the network allows it, R1's and path length's gradients of gradients in it."""
    if not penalties:
        return net(x).square().mean()
    x = x.clone().requires_grad_()
    y = net(x)
    (r1,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (path,) = torch.autograd.grad((y * torch.linspace(0, 1, y.numel()).to(y).view_as(y)).sum(), x, create_graph=True)
    lengths = path.flatten(1).square().sum(1).sqrt()
    return y.square().mean() + 0.1 * r1.square().sum() + (lengths - 0.5).square().mean()


class RowReference:
    """Trains rows of a plain network with torch.optim on separate tensors, and copies them in."""

    def __init__(self, net, ft, make):
        named = dict(net.named_parameters())
        self.rows = []
        for layer in ft.layers:
            for m in layer.members:
                if layer.name in ft.selection.rows:
                    self.rows.append((named[m.name], m.axis, ft.selection.rows[layer.name]))
        self.leaves = [self.take(p.detach(), axis, rows).clone().requires_grad_() for p, axis, rows in self.rows]
        self.net, self.optimizer = net, make(self.leaves)

    @staticmethod
    def take(t, axis, rows):
        return t.reshape(1) if t.ndim == 0 else t.index_select(axis, rows)

    def step(self):
        for leaf, (p, axis, rows) in zip(self.leaves, self.rows, strict=True):
            leaf.grad = None if p.grad is None else self.take(p.grad, axis, rows)
        self.optimizer.step()
        with torch.no_grad():
            for leaf, (p, axis, rows) in zip(self.leaves, self.rows, strict=True):
                p.copy_(leaf.reshape(())) if p.ndim == 0 else p.index_copy_(axis, rows, leaf)
        self.net.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, tolerance=0.0):
    """Equal state dicts: to the bit, or to `tolerance`, absolute for tensors up to 1 and of their largest entry above:
    so far one unit in the last place of an input goes."""
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, value in a.state_dict().items():
        absolute = tolerance * max(1.0, float(theirs[name].detach().abs().max()))
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=absolute, msg=lambda m, name=name: f"{name}: {m}"
        )


ROWS = [0, 2, 5]


def held(make, rows=ROWS):
    """A plain module, a held copy of it, and the copy's optimizer."""
    plain = make().double()
    module = copy.deepcopy(plain)
    ft = SparseFinetuner(module)
    ft.select({"weight": rows})
    return plain, module, ft


def taken(gradient, parameter):
    link = parameter.link
    return gradient.movedim(link.axis, 0)[link.rows]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
