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
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import bias_act, minibatch_stddev
from .layers import PixelNorm, Progressive, check_images, mean_2x2
from .stylegan_layers import (
    AdaptiveInstanceNorm,
    Blur,
    ConstantInput,
    EqualConv2d,
    EqualLinear,
    FusedDownsample,
    FusedUpsample,
    NoiseInjection,
)
from .styles import StyleBased


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


class _Progression(nn.Module):
    """The blocks of a generator and what makes images of their features, by resolution; the layout's `generator`."""

    def __init__(self, blocks: Iterable[StyledConvBlock], to_rgb: Iterable[EqualConv2d]):
        super().__init__()
        self.progression, self.to_rgb = nn.ModuleList(blocks), nn.ModuleList(to_rgb)


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
        sizes = (resolution, channel_base, channel_max, image_channels, channels, alpha)
        mapping = {"latent_dim": latent_dim, "mapping_layers": mapping_layers, "style_dim": style_dim}
        super().__init__(*sizes, **mapping, fused_from=fused_from)
        widths = self.widths
        self.latent_dim, self.style_dim, self.num_layers = latent_dim, style_dim, 2 * len(widths)
        dims = [latent_dim] + [style_dim] * mapping_layers
        layers = [PixelNorm()]
        for cin, cout in itertools.pairwise(dims):
            layers += [EqualLinear(cin, cout), nn.LeakyReLU(0.2)]
        self.style = nn.Sequential(*layers)
        self.generator = _Progression(
            (
                StyledConvBlock(widths.get(r // 2), c, style_dim, fused_from is not None and r >= fused_from)
                for r, c in widths.items()
            ),
            (EqualConv2d(c, image_channels, 1) for c in widths.values()),
        )

    @property
    def learned_constant(self) -> Tensor:
        return cast(ConstantInput, self.generator.progression[0].conv1).input

    def synthesis(self, w: Tensor, noise: str | list[Tensor] = "random", constant: Tensor | None = None) -> Tensor:
        """w [B, L, style_dim] -> images.

        noise: "random" (a new normal map per sample and resolution), "constant" (maps of a fixed seed), "none", or
        L / 2 maps [1 or B, 1, r, r], one per resolution: r = 4, 8, 16, ... Both layers of a resolution add the same
        map, as in the public project; the paper draws two.
        constant: [1 or B, C, 4, 4] in the place of `learned_constant`.
        """
        self._check_synthesis(w, constant)
        maps, blocks, to_rgb = self._noise_maps(noise, w), self.generator.progression, self.generator.to_rgb
        below = x = constant
        styles = w.unbind(1)
        for i, block in enumerate(blocks):
            below = x
            x = block(x, styles[2 * i], styles[2 * i + 1], maps[i])
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


class _LastBlock(nn.Module):
    """The two convolutions at 4 x 4, whose input has the deviation over the batch as one more channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv2d(channels + 1, channels, 3, 1, activate=True))
        self.conv2 = nn.Sequential(EqualConv2d(channels, channels, 4, activate=True))

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
        sizes = (resolution, channel_base, channel_max, image_channels, channels, alpha)
        super().__init__(*sizes, fused_from=fused_from, from_rgb_activate=from_rgb_activate)
        widths = self.widths
        last = _LastBlock(widths[4])
        descending = list(widths)[::-1]
        blocks = [
            ConvBlock(widths[high], widths[low], fused_from is not None and high >= fused_from)
            for high, low in itertools.pairwise(descending)
        ]
        self.progression = nn.ModuleList([*blocks, last])
        from_rgb = (EqualConv2d(image_channels, widths[r], 1, activate=from_rgb_activate) for r in descending)
        self.from_rgb = nn.ModuleList(nn.Sequential(conv) if from_rgb_activate else conv for conv in from_rgb)
        self.linear = EqualLinear(widths[4], 1)

    def image_side_blocks(self) -> list[nn.Module]:
        """The blocks, the nearest to the image first."""
        return [self.from_rgb, *self.progression]

    def features(self, x: Tensor, group: int | None = None) -> Tensor:
        """Activations before the last layer: [B, channels at 4x4].

        group: how many samples share their deviation; None: the whole batch, as in the public project. With 1 no
        sample sees its batch.
        """
        check_images(x, self.image_channels, self.resolution)
        *blocks, last = self.progression
        low = self.from_rgb[1](mean_2x2(x)) if self.alpha < 1 and blocks else None
        x = self.from_rgb[0](x)
        for block in blocks:
            x = block(x)
            if low is not None:
                x, low = torch.lerp(low, x, self.alpha), None
        x = minibatch_stddev(x, group)
        return last(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))[:, 0]
