"""DCGAN (Radford et al. 2016, arXiv 1511.06434), as PyTorch's tutorial builds it and many have after it.

The generator is a chain of transposed convolutions of 4x4 taps, the first without padding on a single pixel, the others
of stride 2, with batch norm and ReLU between them and tanh behind; the discriminator is its mirror, with leaky ReLU.
Conditional, an embedding of the label is appended to z. Images of the generator are in [-1, 1].
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import check_images
from .network import Network


class DCGANGenerator(Network):
    """DCGAN generator: z [B, latent_dim] (and labels [B], or embeddings [B, class_dim]) -> images in [-1, 1].

    Args:
        latent_dim: size of z.
        channels: of the layers before the image, from 4x4 pixels on; each but the first doubles the size, and so does
            the last, of images: the resolution is 4 * 2^len(channels).
        image_channels: 3 for RGB, 1 for grey.
        num_classes, class_dim: of a conditional network; 0 classes for none.
        bias: whether convolutions have one.

    Attributes: as in `Network`, and `latent_dim`, `class_dim`. ValueError: a size below 1.
    """

    family = "dcgan"

    def __init__(
        self,
        latent_dim: int = 100,
        channels: Sequence[int] = (512, 256, 128, 64),
        image_channels: int = 3,
        num_classes: int = 0,
        class_dim: int = 0,
        bias: bool = False,
    ):
        super().__init__()
        self.config = {
            "latent_dim": latent_dim, "channels": [*channels], "image_channels": image_channels,
            "num_classes": num_classes, "class_dim": class_dim, "bias": bias,
        }  # fmt: skip
        if min(latent_dim, image_channels, *channels, len(channels)) < 1 or (num_classes > 0) != (class_dim > 0):
            raise ValueError(f"sizes must be at least 1, and classes have a class_dim: got {self.config}")
        self.latent_dim, self.num_classes, self.class_dim = latent_dim, num_classes, class_dim
        self.resolution, self.image_channels = 4 << len(channels), image_channels
        if num_classes:
            self.embed = nn.Embedding(num_classes, class_dim)
        layers: list[nn.Module] = []
        sizes = [latent_dim + class_dim, *channels]
        for i, width in enumerate(channels):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers.append(nn.ConvTranspose2d(sizes[i], width, 4, stride, padding, bias=bias))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.ConvTranspose2d(sizes[-1], image_channels, 4, 2, 1, bias=bias), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def class_embeddings(self) -> Tensor:
        """[num_classes, class_dim]."""
        return self.embed.weight

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape [B, {self.latent_dim}], got {list(z.shape)}")
        if (y is None) != (not self.num_classes):
            has = f"{self.num_classes} classes: give labels" if self.num_classes else "no classes: give no labels"
            raise ValueError(f"this network has {has}")
        if y is not None:
            if y.shape not in ((len(z),), (len(z), self.class_dim)):
                raise ValueError(f"labels are [{len(z)}], embeddings [{len(z)}, {self.class_dim}], got {list(y.shape)}")
            z = torch.cat((z, self.embed(y) if y.ndim == 1 else y), 1)
        return self.main(z[:, :, None, None])


class DCGANDiscriminator(Network):
    """DCGAN discriminator: images [B, image_channels, R, R] in [-1, 1] -> logits [B], without the tutorial's sigmoid.

    Args: channels: of the layers from the image on, each halving the size; else as the generator's.
    """

    family = "dcgan"
    num_classes = 0

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512), image_channels: int = 3, bias: bool = False):
        super().__init__()
        self.config = {"channels": [*channels], "image_channels": image_channels, "bias": bias}
        if min(image_channels, *channels, len(channels)) < 1:
            raise ValueError(f"sizes must be at least 1, got {self.config}")
        self.resolution, self.image_channels = 4 << len(channels), image_channels
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels[0], 4, 2, 1, bias=bias), nn.LeakyReLU(0.2)]
        for cin, cout in itertools.pairwise(channels):
            layers += [nn.Conv2d(cin, cout, 4, 2, 1, bias=bias), nn.BatchNorm2d(cout), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(channels[-1], 1, 4, bias=bias))
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.image_channels, self.resolution)
        return self.main(x).flatten()
