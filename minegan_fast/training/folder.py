"""A run's folder: what lies where, and how it is written so that a kill at any moment loses nothing."""

import copy
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..files.atomic import atomic_path, save_tensors
from ..models import load_generator, save_model
from .config import TransferConfig, load_config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RESULTS = ("best", "last", "mined")


class RunFolder:
    """The paths in a run's folder.

    It holds `config.json`, `history.jsonl`, `losses.png`, `selection.safetensors`, `samples/`, `snapshots/`, `events/`,
    and three results, each with generator, miner and delta: `last/`, `best/` by held-out KID, and `mined/`, which is
    the state after stage 1. Of several sources a result has a folder for each with these files, and `shares.json`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.history = self.path / "history.jsonl"
        self.curves = self.path / "losses.png"
        self.samples = self.path / "samples"
        self.snapshots = self.path / "snapshots"
        self.events = self.path / "events"
        self.selection = self.path / "selection.safetensors"
        self.last, self.best, self.mined = self.path / "last", self.path / "best", self.path / "mined"

    def create(self) -> None:
        """Makes the folders. ValueError: a file is in the place of one, or nothing may be written there."""
        try:
            for folder in (self.path, self.samples, self.snapshots, self.last, self.best, self.mined):
                folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path / ".writable") as temporary:
                temporary.touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write the run to {str(self.path)!r} ({error.strerror}: {error.filename!r}); "
                "choose another folder with --out"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder during the block, without a file in it. ValueError: one is at work there.

        The lock ends with the process, however that ends. Windows and some network file systems have no such lock:
        there a run does not notice another one that has no snapshot yet.
        """
        if fcntl is None:
            yield
            return
        held = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(
                f"another process is writing a run to {str(self.path)!r}: wait for it, or choose another folder (--out)"
            ) from None
        except OSError:  # no locks here
            pass
        try:
            yield
        finally:
            os.close(held)

    @contextmanager
    def claimed(self, config: TransferConfig, resume: bool) -> Iterator[None]:
        """Makes the folder this run's during the block: it exists, is locked, and holds the run's configuration.

        ValueError: as in `create`, `locked` and `check`.
        """
        self.create()
        with self.locked():
            self.check(config, resume)  # another process may have written a run since it was checked last
            self.clean()
            config.save(self.config)
            yield

    def check(self, config: TransferConfig, resume: bool) -> None:
        """ValueError: the folder holds a run, and that is not to be resumed, or has other settings."""
        if not self.config.is_file() or not self.holds_run():
            return
        if not resume:
            raise ValueError(
                f"{str(self.path)!r} already holds a run: go on with it (--resume, in Python resume=True), or choose "
                "another folder (out)"
            )
        changed = TransferConfig(**load_config(self.config)).differences(config)
        if changed:
            raise ValueError(
                f"the run in {str(self.path)!r} has other settings ({'; '.join(changed)}); "
                "leave those options out, or choose another folder (--out)"
            )

    def holds_run(self) -> bool:
        """Whether there is something to go on from, or to lose: a snapshot, or steps in the history.

        The files of a run that was refused, or failed before its first snapshot, are neither.
        """
        return self.newest() is not None or any(row["step"] > 0 for row in self.read_history())

    def save_snapshot(self, step: int, state: dict, keep: int) -> None:
        """Writes the snapshot of `step` and removes all but the newest `keep`."""
        path = self.snapshots / f"{step:06d}.pt"
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
        for old in self._numbered()[:-keep]:
            old.unlink()

    def load_snapshot(self) -> tuple[int, dict] | None:
        """(step, state) of the newest whole snapshot; a damaged one is passed over with a warning."""
        for path in reversed(self._numbered()):
            try:
                return int(path.stem), torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                warnings.warn(f"{path} is damaged ({error}); going on from the one before it", stacklevel=2)
        return None

    def _numbered(self) -> list[Path]:
        return sorted(p for p in self.snapshots.glob("*.pt") if p.stem.isdigit())

    def newest(self) -> Path | None:
        return (self._numbered() or [None])[-1]

    def kept(self) -> str:
        """What an error message says about the work that is safe."""
        newest = self.newest()
        return f"the last good snapshot is {newest}" if newest else "there is no snapshot yet"

    def read_history(self, until: float = math.inf) -> list[dict]:
        """Rows of the steps up to `until`; a line cut off by a kill is dropped."""
        rows = []
        if self.history.exists():
            for line in self.history.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return [row for row in rows if row["step"] <= until]

    def write_history(self, rows: list[dict]) -> None:
        with atomic_path(self.history) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def clean(self) -> None:
        """Removes what killed writers left behind."""
        for leftover in self.path.rglob(".*.tmp*"):
            leftover.unlink(missing_ok=True)

    def copy_last(self, to: Path) -> None:
        """Gives another result the files of `last/`, one by one."""
        for source in self.last.rglob("*"):
            if source.is_dir():
                continue
            copied = to / source.relative_to(self.last)
            copied.parent.mkdir(exist_ok=True)
            with atomic_path(copied) as temporary:
                shutil.copyfile(source, temporary)
        for old in to.rglob("*"):
            if old.is_file() and not (self.last / old.relative_to(to)).exists():
                old.unlink()


def write_generator(path: Path, generator: nn.Module) -> None:
    """This project's file where it knows the network, else the state dict as safetensors."""
    if hasattr(generator, "family"):
        save_model(path, generator)
        return
    save_tensors(path, {name: tensor.clone() for name, tensor in generator.state_dict().items()})


def read_generator(path: Path, like: nn.Module) -> nn.Module:
    """What `write_generator` wrote; `like` is a network of the same architecture."""
    if hasattr(like, "family"):
        return load_generator(path)
    generator = copy.deepcopy(like)
    generator.load_state_dict(load_file(path))
    return generator.eval()
