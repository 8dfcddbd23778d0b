"""Tables by which NVIDIA's StyleGAN2 files become this project's state dicts, and what their tables are made of."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ._layout import State

# (name in the file, name here, what happens to the tensor)
Table = list[tuple[str, str, Callable[[Tensor], Tensor]]]


def same(t: Tensor) -> Tensor:
    return t


def times4(t: Tensor) -> Tensor:
    return 4 * t


def plus1(t: Tensor) -> Tensor:
    return t + 1


def transposed(t: Tensor) -> Tensor:
    return t.T


def one(t: Tensor) -> Tensor:
    return t.reshape(1)


def column(t: Tensor) -> Tensor:
    return t.reshape(1, -1, 1, 1)


def oihw(t: Tensor) -> Tensor:
    return t.permute(3, 2, 0, 1)


def batch(change: Callable = same) -> Callable:
    return lambda t: change(t)[None]


def flipped(t: Tensor) -> Tensor:
    return oihw(t).flip(2, 3)


def low_pass(gain: float) -> Callable:
    """The 2-D filter of sum `gain` of the taps that a TensorFlow network was built with."""

    def make(t: Tensor) -> Tensor:
        square = torch.outer(t, t) if t.ndim == 1 else t
        return square / square.sum() * gain

    return make


def apply(state: State, table: Table, unused: str) -> State:
    """The tensors under the names of this project; what no entry names stays, unless `unused` matches it."""
    named = {theirs for theirs, _, _ in table}
    rest = {k: v for k, v in state.items() if k not in named and not re.fullmatch(unused, k)}
    return {ours: change(state[theirs]) for theirs, ours, change in table if theirs in state} | rest


def resolutions(highest: int) -> list[int]:
    if highest < 8 or highest & (highest - 1):
        raise ValueError(f"its resolution must be a power of two >= 8, got {highest}")
    return [2**i for i in range(3, highest.bit_length())]


def refuse(state: State, key: str, what: str) -> None:
    if found := next((k for k in state if re.fullmatch(key, k)), None):
        raise ValueError(f"{what} (it has {found}) cannot be expressed here")


def generator_architecture(state: State, first_image: str, skip: str) -> str:
    if any(re.fullmatch(skip, key) for key in state):
        return "resnet"
    if first_image not in state:
        raise ValueError(f"a generator that is neither skip nor residual (no {first_image}) cannot be expressed here")
    return "skip"


def critic_architecture(state: State, skip: str, last_image: str) -> str:
    if skip not in state and last_image not in state:
        raise ValueError(f"a discriminator that is neither skip nor residual (no {skip}) cannot be expressed here")
    return "resnet" if skip in state else "skip"
