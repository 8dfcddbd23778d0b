"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958): generators and discriminators of figure 7, skip and residual.

A generator layer scales the input channels by the style s, convolves, divides by the expected norm of the output
(demodulation, eq. 3), adds noise, and applies bias and leaky ReLU:

    y_o = lrelu( d_o · Σ_i W_oi * (s_i x_i) + noise + b_o ) · √2,      d_o = 1 / √( Σ_i Σ_k (s_i W_oik)² + 1e-8 )

which is one op, `modulated_conv2d`. Weights are stored as N(0, 1) and scaled by 1 / √fan-in in the forward (equalised
learning rate). Parameter names and shapes of the skip generator and the residual discriminator are those of the public
rosinality layout, so its checkpoints load by name. Activations are channels-last, which convolutions are faster with;
`to(memory_format=torch.channels_last)`, here or on a module around a network, changes 4-D weights alone.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import bias_act, minibatch_stddev, modulated_conv2d, upfirdn2d
from .layers import Blur, PixelNorm, Upsample, channel_table, check_images
from .network import Network
from .styles import StyleBased

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


def _check_architecture(architecture: str) -> None:
    if architecture not in ("skip", "resnet"):
        raise ValueError(f'architecture must be "skip" or "resnet", got {architecture!r}')


class StyleGAN2Generator(StyleBased):
    """StyleGAN2 generator: z [B, latent_dim] -> images [B, image_channels, R, R], about [-1, 1].

    Args:
        resolution: output size R, a power of two >= 8.
        latent_dim: size of z.
        channel_base, channel_max: channels at resolution r are min(channel_base / r, channel_max); 32768 and 512 are
            "config-f".
        mapping_layers: depth of the mapping network z -> w, >= 1.
        style_dim: size of w; None takes latent_dim.
        image_channels: 3 for RGB, 1 for grey.
        channels: {resolution: channels} where a network departs from the rule.
        architecture: "skip" (figure 7b: each resolution adds to the image) or "resnet" (figure 7c: residual blocks, one
            image at the end).
        latent_avg: whether there is a buffer `latent_avg` [style_dim]: the mean of w that a training has kept, as
            public files hold it. It is the centre of truncation then.

    Attributes: `latent_dim`, `style_dim`, `resolution`, `image_channels`, `num_classes` (0), `num_layers` (the number L
    of w vectors that the synthesis reads), `config` (the constructor's arguments).
    """

    family = "stylegan2"
    num_classes = 0

    def __init__(
        self,
        resolution: int,
        latent_dim: int = 512,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_layers: int = 8,
        style_dim: int | None = None,
        image_channels: int = 3,
        channels: dict[int, int] | None = None,
        architecture: str = "skip",
        latent_avg: bool = False,
    ):
        super().__init__()
        _check_architecture(architecture)
        style_dim = latent_dim if style_dim is None else style_dim
        widths = channel_table(resolution, channel_base, channel_max, channels)
        self.config = {
            "resolution": resolution,
            "latent_dim": latent_dim,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "mapping_layers": mapping_layers,
            "style_dim": style_dim,
            "image_channels": image_channels,
            "channels": {str(r): c for r, c in widths.items()},
            "architecture": architecture,
        } | ({"latent_avg": True} if latent_avg else {})
        for name in ("latent_dim", "mapping_layers", "style_dim", "image_channels"):
            if self.config[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {self.config[name]}")
        self.resolution, self.latent_dim, self.style_dim = resolution, latent_dim, style_dim
        self.image_channels = image_channels

        sizes = list(widths)
        self.num_layers = 2 * len(sizes)
        dims = [latent_dim] + [style_dim] * mapping_layers
        self.style = nn.Sequential(
            PixelNorm(),
            *(EqualLinear(i, o, lr_mul=0.01, activate=True) for i, o in itertools.pairwise(dims)),
        )
        if latent_avg:
            self.register_buffer("latent_avg", torch.zeros(style_dim))
        self.input = ConstantInput(widths[4])
        self.conv1 = StyledConv(widths[4], widths[4], style_dim)
        self.convs, self.noises = nn.ModuleList(), nn.Module()
        if architecture == "skip":
            self.to_rgb1 = ToRGB(widths[4], image_channels, style_dim, upsample=False)
            self.to_rgbs = nn.ModuleList()
        else:
            self.to_rgb = ToRGB(widths[resolution], image_channels, style_dim, upsample=False)
            self.skips = nn.ModuleList()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for low, high in itertools.pairwise(sizes):
            self.convs.append(StyledConv(widths[low], widths[high], style_dim, upsample=True))
            self.convs.append(StyledConv(widths[high], widths[high], style_dim))
            if architecture == "skip":
                self.to_rgbs.append(ToRGB(widths[high], image_channels, style_dim))
            else:
                self.skips.append(UpsampledSkip(widths[low], widths[high]))
            for k in (len(self.convs) - 1, len(self.convs)):
                self.noises.register_buffer(f"noise_{k}", torch.randn(1, 1, high, high))

    @property
    def learned_constant(self) -> Tensor:
        """What the synthesis begins with, [1, C, 4, 4]."""
        return self.input.input

    def synthesis(self, w: Tensor, noise: str | list[Tensor] = "random", constant: Tensor | None = None) -> Tensor:
        """w [B, L, style_dim] -> images.

        noise: "random" (a new normal map per sample and layer), "constant" (the buffers in `noises`), "none", or L - 1
        maps [1 or B, 1, r, r], one per styled convolution: r = 4, 8, 8, 16, 16, ...
        constant: [1 or B, C, 4, 4] in the place of `learned_constant`.
        """
        self._check_synthesis(w, constant)
        maps = self._noise_maps(noise, w)
        styles = w.unbind(1)  # whose gradient is one stack; that of every w[:, i] would be a tensor as large as w
        x = self.conv1(self.input(w.shape[0], constant), styles[0], maps[0])
        skip = self.config["architecture"] == "skip"
        image = self.to_rgb1(x, styles[1], None) if skip else None
        for j in range(len(self.convs) // 2):
            i = 2 * j
            y = self.convs[i](x, styles[i + 1], maps[i + 1])
            y = self.convs[i + 1](y, styles[i + 2], maps[i + 2])
            if skip:
                # The next block's first convolution reads this w as well.
                image = self.to_rgbs[j](y, styles[i + 3], image)
            x = y if skip else (y + self.skips[j](x)) / SQRT2
        return self.to_rgb(x, styles[-1], None) if image is None else image

    def _noise_maps(self, noise: str | list[Tensor], w: Tensor) -> list[Tensor | None]:
        constant = [getattr(self.noises, f"noise_{k}") for k in range(self.num_layers - 1)]
        if isinstance(noise, str):
            if noise == "random":
                return [w.new_empty(w.shape[0], *buffer.shape[1:]).normal_() for buffer in constant]
            if noise in ("constant", "none"):
                return constant if noise == "constant" else [None] * len(constant)
            raise ValueError(f'noise must be "random", "constant", "none" or a list of maps, got {noise!r}')
        if len(noise) != len(constant):
            raise ValueError(f"noise must hold {len(constant)} maps, one per styled convolution, got {len(noise)}")
        for k, (given, buffer) in enumerate(zip(noise, constant, strict=True)):
            if given.ndim != 4 or given.shape[1:] != buffer.shape[1:] or given.shape[0] not in (1, w.shape[0]):
                expected = f"[1 or {w.shape[0]}, 1, {buffer.shape[2]}, {buffer.shape[3]}]"
                raise ValueError(f"noise map {k} must have shape {expected}, got {list(given.shape)}")
        return list(noise)


def _channels_last(images: Tensor) -> Tensor:
    """Images [B, C, R, R] in the layout of all activations. Of one channel only the strides tell which one it is."""
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    return images.reshape(*images.shape[::2], images.shape[3], 1).permute(0, 3, 1, 2)


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


class StyleGAN2Discriminator(Network):
    """StyleGAN2 discriminator: images [B, image_channels, R, R] in [-1, 1] -> logits [B].

    Args: as the generator's, but `architecture`, which is "resnet" (figure 7c) or "skip" (figure 7b: at each resolution
    the image, made smaller, is read anew and added to the activations). `config` holds them.
    """

    family = "stylegan2"
    num_classes = 0

    def __init__(
        self,
        resolution: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        image_channels: int = 3,
        channels: dict[int, int] | None = None,
        architecture: str = "resnet",
    ):
        super().__init__()
        _check_architecture(architecture)
        widths = channel_table(resolution, channel_base, channel_max, channels)
        if image_channels < 1:
            raise ValueError(f"image_channels must be at least 1, got {image_channels}")
        self.config = {
            "resolution": resolution,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "image_channels": image_channels,
            "channels": {str(r): c for r, c in widths.items()},
            "architecture": architecture,
        }
        self.resolution, self.image_channels = resolution, image_channels
        resnet, pairs = architecture == "resnet", itertools.pairwise([*widths.values()][::-1])
        first, blocks = ConvLayer(image_channels, widths[resolution], 1), [ResBlock(*p, residual=resnet) for p in pairs]
        self.convs = nn.Sequential(first, *blocks)
        if not resnet:
            self.downsample = Downsample()
            self.from_rgbs = nn.ModuleList(ConvLayer(image_channels, c, 1) for c in [*widths.values()][-2::-1])
        self.final_conv = ConvLayer(widths[4] + 1, widths[4], 3)
        self.final_linear = nn.Sequential(
            EqualLinear(widths[4] * 16, widths[4], activate=True), EqualLinear(widths[4], 1)
        )

    def features(self, x: Tensor, group: int = 4) -> Tensor:
        """Activations before the last layer: [B, channels at 4x4]. With group=1 no sample sees its batch."""
        check_images(x, self.image_channels, self.resolution)
        image = _channels_last(x)
        x = self.convs[0](image)
        for i, block in enumerate([*self.convs][1:]):
            x = block(x)
            if self.config["architecture"] == "skip":
                image = self.downsample(image)
                x = x + self.from_rgbs[i](image)
        x = self.final_conv(minibatch_stddev(x, group))
        return self.final_linear[0](x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.final_linear[1](self.features(x))[:, 0]
