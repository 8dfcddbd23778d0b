"""A run's result as a folder that can be shared: a delta or a network, its miner, a picture and a card."""

import filecmp
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from ..files import hub
from ..files.atomic import atomic_path
from ..finetune import fingerprint
from ..finetune.delta import DELTA, base_of
from ..mining import MultiGenerator
from ..mining.checkpoint import MINER
from ..models import load_generator
from .card import PICTURE, UNKNOWN, Base, Facts, card, text
from .config import PATHS, TransferConfig, load_config
from .evaluation import MEASURES
from .folder import RESULTS, RunFolder
from .generators import Generator, Several, as_generator
from .miners import branches
from .moved import located
from .names import short_names
from .result_files import SHARES, read_shares
from .results import evaluate_result, open_result
from .run import ASTRAY, COLLAPSED
from .sources import listed, open_images

GENERATOR = "generator.safetensors"
OURS = (DELTA, GENERATOR, MINER)
# What an earlier push may have left in the repository; fnmatch, whose * takes slashes too.
STALE = [*OURS, *(f"*/{name}" for name in OURS), PICTURE, SHARES]
LOCAL = ("device", "keep", "log_every", "cuda_graphs")  # settings that say nothing of the result
SAMPLES = 500


def push_run(run: str | Path, repo: str, private: bool = False, message: str = "", **choices: Any) -> tuple[str, list]:
    """Shares a result on the Hugging Face Hub as the model `repo`, USER/NAME: (its address, what a user should know).

    private: make a new repository private; without it the Hub's default holds. message: of the commit.
    choices: of `pack`. Nothing is asked: the token is that of `hf auth login` or HF_TOKEN.

    Raises: as `pack` and `hub.publish`.
    """
    hub.logged_in()  # before the work
    with tempfile.TemporaryDirectory() as folder:
        notes = pack(run, repo, folder, **choices)
        return hub.publish(Path(folder), repo, private, message or "A result of minegan_fast", STALE), notes


def pack(
    run: str | Path,
    repo: str,
    out: str | Path,
    which: str = "best",
    whole: bool = False,
    licence: str = UNKNOWN,
    base: str = "",
    images: str | Path | None = None,
    samples: int = SAMPLES,
    device: str | None = None,
    seed: int = 0,
) -> list[str]:
    """Writes what `push_run` shares to the folder `out`, which is made, or is empty: what a user should know of it.

    It gets the delta (or with `whole` the adapted network in its place), the miner, the grid of samples that the run
    drew, and the card, README.md. Of several sources each has a folder of its own, and there is `shares.json`. No path
    of this machine is in any of them, but the names of the files and folders that the settings name are.

    repo: under which name the card loads it. which: "best", "last" or "mined". licence: an identifier that the Hub
        knows, as "mit". base: where the source is to be had; a USER/NAME on the Hub is linked.
    images: real images to measure against; None takes those that the run held out, or trained on, where they are still
        there. samples: how many images are generated for that; 0 takes the numbers of the run, without intervals.

    ValueError/FileNotFoundError: no such run or result, a folder with something in it, a name that cannot be one.
    """
    hub.check_repo(repo)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(f"licence must be an identifier as the Hub has them, like mit or cc-by-4.0, got {licence!r}")
    if which not in RESULTS:
        raise ValueError(f"which must be one of {', '.join(RESULTS)}, got {which!r}")
    folder, out = RunFolder(run), Path(out)
    result = getattr(folder, which)
    if not folder.config.is_file() or not any((result / name).is_file() for name in (MINER, SHARES)):
        raise FileNotFoundError(f"no {which} result of a run in {str(folder.path)!r}: give the folder transfer wrote")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} is not empty: name a folder of its own, since all that is in it is shared")
    settings = load_config(folder.config)
    facts = Facts(repo, "network" if whole else "delta", which, 0, _bases(folder, result, settings))
    if not whole and not any(result.rglob(DELTA)):
        facts.content = "miner"
    facts.licence, facts.origin, facts.settings = licence, base, _settings(settings)
    if (result / SHARES).is_file():
        facts.resize = read_shares(result / SHARES).resize
    facts.families = sorted({family for b in facts.bases if (family := _family(result / b.folder / GENERATOR))})
    row, grid = _snapshot(folder, which, settings)
    facts.step = row["step"]
    facts.warnings = _warnings(row)
    notes = _sizes(result, facts) + _measure(facts, folder, settings, row, images, samples, device, seed)
    facts.versions = _versions()

    out.mkdir(parents=True, exist_ok=True)
    names = [MINER, *([GENERATOR] if whole else [DELTA])]
    for one in facts.bases:
        (out / one.folder).mkdir(exist_ok=True)
        for name in names:
            if (result / one.folder / name).is_file():
                shutil.copyfile(result / one.folder / name, out / one.folder / name)
    if (result / SHARES).is_file():
        shutil.copyfile(result / SHARES, out / SHARES)
    facts.picture = grid.is_file()
    if facts.picture:
        shutil.copyfile(grid, out / PICTURE)
    with atomic_path(out / "README.md") as temporary:
        temporary.write_text(card(facts), encoding="utf-8")
    return notes + facts.warnings


