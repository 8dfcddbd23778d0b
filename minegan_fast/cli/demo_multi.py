"""Several GANs mined together, on what the package ships: three that know three digits each, and targets that mix a
digit of the second one with a digit of the third. Their shares p must follow the target's."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import data
from ..files.atomic import atomic_path
from ..training import transfer
from ..training.images import save_folder
from ..training.plots import labelled_rows
from ..training.run import TransferResult
from ..training.sources import choose_device

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of fours; the rest is sevens
NEAR, SHOWN = 0.08, 20
STEPS = 100
SETTINGS: dict[str, Any] = {
    "mining_steps": STEPS, "finetune_steps": 0, "snapshot_every": STEPS, "batch": 32, "log_every": 1,
    "metrics": ("kid",), "features": "critic", "eval_samples": 200, "critic": data.CRITIC,
}  # fmt: skip
SELECTORS: dict[str, dict[str, Any]] = {
    "mixture": {"loss": "mmd", "loss_features": "digits", "view_augment": ""},
    "winner": {"loss": "nonsaturating"},
}


def run_multi_demo(out: Path, seed: int, device: str | None, console: Console) -> dict:
    """Runs the demo in the folder `out`, or goes on with the one there, and prints its table.

    Returns what demo.json holds.
    """
    started = time.monotonic()
    console.print(f"100 fours and sevens for GANs of 0-2, 3-5 and 6-8; everything goes to {out}", highlight=False)
    rows, pictures = [], []
    for share in SHARES:
        name = f"fours-{100 * share:.0f}"
        for kind, split in (("target", "target"), ("held-out", "validation")):
            save_folder(out / name / kind, data.fours_and_sevens(share, split))
        for selector, settings in SELECTORS.items():
            folder = out / name / selector
            result = transfer(
                [*data.SOURCES.values()], out / name / "target", folder, held_out=str(out / name / "held-out"),
                seed=seed, device=device, resume=folder.exists(), **SETTINGS, **settings,
            )  # fmt: skip
            rows.append({"fours": share, "selector": selector} | measured(result, share))
            if selector == "mixture":
                images = result.mined.sample(SHOWN, torch.Generator().manual_seed(seed))
                pictures.append((f"{100 * share:.0f} % fours", images))

    report = {
        "seed": seed, "rows": rows, "minutes": round((time.monotonic() - started) / 60, 1),
        "device": str(choose_device(device)), "torch": torch.__version__,
    }  # fmt: skip
    with atomic_path(out / "demo.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    labelled_rows(out / "demo.png", pictures, SHOWN)
    console.print(_table(report))
    console.print(f"picture: {out / 'demo.png'}   numbers: {out / 'demo.json'}", highlight=False)
    return report


def measured(result: TransferResult, share: float) -> dict:
    """p of the three sources at the last step, the largest error of a share, and from which step on it is
    small."""
    names = [path.stem for path in data.SOURCES.values()]
    p = [[row[f"p_{name}"] for name in names] for row in result.history if f"p_{names[0]}" in row]
    truth = torch.tensor([0.0, share, 1 - share])
    errors = (torch.tensor(p) - truth).abs().amax(1)
    return {"p": [round(x, 4) for x in p[-1]], "error": round(float(errors[-1]), 4), "steps": _settled(errors)}


def _settled(errors: Tensor) -> int | None:
    """The step from which on no error [steps] exceeds NEAR; None where the last one does."""
    far = (errors > NEAR).nonzero().flatten()
    last = int(far[-1]) if len(far) else -1
    return None if last == len(errors) - 1 else last + 2


def _table(report: dict) -> Table:
    table = Table(
        title=f"shares after {STEPS} steps of mining ({report['minutes']} minutes)",
        caption=f"settled: the step from which on no share is off by more than {NEAR}. The mixture solves for the "
        "shares under the kernel loss; the winner's are how often the critic scores a source highest",
    )
    for name in ("fours", "shares by", "0-2", "3-5", "6-8", "settled"):
        table.add_column(name, justify="left" if name == "shares by" else "right")
    for row in report["rows"]:
        p = [f"{x:.0%}" for x in row["p"]]
        table.add_row(f"{row['fours']:.0%}", row["selector"], *p, "-" if row["steps"] is None else str(row["steps"]))
    return table
