"""What all networks of `minegan_fast.models` have in common, and where the weights of a loaded one come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..files.reading import PART


@dataclass(frozen=True)
class Origin:
    """Where a loaded network's weights come from; a network of `load_generator` has it as its attribute `origin`.

    Attributes:
        path: the file that was read; of a folder, or of a file with others beside it, the one that holds the network.
        project: whose layout the file has.
        container: the file's key that held the network, or the role of the file in its folder (`G_ema`); None: the
            file itself.
        averaged: whether the weights are an exponential moving average; None: the file does not say.
        passed_over: other keys of the file that hold the same network.
        missing: parameters that the file lacks, and that keep the values the network was built with.
        unexpected: the file's tensors that the network does not have, or whose shape does not fit it.
        converted: for a file that `convert` wrote, where these weights come from, in words.
    """

    path: str
    project: str
    container: str | None = None
    averaged: bool | None = None
    passed_over: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    converted: str | None = None

    def __str__(self) -> str:
        name = Path(self.path).name
        is_file = (part := PART.fullmatch(name)) and part["stem"] == self.container
        where = f"{self.container!r} in {name}" if self.container and not is_file else name
        kind = {True: "averaged weights (EMA)", False: "weights", None: "weights"}[self.averaged]
        beside = f"; the raw weights in {', '.join(map(repr, self.passed_over))} were left" if self.passed_over else ""
        before = f", converted from {self.converted}" if self.converted else ""
        return f"{kind} from {where}, the layout of {self.project}{before}{beside}"


class Network(nn.Module):
    """A generator or a discriminator of one of the families.

    Attributes: `family` (the name by which files tell it), `config` (the constructor's arguments), `resolution` (height
    and width of the images), `image_channels`, `num_classes` (0 where there are none), and `origin` where
    `load_generator` or `load_discriminator` made the network.
    """

    family: ClassVar[str]
    config: dict[str, Any]
    resolution: int
    image_channels: int
    num_classes: int
    origin: Origin