def _bases(folder: RunFolder, result: Path, settings: dict) -> list[Base]:
    """The networks that the run began with, told by the deltas, and where there is none by what the run keeps."""
    sources = listed(settings["source"])
    shares = read_shares(result / SHARES) if (result / SHARES).is_file() else None
    names = shares.names if shares else [""]
    found = []
    for i, (name, source) in enumerate(zip(names, sources, strict=True)):
        one = Base(_last(source) if source else "", "a module", "", name)
        if (delta := result / name / DELTA).is_file():
            one.fingerprint, one.kind = base_of(delta)
        elif source:
            kept = folder.source / f"{name or short_names([source])[0]}.safetensors"
            if kept.is_file():
                network = load_generator(kept)
                one.fingerprint, one.kind = fingerprint(network), type(network).__name__
        if shares:
            one.share = float(shares.p[i]), None if shares.interval is None else shares.interval[i].tolist()
        found.append(one)
    return found


def _settings(settings: dict) -> dict[str, Any]:
    """As they are, but of paths the last part alone."""
    return {
        name: _last(value) if name in PATHS else value
        for name, value in settings.items()
        if value is not None and name not in LOCAL
    }


def _last(value: Any) -> Any:
    """Of a path here its last part, of a list those of all; another value, or a place on the Hub, as it is."""
    if isinstance(value, list):
        return [_last(one) for one in value]
    return value if hub.is_named(value) or not isinstance(value, str) else re.split(r"[/\\]", value)[-1]


def _family(path: Path) -> str:
    """ "stylegan2", ...; "" of a network that is not known here."""
    if not path.is_file():
        return ""
    with safe_open(path, "pt") as file:
        modules = (file.metadata() or {}).get("modules", "{}")
    return json.loads(modules).get("generator", {}).get("family", "")


def _snapshot(folder: RunFolder, which: str, settings: dict) -> tuple[dict, Path]:
    """(row of the history, grid of samples) of the snapshot that a result is of."""
    measured = [row for row in folder.read_history() if "kid" in row]
    if not measured:
        raise ValueError(f"the history of the run in {str(folder.path)!r} has no snapshot: it is not whole")
    row = measured[-1]
    if which == "mined":
        row = next((r for r in measured if r["step"] == settings["mining_steps"]), row)
    elif which == "best" and not _same(folder.best, folder.last):
        row = min(measured, key=lambda r: r["kid"])
    return row, folder.samples / f"{row['step']:06d}.png"


def _same(one: Path, other: Path) -> bool:
    files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    return all((other / f).is_file() and filecmp.cmp(one / f, other / f, shallow=False) for f in files)


