"""Files that are either whole or not there, and whose bytes follow from what is in them."""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there becomes `path` in one step.

    A reader sees the old file or the whole new one, also after a power cut: the file is flushed to the disk before it
    is renamed, and the folder after. If the block raises, the temporary file is removed and `path` is left as it was.
    The temporary name keeps the suffix, by which writers choose a format. The folder of `path` must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # some writers make files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # Windows opens no folders; its rename is journalled
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder; what the block puts there lies in the folder `path` afterwards, which is made, with
    its parents. If the block raises, nothing is left, and no folder is made. FileExistsError: `path` is a file, or a
    folder with something in it."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is a file"
        raise FileExistsError(f"{path} {what}, and nothing was written: name a new folder")
    # Within the nearest folder that exists: there it is on the disk of `path`, where a rename copies nothing.
    above = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    temporary = above / f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        path.mkdir(parents=True, exist_ok=True)
        for entry in sorted(temporary.iterdir()):
            os.replace(entry, path / entry.name)
    finally:
        shutil.rmtree(temporary)


def save_torch(path: str | os.PathLike, content: Any) -> None:
    """torch.save, atomically. OSError where the file cannot be written."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # PyTorch's own writer says of a full disk that a position is unexpected
            reason = str(error).splitlines()[0]
            if "inline_container" not in reason and "PytorchStreamWriter" not in reason:
                raise
            raise OSError(errno.ENOSPC, f"{path} cannot be written ({reason}); is the disk full?") from error


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; equal contents give equal bytes.

    safetensors itself writes the metadata in random order. OSError where the file cannot be written.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contents, temporary, metadata)
        except SafetensorError as error:
            said = re.search(r"os error (\d+)", str(error))
            number = int(said[1]) if said else errno.EIO
            raise OSError(number, f"{path} cannot be written ({os.strerror(number)}); is the disk full?") from error
        with open(temporary, "r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            ordered = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
            text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= length:
                file.seek(8)
                file.write(text.ljust(length))
