"""What bench/quality.py runs: its cells, and the settings of `mf.transfer` that each of them is."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import quality_networks as networks
from quality_settings import LARGEST, SEEDS, SETTINGS, TUNING, Setting

from minegan_fast import data

RATES = Path("bench") / "results" / "quality-rates.json"  # from the root
METHODS = ("scratch", "transfergan", "mined", "minegan", "minegan++", "random")
ADVERSARIAL_ONLY = ("freezed",)
ADVERSARIAL = (*METHODS, *ADVERSARIAL_ONLY)
FEW_ADVERSARIAL = ("transfergan", "minegan++", *ADVERSARIAL_ONLY)  # where not every method is run
NEW_CRITIC = ("transfergan", "mined", "minegan", "minegan++")  # beside a new critic, where no way gets far
FEW_METHODS = ("transfergan", "minegan", "minegan++", "random")  # of more images than anyone calls few
FURTHER = ("shuffled", "scale_shift", "ewc", "freeze_top")
MINERS = ("mined", "minegan", "minegan++", "random", "shuffled")
CONTROLS = ("random", "shuffled")  # of minegan++, whose learning rates they take
LOSSES = {"kernel": "mmd", "adversarial": "nonsaturating"}
DENSITIES = (0.02, 0.3)  # beside the default of 0.1, and all
# Ways to choose neurons, as settings of minegan++, and what each is to beat: random neurons, as many of every layer.
LAYER, SHUFFLED = ("random", "scope=layer"), "shuffled"
ATTEMPTS = {
    "Fisher information": ("", (SHUFFLED, "")),
    "Fisher information, in units of a layer's mean": ("scope=normalised", (SHUFFLED, "scope=normalised")),
    "Fisher information, within layers": ("criterion=fisher,scope=layer", LAYER),
    "movement, within layers": ("criterion=movement,scope=layer", LAYER),
    "agreement, within layers": ("criterion=agreement,scope=layer", LAYER),
    "contrast, within layers": ("criterion=contrast,scope=layer", LAYER),
    "Fisher information; gains and biases of all": ("affine=true", (SHUFFLED, "affine=true")),
    "Fisher information, selected four times": ("reselect_every=4x", (SHUFFLED, "reselect_every=4x")),
    "agreement, within layers, gains and biases, four times": (
        "affine=true,criterion=agreement,reselect_every=4x,scope=layer",
        ("random", "affine=true,reselect_every=4x,scope=layer"),
    ),
}
# Under the adversarial loss, where the critic is the source's own it may be sparse too.
ADVERSARIAL_ATTEMPTS = {
    "Fisher information": ("", (SHUFFLED, "")),
    "agreement, within layers": ("criterion=agreement,scope=layer", LAYER),
    "Fisher information, of generator and critic": ("train_critic=sparse", ("random", "train_critic=sparse")),
}
# By family: learning rates to choose from (far apart, since from 2e-3 to 8e-3 minegan++ on personas hardly changed; the
# equalised weights of StyleGAN2 take larger steps, as do gains and biases alone), steps of both stages in multiples of
# 4, images that are judged at each snapshot, and seconds that a cell takes of one core, for `--list`.
LR_GRID = {"faces": (2e-3, 8e-3), "digits": (4e-3, 1.6e-2), "eyes": (5e-4, 2e-3, 8e-3)}
LARGER_STEPS = {"scale_shift": 4}
STEPS = {"faces": 240, "digits": 400, "eyes": 48}
SAMPLES = {"faces": 256, "digits": 256, "eyes": 128}
SECONDS = {
    "faces": {"kernel": 80, "adversarial": 100}, "digits": {"kernel": 40, "adversarial": 80},
    "eyes": {"kernel": 60, "adversarial": 75},
}  # fmt: skip
SNAPSHOTS = 4  # besides the source's
LONGER = 3  # times the steps of other runs, to see them overfit
LONG = f"steps={LONGER}x"
# What suits a family whatever the method.
FAMILIES = {
    "faces": {"batch": 32, "precision": "bf16"},
    "digits": {
        "batch": 32,
        "r1_gamma": 0.3,
        "path_length_weight": 0.0,
        "augment": "translation",
        "view_augment": "",
    },
    "eyes": {"batch": 16},
}


@dataclass(frozen=True)
class Cell:
    """One run.

    variant: settings of `mf.transfer` that differ, as "name=value,name=value". An x at the end says how often: 3x as
        many steps, selected 4x.
    """

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
        """Of both stages."""
        return STEPS[self.family] * (LONGER if self.variant == LONG else 1)

    @property
    def seconds(self) -> float:
        return SECONDS[self.family][self.loss] * self.steps / STEPS[self.family]


def setting_of(cell: Cell) -> Setting:
    return SETTINGS.get(cell.setting) or next(s for s in TUNING.values() if s.name == cell.setting)


def plan() -> list[Cell]:
    """All cells, those first that the others are compared with."""
    cells = [cell for seed in range(SEEDS) for setting in SETTINGS.values() for cell in compared(setting, seed)]
    return cells + [cell for seed in range(SEEDS) for cell in varied(seed)]


def compared(setting: Setting, seed: int) -> list[Cell]:
    """Every method under the kernel loss; with enough images also under the adversarial one, where that makes sense."""
    cells = []
    further = FURTHER if setting.every_method else ()
    for count in sorted(setting.counts, reverse=True):
        methods = METHODS if count <= LARGEST else FEW_METHODS
        cells += [Cell(setting.name, count, "kernel", m, seed) for m in methods]
        if count == LARGEST:
            cells += [Cell(setting.name, count, "kernel", m, seed) for m in further]
            new = NEW_CRITIC if setting.every_method and not setting.critic else None
            methods = new or adversarial(setting, setting.every_method)
            cells += [Cell(setting.name, count, "adversarial", m, seed) for m in methods]
    return cells


def adversarial(setting: Setting, every_method: bool) -> list[str]:
    """FreezeD freezes what a critic has learned: there has to be one."""
    methods = (*ADVERSARIAL, *FURTHER) if every_method else FEW_ADVERSARIAL
    return [m for m in methods if setting.critic or m not in ADVERSARIAL_ONLY]


def varied(seed: int) -> list[Cell]:
    """Settings of `mf.transfer` that differ: which neurons, how many, how long."""
    cells = []
    for setting in (s for s in SETTINGS.values() if s.every_method):
        for loss in LOSSES if setting.critic else ("kernel",):
            for variant, control in attempts(loss, setting.critic):
                both = ("minegan++", variant), control
                cells += [Cell(setting.name, LARGEST, loss, method, seed, v) for method, v in both if v]
        cell = Cell(setting.name, LARGEST, "kernel", "minegan++", seed)
        for name in ("minegan++", "random"):
            cells += [replace(cell, method=name, variant=f"density={density}") for density in DENSITIES]
    cells += [Cell("avataaars", 30, "kernel", method, seed, LONG) for method in ("transfergan", "minegan", "minegan++")]
    return list(dict.fromkeys(cells))


def attempts(loss: str, critic: bool) -> list[tuple[str, tuple[str, str]]]:
    """(variant of minegan++, control)."""
    found = (ATTEMPTS if loss == "kernel" else ADVERSARIAL_ATTEMPTS).values()
    return [(variant, control) for variant, control in found if critic or "train_critic" not in variant]


def quick(setting: str) -> list[Cell]:
    """Four methods, one setting, one seed."""
    return [Cell(setting, 100, "kernel", m, 0) for m in ("transfergan", "mined", "minegan", "minegan++")]


def tuning() -> list[Cell]:
    """Every learning rate of every method and family, on targets that are not reported."""
    cells = []
    for family, setting in TUNING.items():
        every = any(s.every_method and s.family == family for s in SETTINGS.values())
        ways = [("kernel", m) for m in (*METHODS, *(FURTHER if every else ())) if m not in CONTROLS]
        ways += [("adversarial", m) for m in adversarial(setting, every) if m not in CONTROLS]
        for loss, method in ways:
            grid = [lr * LARGER_STEPS.get(method, 1) for lr in LR_GRID[family]]
            cells += [Cell(setting.name, LARGEST, loss, method, 0, f"lr={lr:g}") for lr in grid]
    return cells


def rates(path: Path) -> dict[str, float]:
    """The learning rate of "family loss method"; nothing before any has been tuned."""
    return json.loads(path.read_text()) if path.exists() else {}


def rate(cell: Cell, known: dict[str, float]) -> float | None:
    """None leaves it to the recipe."""
    method = "minegan++" if cell.method in CONTROLS else cell.method
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
    for name, value in (pair.split("=") for pair in cell.variant.split(",") if pair):
        if name == "reselect_every":
            chosen[name] = (steps - mining) // int(value.removesuffix("x"))
        elif name != "steps":
            chosen[name] = float(value) if re.fullmatch(r"[\d.e-]+", value) else {"true": True}.get(value, value)
    if cell.loss == "adversarial":
        own = setting_of(cell).critic
        chosen["critic"] = data.CRITIC if own else None if cell.family == "digits" else "features"
        chosen["critic_warmup"] = 0 if own else steps // 8
    return chosen


def loss_features(cell: Cell):
    """Of an adversarial run whose critic has heads on features these are the features."""
    own = setting_of(cell).critic
    return networks.loss_features(cell.family, own) if cell.loss == "kernel" or cell.family != "digits" else None
