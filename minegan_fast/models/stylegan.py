"""StyleGAN (Karras et al. 2019, arXiv 1812.04948): generator by styles and progressive discriminator.

A layer of the generator convolves, adds noise, applies leaky ReLU, normalises every feature map over its pixels and
gives it the scale and shift that an affine map of w asks for (adaptive instance normalisation, eq. 1):

    AdaIN(x, w)_c = s_c(w) (x_c - mean(x_c)) / √(var(x_c) + 1e-5) + b_c(w)

Weights are stored as N(0, 1) and scaled by He's constant √(2 / fan-in) in the forward, those of the noise included,
whose fan-in is their number of channels. Features are low-pass filtered where the resolution changes. While a
resolution fades in, `alpha` weighs its path against the one through the resolution below. Parameter names and shapes
are those of rosinality/style-based-gan-pytorch.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import bias_act
from .layers import PixelNorm, Progressive, channel_table, check_images, minibatch_stddev
from .styles import StyleBased


def _weight(*shape: int, fan_in: int) -> tuple[nn.Parameter, float]:
    return nn.Parameter(torch.randn(shape)), math.sqrt(2 / fan_in)


class EqualLinear(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.linear = nn.Module()
        self.linear.weight_orig, self.scale = _weight(cout, cin, fan_in=cin)
        self.linear.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight_orig * self.scale, self.linear.bias)


class EqualConv2d(nn.Module):
    """Convolution, where `pool` is given mean over 2x2 pixels, bias, where `activate` is given leaky ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int, padding: int = 0, pool: bool = False, activate: bool = False):
        super().__init__()
        self.conv = nn.Module()
        self.conv.weight_orig, self.scale = _weight(cout, cin, kernel, kernel, fan_in=cin * kernel * kernel)
        self.conv.bias = nn.Parameter(torch.zeros(cout))
        self.padding, self.pool, self.activate = padding, pool, activate

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight_orig * self.scale
        if not self.activate:
            return F.conv2d(x, weight, self.conv.bias, padding=self.padding)
        y = F.conv2d(x, weight, padding=self.padding)
        return bias_act(F.avg_pool2d(y, 2) if self.pool else y, self.conv.bias, act="lrelu")


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
        return bias_act(F.avg_pool2d(y, 2, stride=1), self.bias)


