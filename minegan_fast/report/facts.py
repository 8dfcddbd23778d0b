"""What a report shows, as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..finetune import Selection

LARGEST = 1e300


class Neighbour(NamedTuple):
    """A generated image, the training image nearest to it, and how far that is.

    relative: the distance in that of a training image from the nearest other one, at the median.
    """

    sample: Image.Image
    image: Image.Image
    name: str
    distance: float
    relative: float


@dataclass
class Facts:
    """A run.

    history: rows {"step", "stage", name: number, ...}. grids: {step: file} in the order of steps. marks: {step: what
    its state is called}. shares: {source: (p, interval or None)} of several sources. intervals: {metric: (low, high)}
    at `best`, as `intervals_of` says. settings: {name: (value, whether it is the default)}. messages: (step, text).
    missing: {panel: why it is not there}, for panels without data.
    """

    name: str
    history: list[dict]
    marks: dict[int, str]
    best: int
    judge: str = ""
    grids: dict[int, Path] = field(default_factory=dict)
    selection: Selection | None = None
    sources: list[str] = field(default_factory=list)
    shares: dict[str, tuple[float, Sequence[float] | None]] = field(default_factory=dict)
    neighbours: list[Neighbour] = field(default_factory=list)
    intervals: dict[str, Sequence[float]] = field(default_factory=dict)
    intervals_of: str = ""
    settings: dict[str, tuple[Any, bool]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    messages: list[tuple[int, str]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def series_of(history: Sequence[dict]) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of the numbers in a history that are finite, and small enough for an axis."""
    found: dict[str, dict[int, float]] = {}
    for row in history:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and abs(value) < LARGEST:  # no NaN either
                found.setdefault(name, {})[row["step"]] = float(value)
    return found
