"""BigGAN (Brock et al. 2019, arXiv 1809.11096): class-conditional residual generator and projection discriminator.

A generator block normalises its channels, scales and shifts them by the class and a chunk of z, and doubles the size:

    bn(x) = (1 + U c) · (x - mean) / √(var + eps) + V c,       c = [class embedding, chunk of z]
    y     = conv2(relu(bn2(conv1(up(relu(bn1(x))))))) + conv_sc(up(x))

A discriminator block is conv2(relu(conv1(relu(x)))) + conv_sc(x), halved by an average over 2 x 2; the first one has no
relu in front. With h the sum of relu(features) over the pixels, D(x, y) = w·h + b + embed(y)·h. Attention (Zhang et al.
2019, arXiv 1805.08318) follows the blocks of one size. Every layer is spectrally normalised, every weight drawn
orthogonal. Parameter names and shapes are those of BigGAN-PyTorch, so its files load by name.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .biggan_layers import (
    GENERATOR_WIDTHS,
    Attention,
    BatchNorm,
    ClassTable,
    ConditionalBatchNorm,
    ConditionalGenerator,
    OutputBatchNorm,
    channel_list,
    checked,
    conv2d,
    initialise,
    linear,
)
from .labels import checked_labels
from .network import Network
from .spectral_norm import SpectralEmbedding

# Channels after each block, in units of the width.
DISCRIMINATOR_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}


class GBlock(nn.Module):
    def __init__(self, cin: int, cout: int, condition: int, bn_eps: float, sn_eps: float | None, shared: bool):
        super().__init__()
        self.conv1 = conv2d(cin, cout, 3, sn_eps)
        self.conv2 = conv2d(cout, cout, 3, sn_eps)
        self.conv_sc = conv2d(cin, cout, 1, sn_eps)
        self.bn1 = ConditionalBatchNorm(cin, condition, bn_eps, sn_eps, shared)
        self.bn2 = ConditionalBatchNorm(cout, condition, bn_eps, sn_eps, shared)
        self.shared = shared

    def neuron_parameters(self) -> list:
        """bn2 scales and shifts the output of conv1. bn1 scales a sum of several layers, so its neurons are its own."""
        axis = 0 if self.shared else 1
        first, second = ([(f"{bn}.{p}.weight", axis) for p in ("gain", "bias")] for bn in ("bn1", "bn2"))
        return [first, [("conv1.weight", 0), ("conv1.bias", 0), *second]]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.bn1(x, c)), scale_factor=2)
        y = self.conv2(F.relu(self.bn2(self.conv1(y), c)))
        # A 1x1 convolution before the upsampling gives the same as after it, at a quarter of the cost.
        return y + F.interpolate(self.conv_sc(x), scale_factor=2)


class BigGANGenerator(ConditionalGenerator):
    """BigGAN generator: z [B, latent_dim] and classes y -> images [B, image_channels, R, R] in [-1, 1].

    Args:
        resolution: R, one of 32, 64, 128, 256, 512.
        latent_dim: size of z; with hierarchical z a multiple of the number of blocks + 1. None takes 20 a chunk.
        class_dim: size of a class embedding; unused without a shared one.
        num_classes: number of classes.
        channel_width: the unit of the channels, "ch" of the paper.
        channels: the channels of the 4 x 4 map and after every block, where a network departs from the paper's table.
        attention: sizes of feature maps that attention follows; those the network does not have are ignored.
        hierarchical: the blocks share z among them; otherwise all of it goes into the first layer.
        shared: all blocks read one class embedding; otherwise each has a gain and shift for every class, and z is not
            hierarchical.
        image_channels: 3 for RGB, 1 for grey.
        bn_eps, sn_eps: of the normalisations; sn_eps=None leaves out the spectral one.

    Attributes: `latent_dim`, `class_dim` (without a shared embedding the number of classes), `resolution`,
    `num_classes`, `image_channels`, `config` (the constructor's arguments).
    """

    family = "biggan"

    def __init__(
        self,
        resolution: int = 128,
        latent_dim: int | None = None,
        class_dim: int = 128,
        num_classes: int = 1000,
        channel_width: int = 96,
        channels: Sequence[int] | None = None,
        attention: Sequence[int] = (64,),
        hierarchical: bool = True,
        shared: bool = True,
        image_channels: int = 3,
        bn_eps: float = 1e-5,
        sn_eps: float | None = 1e-6,
    ):
        channels = channel_list(GENERATOR_WIDTHS, resolution, channel_width, channels)
        slots = len(channels) if hierarchical else 1
        latent_dim = 20 * slots if latent_dim is None else latent_dim
        sizes = (resolution, latent_dim, class_dim, num_classes, channel_width, channels, attention, image_channels)
        super().__init__(*sizes, hierarchical=hierarchical, shared=shared, bn_eps=bn_eps, sn_eps=sn_eps)
        if hierarchical and not shared:
            raise ValueError("hierarchical z needs a shared class embedding; give hierarchical=False")
        if latent_dim % slots:
            raise ValueError(f"latent_dim must be a multiple of {slots}, one chunk per block and one, got {latent_dim}")
        self.class_dim = class_dim if shared else num_classes
        self.chunk = latent_dim // slots

        condition = self.class_dim + (self.chunk if hierarchical else 0)
        self.shared = ClassTable(num_classes, class_dim) if shared else None
        self.linear = linear(self.chunk, 16 * channels[0], sn_eps)
        self.blocks = nn.ModuleList()  # of ModuleLists: a block, and the attention that may follow it
        for i, (cin, cout) in enumerate(itertools.pairwise(channels)):
            stage: list[nn.Module] = [GBlock(cin, cout, condition, bn_eps, sn_eps, shared)]
            if 8 << i in self.config["attention"]:
                stage.append(Attention(cout, sn_eps))
            self.blocks.append(nn.ModuleList(stage))
        last = channels[-1]
        self.output_layer = nn.Sequential(
            OutputBatchNorm(last, bn_eps), nn.ReLU(), conv2d(last, image_channels, 3, sn_eps)
        )
        initialise(self)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """y: labels, integers [B], or class embeddings [B, class_dim]; without a shared embedding these are weights of
        the classes. Raises ValueError on other shapes."""
        c = self.class_vectors(z, y, self.shared if self.shared is not None else nn.Identity())
        chunks = z.split(self.chunk, 1)
        x = self.linear(chunks[0]).unflatten(1, (-1, 4, 4))
        for i, (block, *attention) in enumerate(cast(Iterable[nn.ModuleList], self.blocks)):
            x = block(x, torch.cat((c, chunks[i + 1].to(c.dtype)), 1) if len(chunks) > 1 else c)
            for layer in attention:
                x = layer(x)
        return self.output_layer(x).tanh()

    def class_embeddings(self) -> Tensor:
        """What every label stands for, [num_classes, class_dim]."""
        if self.shared is None:
            return torch.eye(self.num_classes, device=self.linear.weight.device)
        return self.shared.weight

    @torch.no_grad()
    def standing_statistics(self, inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Replaces the stored batch-norm statistics by their mean over batches (z, y) ("standing statistics" of the
        paper), so that eval mode does not depend on the last batches of the training. Nothing else moves."""
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            for i, (z, y) in enumerate(inputs):
                for norm in norms:
                    norm.training = True  # of the norm alone: its spectrally normalised layers stay in eval mode
                    norm.momentum = 1 / (i + 1)
                self(z, y)
        finally:
            for norm in norms:
                norm.momentum = 0.1
            for module, mode in modes.items():
                module.training = mode


class DBlock(nn.Module):
    def __init__(self, cin: int, cout: int, hidden: int, first: bool, downsample: bool, eps: float | None):
        super().__init__()
        self.conv1 = conv2d(cin, hidden, 3, eps)
        self.conv2 = conv2d(hidden, cout, 3, eps)
        self.conv_sc = conv2d(cin, cout, 1, eps) if downsample or cin != cout else None
        self.first, self.downsample = first, downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.downsample:
            # Averaging before the 1x1 convolution gives the same as after it, at a quarter of the cost.
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return y + (x if self.conv_sc is None else self.conv_sc(x))


class BigGANDiscriminator(Network):
    """BigGAN projection discriminator: images [B, image_channels, R, R] and labels -> logits [B].

    Args: as the generator's, and
        channels: the channels after every block.
        attention: sizes as BigGAN-PyTorch counts them, where all blocks of the 32 px network count as 16.
        wide: the blocks' inner width is that of their output, otherwise of their input.

    Attributes: `resolution`, `num_classes`, `image_channels`, `config`.
    """

    family = "biggan"

    def __init__(
        self,
        resolution: int = 128,
        num_classes: int = 1000,
        channel_width: int = 96,
        channels: Sequence[int] | None = None,
        attention: Sequence[int] = (64,),
        wide: bool = True,
        image_channels: int = 3,
        sn_eps: float | None = 1e-6,
    ):
        super().__init__()
        channels = channel_list(DISCRIMINATOR_WIDTHS, resolution, channel_width, channels)
        self.config = checked(
            {
                "resolution": resolution,
                "num_classes": num_classes,
                "channel_width": channel_width,
                "channels": channels,
                "attention": [int(size) for size in attention],
                "wide": wide,
                "image_channels": image_channels,
                "sn_eps": sn_eps,
            },
            *("num_classes", "image_channels"),
        )
        self.resolution, self.num_classes, self.image_channels = resolution, num_classes, image_channels
        self.blocks = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip([image_channels, *channels], channels, strict=False)):
            downsample = i < 2 if resolution == 32 else i < len(channels) - 1
            stage: list[nn.Module] = [DBlock(cin, cout, cout if wide else cin, i == 0, downsample, sn_eps)]
            if discriminator_size(resolution, i) in self.config["attention"]:
                stage.append(Attention(cout, sn_eps))
            self.blocks.append(nn.Sequential(*stage))
        self.linear = linear(channels[-1], 1, sn_eps)
        if sn_eps is None:
            self.embed = nn.Embedding(num_classes, channels[-1])
        else:
            self.embed = SpectralEmbedding(num_classes, channels[-1], eps=sn_eps)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """What the logits are read from: the sum of relu(feature maps) over the pixels, [B, channels[-1]]."""
        shape = (self.image_channels, self.resolution, self.resolution)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"images must have shape [B, {', '.join(map(str, shape))}], got {list(x.shape)}")
        for stage in self.blocks:
            x = stage(x)
        return F.relu(x).sum((2, 3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y: labels, integers [B]; without them the projection on the class is left out."""
        h = self.features(x)
        logits = self.linear(h)[:, 0]
        return logits if y is None else logits + (self.embed(checked_labels(y, self.num_classes)) * h).sum(1)


def discriminator_size(resolution: int, block: int) -> int:
    """The size of the feature map behind a block, as BigGAN-PyTorch counts it."""
    return 16 if resolution == 32 else max(resolution >> (block + 1), 4)