class FusedDownsample(nn.Module):
    """A 3x3 convolution and half the size in one, the adjoint of `FusedUpsample`; then bias and leaky ReLU."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.weight, self.scale = _weight(cout, cin, 3, 3, fan_in=cin * 9)
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.avg_pool2d(x, 2, stride=1, padding=1), self.weight * self.scale, stride=2)
        return bias_act(y, self.bias, act="lrelu")


class Blur(nn.Module):
    """Low-pass filter (1, 2, 1) ⊗ (1, 2, 1) / 16 over every channel, zero-padded."""

    def __init__(self, channels: int):
        super().__init__()
        taps = torch.tensor((1.0, 2.0, 1.0))
        kernel = (torch.outer(taps, taps) / 16).expand(channels, 1, 3, 3)
        self.register_buffer("weight", kernel.clone())
        self.register_buffer("weight_flip", kernel.clone())  # the layout's; the filter is symmetric

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), padding=1, groups=x.shape[1])


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


class StyledConvBlock(nn.Module):
    """Both layers of one resolution; without `cin` the first has the learned constant in place of a convolution."""

    def __init__(self, cin: int | None, cout: int, style_dim: int, fused: bool):
        super().__init__()
        if cin is None:
            self.conv1, self.first = ConstantInput(cout), (("conv1.input", 1),)
        elif fused:
            self.conv1 = nn.Sequential(FusedUpsample(cin, cout), Blur(cout))
            self.first = (("conv1.0.weight", 1), ("conv1.0.bias", 0))
        else:
            self.conv1 = nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), EqualConv2d(cin, cout, 3, 1), Blur(cout))
            self.first = (("conv1.1.conv.weight_orig", 0), ("conv1.1.conv.bias", 0))
        self.noise1, self.adain1 = NoiseInjection(cout), AdaptiveInstanceNorm(cout, style_dim)
        self.conv2 = EqualConv2d(cout, cout, 3, 1)
        self.noise2, self.adain2 = NoiseInjection(cout), AdaptiveInstanceNorm(cout, style_dim)

    def neuron_parameters(self) -> list:
        second = (("conv2.conv.weight_orig", 0), ("conv2.conv.bias", 0))
        return [[*self.first, ("noise1.weight_orig", 1)], [*second, ("noise2.weight_orig", 1)]]

    def forward(self, x: Tensor | None, w1: Tensor, w2: Tensor, noise: Tensor | None) -> Tensor:
        """x: features of the resolution below; of the first block the constant, None for its own."""
        x = bias_act(self.noise1(self.conv1(x), noise), act="lrelu")
        x = self.adain1(x, w1)
        x = bias_act(self.noise2(self.conv2(x), noise), act="lrelu")
        return self.adain2(x, w2)


class StyleGANGenerator(StyleBased, Progressive):
    """StyleGAN generator: z [B, latent_dim] -> images [B, image_channels, R, R], about [-1, 1].

    Args:
        resolution: output size R, a power of two >= 4.
        latent_dim: size of z.
        channel_base, channel_max: channels at resolution r are min(channel_base / r, channel_max).
        mapping_layers: depth of the mapping network z -> w, >= 1.
        style_dim: size of w; None takes latent_dim.
        image_channels: 3 for RGB, 1 for grey.
        channels: {resolution: channels} where a network departs from the rule.
        fused_from: the resolution from which on upsampling and convolution are one; None: nowhere.
        alpha: weight of the highest resolution while it fades in, 0..1; the attribute `alpha` may be set at any time.

    Attributes: those arguments, `num_classes` (0), `num_layers` (the number L of w vectors that the synthesis reads,
    two for every resolution), `learned_constant` [1, C, 4, 4], `config` (the constructor's arguments).
    """

    family = "stylegan"
    num_classes = 0

    def __init__(
        self,
        resolution: int,
        latent_dim: int = 512,
        channel_base: int = 16384,
        channel_max: int = 512,
        mapping_layers: int = 8,
        style_dim: int | None = None,
        image_channels: int = 3,
        channels: dict[int, int] | None = None,
        fused_from: int | None = 128,
        alpha: float = 1.0,
    ):
        style_dim = latent_dim if style_dim is None else style_dim
        widths = channel_table(resolution, channel_base, channel_max, channels, smallest=4)
        super().__init__(
            alpha,
            resolution=resolution,
            latent_dim=latent_dim,
            channel_base=channel_base,
            channel_max=channel_max,
            mapping_layers=mapping_layers,
            style_dim=style_dim,
            image_channels=image_channels,
            channels={str(r): c for r, c in widths.items()},
            fused_from=fused_from,
        )
        self.latent_dim, self.style_dim, self.num_layers = latent_dim, style_dim, 2 * len(widths)
        dims = [latent_dim] + [style_dim] * mapping_layers
        layers = [PixelNorm()]
        for cin, cout in itertools.pairwise(dims):
            layers += [EqualLinear(cin, cout), nn.LeakyReLU(0.2)]
        self.style = nn.Sequential(*layers)
        self.generator = nn.Module()
        self.generator.progression = nn.ModuleList(
            StyledConvBlock(widths.get(r // 2), c, style_dim, fused_from is not None and r >= fused_from)
            for r, c in widths.items()
        )
        self.generator.to_rgb = nn.ModuleList(EqualConv2d(c, image_channels, 1) for c in widths.values())

    @property
    def learned_constant(self) -> Tensor:
        """What the synthesis begins with, [1, C, 4, 4]."""
        return self.generator.progression[0].conv1.input

    def synthesis(self, w: Tensor, noise: str | list[Tensor] = "random", constant: Tensor | None = None) -> Tensor:
        """w [B, L, style_dim] -> images.

        noise: "random" (a new normal map per sample and resolution), "constant" (maps of a fixed seed), "none", or
        L / 2 maps [1 or B, 1, r, r], one per resolution: r = 4, 8, 16, ... Both layers of a resolution add the same
        map, as in the public project; the paper draws two.
        constant: [1 or B, C, 4, 4] in the place of `learned_constant`.
        """
        self._check_synthesis(w, constant)
        maps, blocks, to_rgb = self._noise_maps(noise, w), self.generator.progression, self.generator.to_rgb
        x = constant
        for i, block in enumerate(blocks):
            below = x
            x = block(x, w[:, 2 * i], w[:, 2 * i + 1], maps[i])
        image = to_rgb[-1](x)
        if self.alpha < 1 and len(blocks) > 1:
            low = F.interpolate(to_rgb[-2](below), scale_factor=2, mode="nearest")
            image = torch.lerp(low, image, self.alpha)
        return image

    def _noise_maps(self, noise: str | list[Tensor], w: Tensor) -> list[Tensor | None]:
        sizes = [4 << i for i in range(self.num_layers // 2)]
        if isinstance(noise, str):
            if noise == "random":
                return [w.new_empty(len(w), 1, r, r).normal_() for r in sizes]
            if noise == "constant":
                seeded = torch.Generator().manual_seed(0)
                return [torch.randn(1, 1, r, r, generator=seeded).to(w) for r in sizes]
            if noise == "none":
                return [None] * len(sizes)
            raise ValueError(f'noise must be "random", "constant", "none" or a list of maps, got {noise!r}')
        if len(noise) != len(sizes):
            raise ValueError(f"noise must hold {len(sizes)} maps, one per resolution, got {len(noise)}")
        for r, given in zip(sizes, noise, strict=True):
            if given.ndim != 4 or given.shape[1:] != (1, r, r) or given.shape[0] not in (1, len(w)):
                expected = f"[1 or {len(w)}, 1, {r}, {r}]"
                raise ValueError(f"the noise map of {r} px must have shape {expected}, got {list(given.shape)}")
        return list(noise)


class ConvBlock(nn.Module):
    """Two convolutions of one resolution of the discriminator, the second at half the size after a low-pass filter."""

    def __init__(self, cin: int, cout: int, fused: bool):
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv2d(cin, cout, 3, 1, activate=True))
        down = FusedDownsample(cout, cout) if fused else EqualConv2d(cout, cout, 3, 1, pool=True, activate=True)
        self.conv2 = nn.Sequential(Blur(cout), down)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class StyleGANDiscriminator(Progressive):
    """StyleGAN discriminator: images [B, image_channels, R, R] in [-1, 1] -> logits [B].

    Args: as the generator's; `from_rgb_activate`: a leaky ReLU follows the 1x1 convolution of the images, which older
    public files do not have.
    """

    family = "stylegan"
    num_classes = 0

    def __init__(
        self,
        resolution: int,
        channel_base: int = 16384,
        channel_max: int = 512,
        image_channels: int = 3,
        channels: dict[int, int] | None = None,
        fused_from: int | None = 128,
        from_rgb_activate: bool = True,
        alpha: float = 1.0,
    ):
        widths = channel_table(resolution, channel_base, channel_max, channels, smallest=4)
        super().__init__(
            alpha,
            resolution=resolution,
            channel_base=channel_base,
            channel_max=channel_max,
            image_channels=image_channels,
            channels={str(r): c for r, c in widths.items()},
            fused_from=fused_from,
            from_rgb_activate=from_rgb_activate,
        )
        last = nn.Module()
        last.conv1 = nn.Sequential(EqualConv2d(widths[4] + 1, widths[4], 3, 1, activate=True))
        last.conv2 = nn.Sequential(EqualConv2d(widths[4], widths[4], 4, activate=True))
        sizes = list(widths)[::-1]
        self.progression = nn.ModuleList(
            ConvBlock(widths[high], widths[low], fused_from is not None and high >= fused_from)
            for high, low in itertools.pairwise(sizes)
        )
        self.progression.append(last)
        from_rgb = (EqualConv2d(image_channels, widths[r], 1, activate=from_rgb_activate) for r in sizes)
        self.from_rgb = nn.ModuleList(nn.Sequential(conv) if from_rgb_activate else conv for conv in from_rgb)
        self.linear = EqualLinear(widths[4], 1)

    def features(self, x: Tensor, group: int | None = None) -> Tensor:
        """Activations before the last layer: [B, channels at 4x4].

        group: how many samples share their deviation; None: the whole batch, as in the public project. With 1 no
        sample sees its batch.
        """
        check_images(x, self.image_channels, self.resolution)
        *blocks, last = self.progression
        low = self.from_rgb[1](F.avg_pool2d(x, 2)) if self.alpha < 1 and blocks else None
        x = self.from_rgb[0](x)
        for block in blocks:
            x = block(x)
            if low is not None:
                x, low = torch.lerp(low, x, self.alpha), None
        x = minibatch_stddev(x, len(x) if group is None else group)
        return last.conv2(last.conv1(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))[:, 0]
