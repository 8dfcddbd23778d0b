"""Miners in the files of the original MineGAN code (Wang et al. 2020), as miners of this package.

    StyleGAN, StyleGAN2  `miner`            transform.{0,2}: Linear, ReLU, Linear before the mapping network
    StyleGAN2            `miner_semantic`   a constant [1, 8, 4, 4] through three 1x1 convolutions: the same for every
                                            image, so it is the tensor that comes out, in the learned constant's place
    StyleGAN             `miner_semantic`   noise maps, which that code never trained: not read
    BigGAN               `M`, file M.pth    linear .. linear4 give z, linear5 .. linear8 the class embedding; all are
                                            spectrally normalised and nothing is between them

None of them is residual. A spectrally normalised weight becomes W / σ with the σ that evaluation uses.
"""

import itertools
import math
import re
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from .miner import Miner

State = dict[str, Tensor]


def find_original(content: dict) -> tuple[Miner, Miner | None, Tensor | None] | None:
    """(miner, class miner, constant) in the contents of a training file, a folder of BigGAN's, or a miner's state dict;
    None: no miner."""
    state = _tensors(next((content[name] for name in ("miner", "M") if name in content), content))
    if {"linear.weight", "linear8.weight"} <= state.keys():
        names = ["linear", *(f"linear{i}" for i in range(2, 9))]
        weights = [_normalised(state[f"{name}.weight"], state.get(f"{name}.u0")) for name in names]
        layers = [(weight, state[f"{name}.bias"]) for weight, name in zip(weights, names, strict=True)]
        return _perceptron(layers[:4], "linear"), _perceptron(layers[4:], "linear"), None
    numbers = sorted(int(m[1]) for key in state if (m := re.fullmatch(r"transform\.(\d+)\.weight", key)))
    if not numbers:
        return None
    layers = [(state[f"transform.{i}.weight"], state[f"transform.{i}.bias"]) for i in numbers]
    return _perceptron(layers, "relu"), None, _constant(_tensors(content.get("miner_semantic", {})))


def _tensors(content) -> State:
    """The tensors of a state dict, without the prefixes of DataParallel."""
    named = content.items() if isinstance(content, dict) else ()
    return {str(k).removeprefix("module."): t for k, t in named if isinstance(t, Tensor)}


def _perceptron(layers: list[tuple[Tensor, Tensor]], activation: str) -> Miner:
    (width, inputs), outputs = layers[0][0].shape, len(layers[-1][1])
    sizes = [inputs, *[width] * (len(layers) - 1), outputs]
    expected = [([after, before], [after]) for before, after in itertools.pairwise(sizes)]
    if [(list(weight.shape), list(bias.shape)) for weight, bias in layers] != expected:
        raise ValueError(f"the miner's layers do not follow each other: {[list(weight.shape) for weight, _ in layers]}")
    miner = Miner(inputs, len(layers), width, output_dim=outputs, activation=activation, residual=False)
    miner = miner.to(torch.promote_types(layers[0][0].dtype, torch.float32))
    values = zip(miner.parameters(), (tensor for layer in layers for tensor in layer), strict=True)
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
    return miner.eval()


def _normalised(weight: Tensor, u: Tensor | None) -> Tensor:
    """W / σ, σ = |W v|, v = Wᵀu / |Wᵀu|: one step of the power iteration from the stored u, which stays as it is."""
    if u is None:
        return weight
    w = weight.double()
    v = F.normalize(u.double().flatten() @ w, dim=0)
    return (w / (w @ v).norm()).to(weight.dtype)


def _constant(state: State) -> Tensor | None:
    if any(name.startswith("transform_") for name in state):
        warnings.warn(
            "the file's miner_semantic makes noise maps that its training never reached; the generator's noise stays",
            stacklevel=5,
        )
    if "conv1.weight" not in state:
        return None
    x = state["input.input"].double()
    if x.ndim != 4 or x.shape[0] != 1 or x.shape[2:] != (4, 4):
        raise ValueError(f"its constant is {list(x.shape)}, expected [1, C, 4, 4]")
    for i in (1, 2, 3):
        weight = state[f"conv{i}.weight"].double()
        x = F.conv2d(x, weight / math.sqrt(weight.shape[1]))
        if i < 3:
            x = F.leaky_relu(x + state[f"relu{i}.bias"].double()[:, None, None], 0.2) * math.sqrt(2)
    return x.to(state["conv3.weight"].dtype)
