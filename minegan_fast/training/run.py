"""A run while it goes on: the loop, the snapshots, the search for the best."""

import errno
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..mining import Mined, Miner, MultiGenerator
from .estimate import DoesNotFit
from .evaluation import generate, measure
from .events import EventWriter
from .folder import RunFolder, read_generator
from .generators import networks, source_of
from .miners import Network, branches, latents_of, shares
from .moved import keep_source
from .notes import Notes, heard
from .plots import loss_curves, save_grid
from .prepared import Prepared
from .progress import Progress
from .randomness import derived_seed, keep_and_set_random_state, keep_random_state
from .reporting import conclude, spaced
from .result_files import read_result, write_result

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
VERSION = 3  # of the snapshots
PARTS = ("version", "step", "best", "images", "trainer")
_SAID = {"images": "training images", "source": "source networks", "held_out": "held-out images"}
COLLAPSED = 1 / 3  # of the real images' diversity
LATENTS = 1024  # how many mined latents are measured
ASTRAY = 0.1  # how far the mean of |z|²/d may be from 1
SHOWN = 4  # shares in the line of a step


class TrainingDiverged(RuntimeError):  # noqa: N818
    """A loss became NaN or infinite."""


@dataclass
class TransferResult:
    """What a run gives back.

    mined: generator and miners with the averaged weights of the best snapshot by held-out KID, or of the last snapshot
        where nothing is held out; of several sources a `MultiGenerator`.
    step: the step of that snapshot.
    history: the rows of history.jsonl.
    metrics: of that snapshot, on the features that `judge` names.
    folder: where all of it is.
    judge: the features' name, which says so where they trained the run too.
    """

    mined: Network = field(repr=False)
    step: int
    history: list[dict] = field(repr=False)
    metrics: dict[str, float]
    folder: Path
    judge: str = ""

    @property
    def generator(self) -> nn.Module:
        """Of one source. ValueError: there are several."""
        return self._only.generator

    @property
    def miner(self) -> Miner:
        """The miner of z or w; of a conditional source, `mined.class_miner` gives the class embeddings. ValueError:
        there are several sources."""
        return cast(Miner, self._only.miner)

    @property
    def _only(self) -> Mined:
        if isinstance(self.mined, MultiGenerator):
            raise ValueError(f"there are {len(self.mined)} sources: mined.branches has generator and miner of each")
        return self.mined

    @property
    def shares(self) -> dict[str, float]:
        """Of several sources the share of each in the images; empty of one."""
        names = self.mined.names if isinstance(self.mined, MultiGenerator) else []
        return dict(zip(names, shares(self.mined), strict=False))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n images [n, C, R, R] in [-1, 1] on the CPU; the same for the same seed."""
        return generate(self.mined, n, seed)


def execute(prepared: Prepared, out: Path, resume: bool, progress: bool) -> TransferResult:
    """Runs what is prepared, in the folder `out`; the caller's random state comes back afterwards."""
    folder, processes, config = RunFolder(out), prepared.processes, prepared.config
    with processes.together():
        folder.check(config, resume)
        prepared.estimate.check(config.batch)
    with ExitStack() as claim:  # the first process holds it
        processes.from_first(lambda: claim.enter_context(folder.claimed(config, resume)))
        with _explained(prepared, folder), keep_random_state(prepared.device):
            result = Run(prepared, folder, resume, progress).train()
            if config.report:
                processes.from_first(lambda: conclude(prepared, folder.path, result.step, result.mined))
            return result


