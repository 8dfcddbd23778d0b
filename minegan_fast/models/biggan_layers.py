"""What BigGAN and BigGAN-deep share: channel tables, class embeddings, batch norm, attention, initial weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .labels import class_vectors
from .network import Network
from .spectral_norm import SpectralConv2d, SpectralLinear

# Channels in units of the width: of the 4 x 4 map, and after each doubling of the size.
GENERATOR_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}


def channel_list(table: dict, resolution: int, width: int, override: Sequence[int] | None) -> list[int]:
    """The channels of a network of that resolution: the table's row times `width`, or `override`."""
    if resolution not in table:
        raise ValueError(f"resolution must be one of {list(table)}, got {resolution!r}")
    channels = [width * m for m in table[resolution]] if override is None else [int(c) for c in override]
    if len(channels) != len(table[resolution]) or min(channels) < 1:
        raise ValueError(f"a {resolution} px network has {len(table[resolution])} widths of at least 1, got {channels}")
    return channels


def checked(arguments: dict, *names: str) -> dict:
    for name in names:
        if arguments[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {arguments[name]}")
    return arguments


class ConditionalGenerator(Network):
    """What generators of z and classes have in common: their sizes, which `config` holds with all arguments of the
    constructor, and the checks of what they are given."""

    latent_dim: int
    class_dim: int

    def __init__(
        self,
        resolution: int,
        latent_dim: int,
        class_dim: int,
        num_classes: int,
        channel_width: int,
        channels: list[int],
        attention: Sequence[int],
        image_channels: int,
        **others,
    ):
        super().__init__()
        self.config = checked(
            {
                "resolution": resolution,
                "latent_dim": latent_dim,
                "class_dim": class_dim,
                "num_classes": num_classes,
                "channel_width": channel_width,
                "channels": channels,
                "attention": [int(size) for size in attention],
                "image_channels": image_channels,
                **others,
            },
            *("latent_dim", "class_dim", "num_classes", "image_channels"),
        )
        self.resolution, self.latent_dim, self.class_dim = resolution, latent_dim, class_dim
        self.num_classes, self.image_channels = num_classes, image_channels

    def class_vectors(self, z: Tensor, y: Tensor | None, table: Callable[[Tensor], Tensor]) -> Tensor:
        """y where it is embeddings [B, class_dim], `table(y)` where it is labels [B]. ValueError: z or y of another
        shape."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape [B, {self.latent_dim}], got {list(z.shape)}")
        return class_vectors(z, y, self.num_classes, self.class_dim, table)


def conv2d(cin: int, cout: int, kernel: int, eps: float | None, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the size, spectrally normalised with that eps, or plain where eps is None."""
    if eps is None:
        return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=bias)
    return SpectralConv2d(cin, cout, kernel, padding=kernel // 2, bias=bias, eps=eps)


def linear(cin: int, cout: int, eps: float | None, bias: bool = True) -> nn.Linear:
    return nn.Linear(cin, cout, bias) if eps is None else SpectralLinear(cin, cout, bias, eps=eps)


def initialise(model: nn.Module) -> None:
    """Makes the weights orthogonal and the biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)


class ClassTable(nn.Embedding):
    """A row for every class: of labels [B] their rows, of weights [B, classes] the mixtures of all rows."""

    def forward(self, y: Tensor) -> Tensor:
        return F.linear(y.to(self.weight.dtype), self.weight.t()) if y.is_floating_point() else super().forward(y)


class BatchNorm(nn.Module):
    """In train mode it normalises by the batch and moves the stored statistics; in eval mode it normalises by those."""

    stored_mean: Tensor
    stored_var: Tensor

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps, self.momentum = eps, 0.1
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def normalise(self, x: Tensor) -> Tensor:
        mean, var = self.stored_mean, self.stored_var
        return F.batch_norm(x, mean, var, training=self.training, momentum=self.momentum, eps=self.eps)


class ConditionalBatchNorm(BatchNorm):
    """Gain 1 + U c and shift V c per sample: c [B, condition], or labels where each class has its own."""

    def __init__(self, channels: int, condition: int, eps: float, sn_eps: float | None, shared: bool):
        super().__init__(channels, eps)
        self.gain, self.bias = (
            linear(condition, channels, sn_eps, bias=False) if shared else ClassTable(condition, channels)
            for _ in range(2)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.normalise(x)
        gain, shift = 1 + self.gain(c), self.bias(c)
        return y * gain[:, :, None, None].to(y.dtype) + shift[:, :, None, None].to(y.dtype)


class OutputBatchNorm(BatchNorm):
    def __init__(self, channels: int, eps: float):
        super().__init__(channels, eps)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalise(x)
        return y * self.gain[:, None, None].to(y.dtype) + self.bias[:, None, None].to(y.dtype)


def attend(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """For every pixel of theta [B, K, H, W], the mean of g over the pixels of phi's size, weighed by softmax(θ·φ)."""
    # It is written out because PyTorch's fused attention cannot be differentiated twice.
    weights = torch.bmm(theta.flatten(2).transpose(1, 2), phi.flatten(2)).softmax(-1)
    return torch.bmm(g.flatten(2), weights.transpose(1, 2)).unflatten(2, theta.shape[2:])


class Attention(nn.Module):
    """x + gamma · o(attention over the pixels of x), keys and values at half the size."""

    def __init__(self, channels: int, eps: float | None):
        super().__init__()
        if channels < 8:
            raise ValueError(f"attention divides the channels by 8 and has {channels}; widen the network or drop it")
        self.theta = conv2d(channels, channels // 8, 1, eps, bias=False)
        self.phi = conv2d(channels, channels // 8, 1, eps, bias=False)
        self.g = conv2d(channels, channels // 2, 1, eps, bias=False)
        self.o = conv2d(channels // 2, channels, 1, eps, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        y = attend(self.theta(x), F.max_pool2d(self.phi(x), 2), F.max_pool2d(self.g(x), 2))
        return x + self.gamma.to(x.dtype) * self.o(y).to(x.dtype)
