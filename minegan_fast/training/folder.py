"""A run's folder: what lies where, and how it is written so that a kill at any moment loses nothing."""

import copy
import json
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..files.atomic import atomic_path, save_tensors, save_torch
from ..files.reading import read
from ..finetune.delta import DELTA
from ..models import load_generator, save_model
from .config import TransferConfig, load_config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RESULTS = ("best", "last", "mined")


class RunFolder:
    """The paths in a run's folder.

    It holds `config.json`, `history.jsonl`, `log.jsonl` with what the run said, `losses.png`, `report.html`,
    `selection.safetensors`, `samples/`, `snapshots/`, `events/`, `source/` with the networks that the run read from
    files, as they were, and three results, each with generator, miner and delta: `last/`, `best/` by held-out KID, and
    `mined/`, which is the state after stage 1. Of several sources a result has a folder for each with these files, and
    `shares.json`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.history = self.path / "history.jsonl"
        self.curves = self.path / "losses.png"
        self.log = self.path / "log.jsonl"
        self.report = self.path / "report.html"
        self.samples = self.path / "samples"
        self.snapshots = self.path / "snapshots"
        self.events = self.path / "events"
        self.selection = self.path / "selection.safetensors"
        self.source = self.path / "source"
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
        """Makes the folder this run's during the block: it exists and is locked. What it holds is as it was, until the
        run knows that it can go on from it (`begin`).

        ValueError: as in `create`, `locked` and `check`.
        """
        self.create()
        with self.locked():
            self.check(config, resume)  # another process may have written a run since it was checked last
            yield

    def begin(self, config: TransferConfig, rows: list[dict]) -> None:
        """Makes the run's configuration that of the folder, and `rows` its history."""
        self.clean()
        config.save(self.config)
        self.write_history(rows)

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

    def check_results(self) -> None:
        """ValueError: there is no snapshot to go on from, and results of a run that a new one would write over."""
        results = [f"{name}/" for name in RESULTS if any((self.path / name).rglob("generator.safetensors"))]
        last = max((row["step"] for row in self.read_history()), default=None)
        if last:
            results.append(f"{self.history.name} up to step {last}")
        if results and last != 0:  # before the first step there is nothing to lose
            raise ValueError(
                f"{str(self.path)!r} holds {', '.join(results)}, but no snapshot that a run could go on from, and "
                "nothing was written there: begin anew in another folder (--out), or put the snapshots back"
            )

    def save_snapshot(self, step: int, state: dict, keep: int) -> None:
        """Writes the snapshot of `step` and removes all but the newest `keep`."""
        save_torch(self.snapshots / f"{step:06d}.pt", state)
        for old in self._numbered()[:-keep]:
            old.unlink()

    def load_snapshot(self, parts: Iterable[str] = ()) -> tuple[int, dict] | None:
        """(step, state) of the newest whole snapshot that has these parts; others are passed over with a warning."""
        for path in reversed(self._numbered()):
            try:
                return int(path.stem), _read_snapshot(path, parts)
            except Exception as error:  # whatever a file that is damaged makes of its reader
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"{path} is damaged ({reason}) and is passed over", stacklevel=2)
        return None

    def _numbered(self) -> list[Path]:
        """Snapshots, the newest last."""
        return sorted((p for p in self.snapshots.glob("*.pt") if p.stem.isdecimal()), key=lambda p: int(p.stem))

    def newest(self) -> Path | None:
        return (self._numbered() or [None])[-1]

    def kept(self) -> str:
        """What an error message says about the work that is safe."""
        newest = self.newest()
        return f"the last good snapshot is {newest}" if newest else "there is no snapshot yet"

    def read_history(self, until: float = math.inf) -> list[dict]:
        """Rows of the steps up to `until`. A line that is no row, as one that a kill has cut off, is passed over, with
        a warning where others follow."""
        rows = []
        lines = self.history.read_bytes().splitlines() if self.history.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if type(row["step"]) is not int:
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                if number < len(lines):
                    warnings.warn(f"line {number} of {self.history} is no row and is passed over", stacklevel=2)
                continue
            rows.append(row)
        return [row for row in rows if row["step"] <= until]

    def write_history(self, rows: list[dict]) -> None:
        with atomic_path(self.history) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def clean(self) -> None:
        """Removes what killed writers left behind."""
        for leftover in self.path.rglob(".*.tmp*"):
            leftover.unlink(missing_ok=True)

    def copy_last(self, to: Path) -> None:
        """Gives another result the files of `last/`, one by one.

        A delta goes first and comes last: at no moment does it lie beside a generator that it does not belong to.
        """
        for old in to.rglob(DELTA):
            old.unlink()
        for source in sorted(self.last.rglob("*"), key=lambda path: path.name == DELTA):
            if source.is_dir():
                continue
            copied = to / source.relative_to(self.last)
            copied.parent.mkdir(exist_ok=True)
            with atomic_path(copied) as temporary:
                shutil.copyfile(source, temporary)
        for old in to.rglob("*"):
            if old.is_file() and not (self.last / old.relative_to(to)).exists():
                old.unlink()


def _read_snapshot(path: Path, parts: Iterable[str]) -> dict:
    """ValueError and others: the file is not what `save_snapshot` wrote."""
    read(path)  # which refuses what would take torch.load for ever, and what is compressed
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} is not what was written")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    if missing := [part for part in parts if part not in state]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if state.get("step", int(path.stem)) != int(path.stem):
        raise ValueError(f"it is of step {state['step']}, and has another name")
    return state


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
