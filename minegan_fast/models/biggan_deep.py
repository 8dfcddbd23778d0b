"""BigGAN-deep (Brock et al. 2019, arXiv 1809.11096, appendix B): the generator of pytorch-pretrained-biggan.

Two bottleneck blocks for every size, the second of which doubles it. c = [z, class embedding] enters whole everywhere:

    y = conv_3(r(bn_3(conv_2(r(bn_2(conv_1(up(r(bn_1(conv_0(r(bn_0(x))))))))))))) + up(the first channels of x)

r is relu, conv_0 and conv_3 are 1x1 into and out of a quarter of the channels, conv_1 and conv_2 3x3. The batch norms
read statistics that were taken beforehand, one row for every truncation 0, 1/(n-1), ..., 1, in train mode too. Layers
are spectrally normalised. Parameter names and shapes are those of that project, so its files load by name.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .biggan_layers import GENERATOR_WIDTHS, ConditionalGenerator, attend, channel_list
from .labels import checked_labels
from .spectral_norm import TorchSpectralConv2d, TorchSpectralLinear


def conv2d(cin: int, cout: int, kernel: int, eps: float, bias: bool = True) -> nn.Conv2d:
    return TorchSpectralConv2d(cin, cout, kernel, padding=kernel // 2, bias=bias, eps=eps)


class StandingNorm(nn.Module):
    """Normalisation of x [B, C, H, W] by the statistics stored for a truncation."""

    running_means: Tensor
    running_vars: Tensor

    def __init__(self, channels: int, steps: int, eps: float):
        super().__init__()
        self.eps = eps
        self.collect: tuple[int, float] | None = None
        self.register_buffer("running_means", torch.zeros(steps, channels))
        self.register_buffer("running_vars", torch.ones(steps, channels))

    def statistics(self, truncation: float) -> tuple[Tensor, Tensor]:
        last = len(self.running_means) - 1
        share, low = math.modf(truncation / (1 / last))
        low = int(low)
        if share == 0:
            return self.running_means[low], self.running_vars[low]
        # Between two steps the project weighs the lower step with the share of the upper one. Only the same mistake
        # gives the same images.
        high = min(low + 1, last)
        mean, var = (t[low] * share + t[high] * (1 - share) for t in (self.running_means, self.running_vars))
        return mean, var

    def normalise(self, x: Tensor, truncation: float) -> Tensor:
        if self.collect is not None:
            row, share = self.collect
            found = torch.var_mean(x.to(self.running_means.dtype), (0, 2, 3))
            for table, batch in zip((self.running_vars, self.running_means), found, strict=True):
                table[row].lerp_(batch, share)
            var, mean = found
        else:
            mean, var = self.statistics(truncation)
        return F.batch_norm(x, mean, var, training=False, eps=self.eps)


class ConditionalNorm(StandingNorm):
    """Gain 1 + U c and shift V c."""

    def __init__(self, channels: int, condition: int, steps: int, eps: float):
        super().__init__(channels, steps, eps)
        self.scale = TorchSpectralLinear(condition, channels, bias=False, eps=eps)
        self.offset = TorchSpectralLinear(condition, channels, bias=False, eps=eps)

    def forward(self, x: Tensor, c: Tensor, truncation: float) -> Tensor:
        y = self.normalise(x, truncation)
        gain, shift = 1 + self.scale(c), self.offset(c)
        return y * gain[:, :, None, None].to(y.dtype) + shift[:, :, None, None].to(y.dtype)


class OutputNorm(StandingNorm):
    def __init__(self, channels: int, steps: int, eps: float):
        super().__init__(channels, steps, eps)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, truncation: float) -> Tensor:
        y = self.normalise(x, truncation)
        return y * self.weight[:, None, None].to(y.dtype) + self.bias[:, None, None].to(y.dtype)


class SelfAttention(nn.Module):
    def __init__(self, channels: int, eps: float):
        super().__init__()
        if channels < 8:
            raise ValueError(f"attention divides the channels by 8 and has {channels}; widen the network or drop it")
        self.snconv1x1_theta = conv2d(channels, channels // 8, 1, eps, bias=False)
        self.snconv1x1_phi = conv2d(channels, channels // 8, 1, eps, bias=False)
        self.snconv1x1_g = conv2d(channels, channels // 2, 1, eps, bias=False)
        self.snconv1x1_o_conv = conv2d(channels // 2, channels, 1, eps, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        phi, g = F.max_pool2d(self.snconv1x1_phi(x), 2), F.max_pool2d(self.snconv1x1_g(x), 2)
        y = self.snconv1x1_o_conv(attend(self.snconv1x1_theta(x), phi, g))
        return x + self.gamma.to(x.dtype) * y.to(x.dtype)


class DeepBlock(nn.Module):
    def __init__(self, cin: int, cout: int, condition: int, upsample: bool, steps: int, eps: float):
        super().__init__()
        if cout > cin or cin < 4:
            raise ValueError(f"a block has at least 4 channels and gives no more than it takes, got {cin} and {cout}")
        inner = cin // 4
        self.cout, self.upsample = cout, upsample
        self.bn_0 = ConditionalNorm(cin, condition, steps, eps)
        self.conv_0 = conv2d(cin, inner, 1, eps)
        self.bn_1 = ConditionalNorm(inner, condition, steps, eps)
        self.conv_1 = conv2d(inner, inner, 3, eps)
        self.bn_2 = ConditionalNorm(inner, condition, steps, eps)
        self.conv_2 = conv2d(inner, inner, 3, eps)
        self.bn_3 = ConditionalNorm(inner, condition, steps, eps)
        self.conv_3 = conv2d(inner, cout, 1, eps)

    def neuron_parameters(self) -> list:
        """A norm scales and shifts the convolution in front of it. bn_0 scales a sum of several layers."""
        norms = [[(f"bn_{i}.{p}.weight_orig", 0) for p in ("scale", "offset")] for i in range(4)]
        convs = [[(f"conv_{i}.weight_orig", 0), (f"conv_{i}.bias", 0)] for i in range(3)]
        return [norms[0], *(conv + norm for conv, norm in zip(convs, norms[1:], strict=True))]

    def forward(self, x: Tensor, c: Tensor, truncation: float) -> Tensor:
        y = F.relu(self.bn_1(self.conv_0(F.relu(self.bn_0(x, c, truncation))), c, truncation))
        x = x[:, : self.cout]
        if self.upsample:
            x, y = (F.interpolate(t, scale_factor=2) for t in (x, y))
        y = F.relu(self.bn_2(self.conv_1(y), c, truncation))
        return x + self.conv_3(F.relu(self.bn_3(self.conv_2(y), c, truncation)))


class DeepLayers(nn.Module):
    """c [B, condition] -> images."""

    def __init__(
        self, channels: list[int], attention: list[int], condition: int, image_channels: int, steps: int, eps: float
    ):
        super().__init__()
        self.image_channels = image_channels
        self.gen_z = TorchSpectralLinear(condition, 16 * channels[0], eps=eps)
        self.layers = nn.ModuleList()
        for i, (cin, cout) in enumerate(itertools.pairwise(channels)):
            self.layers.append(DeepBlock(cin, cin, condition, False, steps, eps))
            self.layers.append(DeepBlock(cin, cout, condition, True, steps, eps))
            if 8 << i in attention:
                self.layers.append(SelfAttention(cout, eps))
        self.bn = OutputNorm(channels[-1], steps, eps)
        # In the public files it has as many outputs as inputs, and the first outputs are the image.
        self.conv_to_rgb = conv2d(channels[-1], channels[-1], 3, eps)

    def forward(self, c: Tensor, truncation: float) -> Tensor:
        x = self.gen_z(c).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)
        for layer in self.layers:
            x = layer(x) if isinstance(layer, SelfAttention) else layer(x, c, truncation)
        return self.conv_to_rgb(F.relu(self.bn(x, truncation)))[:, : self.image_channels].tanh()


class BigGANDeepGenerator(ConditionalGenerator):
    """BigGAN-deep generator: z [B, latent_dim] and classes y -> images [B, image_channels, R, R] in [-1, 1].

    Args:
        resolution: R, one of 32, 64, 128, 256, 512.
        latent_dim, class_dim: sizes of z and of a class embedding.
        num_classes: number of classes.
        channel_width: the unit of the channels.
        channels: the channels of the 4 x 4 map and after each doubling, where a network departs from the table; none
            more than the one before, and the last at least `image_channels`.
        attention: sizes of feature maps that attention follows; those the network does not have are ignored.
        image_channels: 3 for RGB, 1 for grey.
        steps: rows of the stored statistics, at least 2.
        eps: of all normalisations.

    Attributes: `latent_dim`, `class_dim`, `resolution`, `num_classes`, `image_channels`, `config`.
    """

    family = "biggan_deep"

    def __init__(
        self,
        resolution: int = 128,
        latent_dim: int = 128,
        class_dim: int = 128,
        num_classes: int = 1000,
        channel_width: int = 128,
        channels: Sequence[int] | None = None,
        attention: Sequence[int] = (64,),
        image_channels: int = 3,
        steps: int = 51,
        eps: float = 1e-4,
    ):
        channels = channel_list(GENERATOR_WIDTHS, resolution, channel_width, channels)
        sizes = (resolution, latent_dim, class_dim, num_classes, channel_width, channels, attention, image_channels)
        super().__init__(*sizes, steps=steps, eps=eps)
        if steps < 2:
            raise ValueError(f"steps must be at least 2, the truncations 0 and 1, got {steps}")
        if image_channels > channels[-1]:
            raise ValueError(f"{image_channels} image channels cannot be taken from {channels[-1]} outputs; widen it")
        self.embeddings = nn.Linear(num_classes, class_dim, bias=False)
        condition = latent_dim + class_dim
        self.generator = DeepLayers(channels, self.config["attention"], condition, image_channels, steps, eps)
        nn.init.orthogonal_(self.embeddings.weight)
        for module in self.modules():
            if isinstance(module, TorchSpectralConv2d | TorchSpectralLinear):
                nn.init.orthogonal_(module.weight_orig)
                module.follow()
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, labels: Tensor) -> Tensor:
        """Class embeddings [B, class_dim] of labels [B]."""
        hot = F.one_hot(checked_labels(labels, self.num_classes), self.num_classes)
        return self.embeddings(hot.to(self.embeddings.weight.dtype))

    def class_embeddings(self) -> Tensor:
        """What every label stands for, [num_classes, class_dim]."""
        return self.embeddings.weight.t()

    def forward(self, z: Tensor, y: Tensor, *, truncation: float = 1.0) -> Tensor:
        """y: labels, integers [B], or class embeddings [B, class_dim].

        truncation, 0..1, chooses the stored statistics; z is taken as it is. They belong to z = truncation times a
        normal variable that was cut off at ±2. Raises ValueError on other values and shapes.
        """
        if not 0 <= truncation <= 1:
            raise ValueError(f"truncation must lie in 0..1, got {truncation}")
        c = self.class_vectors(z, y, self.embed)
        return self.generator(torch.cat((z, c.to(z.dtype)), 1), truncation)

    @torch.no_grad()
    def standing_statistics(self, inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Replaces the stored statistics, which do not fit weights that have moved.

        Each row becomes the mean over the batches (z, y), whose z is of truncation 1 and is scaled by the row's.
        """
        inputs = list(inputs)
        norms = [module for module in self.modules() if isinstance(module, StandingNorm)]
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            for row in range(self.config["steps"]):
                for i, (z, y) in enumerate(inputs):
                    for norm in norms:
                        norm.collect = row, 1 / (i + 1)
                    self(z * (row / (self.config["steps"] - 1)), y)
        finally:
            for norm in norms:
                norm.collect = None
            for module, mode in modes.items():
                module.training = mode
