"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958): generators and discriminators of figure 7.

A generator layer scales the input channels by the style s, convolves, divides by the expected norm of the output
(demodulation, eq. 3), adds noise, and applies bias and leaky ReLU:

    y_o = lrelu( d_o · Σ_i W_oi * (s_i x_i) + noise + b_o ) · √2,      d_o = 1 / √( Σ_i Σ_k (s_i W_oik)² + 1e-8 )

which is one op, `modulated_conv2d`. Weights are stored as N(0, 1) and scaled by 1 / √fan-in in the forward (equalised
learning rate).

StyleGAN2-ADA (Karras et al. 2020, arXiv 2006.06676) has conditional ones. With N(x) = x / √(mean x²) and the row e of a
label in a linear layer, the mapping network reads [N(z), N(e)], and the discriminator's logit is o·m / √d, where o are
the d outputs of its last layer and m is what a mapping network of its own makes of N(e').

Parameter names and shapes of the skip generator and the residual discriminator are those of the public
rosinality layout, so its checkpoints load by name. Activations are channels-last, which convolutions are faster with;
`to(memory_format=torch.channels_last)`, here or on a module around a network, changes 4-D weights alone.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..ops import minibatch_stddev
from .labels import checked_labels, class_vectors
from .layers import PixelNorm, channel_table, check_images
from .network import Network
from .stylegan2_layers import (
    SQRT2,
    ConstantInput,
    ConvLayer,
    Downsample,
    EqualLinear,
    LabelEmbedding,
    ResBlock,
    StyledConv,
    ToRGB,
    UpsampledSkip,
    mapping_network,
)
from .styles import StyleBased


def _check_architecture(architecture: str) -> None:
    if architecture not in ("skip", "resnet", "orig"):
        raise ValueError(f'architecture must be "skip", "resnet" or "orig", got {architecture!r}')


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
        architecture: "skip" (figure 7b: each resolution adds to the image), "resnet" (figure 7c: residual blocks, one
            image at the end) or "orig" (one image at the end of a plain chain of layers).
        latent_avg: whether there is a buffer `latent_avg` [style_dim]: the mean of w that a training has kept, as
            public files hold it. It is the centre of truncation then.
        num_classes: how many labels a conditional network knows; 0 for none.
        class_dim: size of its class embeddings; None takes style_dim.

    Attributes: `latent_dim`, `style_dim`, `resolution`, `image_channels`, `num_classes`, `class_dim` (0 without
    classes), `num_layers` (the number L of w vectors that the synthesis reads), `config` (the constructor's arguments).
    """

    family = "stylegan2"

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
        num_classes: int = 0,
        class_dim: int | None = None,
    ):
        super().__init__()
        _check_architecture(architecture)
        style_dim = latent_dim if style_dim is None else style_dim
        class_dim = 0 if not num_classes else style_dim if class_dim is None else class_dim
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
        self.config |= {"num_classes": num_classes, "class_dim": class_dim} if num_classes else {}
        for name in ("latent_dim", "mapping_layers", "style_dim", "image_channels", "num_classes", "class_dim"):
            if self.config.get(name, 1) < 1:
                raise ValueError(f"{name} must be at least 1, got {self.config[name]}")
        self.resolution, self.latent_dim, self.style_dim = resolution, latent_dim, style_dim
        self.image_channels, self.num_classes, self.class_dim = image_channels, num_classes, class_dim

        sizes = list(widths)
        self.num_layers = 2 * len(sizes)
        dims = [latent_dim + class_dim] + [style_dim] * mapping_layers
        self.style = nn.Sequential(PixelNorm(), *mapping_network(dims))
        if num_classes:
            self.embed = LabelEmbedding(num_classes, class_dim)
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
            elif architecture == "resnet":
                self.skips.append(UpsampledSkip(widths[low], widths[high]))
            for k in (len(self.convs) - 1, len(self.convs)):
                self.noises.register_buffer(f"noise_{k}", torch.randn(1, 1, high, high))

    @property
    def learned_constant(self) -> Tensor:
        """What the synthesis begins with, [1, C, 4, 4]."""
        return self.input.input

    def mapping(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        if not self.num_classes:
            return super().mapping(z, y)
        self._check_latents(z)
        norm, *layers = self.style
        c = class_vectors(z, y, self.num_classes, self.class_dim, self.embed)
        x = torch.cat((norm(z), norm(c.to(z.dtype))), 1)
        for layer in layers:
            x = layer(x)
        return x

    def class_embeddings(self) -> Tensor:
        """What every label stands for, [num_classes, class_dim], as the mapping network reads it: of mean square 1."""
        return self.style[0](self.embed.table())

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
            x = (y + self.skips[j](x)) / SQRT2 if self.config["architecture"] == "resnet" else y
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


class StyleGAN2Discriminator(Network):
    """StyleGAN2 discriminator: images [B, image_channels, R, R] in [-1, 1] -> logits [B].

    Args: as the generator's, but
        architecture: "resnet" (figure 7c), "skip" (figure 7b: at each resolution the image, made smaller, is read anew
            and added to the activations) or "orig" (a plain chain of layers).
        num_classes: how many labels it knows; 0 for none. Logits are of images and labels then; without labels they are
            the mean over all of them.
        class_dim, mapping_layers, projection: size of the class embeddings, depth of what maps them, and size d of what
            that gives; None takes d, and for d the channels at 4x4.

    Attributes: `resolution`, `image_channels`, `num_classes`, `config` (the constructor's arguments).
    """

    family = "stylegan2"

    def __init__(
        self,
        resolution: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        image_channels: int = 3,
        channels: dict[int, int] | None = None,
        architecture: str = "resnet",
        num_classes: int = 0,
        class_dim: int | None = None,
        mapping_layers: int = 8,
        projection: int | None = None,
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
        self.resolution, self.image_channels, self.num_classes = resolution, image_channels, num_classes
        outputs = 1 if not num_classes else widths[4] if projection is None else projection
        class_dim = outputs if class_dim is None else class_dim
        if num_classes:
            conditional = {"num_classes": num_classes, "class_dim": class_dim, "projection": outputs}
            if min(conditional.values()) < 1 or mapping_layers < 0 or (mapping_layers == 0 and class_dim != outputs):
                raise ValueError(f"{conditional} and {mapping_layers} mapping layers are no conditional discriminator")
            self.config |= {**conditional, "mapping_layers": mapping_layers}
        resnet, pairs = architecture == "resnet", itertools.pairwise([*widths.values()][::-1])
        first, blocks = ConvLayer(image_channels, widths[resolution], 1), [ResBlock(*p, residual=resnet) for p in pairs]
        self.convs = nn.Sequential(first, *blocks)
        if architecture == "skip":
            self.downsample = Downsample()
            self.from_rgbs = nn.ModuleList(ConvLayer(image_channels, c, 1) for c in [*widths.values()][-2::-1])
        self.final_conv = ConvLayer(widths[4] + 1, widths[4], 3)
        self.final_linear = nn.Sequential(
            EqualLinear(widths[4] * 16, widths[4], activate=True), EqualLinear(widths[4], outputs)
        )
        if num_classes:
            self.embed = LabelEmbedding(num_classes, class_dim)
            dims = [class_dim] + [outputs] * mapping_layers
            self.class_mapping = nn.Sequential(PixelNorm(), *mapping_network(dims))

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

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y: labels, integers [B]. ValueError: a shape, or labels, that the network does not have."""
        outputs = self.final_linear[1](self.features(x))
        if not self.num_classes:
            if y is not None:
                raise ValueError("this network has no classes: give no labels")
            return outputs[:, 0]
        if y is None:
            m = self.class_mapping(self.embed.table()).mean(0, keepdim=True)
        else:
            m = self.class_mapping(self.embed(checked_labels(y, self.num_classes)))
        return (outputs * m).sum(1) / math.sqrt(outputs.shape[1])

    @torch.no_grad()
    def of_classes(self, labels: Sequence[int]) -> "StyleGAN2Discriminator":
        """A copy without classes, whose logit is the mean of this network's logits for these labels.

        Both are linear in the last layer's outputs, so it is the mean of m that becomes a part of that layer.
        """
        y = torch.tensor([*labels], device=self.embed.weight.device)
        exact = copy.deepcopy(self).double()
        m = exact.class_mapping(exact.embed(checked_labels(y, self.num_classes))).mean(0)
        m = m / math.sqrt(len(m))
        judge, last = copy.deepcopy(self), cast(EqualLinear, self.final_linear[1])
        single = EqualLinear(last.weight.shape[1], 1).to(last.weight)
        single.weight.copy_((m @ last.weight.double())[None])
        single.bias.copy_((m @ last.bias.double())[None])
        judge.final_linear[1] = single
        del judge.embed, judge.class_mapping
        judge.num_classes = 0
        for name in ("num_classes", "class_dim", "projection", "mapping_layers"):
            del judge.config[name]
        return judge
