"""From the files of finished cells to what is committed: bench/results/quality.json, its rates, and its pictures."""

import json
from pathlib import Path

import machine
import quality_plan as planned
import torch
from PIL import Image
from quality_cells import picture
from quality_pictures import read_strip, small
from quality_plan import Cell
from quality_settings import SETTINGS, Places, target

from minegan_fast.files.atomic import atomic_path
from minegan_fast.training.plots import labelled_rows

RESULTS = Path("bench") / "results" / "quality.json"
TUNING = Path("bench") / "results" / "quality-tuning.json"
PICTURES = Path("docs") / "images"
COUNT, SEED, COLUMNS, COLOURS = 100, 0, 10, 64  # of a picture: small ones, in few colours, stay small files
ADVERSARIAL_SHOWN = ("transfergan", "minegan++")


def merge(found: dict[Cell, dict], places: Places, root: Path) -> None:
    """Writes the cells, one a line, and a picture of each setting of which there are cells to show."""
    facts = {
        "processor": machine.device_name("cpu"), "torch": torch.__version__, "commit": machine.commit(),
        "rates": planned.rates(root / planned.RATES),
    }  # fmt: skip
    _write(root / RESULTS, facts, found)
    for name in SETTINGS:
        rows = [cell for cell in planned.plan() if picture_of(cell, name) and picture(cell, places).exists()]
        if rows:
            draw(root / PICTURES / f"quality-{name}.png", rows, places)


def _write(path: Path, facts: dict, found: dict[Cell, dict]) -> None:
    """The cells, one a line."""
    lines = [json.dumps(found[cell]) for cell in sorted(found, key=lambda cell: cell.name)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(f'{{"facts": {json.dumps(facts)},\n"cells": [\n' + ",\n".join(lines) + "\n]}\n")


def committed(root: Path) -> dict[str, dict]:
    """The records of bench/results/quality.json by the names of their cells."""
    path = root / RESULTS
    records = json.loads(path.read_text())["cells"] if path.exists() else []
    return {Cell(**record["cell"]).name: record for record in records}


def merge_rates(found: dict[Cell, dict], root: Path) -> None:
    """Of each method, loss and family the learning rate whose last snapshot has the lowest held-out KID; and the cells
    that say so."""
    best: dict[str, tuple[float, float]] = {}
    for cell, record in found.items():
        key = f"{cell.family} {cell.loss} {cell.method}"
        kid = float("inf") if record["diverged"] else record["curve"][-1]["kid"]
        best[key] = min(best.get(key, (float("inf"), 0.0)), (kid, float(cell.variant.removeprefix("lr="))))
    path = root / planned.RATES
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({key: lr for key, (_, lr) in sorted(best.items())}, indent=2) + "\n")
    _write(root / TUNING, {"commit": machine.commit()}, found)


def picture_of(cell: Cell, setting: str) -> bool:
    same = (cell.setting, cell.count, cell.seed, cell.variant) == (setting, COUNT, SEED, "")
    return same and (cell.loss == "kernel" or cell.method in ADVERSARIAL_SHOWN)


def draw(path: Path, cells: list[Cell], places: Places) -> None:
    """Real images, and below them what each cell makes."""
    real = target(planned.setting_of(cells[0]), COUNT, SEED, places).test
    rows = [("real", small(real[:COLUMNS]))]
    rows += [(f"{cell.method}, {cell.loss}", small(read_strip(picture(cell, places)))[:COLUMNS]) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_rows(path, rows, COLUMNS)
    few = Image.open(path).quantize(COLOURS, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        few.save(temporary, optimize=True)
