"""What a public project's file of one network looks like, and what of ours it becomes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..network import Network

State = dict[str, Tensor]


def as_it_is(state: State) -> State:
    return state


def square(constant: Tensor | None) -> None:
    """ValueError: what a StyleGAN2's synthesis begins with, [..., 4, 4], has other sides."""
    if constant is not None and constant.shape[-2:] != (4, 4):
        sides = " x ".join(map(str, constant.shape[-2:]))
        raise ValueError(
            f"its synthesis begins with {sides} pixels: networks of images that are not square are not read here"
        )


def highest(state: State, pattern: str) -> int:
    """The highest number in names of that pattern, whose group it is; -1 where there is none.

    Sizes follow from it and not from how many names there are: a network that lacks a tensor keeps its size, and what
    is missing is told by name. Numbers above 9999 are passed over: no network has them, and a file that does would
    have sizes computed that fill the memory.
    """
    found = (re.fullmatch(pattern, name) for name in state)
    return max((int(m[1]) for m in found if m and len(m[1]) < 5), default=-1)


@dataclass(frozen=True)
class Layout:
    """One way of writing one network of a family.

    Attributes:
        project: whose layout it is, as messages say it.
        role: "generator" or "discriminator".
        model: the class that is built; its `family` is the layout's.
        signature: parameter names (after `module.` prefixes are gone) that only such a file has; all must be there.
        containers: where a training file keeps the network, best first (averaged weights before raw ones); each is a
            top-level key of the file, or the name of a file in a folder without its suffix. A file that is the
            network's state dict itself needs no entry.
        config: the constructor's arguments, told from the shapes. KeyError and IndexError mean: tensors are missing
            or have too few dimensions; a ValueError says why this file cannot be expressed.
        averaged: those of `containers` that hold an exponential moving average.
        convert: renames, reshapes or rescales the tensors to the model's own state dict. What it leaves out of the
            file is known to be of no use; what it keeps beyond the model's own names is reported as unexpected.
        optional: regular expression of the model's own names that a file may leave out; they get the values of a
            freshly built network (seed 0).
        at_the_top: tensors that lie beside the container, in the file itself, and belong to the network.
        crop: (tensors under the file's names, resolution) -> those of the network up to that resolution, which `config`
            and `convert` then see; None stands for the resolution that the network was trained for. Only where the
            layers of a lower resolution are a network of their own. ValueError: no such resolution in the file.
        beside: (what `config` gave, the tensors of the file's discriminator, none where it has none, the whole file) ->
            the constructor's arguments, where the shapes of a network leave open what lies beside it. ValueError as
            from `config`.
    """

    project: str
    role: str
    model: type[Network]
    signature: tuple[str, ...]
    containers: tuple[str, ...]
    config: Callable[[State], dict]
    averaged: tuple[str, ...] = ()
    convert: Callable[[State], State] = as_it_is
    optional: str | None = None
    at_the_top: tuple[str, ...] = ()
    crop: Callable[[State, int | None], State] | None = None
    beside: Callable[[dict, State, Mapping], dict] | None = None
