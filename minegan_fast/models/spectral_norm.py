"""Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957): layers with W / σ in the place of W.

σ is the largest singular value of W as a matrix [O, I·k·k]. One power iteration from the last u follows it:

    v = Wᵀu / |Wᵀu|,   u' = Wv / |Wv|,   σ = u'ᵀ W v,   with u' and v constant:   dσ/dW = u' vᵀ

Two layouts of the same layer: BigGAN-PyTorch keeps `weight`, `u0` [1, O] and `sv0` [1], the last σ of the training, and
iterates in eval mode too, from u0 as it stands; `torch.nn.utils.spectral_norm` keeps `weight_orig`, `weight_u` [O] and
`weight_v` [I·k·k], and takes σ of these in eval mode.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def power_iteration(weight: Tensor, u: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(σ, u', v): scalar, [O] and [I·k·k], of weight [O, ...] and u [O]; σ is differentiable by the weight."""
    with torch.no_grad():
        v = F.normalize(torch.mv(weight.flatten(1).t(), u), dim=0, eps=eps)
    image = torch.mv(weight.flatten(1), v)
    u = F.normalize(image.detach(), dim=0, eps=eps)
    return torch.dot(image, u), u, v


class _Normalised(nn.Module):
    """A layer whose weight is divided by σ. The two subclasses, one for each layout, are mixed into a plain layer."""

    eps: float

    def remember(self, eps: float) -> None:
        """Makes the buffers of the layout."""
        raise NotImplementedError

    def normalised(self) -> Tensor:
        """W / σ; in train mode the power iteration makes a step."""
        raise NotImplementedError


class _StoredU(_Normalised):
    """The layout of BigGAN-PyTorch."""

    weight: Tensor
    u0: Tensor
    sv0: Tensor

    def remember(self, eps: float) -> None:
        self.eps = eps
        self.register_buffer("u0", torch.randn(1, self.weight.shape[0]))
        self.register_buffer("sv0", torch.ones(1))

    def normalised(self) -> Tensor:
        # Autocast must not round σ, which divides every weight of the layer.
        with torch.autocast(self.weight.device.type, enabled=False):
            sigma, u, _ = power_iteration(self.weight, self.u0[0], self.eps)
            if self.training:
                with torch.no_grad():
                    self.u0.copy_(u[None])
                    self.sv0.copy_(sigma)
            return self.weight / sigma


class _StoredUV(_Normalised):
    """The layout of torch.nn.utils.spectral_norm."""

    weight: nn.Parameter  # the plain layer's, until `remember`
    weight_orig: nn.Parameter
    weight_u: Tensor
    weight_v: Tensor

    def remember(self, eps: float) -> None:
        self.eps = eps
        self.weight_orig = self.weight
        del self.weight
        self.register_buffer("weight_u", F.normalize(torch.randn(self.weight_orig.shape[0]), dim=0))
        self.register_buffer("weight_v", torch.empty(self.weight_orig[0].numel()))
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """One power iteration: u and v follow the weight as it is now."""
        _, u, v = power_iteration(self.weight_orig, self.weight_u, self.eps)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)

    def normalised(self) -> Tensor:
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            if self.training:
                self.follow()
            # Copies: the next iteration overwrites the buffers before the backward of this one has run.
            sigma = torch.dot(self.weight_u.clone(), torch.mv(self.weight_orig.flatten(1), self.weight_v.clone()))
            return self.weight_orig / sigma


class _Conv2d(_Normalised, nn.Conv2d):
    def __init__(self, *arguments, eps: float, **keywords):
        super().__init__(*arguments, **keywords)
        self.remember(eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised(), self.bias, self.stride, self.padding)


class _Linear(_Normalised, nn.Linear):
    def __init__(self, *arguments, eps: float, **keywords):
        super().__init__(*arguments, **keywords)
        self.remember(eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class SpectralConv2d(_StoredU, _Conv2d):
    """Convolution with `weight`, `bias`, `u0`, `sv0`."""


class SpectralLinear(_StoredU, _Linear):
    """Linear layer with `weight`, `bias`, `u0`, `sv0`."""


class SpectralEmbedding(_StoredU, nn.Embedding):
    """Embedding with `weight`, `u0`, `sv0`."""

    def __init__(self, *arguments, eps: float, **keywords):
        super().__init__(*arguments, **keywords)
        self.remember(eps)

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.normalised())


class TorchSpectralConv2d(_StoredUV, _Conv2d):
    """Convolution with `weight_orig`, `bias`, `weight_u`, `weight_v`."""


class TorchSpectralLinear(_StoredUV, _Linear):
    """Linear layer with `weight_orig`, `bias`, `weight_u`, `weight_v`."""