@contextmanager
def _explained(prepared: Prepared, folder: RunFolder) -> Iterator[None]:
    """A full disk or too little memory ends the block with an error that names the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise RuntimeError(
            f"the disk is full or its quota is used up: cannot write below {str(folder.path)!r}; {folder.kept()}. "
            "Free some space and go on with --resume"
        ) from None
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        batch, processes = prepared.config.batch, prepared.processes
        smaller = min(batch // 2, prepared.estimate.largest_batch())
        smaller -= smaller % processes.size
        advice = f"batch {smaller} should fit" if smaller else "even batch 1 may not fit on this device"
        raise DoesNotFit(f"out of memory at batch {batch}: {advice}; {folder.kept()}") from None


class Run:
    """What is prepared while it trains: the loop, the snapshots, the search for the best."""

    def __init__(self, prepared: Prepared, folder: RunFolder, resume: bool, progress: bool):
        self.prepared, self.config, self.folder = prepared, prepared.config, folder
        self.processes = prepared.processes
        self.trainer = prepared.trainer()
        self.contents = prepared.contents()
        self.step, self.best_kid, self.best_step, self.waited = 0, float("inf"), 0, 0
        self.best_row: dict = {}
        self.history: list[dict] = []
        self.warned: set[str] = set()
        with self.processes.together(), heard() as warned:
            # The first process alone measures.
            self.real = prepared.features(prepared.reference) if self.processes.first else torch.empty(0)
            seen = spaced(prepared.target.images, self.config.eval_samples)
            told_apart = self.processes.first and prepared.held_out is not None
            self.seen = prepared.features(seen) if told_apart else None
            restored = folder.load_snapshot(PARTS) if resume else None
            if restored:
                self._restore(*restored)
            elif resume:
                folder.check_results()
        self.processes.check_equal(self.step, f"the processes see different snapshots in {str(folder.path)!r}")
        self.processes.from_first(lambda: folder.begin(self.config, self.history))
        self.resumed, self.asked_to_resume = bool(restored), resume
        self.notes = Notes(folder.log)
        self.processes.from_first(lambda: self._begin_notes([*prepared.warned, *warned]))
        keep = self.notes.message if self.processes.first else None
        shows = progress and self.processes.first
        self.progress = Progress(self.config.total_steps, enabled=shows, done=self.step, keep=keep)

    def _begin_notes(self, warned: list[str]) -> None:
        self.notes.begin(self.step, self.prepared, self.contents)
        for text in warned:
            self.notes.message(self.step, text)

    def train(self) -> TransferResult:
        """Both stages, or what is left of them."""
        config = self.config
        with ExitStack() as files:
            files.enter_context(self.progress)
            if self.processes.first:
                self.events = files.enter_context(EventWriter(self.folder.events, self.step))
                self.log = files.enter_context(open(self.folder.history, "a"))
            for note in self.prepared.notes:
                self.progress.log(note)
            if self.resumed:
                self.progress.log(f"resumed at step {self.step}")
            else:
                if self.asked_to_resume:
                    self.progress.log(f"nothing to resume in {str(self.folder.path)!r}: a new run begins")
                self.processes.from_first(lambda: keep_source(self.folder, self.prepared))
                self._snapshot()
            if self.step < config.mining_steps:
                self.progress.stage("mining", config.mining_steps, first=0)
                self._steps(config.mining_steps)
            if config.finetune_steps and self.trainer.finetuner is None:
                self._select()
            self.progress.stage("finetuning", config.finetune_steps, first=config.mining_steps)
            self._steps(config.total_steps)
            if self.trainer.finetuner:
                with self.processes.together():
                    self.trainer.finetuner.verify()
        return self._result()

    def _select(self) -> None:
        self.progress.log("scoring the neurons on the target")
        finetuner, selection = self.trainer.select()
        self.processes.from_first(lambda: selection.save(self.folder.selection))
        trained = sum(p.numel() for p in finetuner.parameters())
        total = sum(p.numel() for p in self.prepared.generator.parameters())
        self.progress.log(
            f"{selection.density:.1%} of the neurons are selected: {trained / total:.1%} of the parameters train"
        )
        if names := list(self.trainer.shares_of()):
            counts = [0] * len(names)
            for layer, rows in selection.rows.items():
                counts[source_of(layer)] += len(rows)
            own = ", ".join(f"{count} of {name}" for name, count in zip(names, counts, strict=True))
            self.progress.log(f"neurons that train: {own}")

    def _steps(self, until: int) -> None:
        config = self.config
        started = time.monotonic() - max((row.get("seconds", 0.0) for row in self.history), default=0.0)
        began = self.step
        while self.step < until and not self._exhausted():
            done = self.step - config.mining_steps
            if config.reselect_every and done > 0 and done % config.reselect_every == 0:
                self._select()
            values = self.trainer.step(self.step)
            if self.trainer.why_eager:
                self._warn("eager", f"no CUDA graphs from step {self.step} on: {self.trainer.why_eager}")
            self.step += 1
            self.progress.update(self.step, self._at_a_glance(values))
            logs, snapshots = self.step % config.log_every == 0, self.step % config.snapshot_every == 0
            if logs or snapshots or self.step == until:
                self._stop_if_diverged()
                seconds = {"seconds": round(time.monotonic() - started, 3)}
                self._record({name: value.item() for name, value in values.items()} | seconds)
            if snapshots or self.step == until:
                self._snapshot()
        if self.step > began and (p := self.trainer.shares_of()):
            self.progress.log(f"shares: {_percentages(p, self.trainer.interval())}")

    def _at_a_glance(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | str]:
        """The values of a step for a line: of the shares the largest."""
        shown: dict[str, Tensor | str] = {name: v for name, v in values.items() if not name.startswith("p_")}
        if p := self.trainer.shares_of():
            largest = sorted(p.items(), key=lambda item: -item[1])[:SHOWN]
            shown["p"] = _percentages(dict(largest)) + (", ..." if len(p) > SHOWN else "")
        return shown

    @property
    def stage(self) -> str:
        return "finetuning" if self.trainer.finetuner else "mining" if self.step else "source"

    def _exhausted(self) -> bool:
        return bool(self.config.patience) and self.waited >= self.config.patience and self.stage == self._last_stage()

    def _last_stage(self) -> str:
        return "finetuning" if self.config.finetune_steps else "mining"

    def _stop_if_diverged(self) -> None:
        if not self.trainer.finite:
            raise TrainingDiverged(
                f"a loss became NaN or infinite before step {self.step}; {self.folder.kept()}. "
                "Try a smaller lr, a larger r1_gamma, or precision fp32, in a new folder"
            )

    def _record(self, values: Mapping[str, float | str]) -> None:
        row = {"step": self.step, "stage": self.stage, **values}
        self.history.append(row)
        if self.processes.first:
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()
            curves = {k: v for k, v in values.items() if k != "seconds" and not isinstance(v, str)}
            self.events.scalars(self.step, curves)

    def _snapshot(self) -> None:
        self.best_kid, self.best_step, self.waited = self.processes.from_first(self._write_snapshot)

    def _write_snapshot(self) -> tuple[float, int, int]:
        """Measures, writes the results, and writes the snapshot last, so that a run that was killed in between repeats
        the steps since the last snapshot.

        Returns what decides how the run goes on: the best KID, its step, and the number of snapshots since.
        """
        config, folder, sampler = self.config, self.folder, self.trainer.result()
        fake = generate(sampler, config.eval_samples, config.seed)
        names = dict.fromkeys((*config.metrics, "kid", "diversity"))
        features = self.prepared.features(fake)
        values = measure(features, self.real, names)
        if self.seen is not None:
            values["kid_train"] = measure(features, self.seen, ("kid",))["kid"]
        values |= self._health(sampler, values["diversity"])
        self._record(values | {"judge": self.prepared.judge})
        self.progress.update(self.step, self._shown(values))

        grid = generate(sampler, config.grid, derived_seed(config.seed, "grid"))
        save_grid(folder.samples / f"{self.step:06d}.png", grid)
        self.events.grid(self.step, "samples", grid)
        loss_curves(folder.curves, self.history)

        interval = self.trainer.interval()
        write_result(folder.last, sampler, self.prepared.generator, self.trainer.finetuner, interval)
        if self.step == config.mining_steps:
            folder.copy_last(folder.mined)
        kid = values["kid"]
        self.waited = 0 if self.step == config.mining_steps else self.waited + 1
        if kid < self.best_kid or self.prepared.held_out is None:
            self.best_kid, self.best_step, self.waited = kid, self.step, 0
            self.best_row = self.history[-1]
            folder.copy_last(folder.best)
        os.fsync(self.log.fileno())  # of the rows that the snapshot stands on none may be lost
        folder.save_snapshot(self.step, self._state(), config.keep)
        return self.best_kid, self.best_step, self.waited

    def _health(self, sampler: Network, diversity: float) -> dict[str, float]:
        """How far the mined latents are from their prior. Logs what is out of bounds, the images' diversity too."""
        if diversity < COLLAPSED and self.step == 0:
            self.progress.log(f"the source's images are {diversity:.0%} as diverse as the real ones")
        elif diversity < COLLAPSED:
            self._warn(
                "collapse",
                f"step {self.step}: the images are {diversity:.0%} as diverse as the real ones: they collapse; a "
                "larger batch, fewer steps, a smaller lr or the loss mmd keep them apart",
            )
        whole: dict[str, float] = {}  # of several sources the means by their shares
        names = self.trainer.shares_of() or [""]
        for i, (name, share) in enumerate(zip(names, shares(sampler), strict=True)):
            if not share:
                continue
            values = self._latents(sampler, i, f"the mined latents{name and f' of {name}'}")
            for key, value in values.items():
                whole[key] = whole.get(key, 0.0) + share * value
        return whole

    def _latents(self, sampler: Network, i: int, what: str) -> dict[str, float]:
        """The statistics of the latents of one source; logs them where they are out of bounds."""
        branch = branches(sampler)[i]
        with keep_and_set_random_state(self.config.seed, "latents"):
            u = torch.randn(LATENTS, branch.input_dim).to(self.prepared.device)
        with torch.no_grad():
            found = branch.statistics(latents_of(sampler, i, u))
        prior = found.pop("dimension_prior")
        values = {f"latent_{name}": value for name, value in found.items()}
        values["latent_dimensions"] = values.pop("latent_dimension") / prior
        if abs(found["norm"] - 1) > ASTRAY or values["latent_dimensions"] < COLLAPSED:
            self._warn(
                what,
                f"step {self.step}: {what} leave the prior: |z|²/d is {found['norm']:.2f} (the prior's: 1), "
                f"the effective dimension {values['latent_dimensions']:.0%} of the prior's; images may be none that "
                "the source knows, or few of its kinds. Another prior (--prior), a larger prior_weight, a smaller "
                "miner_lr or fewer steps help",
            )
        return values

    def _warn(self, kind: str, message: str) -> None:
        """Logs one message of each kind; the history has the numbers of every snapshot."""
        if kind not in self.warned:
            self.warned.add(kind)
            self.progress.log(message)

    def _shown(self, values: dict[str, float]) -> dict[str, float]:
        """The numbers of a snapshot that the progress line shows; "*" marks those that the training network judged."""
        mark = "*" if self.prepared.judge != self.prepared.features.name else ""
        names = dict.fromkeys((*self.config.metrics, "kid", "diversity"))
        shown = {name + mark: values[name] for name in names if name in values}
        return shown | {"|z|²/d": values["latent_norm"]}

    def _state(self) -> dict:
        return {
            "version": VERSION,
            "step": self.step,
            "best": {"kid": self.best_kid, "step": self.best_step, "waited": self.waited, "row": self.best_row},
            "images": self.contents["images"],
            "contents": self.contents,
            "trainer": self.trainer.state_dict(),
        }

    def _restore(self, step: int, state: dict) -> None:
        if state["version"] != VERSION:
            raise ValueError(
                f"the run's snapshots are of version {state['version']}, this library goes on from {VERSION}: finish "
                "it with the library that began it, or start a new run"
            )
        contents = state.get("contents")
        for name, was in (contents if isinstance(contents, dict) else {"images": state["images"]}).items():
            if self.contents.get(name, was) != was:
                place = getattr(self.config, name)
                at = f" at {place!r}" if isinstance(place, str) else ""
                raise ValueError(
                    f"the run began with other {_SAID.get(name, name)} than what is now{at}: give what it began with "
                    "(it may lie anywhere), or start a new run in another folder"
                )
        self.step = step
        try:
            best = state["best"]
            self.best_kid, self.best_step, self.waited = best["kid"], best["step"], best["waited"]
            self.best_row = best.get("row", {})
            self.trainer.load_state_dict(state["trainer"])
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the snapshot of step {step} in {str(self.folder.snapshots)!r} does not fit this run "
                f"({type(error).__name__}: {' '.join(str(error).split())}): remove it to go on from the one before"
            ) from None
        self.history = self.folder.read_history(step)
        kept = {row["step"] for row in self.history if "kid" in row}
        if self.best_row and self.best_step not in kept:
            self.history = sorted([*self.history, self.best_row], key=lambda row: row["step"])

    def _result(self) -> TransferResult:
        self.history = self.processes.from_first(lambda: self.history)
        if self.best_step == 0 and self.processes.first:
            text = (
                "by held-out KID no snapshot was better than the source itself, so best/ holds it: train longer, hold "
                "more images out, or look at last/"
            )
            self.notes.message(self.step, text)
            warnings.warn(text, stacklevel=5)
        like = networks(self.prepared.generator)
        device, sleep = self.prepared.device, self.prepared.sleep
        mined = read_result(self.folder.best, lambda path, i: read_generator(path, like[i]), device, sleep)
        rows = [row for row in self.history if row["step"] == self.best_step and "kid" in row]
        metrics = {k: v for k, v in rows[-1].items() if k not in ("step", "stage", "judge")}
        return TransferResult(mined, self.best_step, self.history, metrics, self.folder.path, self.prepared.judge)


def _percentages(p: Mapping[str, float], interval: list[list[float]] | None = None) -> str:
    """ "faces 61 % (55 to 67), cats 39 % (33 to 45)"."""
    ends = [""] * len(p) if interval is None else [f" ({100 * low:.0f} to {100 * high:.0f})" for low, high in interval]
    return ", ".join(f"{name} {100 * share:.0f} %{end}" for (name, share), end in zip(p.items(), ends, strict=True))
