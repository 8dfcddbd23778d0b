"""Inception v3 up to its pooled features, for weights that the user has.

The network of Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", table 1 and figures 5-7
and 10, under the names of the public weights. A block is a table: for each branch its convolutions, (channels, kernel)
each; a list of two stands for both side by side. A kernel n is n×n, and (h, w) is h×w. Every convolution is followed by
batch norm (epsilon 0.001) and ReLU, and keeps the size of its map unless the table says otherwise.

Two sets of weights are in use, and their pools differ:

    torchvision  ImageNet, 1000 classes. The average pools of the blocks count the zeros of their padding.
    fid          the TensorFlow network of 2015-12-05, 1008 outputs, by which Heusel et al. 2017 define FID, as
                 pytorch-fid ported it. The average pools leave the padding out, and the pool of the last block is a
                 maximum, unlike the paper's.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = {1000: "torchvision", 1008: "fid"}  # the rows of fc.weight tell the weights apart
SMALLEST = 75  # of a smaller image nothing is left for the last convolutions
_UNUSED = ("AuxLogits.", "fc.")
_COUNTER = ".num_batches_tracked"

_STEM = {  # channels, kernel, stride, padding
    "Conv2d_1a_3x3": (32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3, 1, 1),
    "pool1": None,
    "Conv2d_3b_1x1": (80, 1, 1, 0),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
    "pool2": None,
}


def _grid35(pool):  # figure 5
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool, 1)],
    }


def _grid17(c):  # figure 6 with n = 7
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, 1)],
    }


_GRID8 = {  # figure 7
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
    "branch3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
    "branch_pool": [(192, 1)],
}

# Figure 10: the last convolution of each branch has stride 2 and no padding, and so has a maximum pool beside them.
_REDUCE = {
    "Mixed_6a": {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]},
    "Mixed_7a": {
        "branch3x3": [(192, 1), (320, 3)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
    },
}

_BLOCKS = {
    "Mixed_5b": _grid35(32),
    "Mixed_5c": _grid35(64),
    "Mixed_5d": _grid35(64),
    "Mixed_6a": _REDUCE["Mixed_6a"],
    "Mixed_6b": _grid17(128),
    "Mixed_6c": _grid17(160),
    "Mixed_6d": _grid17(160),
    "Mixed_6e": _grid17(192),
    "Mixed_7a": _REDUCE["Mixed_7a"],
    "Mixed_7b": _GRID8,
    "Mixed_7c": _GRID8,
}


class _Conv(nn.Module):
    def __init__(self, inputs: int, channels: int, kernel, stride: int = 1, padding: int | str = "same"):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches side by side. pool: "zeros" and "inside" are averages with and without the padding, or "max"."""

    def __init__(self, inputs, branches, reduces, pool):
        super().__init__()
        self.pool, self.reduces, self.names, self.channels = pool, reduces, {}, inputs if reduces else 0
        for branch, layers in branches.items():
            width, steps = inputs, []
            for i, layer in enumerate(layers, 1):
                layer = layer if isinstance(layer, list) else [layer]
                suffixes = [""] if len(layers) == 1 else [f"_{i}"] if len(layer) == 1 else [f"_{i}a", f"_{i}b"]
                steps.append([branch + suffix for suffix in suffixes])
                stride, padding = (2, 0) if reduces and i == len(layers) else (1, "same")
                for name, (channels, kernel) in zip(steps[-1], layer, strict=True):
                    self.add_module(name, _Conv(width, channels, kernel, stride, padding))
                width = sum(channels for channels, _ in layer)
            self.names[branch] = steps
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, steps in self.names.items():
            y = self._pooled(x) if branch == "branch_pool" else x
            for names in steps:
                parts = [self.get_submodule(name)(y) for name in names]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        if self.reduces:
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)

    def _pooled(self, x):
        if self.pool == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=self.pool == "zeros")


class Inception(nn.Module):
    """images [N, 3, H, W] in [-1, 1], H and W at least 75 (299 is what the weights know) -> features [N, 2048].

    variant: "torchvision" | "fid". Parameters have the names of torchvision's, without `fc` and `AuxLogits`, which the
    features do not need.
    """

    def __init__(self, variant: str):
        super().__init__()
        width, self.names = 3, []
        for name, layer in _STEM.items():
            self.names.append(name)
            self.add_module(name, nn.MaxPool2d(3, 2) if layer is None else _Conv(width, *layer))
            width = layer[0] if layer else width
        for name, branches in _BLOCKS.items():
            pool = "zeros" if variant == "torchvision" else "max" if name == "Mixed_7c" else "inside"
            block = _Block(width, branches, name in _REDUCE, pool)
            self.names.append(name)
            self.add_module(name, block)
            width = block.channels

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def is_inception(state: dict) -> bool:
    """Whether these are weights under the names of torchvision's Inception v3."""
    return any(isinstance(name, str) and name.startswith(("Conv2d_1a_3x3.", "Mixed_5b.")) for name in state)


def from_weights(state: dict[str, Tensor], device: str | torch.device = "cpu") -> tuple[Inception, str]:
    """(network, its variant) with these weights in memory of its own: float64 if one of them is, else float32.

    Raises:
        ValueError: it cannot be told whose weights these are, or tensors are missing, too many, of another shape or
            type, or not finite (by name).
    """
    fc = state.get("fc.weight")
    variant = CLASSES.get(len(fc)) if isinstance(fc, Tensor) and fc.dim() else None
    if variant is None:
        there = "is not there" if fc is None else f"is {list(getattr(fc, 'shape', ['no tensor']))}"
        raise ValueError(
            f"fc.weight tells torchvision's weights [1000, 2048] from those of FID [1008, 2048], and here it {there}"
        )
    with torch.device("meta"):
        network = Inception(variant)
    # Some files have a counter beside each batch norm, some have not, and nothing reads it.
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(_COUNTER)}
    own = {name: tensor for name, tensor in network.state_dict().items() if name not in counters}
    weights = {
        name: tensor
        for name, tensor in state.items()
        if not str(name).startswith(_UNUSED) and not str(name).endswith(_COUNTER)
    }
    wrong = []
    for name in own.keys() & weights.keys():
        tensor = weights[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            wrong.append(f"{name} holds {getattr(tensor, 'dtype', type(tensor).__name__)}, expected floats")
        elif tensor.shape != own[name].shape:
            wrong.append(f"{name} is {list(tensor.shape)}, expected {list(own[name].shape)}")
        elif not torch.stack(tensor.aminmax()).isfinite().all():
            wrong.append(f"{name} holds NaN or inf")
    kinds = {"missing": own.keys() - weights.keys(), "unexpected": weights.keys() - own.keys(), "wrong": wrong}
    if told := [f"{kind}: {shortened(names)}" for kind, names in kinds.items() if names]:
        raise ValueError(f"the weights do not fit an Inception v3: {'; '.join(told)}")
    double = any(tensor.dtype == torch.float64 for tensor in weights.values())
    network = network.to(torch.float64 if double else torch.float32).to_empty(device=device)
    network.load_state_dict(weights | counters)
    return network.requires_grad_(False).eval(), variant


def shortened(names: Iterable, most: int = 6) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
