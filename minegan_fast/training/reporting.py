"""`report.html` of a run, from what its folder holds."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .. import metrics as m
from ..files.atomic import atomic_path
from ..finetune import Selection
from ..report import Facts, Neighbour, page, series_of
from .config import TransferConfig, load_config
from .evaluation import generate, intervals
from .folder import RunFolder
from .images import ImageSet, load_images, to_pil
from .moved import located
from .notes import Notes
from .plots import tiles
from .prepared import Prepared
from .result_files import SHARES, read_shares

LEVEL = 0.95
GENERATED, REAL = 128, 500  # images of the intervals: the jackknife measures as often as there are images
SHOWN = 16  # generated images whose neighbours are shown
MANY = 5000  # training images, of which fewer pixels are compared
PART = 64  # of them in floats at once


def write_report(run: str | Path, target: ImageSet | None = None) -> Path:
    """Writes `report.html` to a run's folder, anew where it is there, and returns its path.

    target: the training images; None reads them from where the run had them, if they are what they were.

    A panel whose files are damaged or not there says so. ValueError: no run there, none that has measured anything yet,
    or one whose settings are damaged.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ValueError(f"no run in {str(folder.path)!r}: give the folder that transfer wrote")
    text = page(gather(folder, target))
    with atomic_path(folder.report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder.report


def conclude(prepared: Prepared, run: Path, step: int, mined) -> None:
    """Adds the intervals of the best snapshot, whose sampler is `mined`, to the run's log, and writes its report. What
    goes wrong is a warning: the run is whole without it."""
    try:
        notes = Notes(RunFolder(run).log)
        notes.add(step, intervals=_intervals(prepared, mined, RunFolder(run).read_history(), step))
        write_report(run, prepared.target)
    except Exception as error:
        warnings.warn(
            f"the report could not be written ({type(error).__name__}: {error}); the run is whole, and minegan-fast "
            f"report {run} tries again",
            stacklevel=6,  # at who called transfer
        )


def gather(folder: RunFolder, target: ImageSet | None = None) -> Facts:
    """What a report shows of a run's folder. ValueError: nothing has been measured there yet."""
    settings = TransferConfig(**load_config(folder.config)).to_dict()
    history, notes = folder.read_history(), Notes(folder.log)
    kid = series_of(history).get("kid")
    if not kid:
        why = f"{folder.history.name} is damaged or not there" if folder.newest() else "wait for its first snapshot"
        raise ValueError(f"the run in {str(folder.path)!r} has measured nothing: {why}")
    began = [row for _, row in notes.read("began")]
    held_out = began[-1]["target"]["held_out"] if began else settings["held_out"]
    best = min(kid, key=lambda step: kid[step]) if held_out else max(kid)
    judge = str(next((row["judge"] for row in reversed(history) if "judge" in row), ""))
    facts = Facts(folder.path.resolve().name, history, _marks(settings, kid, best), best, judge)
    pictures = (path for path in folder.samples.glob("*.png") if path.stem.isdecimal())
    facts.grids = {int(path.stem): path for path in sorted(pictures, key=lambda path: int(path.stem))}
    _shares(folder, settings, facts)
    _selection(folder, facts)
    _intervals_of(facts, notes)
    facts.settings = {name: (value, value == default) for name, value, default in _settings(settings)}
    facts.messages = notes.read("message")
    for row in began:
        for name, value in row["versions"].items():
            if value not in (known := facts.versions.get(name, "")).split(", then "):
                facts.versions[name] = f"{known}, then {value}" if known else value
    if not began:
        said = f"{folder.log.name} is damaged" if folder.log.is_file() else "an older version began it"
        facts.missing["Versions"] = facts.missing["Messages"] = f"The run has no log: {said}."
    facts.missing.setdefault("Images", "The run has no sample grids, or none that can be opened.")
    try:
        target = target or _target(folder, settings, began)
        facts.neighbours = neighbours(facts.grids.get(best), settings["grid"], target)
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        facts.missing["Nearest training images"] = f"Not compared: {str(error).rstrip('.')}."
    return facts


def _marks(settings: dict, measured: Collection[int], best: int) -> dict[int, str]:
    last, mining = max(measured), settings["mining_steps"]
    named = {"source": 0, "mined": mining if mining else None, "finetuned": last, "best": best}
    if last <= mining:
        named["last"] = named.pop("finetuned")
    marks: dict[int, str] = {}
    for name, step in named.items():
        if step in measured:
            marks[step] = f"{marks[step]}, {name}" if step in marks else name
    return dict(sorted(marks.items()))


def _shares(folder: RunFolder, settings: dict, facts: Facts) -> None:
    if not isinstance(settings["source"], list):
        return
    try:
        found = read_shares(folder.best / SHARES)
    except (ValueError, OSError) as error:
        facts.missing["Sources"] = f"No shares: {error}."
        return
    intervals = [None] * len(found.names) if found.interval is None else found.interval.tolist()
    facts.sources = found.names
    facts.shares = dict(zip(found.names, zip(found.p.tolist(), intervals, strict=True), strict=True))


def _selection(folder: RunFolder, facts: Facts) -> None:
    if not folder.selection.is_file():
        facts.missing["Neurons"] = "No neurons were selected: stage 2 has not begun, or there is none."
        return
    try:
        facts.selection = Selection.load(folder.selection)
    except (ValueError, OSError) as error:
        facts.missing["Neurons"] = f"Not to be read: {error}."


def _intervals_of(facts: Facts, notes: Notes) -> None:
    found = [row for step, row in notes.read("intervals") if step == facts.best]
    if not found:
        facts.missing["Intervals"] = "Without intervals: the run computes them at its end."
        return
    facts.intervals = found[-1]["values"]
    facts.intervals_of = (
        f"In brackets {LEVEL:.0%} intervals of the best snapshot by the jackknife, over {found[-1]['generated']} "
        f"generated and {found[-1]['real']} real images. FID has none: it rises where images are few."
    )


def _settings(settings: dict) -> list[tuple[str, Any, Any]]:
    """(name, value, what it would be by itself): inputs, loss and method choose the defaults."""
    choosing = ("source", "images", "critic", "features", "loss_features", "loss", "method")
    own = TransferConfig(**{name: settings[name] for name in choosing if name in settings}).to_dict()
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731 - JSON has no tuples
    defaults = {name: None if name in choosing else plain(value) for name, value in own.items()}
    return [(name, plain(value), defaults.get(name)) for name, value in settings.items()]


@torch.no_grad()
def _intervals(prepared: Prepared, mined, history: list[dict], step: int) -> dict:
    config = prepared.config
    row = next(row for row in reversed(history) if row["step"] == step and "kid" in row)
    x = prepared.features(generate(mined, min(GENERATED, config.eval_samples), config.seed))
    y = prepared.features(spaced(prepared.reference, REAL))
    values = intervals(x, y, row, LEVEL)
    if "kid_train" in row:
        trained = prepared.features(spaced(prepared.target.images, REAL))
        found = intervals(x, trained, {"kid": row["kid_train"]}, LEVEL)
        values |= {"kid_train": found["kid"]} if found else {}
    return {"values": values, "generated": len(x), "real": len(y)}


def spaced(images: Tensor, count: int) -> Tensor:
    """At most `count` of them, evenly spaced."""
    return images[:: -(-len(images) // count)]


def _target(folder: RunFolder, settings: dict, began: list[dict]) -> ImageSet:
    """The training images, from the path that the run had them from. ValueError/OSError: they are not to be had."""
    if not began:
        raise ValueError("the run has no log that tells its training images")
    images = located(folder, settings)["images"]
    if images is None:
        raise ValueError("the training images were an array, which the folder does not hold")
    _, channels, resolution, _ = began[-1]["target"]["shape"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run has said it
        found = load_images(images, resolution, channels)
    held_out = settings["held_out"]
    parts = [found] if isinstance(held_out, str) else [found, found.split(held_out, settings["seed"])[0]]
    for part in parts:
        if part.fingerprint() == began[-1]["target"]["digest"]:
            return part
    raise ValueError(f"the images in {images!r} are not those that the run trained on")


def neighbours(grid: Path | None, count: int, target: ImageSet) -> list[Neighbour]:
    """For the first images of a sample grid the nearest training image, by pixels of at most 32x32.

    ValueError/OSError: no grid, or images that are neither grey nor in colours.
    """
    N, channels, resolution, _ = target.images.shape
    if grid is None:
        raise ValueError("the grid of the best snapshot is not there")
    if channels not in (1, 3):
        raise ValueError(f"the images have {channels} channels")
    with Image.open(grid) as picture:
        samples = [tile.convert("L" if channels == 1 else "RGB") for tile in tiles(picture, count, resolution)[:SHOWN]]
    side = min(resolution, 32 if N <= MANY else 8)

    def vectors(images: Tensor) -> Tensor:
        parts = images.split(PART)
        return (
            torch.cat([F.adaptive_avg_pool2d(p.float(), side).flatten(1).double() for p in parts])
            / side
            / channels**0.5
        )

    drawn = torch.stack([torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8) for s in samples])
    x = vectors(drawn.view(-1, resolution, resolution, channels).permute(0, 3, 1, 2))
    y = vectors(target.images.cpu())
    distance, index = m.nearest(x, y)
    among = torch.cdist(spaced(y, REAL), spaced(y, REAL)).fill_diagonal_(torch.inf).min(1).values.median()
    if among == 0:
        raise ValueError("the training images are mostly copies of each other")
    return [
        Neighbour(sample, to_pil(target.images[i]), target.names[i], float(d), float(d / among))
        for sample, d, i in zip(samples, distance, index.tolist(), strict=True)
    ]
