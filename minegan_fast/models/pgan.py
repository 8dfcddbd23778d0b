"""Progressive GAN (Karras et al. 2018, arXiv 1710.10196).

Every layer is equalised: weights are stored as N(0, 1), and He's constant c = √(2 / fan-in) scales the layer's output,
bias included (section 4.1):

    y = c (W x + b) = (c W) x + c b

The generator normalises the features of every pixel after each layer (section 4.2), the discriminator sees the
deviation over its batch (section 3). While a resolution fades in (figure 2), `alpha` weighs its path against the one
through the resolution below; 1 is a network that has grown. Parameter names and shapes are those of
facebookresearch/pytorch_GAN_zoo, so its files load by name. Images leave the generator without an activation.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import bias_act, minibatch_stddev
from .layers import PixelNorm, Progressive, check_images, mean_2x2


class _Parameters(nn.Module):
    """The parameters of a layer, which the layout keeps in a module of their own."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape[0]))


class Equalised(nn.Module):
    """Linear layer (kernel None) or convolution of unchanged size; `activate` adds a leaky ReLU of slope 0.2.

    pool: mean over 2x2 pixels, between the convolution and the bias.
    """

    def __init__(self, cin: int, cout: int, kernel: int | None = None, activate: bool = True, pool: bool = False):
        super().__init__()
        shape = (cout, cin) if kernel is None else (cout, cin, kernel, kernel)
        self.module = _Parameters(shape)
        self.constant = math.sqrt(2 / math.prod(shape[1:]))
        self.kernel, self.pool, self.act = kernel, pool, "lrelu" if activate else "linear"

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            y = F.linear(x * self.constant, self.module.weight)  # x is the smaller one
        else:
            y = F.conv2d(x, self.module.weight * self.constant, padding=self.kernel // 2)
        y = mean_2x2(y) if self.pool else y
        return bias_act(y, self.module.bias * self.constant, act=self.act)


def consecutive_stddev(x: Tensor, group: int = 4) -> Tensor:
    """Appends one channel to x [B, C, H, W]: the mean standard deviation over each `group` of consecutive samples.

    Where B is no multiple of `group` the whole batch is one; a sample alone has the deviation 0. The variance is the
    unbiased one.
    """
    b, c, h, w = x.shape
    size = group if b % group == 0 else b
    if size == 1:
        return F.pad(x, (0, 0, 0, 0, 0, 1))
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(b // size, size, c, h, w)
    std = (y.var(1) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat((x, std.to(x.dtype).repeat_interleave(size)[:, None, None, None].expand(b, 1, h, w)), 1)


class PGANGenerator(Progressive):
    """Progressive GAN generator: z [B, latent_dim] -> images [B, image_channels, R, R], about [-1, 1].

    Args:
        resolution: output size R, a power of two >= 4.
        latent_dim: size of z.
        channel_base, channel_max: channels at resolution r are min(channel_base / r, channel_max).
        image_channels: 3 for RGB, 1 for grey.
        num_classes: size of a label vector that is appended to z (an auxiliary-classifier GAN's one-hot categories).
            A file's shapes tell the sum alone: where no critic beside it says how many labels there are, a loaded
            network has `latent_dim` hold both and num_classes 0.
        channels: {resolution: channels} where a network departs from the rule.
        alpha: weight of the highest resolution while it fades in, 0..1; the attribute `alpha` may be set at any time.

    Attributes: those arguments, `class_dim` (= num_classes), `config` (the constructor's arguments).
    """

    family = "pgan"

    def __init__(
        self,
        resolution: int,
        latent_dim: int = 512,
        channel_base: int = 16384,
        channel_max: int = 512,
        image_channels: int = 3,
        num_classes: int = 0,
        channels: dict[int, int] | None = None,
        alpha: float = 1.0,
    ):
        sizes = (resolution, channel_base, channel_max, image_channels, channels, alpha)
        super().__init__(*sizes, latent_dim=latent_dim, num_classes=num_classes)
        self.latent_dim, self.num_classes, self.class_dim = latent_dim, num_classes, num_classes
        widths = list(self.widths.values())
        self.norm = PixelNorm()
        self.formatLayer = Equalised(latent_dim + num_classes, 16 * widths[0])
        self.groupScale0 = nn.ModuleList([Equalised(widths[0], widths[0], 3)])
        self.scaleLayers = nn.ModuleList(
            nn.ModuleList([Equalised(low, high, 3), Equalised(high, high, 3)])
            for low, high in itertools.pairwise(widths)
        )
        self.toRGBLayers = nn.ModuleList(Equalised(c, image_channels, 1, activate=False) for c in widths)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images of z [B, latent_dim] and, where num_classes > 0, y: int64 labels [B] or vectors [B, num_classes].

        Raises ValueError for another shape, or a y that is missing or too many.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape [B, {self.latent_dim}], got {list(z.shape)}")
        x = self.norm(z if y is None and not self.num_classes else torch.cat((z, self._labels(z, y)), 1))
        x = self.norm(self.formatLayer(x).unflatten(1, (-1, 4, 4)))
        below = x = self.norm(self.groupScale0[0](x))
        for first, second in cast(Iterable[nn.ModuleList], self.scaleLayers):
            below = x
            x = self.norm(first(F.interpolate(x, scale_factor=2, mode="nearest")))
            x = self.norm(second(x))
        image = self.toRGBLayers[-1](x)
        if self.alpha < 1 and len(self.scaleLayers):
            low = F.interpolate(self.toRGBLayers[-2](below), scale_factor=2, mode="nearest")
            image = torch.lerp(low, image, self.alpha)
        return image

    def class_embeddings(self) -> Tensor:
        """What every label stands for, [num_classes, num_classes]."""
        return torch.eye(self.num_classes, device=self.formatLayer.module.weight.device)

    def _labels(self, z: Tensor, y: Tensor | None) -> Tensor:
        if y is not None and not y.is_floating_point() and y.ndim == 1 and self.num_classes:
            y = F.one_hot(y, self.num_classes)
        if y is None or y.shape != (len(z), self.num_classes) or not self.num_classes:
            got = None if y is None else list(y.shape)
            expected = f"labels [{len(z)}] or vectors [{len(z)}, {self.num_classes}]" if self.num_classes else "None"
            raise ValueError(f"y must be {expected} for a generator with num_classes={self.num_classes}, got {got}")
        return y.to(z.dtype)


class PGANDiscriminator(Progressive):
    """Progressive GAN discriminator: images [B, image_channels, R, R] in [-1, 1] -> logits [B].

    Args: as the generator's; with num_classes > 0 the last layer has as many further outputs, see `outputs`.
        fused: as in the authors' program, convolution and halving are one step, before bias and activation, and the
            deviation over the batch is `minibatch_stddev`; else as in the paper's tables, and `consecutive_stddev`.
    """

    family = "pgan"

    def __init__(
        self,
        resolution: int,
        channel_base: int = 16384,
        channel_max: int = 512,
        image_channels: int = 3,
        num_classes: int = 0,
        channels: dict[int, int] | None = None,
        fused: bool = False,
        alpha: float = 1.0,
    ):
        sizes = (resolution, channel_base, channel_max, image_channels, channels, alpha)
        super().__init__(*sizes, num_classes=num_classes, fused=fused)
        self.num_classes, self.fused = num_classes, fused
        widths = list(self.widths.values())
        self.fromRGBLayers = nn.ModuleList(Equalised(image_channels, c, 1) for c in widths)
        self.scaleLayers = nn.ModuleList(
            nn.ModuleList([Equalised(high, high, 3), Equalised(high, low, 3, pool=fused)])
            for low, high in itertools.pairwise(widths)
        )
        self.groupScaleZero = nn.ModuleList(
            [Equalised(widths[0] + 1, widths[0], 3), Equalised(16 * widths[0], widths[0])]
        )
        self.decisionLayer = Equalised(widths[0], 1 + num_classes, activate=False)

    def image_side_blocks(self) -> list[nn.Module]:
        """The blocks, the nearest to the image first."""
        return [self.fromRGBLayers, *reversed(self.scaleLayers), self.groupScaleZero]

    def features(self, x: Tensor, group: int = 4) -> Tensor:
        """Activations before the last layer: [B, channels at 4x4]. With group=1 no sample sees its batch."""
        check_images(x, self.image_channels, self.resolution)
        low = None
        if self.alpha < 1 and len(self.scaleLayers):
            low = self.fromRGBLayers[-2](mean_2x2(x))
        x = self.fromRGBLayers[-1](x)
        for first, second in reversed(cast(Sequence[nn.ModuleList], self.scaleLayers)):
            x = second(first(x))
            x = x if self.fused else mean_2x2(x)
            if low is not None:
                x, low = torch.lerp(low, x, self.alpha), None
        x = (minibatch_stddev if self.fused else consecutive_stddev)(x, group)
        return self.groupScaleZero[1](self.groupScaleZero[0](x).flatten(1))

    def outputs(self, x: Tensor) -> Tensor:
        """Everything the last layer says: [B, 1 + num_classes], the logit first."""
        return self.decisionLayer(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[:, 0]
