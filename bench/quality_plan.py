"""What bench/quality.py runs: its cells, and the settings of `mf.transfer` that each of them is."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import quality_networks as networks
from quality_settings import SEEDS, SETTINGS, TUNING, Setting

from minegan_fast import data

RATES = Path(__file__).parent / "results" / "quality-rates.json"
MINERS = ("mined", "minegan", "minegan++", "random")
METHODS = ("scratch", "transfergan", *MINERS)
ADVERSARIAL_ONLY = ("freezed",)
FURTHER = ("scale_shift", "ewc", "freeze_top")
LOSSES = {"kernel": "mmd", "adversarial": "nonsaturating"}
DENSITIES = (0.02, 0.05, 0.1, 0.3, 0.6)
CRITERIA = ("fisher", "movement", "agreement", "contrast", "magnitude")
SCOPES = ("global", "normalised", "layer")
LR_GRID = (5e-4, 1e-3, 2e-3, 4e-3)
LONGER, EVERY_COUNT, STEPS = 4, 100, 240  # an adversarial run only with so many images; steps of both stages
SNAPSHOTS, SAMPLES = 4, 300  # besides the source's; images that are judged at each

# Seconds of one core for a cell, measured; a plan's first estimate, before cells have been timed.
SECONDS = {"faces": {"kernel": 60, "adversarial": 80}, "digits": {"kernel": 45, "adversarial": 60},
           "eyes": {"kernel": 80, "adversarial": 100}}  # fmt: skip

# What suits a family whatever the method.
FAMILIES = {
    "faces": {"batch": 32},
    "digits": {"batch": 32, "r1_gamma": 0.3, "path_length_weight": 0.0, "augment": "translation", "flips": False},
    "eyes": {"batch": 16},
}


@dataclass(frozen=True)
class Cell:
    """One run. variant: "" or "name=value", a setting of `mf.transfer` that differs (of steps: how many times)."""

    setting: str
    count: int
    loss: str
    method: str
    seed: int
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(
            [self.setting, str(self.count), self.loss, self.method, *filter(None, [self.variant]), str(self.seed)]
        )

    @property
    def family(self) -> str:
        return setting_of(self).family

    @property
    def steps(self) -> int:
        return STEPS * (LONGER if self.variant.startswith("steps=") else 1)

    @property
    def seconds(self) -> float:
        return SECONDS[self.family][self.loss] * self.steps / STEPS


def setting_of(cell: Cell) -> Setting:
    return SETTINGS.get(cell.setting) or next(s for s in TUNING.values() if s.name == cell.setting)


def plan() -> list[Cell]:
    """All cells, those first that the others are compared with."""
    cells = []
    for seed in range(SEEDS):
        for setting in SETTINGS.values():
            further = FURTHER if setting.every_method else ()
            for count in sorted(setting.counts, reverse=True):
                cells += [Cell(setting.name, count, "kernel", m, seed) for m in (*METHODS, *further)]
                if count >= EVERY_COUNT:
                    methods = (*METHODS, *ADVERSARIAL_ONLY, *further)
                    cells += [Cell(setting.name, count, "adversarial", m, seed) for m in methods]
    for seed in range(SEEDS):
        for setting in (s for s in SETTINGS.values() if s.every_method):
            cell = Cell(setting.name, EVERY_COUNT, "kernel", "minegan++", seed)
            cells += [replace(cell, variant=f"criterion={name}") for name in CRITERIA]
            cells += [replace(cell, variant=f"scope={name}") for name in SCOPES]
            for name in ("minegan++", "random"):
                cells += [replace(cell, method=name, variant=f"density={density}") for density in DENSITIES]
        for name in ("transfergan", "minegan", "minegan++"):
            cells.append(Cell("avataaars", 30, "kernel", name, seed, f"steps={LONGER}x"))
    return cells


def quick(setting: str) -> list[Cell]:
    """Four methods, one setting, one seed."""
    return [Cell(setting, 100, "kernel", m, 0) for m in ("transfergan", "mined", "minegan", "minegan++")]


def tuning() -> list[Cell]:
    """Every learning rate of every method and family, on targets that are not reported."""
    cells = []
    for family, setting in TUNING.items():
        further = FURTHER if any(s.every_method and s.family == family for s in SETTINGS.values()) else ()
        for loss in LOSSES:
            methods = (*METHODS, *further, *(ADVERSARIAL_ONLY if loss == "adversarial" else ()))
            # the random neurons take the rate of the chosen ones, whose control they are
            methods = [m for m in methods if m != "random"]
            cells += [Cell(setting.name, 100, loss, m, 0, f"lr={lr}") for m in methods for lr in LR_GRID]
    return cells


def rates(path: Path = RATES) -> dict[str, float]:
    """The learning rate of "family loss method"; nothing before any has been tuned."""
    return json.loads(path.read_text()) if path.exists() else {}


def rate(cell: Cell, known: dict[str, float]) -> float | None:
    """None leaves it to the recipe."""
    method = "minegan++" if cell.method == "random" else cell.method
    return known.get(f"{cell.family} {cell.loss} {method}")


def settings(cell: Cell, known: dict[str, float]) -> dict:
    """The settings of `mf.transfer`, but for networks, images and folder. All methods take as many steps; those with a
    miner use the first quarter of them for it alone."""
    steps = cell.steps
    mining = {"mined": steps}.get(cell.method, steps // 4 if cell.method in MINERS else 0)
    chosen = {
        **FAMILIES[cell.family], "method": cell.method, "loss": LOSSES[cell.loss], "seed": cell.seed,
        "mining_steps": mining, "finetune_steps": steps - mining, "snapshot_every": steps // SNAPSHOTS,
    }  # fmt: skip
    if (lr := rate(cell, known)) is not None:
        chosen["lr"] = lr
    name, _, value = cell.variant.partition("=")
    if name and name != "steps":
        chosen[name] = float(value) if re.fullmatch(r"[\d.e-]+", value) else value
    if cell.loss == "adversarial":
        chosen |= {"critic": data.CRITIC if setting_of(cell).critic else None, "critic_warmup": None}
        if cell.family != "digits":
            chosen["critic"] = "features"
        chosen["critic_warmup"] = 0 if setting_of(cell).critic else steps // 8
    return chosen


def loss_features(cell: Cell):
    """Of an adversarial run whose critic has heads on features these are the features."""
    return networks.loss_features(cell.family) if cell.loss == "kernel" or cell.family != "digits" else None


def described(cell: Cell) -> dict:
    return asdict(cell)