def _sizes(result: Path, facts: Facts) -> list[str]:
    """Sets how much of the network a delta holds, and says so where it is as large as the network."""
    if facts.content != "delta":
        return []
    deltas = sum(_numbers(path, lambda name: not name.endswith(":rows")) for path in result.rglob(DELTA))
    whole = sum(_numbers(path, lambda name: True) for path in result.rglob(GENERATOR))
    facts.trained = min(1.0, deltas / max(whole, 1))
    if facts.trained < 0.9:
        return []
    return ["the delta is as large as the network, of which nearly all has trained: with --whole nobody needs the base"]


def _numbers(path: Path, counts) -> int:
    with safe_open(path, "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys() if counts(name)]  # noqa: SIM118
    return sum(int(torch.Size(size).numel()) for size in sizes)


def _warnings(row: dict) -> list[str]:
    found = []
    if row["step"] and row.get("diversity", 1) < COLLAPSED:
        found.append(f"The images are {row['diversity']:.0%} as diverse as the real ones: they collapse.")
    norm, dimensions = row.get("latent_norm", 1), row.get("latent_dimensions", 1)
    if abs(norm - 1) > ASTRAY or dimensions < COLLAPSED:
        found.append(
            f"The mined latents leave the prior: |z|²/d is {norm:.2f} (the prior's: 1), the effective dimension "
            f"{dimensions:.0%} of the prior's."
        )
    if "which trained it" in str(row.get("judge", "")):
        found.append("The network that judged the run trained it too, so its numbers flatter.")
    if row["step"] == 0:
        found.append("By images held out no snapshot was better than the source: these are the source's own images.")
    return found


def _measure(
    facts: Facts, folder: RunFolder, settings: dict, row: dict, images, samples: int, device, seed: int
) -> list[str]:
    """Sets the metrics: measured anew, with intervals, or where that cannot be, those of the run. What only the user
    should know, since it may name paths."""
    facts.metrics = {name: row[name] for name in MEASURES if name in row}
    facts.judged = f"Measured by the run, on {_plain(row.get('judge', 'its'))} features, without intervals."
    if samples == 0:
        return []
    try:
        real, whose = _real(folder, facts.which, settings, images)
        report = evaluate_result(folder.path, facts.which, device, None, None, real, samples, None, seed, True)
    except (ValueError, OSError) as error:
        if images is not None:
            raise
        return [f"the card has the run's own numbers, without intervals, which could not be measured again: {error}"]
    facts.metrics, facts.intervals = report["metrics"], report["intervals"]
    facts.warnings += report["notes"]
    facts.judged = (
        f"{report['generated']} generated images against {report['real']} real ones, {whose}, on "
        f"{_plain(report['features'])} features. Diversity is in that of the real images. The intervals are the "
        "jackknife's; FID has none, since it rises where images are few."
    )
    return []


def _real(folder: RunFolder, which: str, settings: dict, images):
    """(real images to measure against, whose they are). ValueError/OSError: they are not to be had."""
    if images is not None:
        return images, f"of the folder {_plain(Path(images).name)}"
    config = TransferConfig(**located(folder, settings))
    if config.images is None:
        raise ValueError("the run's images were an array, which its folder does not hold")
    sampler = open_result(folder.path, which, "cpu")
    generator = as_generator(branches(sampler)[0].generator)
    if isinstance(sampler, MultiGenerator):
        size = None if sampler.resize is None else sampler.resize[0]
        generator = cast(Generator, Several([b.generator for b in branches(sampler)], sampler.names, size))
    target, held_out = open_images(config.images, generator, config)
    if held_out is None:
        return target.images, "which it was trained on, so the numbers flatter"
    return held_out, "which were held out of the training"


def _plain(name: object) -> str:
    return text(_last(str(name)))


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"minegan_fast": __version__, "torch": torch.__version__}
