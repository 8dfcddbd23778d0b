"""Building blocks that several families share."""

import torch
from torch import Tensor, nn

from ..ops import upfirdn2d


def channel_table(resolution: int, base: int, maximum: int, override: dict[int, int] | None) -> dict[int, int]:
    """Channels at every resolution from 4 up: min(base / r, maximum), or `override[r]` where given."""
    if not isinstance(resolution, int) or resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two >= 8, got {resolution!r}")
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
