"""Runs one cell of bench/quality.py, and measures what it makes at every snapshot."""

import contextlib
import hashlib
import json
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import quality_networks as networks
import quality_plan as planned
import torch
from quality_measure import found_class, measure
from quality_pictures import write_strip
from quality_plan import Cell
from quality_settings import Places, Setting, Target, digits, hidden_label, source, target
from safetensors.torch import load_file, save_file
from torch import Tensor

import minegan_fast as mf
from minegan_fast.files.atomic import atomic_path
from minegan_fast.training import TrainingDiverged

SHOWN = 12
JUDGED = ("fid", "kid", "kmmd", "mv", "diversity")  # what a run says of its training images; here others count


def finished(cell: Cell, places: Places) -> Path:
    return places.cache / "cells" / f"{cell.name}.json"


def picture(cell: Cell, places: Places) -> Path:
    return finished(cell, places).with_suffix(".png")


def prepare(cells: list[Cell], places: Places) -> None:
    """What several cells share is computed before any of them starts; a package or folder that is missing says so."""
    (places.cache / "cells").mkdir(parents=True, exist_ok=True)
    families = {cell.family for cell in cells}
    for setting in {planned.setting_of(cell) for cell in cells}:
        if setting.family == "digits":
            networks.digit_judge(places.judge(setting), *digits(places.mnist), setting.negatives)
    for family in families:
        networks.loss_features(family), source(family)
    for cell in {(c.setting, c.seed): c for c in cells}.values():
        held_out(cell, places)


def held_out(cell: Cell, places: Places, judge=None) -> tuple[Target, Tensor, Tensor]:
    """The cell's images, and the judge's features [N, D] of those to validate with and of those that judge; kept."""
    setting = planned.setting_of(cell)
    images = target(setting, cell.count, cell.seed, places)
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in (images.validation, images.test)))
    path = places.cache / "held_out" / f"{judge_name(setting, places)}-{digest.hexdigest()[:16]}.safetensors"
    if not path.exists():
        judge = judge or judging(cell.family, places.judge(setting))
        path.parent.mkdir(parents=True, exist_ok=True)
        features = {name: judge(getattr(images, name)) for name in ("validation", "test")}
        with atomic_path(path) as temporary:
            save_file(features, temporary)
    kept = load_file(path)
    return images, kept["validation"], kept["test"]


def judge_name(setting: Setting, places: Places) -> str:
    return places.judge(setting).stem if setting.family == "digits" else "efficientnet_lite2"


@cache
def judging(family: str, path: Path) -> networks.Recorder:
    return networks.judge(family, path)


def run_cell(cell: Cell, places: Places, rates: dict[str, float], **overrides) -> Path:
    """Runs `cell` and writes its file, which exists only when it has come to its end. overrides: of settings."""
    judge = judging(cell.family, places.judge(planned.setting_of(cell)))
    images, validation, test = held_out(cell, places, judge)
    judge.seen.clear()
    settings = planned.settings(cell, rates) | overrides
    started, wall = time.process_time(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        materials = {"images": images.train, "out": Path(folder) / "run", "features": judge}
        if (features := planned.loss_features(cell)) is not None:
            materials["loss_features"] = features
        result, diverged = None, None
        try:
            result = mf.transfer(
                source(cell.family), **materials, **settings, held_out=0.0, metrics=(), keep=1, grid=SHOWN,
                eval_samples=planned.SAMPLES[cell.family], progress=False, report=False, device="cpu",
            )  # fmt: skip
        except TrainingDiverged as error:
            diverged = str(error).partition(";")[0]
        history = [json.loads(line) for line in (Path(folder) / "run" / "history.jsonl").read_text().splitlines()]
    curve = measured(judge.seen, history, planned.SAMPLES[cell.family], validation, test)
    record = {
        "cell": asdict(cell), **conditions(cell, places, rates),
        "curve": curve, "diverged": diverged, "seconds": round(time.process_time() - started, 1),
        "wall": round(time.monotonic() - wall, 1), "torch": torch.__version__,
    }  # fmt: skip
    label = hidden_label(planned.setting_of(cell), cell.seed)
    if label is not None and result is not None and result.mined.class_miner is not None:
        record["class"] = found_class(result.mined, label)
    if result is not None:
        write_strip(picture(cell, places), result.sample(SHOWN))
    with atomic_path(finished(cell, places)) as temporary:
        temporary.write_text(json.dumps(rounded(record)) + "\n")
    return finished(cell, places)


def measured(seen: list[Tensor], history: list[dict], samples: int, validation: Tensor, test: Tensor) -> list[dict]:
    """A row for every snapshot: its step and stage, `measure`, and whatever numbers the run itself noted at that step.

    seen: what the judge said of the training images and then of the generated ones of every snapshot, in this order.
    """
    snapshots = [row for row in history if "kid" in row]
    train, fakes = seen[0], seen[1:]
    if len(fakes) != len(snapshots) or any(len(fake) != samples for fake in fakes):
        raise RuntimeError(
            f"the judge saw sets of {[len(fake) for fake in fakes]} images, not {len(snapshots)} of {samples}"
        )
    curve = []
    for snapshot, fake in zip(snapshots, fakes, strict=True):
        noted = {}
        for row in history:
            if row["step"] == snapshot["step"]:
                noted |= {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in (*JUDGED, "step")}
        row = {"step": snapshot["step"], "stage": snapshot["stage"], **measure(fake, train, validation, test)}
        curve.append(row | {"noted": noted})
    return curve


def rounded(value, digits: int = 4):
    """Floats of any nesting to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, (list, tuple)) else value


def conditions(cell: Cell, places: Places, rates: dict[str, float]) -> dict:
    """Under which a cell's numbers hold, as its file keeps them: a file under others is not this cell's."""
    settings = planned.settings(cell, rates).items()
    return {
        "settings": {name: value.name if isinstance(value, Path) else value for name, value in settings},
        "judge": judge_name(planned.setting_of(cell), places),
        "samples": planned.SAMPLES[cell.family],
    }


def load_cells(
    cells: list[Cell], places: Places, rates: dict[str, float], committed: dict[str, dict] | None = None
) -> dict[Cell, dict]:
    """Of those that are finished under these conditions, what their files hold; or, where the cache has none, what the
    results that are committed (by name) hold: a long run may be spread over machines and days."""
    found = {}
    for cell in cells:
        record = (committed or {}).get(cell.name, {})
        with contextlib.suppress(FileNotFoundError):
            record = json.loads(finished(cell, places).read_text())
        if record and conditions(cell, places, rates).items() <= record.items():
            found[cell] = record
    return found
