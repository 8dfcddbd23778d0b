"""What of a generator's miners the generator itself can hold, for programs that know no miner.

A mined constant takes the place of the learned one, bit for bit. An affine miner of w, M(w) = A w + b, goes into the
layers that read w, style = W w + c:

    W' = W A,    c' = c + W b

which is the same up to rounding, and so is truncation, since M(m + ψ (w - m)) = M(m) + ψ (M(w) - M(m)). A miner bends
where it has activations; those of w would need layers behind the mapping network, whose last one ends in a leaky ReLU
of w's size. A miner of z stands before a normalisation of z (StyleGAN, StyleGAN2, Progressive GAN), which no layer
behind it replaces, or before a generator that reads z in parts (BigGAN): the generator holds it only where it is the
identity. There the projection onto the sphere goes too, if the generator normalises z itself.
"""

import copy

import torch
from torch import Tensor, nn

from ..mining import Mined, Miner
from ..mining.mined import learned_constant
from ..mining.prior import on_sphere
from ..models import PGANGenerator
from ..models.stylegan2_layers import ModulatedConv2d
from ..models.stylegan_layers import AdaptiveInstanceNorm
from ..models.styles import StyleBased


@torch.no_grad()
def fold(mined: Mined) -> tuple[nn.Module, Mined | None]:
    """(a copy of the generator that holds what it can, the miners that are still before it; None: none are)."""
    generator = copy.deepcopy(mined.generator)
    if mined.constant is not None:
        learned_constant(generator).copy_(mined.constant)
    affine = affine_map(mined.miner)
    if affine is not None and mined.class_miner is None:
        if mined.place == "w":
            for weight, bias, scale in _readers_of_w(generator):
                a, b, own = (t.double() for t in (*affine, weight))
                bias.add_(scale * own @ b)
                weight.copy_(own @ a)
            return generator, None
        normalises = isinstance(generator, (StyleBased, PGANGenerator))
        if _is_identity(*affine) and (normalises or not on_sphere(mined.prior)):
            return generator, None
    return generator, Mined(generator, mined.miner, mined.class_miner, mined.place, None, mined.prior)


@torch.no_grad()
def affine_map(miner: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(A [output_dim, input_dim], b [output_dim]) in float64 of a miner that is u -> A u + b; None: it bends."""
    if not isinstance(miner, Miner):
        return None
    linears = [layer for layer in miner.layers if isinstance(layer, nn.Linear)]
    if len(linears) > 1 and miner.config["activation"] != "linear" and linears[-1].weight.any():
        return None
    exact = copy.deepcopy(miner).double()
    like = next(exact.parameters())
    b = exact(like.new_zeros(1, miner.input_dim))[0]
    return (exact(torch.eye(miner.input_dim).to(like)) - b).T, b


def _is_identity(a: Tensor, b: Tensor) -> bool:
    return a.shape[0] == a.shape[1] and not b.any() and torch.equal(a, torch.eye(len(a)).to(a))


def _readers_of_w(generator: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """(weight, bias, what the weight is multiplied with) of every layer that makes a style of w."""
    found = []
    for module in generator.modules():
        if isinstance(module, ModulatedConv2d):
            found.append((module.modulation.weight, module.modulation.bias, module.modulation.scale))
        elif isinstance(module, AdaptiveInstanceNorm):
            layer = module.style
            found.append((layer.linear.weight_orig, layer.linear.bias, layer.scale))
    return found
