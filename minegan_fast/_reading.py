"""From a checkpoint's bytes to plain data. Reading never runs code from a file."""

import argparse
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        path: the file.
        data: nested containers of numbers, strings and tensors; keys are the file's own.
        metadata: the text entries of a safetensors file.
    """

    path: Path
    data: dict
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: str | Path) -> Contents:
    """The contents of a safetensors file or a torch.save file (zip or legacy).

    Raises:
        FileNotFoundError, ValueError: no such file; a file of another kind, a truncated one, a pickle that asks for
            code (named and refused).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint file in it")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}: check the path") from None
    if not head:
        raise ValueError(f"{path} is empty; copy or download it again")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not a checkpoint: the download gave HTML; fetch the file itself")
    zipped = head[:2] == b"PK"
    if not zipped and head[:1] != b"\x80":
        raise ValueError(f"{path} is neither a safetensors nor a PyTorch file (it begins with {head[:16]})")
    return Contents(path, _read_torch(path, zipped))


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Contents(path, tensors, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None


def _read_torch(path: Path, zipped: bool) -> dict:
    try:
        # Training files of the rosinality layout hold their command line: a Namespace is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} was refused: its pickle asks for {wanted[1]!r}, which is code, and a checkpoint is data. "
                "Save the state_dict() of the network on the machine that made the file, and load that"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{path} is truncated, damaged or no file of torch.save ({reason}); nothing of it was run. "
            "Copy or download it again, or save the network's state_dict() with torch.save"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors (a state_dict)")
    return content
