"""Layers of StyleGAN, with the parameters of rosinality/style-based-gan-pytorch.

Equalised learning rate: weights are stored as N(0, 1) and scaled by He's constant √(2 / fan-in) in the forward.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import bias_act, upfirdn2d
from .layers import mean_2x2


def _weight(*shape: int, fan_in: int) -> tuple[nn.Parameter, float]:
    return nn.Parameter(torch.randn(shape)), math.sqrt(2 / fan_in)


class _Parameters(nn.Module):
    """The parameters of a layer, which the layout keeps in a module of their own."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight_orig, self.bias = weight, nn.Parameter(torch.zeros(len(weight)))


class EqualLinear(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        weight, self.scale = _weight(cout, cin, fan_in=cin)
        self.linear = _Parameters(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.scale, self.linear.weight_orig, self.linear.bias)  # x is the smaller one


class EqualConv2d(nn.Module):
    """Convolution, where `pool` is given mean over 2x2 pixels, bias, where `activate` is given leaky ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int, padding: int = 0, pool: bool = False, activate: bool = False):
        super().__init__()
        weight, self.scale = _weight(cout, cin, kernel, kernel, fan_in=cin * kernel * kernel)
        self.conv = _Parameters(weight)
        self.padding, self.pool, self.activate = padding, pool, activate

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight_orig * self.scale
        if not self.activate:
            return F.conv2d(x, weight, self.conv.bias, padding=self.padding)
        y = F.conv2d(x, weight, padding=self.padding)
        return bias_act(mean_2x2(y) if self.pool else y, self.conv.bias, act="lrelu")


class FusedUpsample(nn.Module):
    """Twice the size and a 3x3 convolution in one: a transposed one of stride 2, then the mean over 2x2 neighbours.

    The two are one transposed convolution with a 4x4 kernel, the 3x3 one spread over its four shifts; apart they take
    9 multiplications where that takes 16.
    """

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.weight, self.scale = _weight(cin, cout, 3, 3, fan_in=cin * 9)
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, self.weight * self.scale, stride=2)
        return bias_act(mean_2x2(y, stride=1), self.bias)


class FusedDownsample(nn.Module):
    """A 3x3 convolution and half the size in one, the adjoint of `FusedUpsample`; then bias and leaky ReLU."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.weight, self.scale = _weight(cout, cin, 3, 3, fan_in=cin * 9)
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(mean_2x2(x, stride=1, padding=1), self.weight * self.scale, stride=2)
        return bias_act(y, self.bias, act="lrelu")


class Blur(nn.Module):
    """Low-pass filter (1, 2, 1) ⊗ (1, 2, 1) / 16 over every channel, zero-padded."""

    def __init__(self, channels: int):
        super().__init__()
        taps = torch.tensor((1.0, 2.0, 1.0))
        kernel = (torch.outer(taps, taps) / 16).expand(channels, 1, 3, 3)
        self.weight: Tensor
        self.register_buffer("weight", kernel.clone())
        self.register_buffer("weight_flip", kernel.clone())  # the layout has it, and the filter is symmetric

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.weight[0, 0], padding=1)


class AdaptiveInstanceNorm(nn.Module):
    def __init__(self, channels: int, style_dim: int):
        super().__init__()
        self.style = EqualLinear(style_dim, 2 * channels)
        with torch.no_grad():
            self.style.linear.bias[:channels] = 1

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, shift = self.style(w)[:, :, None, None].chunk(2, 1)
        # Half precision has too few digits for the difference of the mean.
        var, mean = torch.var_mean(
            x.to(torch.promote_types(x.dtype, torch.float32)), (2, 3), correction=0, keepdim=True
        )
        scale = scale * torch.rsqrt(var + 1e-5)
        return torch.addcmul((shift - scale * mean).to(x.dtype), x, scale.to(x.dtype))


class NoiseInjection(nn.Module):
    """Adds one map, weighted by channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = math.sqrt(2 / channels)

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return x if noise is None else x + (self.weight_orig * self.scale).to(x.dtype) * noise.to(x.dtype)


class ConstantInput(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.ones(1, channels, 4, 4))

    def forward(self, constant: Tensor | None) -> Tensor:
        return self.input if constant is None else constant
