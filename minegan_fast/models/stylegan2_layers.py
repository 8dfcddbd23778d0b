"""The layers of StyleGAN2, generator's and discriminator's, whose equations stand in `stylegan2`."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import bias_act, modulated_conv2d, upfirdn2d
from .layers import Blur, Upsample

SQRT2 = math.sqrt(2.0)


class FusedLeakyReLU(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(x, self.bias, act="lrelu", gain=SQRT2)


class EqualLinear(nn.Module):
    """Linear layer that learns `lr_mul` times as fast as the others; `activate` adds a leaky ReLU."""

    def __init__(self, cin: int, cout: int, bias: float = 0.0, lr_mul: float = 1.0, activate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin) / lr_mul)
        self.bias = nn.Parameter(torch.full((cout,), float(bias)))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(cin), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.lr_mul == 1 else self.bias * self.lr_mul
        if not self.activate:
            return F.linear(x * self.scale, self.weight, bias)  # x is smaller than the weight
        return bias_act(F.linear(x, self.weight * self.scale), bias, act="lrelu", gain=SQRT2)


class LabelEmbedding(EqualLinear):
    """A linear layer of one-hot vectors: labels, integers [B], -> [B, cout]."""

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(F.one_hot(y, self.weight.shape[1]).to(self.weight.dtype))

    def table(self) -> Tensor:
        """What it makes of every label, [cin, cout], without a one-hot vector for each."""
        return self.weight.t() * self.scale + self.bias


def mapping_network(dims: Sequence[int]) -> list[EqualLinear]:
    """Layers of these sizes, from the input's to the output's, which learn a hundredth as fast as the others."""
    return [EqualLinear(cin, cout, lr_mul=0.01, activate=True) for cin, cout in itertools.pairwise(dims)]


class EqualConv2d(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel))
        self.scale = 1 / math.sqrt(cin * kernel * kernel)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class ModulatedConv2d(nn.Module):
    """The convolution of eq. 1-3: x [B, in, H, W], style [B, style_dim] -> [B, out, H or 2H, W or 2W]."""

    def __init__(
        self, cin: int, cout: int, kernel: int, style_dim: int, demodulate: bool = True, upsample: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, cout, cin, kernel, kernel))
        self.modulation = EqualLinear(style_dim, cin, bias=1.0)
        self.scale = 1 / math.sqrt(cin * kernel * kernel)
        self.demodulate = demodulate
        self.blur = Blur(padding=1, gain=4.0) if upsample else None

    def _apply(self, fn, recurse=True):
        # `to(memory_format=torch.channels_last)`, on this module or one around it, asks for that format of each tensor
        # of 4 or 5 axes, and one of 5 has no such format. So the weight moves as a flat tensor and keeps its layout.
        return super()._apply(lambda t: fn(t.flatten()).view(t.shape) if t.ndim == 5 else fn(t), recurse)

    def forward(self, x: Tensor, style: Tensor, **epilogue) -> Tensor:
        """epilogue: what follows in the same pass, as of the op."""
        return modulated_conv2d(
            x,
            self.weight,
            self.modulation(style),
            demodulate=self.demodulate,
            up=self.blur is not None,
            kernel=None if self.blur is None else self.blur.kernel,
            scale=self.scale,
            **epilogue,
        )


class NoiseInjection(nn.Module):
    """The strength of a layer's noise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class ConstantInput(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def neuron_parameters(self) -> list:
        return [[("input", 1)]]

    def forward(self, batch: int, constant: Tensor | None = None) -> Tensor:
        constant = self.input if constant is None else constant
        return constant.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)


class StyledConv(nn.Module):
    def __init__(self, cin: int, cout: int, style_dim: int, upsample: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(cin, cout, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(cout)

    def neuron_parameters(self) -> list:
        return [[("conv.weight", 1), ("activate.bias", 0)]]

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        strength = None if noise is None else self.noise.weight
        epilogue = {"bias": self.activate.bias, "act": "lrelu", "gain": SQRT2}
        return self.conv(x, style, noise=noise, strength=strength, **epilogue)


class ToRGB(nn.Module):
    """Adds this resolution's contribution to the image of the one below, `skip`."""

    def __init__(self, cin: int, image_channels: int, style_dim: int, upsample: bool = True):
        super().__init__()
        self.upsample = Upsample() if upsample else None
        self.conv = ModulatedConv2d(cin, image_channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, image_channels, 1, 1))

    def neuron_parameters(self) -> list:
        return [[("conv.weight", 1), ("bias", 1)]]

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None) -> Tensor:
        y = self.conv(x, style)
        y = (y + self.bias).to(y.dtype)
        if skip is None:
            return y
        return y + (skip if self.upsample is None else self.upsample(skip))


class UpsampledSkip(nn.Sequential):
    """The short way past a residual block: 1x1 convolution, then upsampling, which it commutes with."""

    def __init__(self, cin: int, cout: int):
        super().__init__(EqualConv2d(cin, cout, 1, stride=1, padding=0), Upsample())

    def neuron_parameters(self) -> list:
        return [[("0.weight", 0)]]


class ConvLayer(nn.Sequential):
    """[blur,] convolution [, bias and leaky ReLU]; `downsample` halves the size."""

    def __init__(self, cin: int, cout: int, kernel: int, downsample: bool = False, activate: bool = True):
        # A 1x1 convolution of stride 2 reads every second pixel alone: so the filter computes no other.
        single = kernel == 1
        before = [Downsample() if single else Blur(padding=(kernel + 1) // 2)] if downsample else []
        stride, padding = (1 if single else 2, 0) if downsample else (1, kernel // 2)
        super().__init__(
            *before,
            EqualConv2d(cin, cout, kernel, stride, padding),
            *([FusedLeakyReLU(cout)] if activate else []),
        )

    def neuron_parameters(self) -> list:
        conv = int(isinstance(self[0], Blur))
        return [[(f"{conv}.weight", 0)] + [(f"{conv + 1}.bias", 0)] * (len(self) > conv + 1)]


class ResBlock(nn.Module):
    """Two convolutions, the second of which halves the size, and, where `residual`, a short way past them."""

    def __init__(self, cin: int, cout: int, residual: bool = True):
        super().__init__()
        self.conv1 = ConvLayer(cin, cin, 3)
        self.conv2 = ConvLayer(cin, cout, 3, downsample=True)
        self.skip = ConvLayer(cin, cout, 1, downsample=True, activate=False) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return y if self.skip is None else (y + self.skip(x)) / SQRT2


class Downsample(Blur):
    """Half the size: the filter, then every second pixel."""

    def __init__(self):
        super().__init__(padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, down=2, padding=self.padding)
