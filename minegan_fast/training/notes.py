"""What a run says, kept in its folder: `log.jsonl`, of which a line may be cut off but none before it is lost."""

import importlib.metadata
import json
import platform
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
        held_out = 0 if prepared.held_out is None else len(prepared.held_out)
        target = {"shape": list(prepared.target.images.shape), "digest": contents["images"], "held_out": held_out}
        self.add(step, began={"versions": versions(prepared.device), "target": target})

    def read(self, kind: str) -> list[tuple[int, Any]]:
        """(step, content) of the rows of a kind. Lines that are no rows are passed over."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else []:
            try:
                row = json.loads(line)
                found += [(int(row["step"]), row[kind])] if kind in row else []
            except (ValueError, TypeError, KeyError):
                continue
        return found


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
