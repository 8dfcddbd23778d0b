"""A critic that few images cannot fool easily: small heads on the features of a frozen pretrained network.

    D(x) = mean over stages s and places of head_s(normalise(f_s(x)))

f_s are maps of the network's stages (Projected GAN: Sauer et al. 2021, arXiv 2111.01007; vision-aided GAN: Kumari et
al. 2022, arXiv 2112.09130), normalised at every place to unit RMS over the channels, so that no stage outweighs
another and no image gains by large features. A head is a 1x1, a 3x3 and a 1x1 convolution to a logit, each under
spectral norm, which bounds how steep it can become on few images.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTH = 64
_EPSILON = 1e-6


class FeatureCritic(nn.Module):
    """images [B, image_channels, resolution, resolution] in [-1, 1] -> logits [B].

    maps: images -> maps [B, C, h, w] or vectors [B, C], one a stage, of a frozen network; differentiable in the images.
        The network is no part of this module: `parameters()`, `train()`, `requires_grad_()`, `to()` and `state_dict()`
        see the heads alone, and copies share it. So nothing trains it or changes its mode, and no snapshot holds it.
    width: channels of a head. dropout: the share of them that a training step leaves out.

    The heads are made on the device of the maps.
    """

    def __init__(
        self,
        maps: Callable[[Tensor], Sequence[Tensor]],
        resolution: int,
        image_channels: int = 3,
        width: int = WIDTH,
        dropout: float = 0.0,
    ):
        super().__init__()
        self._network, self.resolution, self.image_channels = maps, resolution, image_channels
        with torch.no_grad():
            found = self._maps(torch.zeros(1, image_channels, resolution, resolution))
        self.heads = nn.ModuleList(_head(m.shape[1], width, dropout) for m in found)
        self.to(found[0].device)

    def forward(self, x: Tensor) -> Tensor:
        return self._judge(self._maps(x))

    def r1_penalty(self, real: Tensor) -> Tensor:
        """mean over images of the sum over stages of h w |grad D by the normalised map [C, h, w]|_2^2, a scalar.

        R1 on what the heads see: it costs no pass backwards through the network, which need not be differentiable
        twice. The gradient of a mean over h w places falls with their number, which the factor undoes.
        """
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
            maps = [m.requires_grad_() for m in self._maps(real.detach())]
            gradients = torch.autograd.grad(self._judge(maps).sum(), maps, create_graph=create_graph)
        squares = [m.shape[2:].numel() * g.square().sum() for m, g in zip(maps, gradients, strict=True)]
        return sum(squares, real.new_zeros(())) / len(real)

    def image_side_blocks(self) -> list[nn.Module]:
        """There are none: everything before the heads is frozen already."""
        return []

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = [(m[:, :, None, None] if m.ndim == 2 else m).float() for m in self._network(x)]
        return [m * torch.rsqrt(m.square().mean(1, keepdim=True) + _EPSILON) for m in maps]

    def _judge(self, maps: Sequence[Tensor]) -> Tensor:
        logits = [head(m).mean((1, 2, 3)) for head, m in zip(self.heads, maps, strict=True)]
        return torch.stack(logits).mean(0)

    def __deepcopy__(self, memo: dict):
        memo[id(self._network)] = self._network
        copied = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


def _head(channels: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, width, 1)),
        nn.LeakyReLU(0.2),
        nn.Dropout2d(dropout),
        spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )
