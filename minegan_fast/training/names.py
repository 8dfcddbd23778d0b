"""Short names of a run's sources, for its log, its history and its folders."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn


def short_names(sources: Sequence) -> list[str]:
    """A name for each source, a path or a module, unique and fit for a folder: of a path its last part, and as many
    parts before it as tell all of them apart; of a module its class."""
    parts = [_parts(source) for source in sources]
    names = [_tail(p, 1) for p in parts]
    for depth in range(2, 1 + max(map(len, parts))):
        if len(set(names)) == len(names):
            break
        names = [_tail(p, depth) if names.count(name) > 1 else name for p, name in zip(parts, names, strict=True)]
    for name in {name for name in names if names.count(name) > 1}:
        for number, i in enumerate([i for i, other in enumerate(names) if other == name], 1):
            names[i] = _free(f"{name}-{number}", names)
    return names


def _parts(source) -> tuple[str, ...]:
    if isinstance(source, nn.Module):
        return (type(source).__name__,)
    path = Path(source).resolve()
    folder = path.is_dir() or not path.suffix
    return (*path.parts[1:-1], path.name if folder else path.stem)


def _tail(parts: tuple[str, ...], count: int) -> str:
    return re.sub(r"[^\w.-]|^\.", "_", "-".join(parts[-count:])) or "source"


def _free(name: str, names: list[str]) -> str:
    while name in names:
        name += "_"
    return name
