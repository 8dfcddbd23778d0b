"""The main job on what the package ships: a GAN of the digits 0 to 8 learns to draw nines from a hundred of them."""

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import data, metrics
from ..files.atomic import atomic_path
from ..finetune import Selection
from ..mining import Mined, Miner
from ..models import load_generator
from ..training import transfer
from ..training.evaluation import MEASURES, Features, generate, measure
from ..training.folder import RunFolder
from ..training.generators import as_generator
from ..training.images import load_images, save_folder, to_float
from ..training.plots import labelled_rows
from ..training.results import open_result
from ..training.sources import choose_device

SAMPLES, RESAMPLES, SHOWN = 1000, 100, 12
# The loss is the kernel distance of the critic's features; the metrics are judged by the classifier of digits instead.
SETTINGS = {
    "mining_steps": 200, "finetune_steps": 800, "loss": "mmd", "loss_features": "critic",
    "view_augment": "", "snapshot_every": 100, "eval_samples": 500, "features": "digits",
}  # fmt: skip


def run_demo(out: Path, controls: bool, seed: int, device: str | None, console: Console) -> dict:
    """Runs the demo in the folder `out`, or goes on with the one there, and prints its table.

    Returns what demo.json holds.
    """
    started = time.monotonic()
    save_folder(out / "validation", data.nines("validation"))
    common = {
        **SETTINGS, "source": data.GENERATOR, "critic": data.CRITIC, "images": data.TARGET, "seed": seed,
        "held_out": str(out / "validation"), "device": device,
    }  # fmt: skip

    def run(folder: Path, **settings):
        transfer(**common, **settings, out=folder, resume=folder.exists())

    console.print(f"100 nines for a GAN of the digits 0 to 8; everything goes to {out}", highlight=False)
    run(out / "dense")
    if controls:
        console.print("for comparison: the neurons that matter, then as many random ones of every layer")
        run(out / "sparse", method="minegan++")
        run(out / "random", method="shuffled")

    judge = Judge(device)
    source = as_generator(load_generator(data.GENERATOR))
    samplers = {
        "source": Mined(source, Miner(source.latent_dim)).to(choose_device(device)).eval(),
        "mined": open_result(out / "dense", "mined", device),
        "mined + dense": open_result(out / "dense", "best", device),
    }
    for name in ("sparse", "random") if controls else ():
        samplers[f"mined + {name}"] = open_result(out / name, "best", device)
    images, rows = {}, {}
    for name, sampler in samplers.items():
        console.print(f"measuring {SAMPLES} images: {name}", highlight=False)
        images[name] = generate(sampler, SAMPLES, seed)
        rows[name] = judge(images[name])
    rows["other real nines"] = judge(data.nines("floor"))

    report = {
        "seed": seed,
        "generated": SAMPLES,
        "real": len(judge.real),
        "trained_parameters": round(trained_parameters(out / "sparse"), 4) if controls else 1.0,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "device": str(choose_device(device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    with atomic_path(out / "demo.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    best = images["mined + dense"][:SHOWN]
    pictures = [(name, fake[:SHOWN]) for name, fake in images.items()]
    pictures += [("nearest target", judge.nearest(best)), ("real", data.nines("test")[:SHOWN])]
    labelled_rows(out / "demo.png", pictures, SHOWN)
    console.print(_table(report))
    console.print(f"picture: {out / 'demo.png'}   numbers: {out / 'demo.json'}", highlight=False)
    return report


def trained_parameters(run: Path) -> float:
    """The fraction of the generator's parameters that a run's selection trains."""
    selection = Selection.load(RunFolder(run).selection)
    trained = sum(len(rows) * selection.sizes[layer][1] for layer, rows in selection.rows.items())
    return trained / sum(neurons * each for neurons, each in selection.sizes.values())


class Judge:
    """Measures images against the held-out nines, on the features of the embedded classifier."""

    def __init__(self, device: str | None):
        target = load_images(data.TARGET, 32, 1).images
        self.classifier = data.classifier().to(choose_device(device))
        self.features = Features(self.classifier, "digits")
        self.real, self.target, self.target_images = self.features(data.nines("test")), self.features(target), target

    def __call__(self, images: Tensor) -> dict[str, float | list[float]]:
        features = self.features(images)
        values = measure(features, self.real, MEASURES)
        low, high = metrics.bootstrap(metrics.kmmd, features, self.real, samples=RESAMPLES)
        return {
            **{name: round(value, 5) for name, value in values.items()},
            "kmmd_95%": [round(low, 5), round(high, 5)],
            "nines": round(self._nines(images), 3),
            "nearest": round(float(metrics.nearest(features, self.target)[0].median()), 3),
        }

    @torch.no_grad()
    def _nines(self, images: Tensor) -> float:
        pixels = images if images.is_floating_point() else to_float(images)
        logits = self.classifier.logits(pixels.to(next(self.classifier.parameters()).device))
        return float((logits.argmax(1) == 9).float().mean())

    def nearest(self, images: Tensor) -> Tensor:
        """For each image the target image with the nearest features."""
        return self.target_images[metrics.nearest(self.features(images), self.target)[1].cpu()]


def _table(report: dict) -> Table:
    table = Table(
        title=f"{report['generated']} generated against {report['real']} held-out nines ({report['minutes']} minutes)",
        caption="diversity: mean distance between two samples, in that of real nines; nearest: median distance to the "
        "closest of the 100 training images; KMMD with its 95 % bootstrap interval",
    )
    for name in ("", "FID", "KID", "KMMD", "MV", "diversity", "nearest", "nines"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in report["rows"].items():
        low, high = row["kmmd_95%"]
        table.add_row(
            name, f"{row['fid']:.2f}", f"{row['kid']:.3f}", f"{row['kmmd']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['mv']:.3f}", f"{row['diversity']:.2f}", f"{row['nearest']:.2f}", f"{row['nines']:.0%}",
        )  # fmt: skip
    return table
