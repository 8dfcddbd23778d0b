"""What a run says, kept in its folder: `log.jsonl`, of which a line may be cut off but none before it is lost."""

import importlib.metadata
import json
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from .prepared import Prepared

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "matplotlib")


class Notes:
    """The rows {"step", and "message" | "began" | "intervals"} of a file."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, step: int, **row: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    def message(self, step: int, text: str) -> None:
        self.add(step, message=text)

    def begin(self, step: int, prepared: Prepared, contents: dict[str, str]) -> None:
        """Of a new run the first row, of a resumed one one more: by what it runs, and on which images."""
        if step == 0:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):  # a kill cut the last line off
            with open(self.path, "a") as file:
                file.write("\n")
        held_out = 0 if prepared.held_out is None else len(prepared.held_out)
        target = {"shape": list(prepared.target.images.shape), "digest": contents["images"], "held_out": held_out}
        self.add(step, began={"versions": versions(prepared.device), "target": target})

    def read(self, kind: str) -> list[tuple[int, Any]]:
        """(step, content) of the rows of a kind. Lines that are no rows are passed over."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else []:
            try:
                row = json.loads(line)
                if kind in row and _FITS[kind](row[kind]):
                    found.append((int(row["step"]), row[kind]))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                continue
        return found


def _began(row: Any) -> bool:
    target, texts = row["target"], [*row["versions"].values(), row["target"]["digest"]]
    numbers = [*target["shape"], target["held_out"]]
    return len(numbers) == 5 and all(type(n) is int for n in numbers) and all(isinstance(t, str) for t in texts)


def _intervals(row: Any) -> bool:
    ends = [[low, high] for low, high in row["values"].values()]
    return all(isinstance(end, Real) for pair in ends for end in pair) and {"generated", "real"} <= row.keys()


_FITS = {"message": lambda row: isinstance(row, str), "began": _began, "intervals": _intervals}


@contextmanager
def heard() -> Iterator[list[str]]:
    """Gives a list that holds, after the block, the texts of the warnings in it, which go on to who waits for them."""
    texts: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield texts
    finally:
        texts += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        for one in caught:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def versions(device: torch.device) -> dict[str, str]:
    """Of the library and of what it runs on, and the name of the device."""
    from .. import __version__

    found = {"minegan_fast": __version__, "python": f"{platform.python_version()}, {platform.platform()}"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        return found | {"device": f"{device}, {torch.cuda.get_device_name(device)}"}
    return found | {"device": f"{device}, {torch.get_num_threads()} threads"}
