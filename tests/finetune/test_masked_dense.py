"""Whole networks: sparse training is dense training with a mask, for every optimizer and kind of mixed precision."""

import copy
from contextlib import nullcontext

import pytest
import torch
from sample_networks import CUDA
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.models import StyleGAN2Generator


class ConditionalNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.shift = (spectral_norm(nn.Linear(5, channels, bias=False)) for _ in range(2))

    def forward(self, x, y):
        return self.norm(x) * (1 + self.gain(y)[:, :, None, None]) + self.shift(y)[:, :, None, None]


class BigGANBlock(nn.Module):
    """Conditional norm, ReLU, upsampling and spectrally normalised 3x3 convolutions, twice; a 1x1 shortcut."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(3), ConditionalNorm(6)
        self.conv1, self.conv2 = (spectral_norm(nn.Conv2d(c, 6, 3, padding=1)) for c in (3, 6))
        self.shortcut = spectral_norm(nn.Conv2d(3, 6, 1))

    def forward(self, x):
        y = x[:, :1, 0, :5]
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, y[:, 0])), scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h, y[:, 0])))
        return h + self.shortcut(F.interpolate(x, scale_factor=2))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class Encoder(nn.Module):
    """Patches, a learned position, two transformer layers, a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, 8) * 0.02)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.position))


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = StyleGAN2Generator(8, latent_dim=8, channel_base=64, channel_max=8, mapping_layers=2)

    def forward(self, x):
        return self.net(x.flatten(1)[:, :8], noise="constant")


NETWORKS = {
    "resnet": lambda: nn.Sequential(
        BasicBlock(3, 6), BasicBlock(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ),
    "transformer": Encoder,
    "BigGAN": BigGANBlock,
    "StyleGAN2": Generator,
}
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 2e-3, "betas": (0.5, 0.99), "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 2e-2, "momentum": 0.9, "weight_decay": 0.01}),
}
# How far apart two trainings may be, over how far they went: float32 sums in another order, 16-bit ones likewise.
PRECISIONS = {"float32": (None, 2e-4), "bfloat16": (torch.bfloat16, 0.1), "float16": (torch.float16, 0.02)}


def train(net, optimizer, x, dtype, device, after=lambda: None):
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16, init_scale=2.0**12)
    for images in x:
        optimizer.zero_grad()
        with torch.autocast(device, dtype) if dtype else nullcontext():
            y = net(images).float()
        scaler.scale((y - torch.linspace(-1, 1, y[0].numel()).to(y).view(y[0].shape)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        after()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_dense_training_with_a_mask(name, optimizer, precision, device):
    make, arguments = OPTIMIZERS[optimizer]
    dtype, tolerance = PRECISIONS[precision]
    torch.manual_seed(0)
    plain = NETWORKS[name]().to(device)
    net, start = copy.deepcopy(plain), copy.deepcopy(plain)
    x = torch.randn(20, 4, 3, 8, 8, device=device)
    ft = SparseFinetuner(net, density=0.3, criterion="random", scope="layer", optimizer=optimizer, **arguments)
    ft.select()
    train(net, ft, x, dtype, device)

    masks = {}
    for layer in ft.layers:
        for m in layer.members:
            mask = torch.zeros_like(m.parameter.detach(), dtype=torch.bool)
            if layer.name in ft.selection.rows:
                mask.movedim(m.axis, 0)[ft.selection.rows[layer.name]] = True if mask.ndim else mask.fill_(True)
            masks[m.name] = mask
    parameters, first = dict(plain.named_parameters()), dict(start.named_parameters())

    @torch.no_grad()
    def restore():  # masked gradients would not do: weight decay moves what has none
        for n, p in parameters.items():
            p.copy_(torch.where(masks[n], p, first[n]))

    train(plain, make(plain.parameters(), **arguments), x, dtype, device, restore)
    apart = moved = 0.0
    for n, p in net.named_parameters():
        if n not in masks:
            continue
        assert torch.equal(p.detach()[~masks[n]], first[n].detach()[~masks[n]]), n
        apart += (p.detach() - parameters[n].detach()).double().square().sum().item()
        moved += (parameters[n].detach() - first[n].detach()).double().square().sum().item()
    assert moved > 1e-4
    assert apart**0.5 < tolerance * moved**0.5
    ft.verify()
