"""What a public project's file of one network looks like, and what of ours it becomes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

State = dict[str, Tensor]


def as_it_is(state: State) -> State:
    return state


@dataclass(frozen=True)
class Layout:
    """One way of writing one network of a family.

    Attributes:
        project: whose layout it is, as messages say it.
        role: "generator" or "discriminator".
        model: the class that is built; its `family` is the layout's.
        signature: parameter names (after `module.` prefixes are gone) that only such a file has; all must be there.
        containers: where a training file keeps the network, best first (averaged weights before raw ones); each is a
            top-level key of the file. A file that is the network's state dict itself needs no entry.
        averaged: those of `containers` that hold an exponential moving average.
        config: the constructor's arguments, told from the shapes. KeyError and IndexError mean: tensors are missing.
        convert: renames, reshapes or rescales the tensors to the model's own state dict.
        optional: regular expression of the model's own names that a file may leave out.
    """

    project: str
    role: str
    model: type[nn.Module]
    signature: tuple[str, ...]
    containers: tuple[str, ...]
    config: Callable[[State], dict]
    averaged: tuple[str, ...] = ()
    convert: Callable[[State], State] = as_it_is
    optional: str | None = None
