"""Building blocks that several families share."""

import torch
from torch import Tensor, nn

from ..ops import upfirdn2d
from .network import Network


def channel_table(
    resolution: int, base: int, maximum: int, override: dict[int, int] | None, smallest: int = 8
) -> dict[int, int]:
    """Channels at every resolution from 4 up: min(base / r, maximum), or `override[r]` where given."""
    if not isinstance(resolution, int) or resolution < smallest or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two >= {smallest}, got {resolution!r}")
    table = {2**i: max(1, min(base // 2**i, maximum)) for i in range(2, resolution.bit_length())}
    override = {int(r): int(c) for r, c in (override or {}).items()}
    if unknown := sorted(override.keys() - table.keys()):
        raise ValueError(f"channels names the resolutions {unknown}; at {resolution} there are {list(table)}")
    table |= override
    if min(table.values()) < 1:
        raise ValueError(f"every resolution needs at least one channel, got {table}")
    return table


class Blur(nn.Module):
    """Low-pass filter (1, 3, 3, 1) ⊗ (1, 3, 3, 1) of sum `gain` over every channel, zero-padded."""

    def __init__(self, padding: int, gain: float = 1.0):
        super().__init__()
        taps = torch.tensor((1.0, 3.0, 3.0, 1.0))
        self.kernel: Tensor
        self.register_buffer("kernel", torch.outer(taps, taps) / 64 * gain)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, padding=self.padding)


class Upsample(Blur):
    """Twice the size: zeros between the pixels, then the filter."""

    def __init__(self):
        super().__init__(padding=1, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, up=2, padding=(2, 1, 2, 1))


class PixelNorm(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def mean_2x2(x: Tensor, stride: int = 2, padding: int = 0) -> Tensor:
    """Average pooling by `upfirdn2d`: PyTorch's own code for a CPU is many times slower."""
    return upfirdn2d(x, x.new_ones(2), down=stride, padding=padding, gain=0.25)


def check_images(x: Tensor, channels: int, resolution: int) -> None:
    """Raises ValueError where x is not [B >= 1, channels, resolution, resolution]."""
    if x.ndim != 4 or x.shape[1:] != (channels, resolution, resolution) or not len(x):
        shape = f"[B >= 1, {channels}, {resolution}, {resolution}]"
        raise ValueError(f"images must have shape {shape}, got {list(x.shape)}")


class Progressive(Network):
    """A network of growing resolution: its sizes, and the weight `alpha` of the highest resolution while it fades in.

    `config` holds the constructor's arguments, alpha as it is now; `widths` the channels at every resolution.
    """

    def __init__(
        self,
        resolution: int,
        channel_base: int,
        channel_max: int,
        image_channels: int,
        channels: dict[int, int] | None,
        alpha: float,
        **others,
    ):
        super().__init__()
        self.widths = channel_table(resolution, channel_base, channel_max, channels, smallest=4)
        sizes = {
            "resolution": resolution,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "image_channels": image_channels,
            "channels": {str(r): c for r, c in self.widths.items()},
            **others,
        }
        for name in ("latent_dim", "style_dim", "mapping_layers", "image_channels", "num_classes"):
            least = 0 if name == "num_classes" else 1
            if sizes.get(name, least) < least:
                raise ValueError(f"{name} must be at least {least}, got {sizes[name]}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1, got {alpha}")
        self.alpha, self._sizes = alpha, sizes
        self.resolution, self.image_channels = resolution, image_channels

    @property
    def config(self) -> dict:
        return self._sizes | {"alpha": self.alpha}
