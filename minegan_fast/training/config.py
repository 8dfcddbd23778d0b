"""Every setting of a run: its default, its meaning, its check, and its file in the run's folder."""

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn

from ..files import hub
from ..files.atomic import atomic_path
from ..finetune.evidence import CRITERIA
from ..finetune.selection import SCOPES
from ..mining.mined import PLACES
from ..mining.prior import PRIORS
from .augment import parse_policy
from .losses import LOSSES
from .methods import KERNEL, METHODS, chosen, kernel_lr

# Under mmd a faster miner puts its latents along few directions. At 8e-3 and more a third or a tenth of the prior's
# dimension is left; at 4e-3 two thirds are, and the images are as good.
MINER_LR = 4e-3
CRITIC_TRAINING = ("all", "sparse", "freezed")
PRECISIONS = ("fp32", "bf16", "fp16")
METRICS = ("fid", "kid", "kmmd", "mv", "diversity")
# Settings that may differ when a run is resumed: they do not change what a step computes.
OF_THE_SELECTION = ("density", "budget", "criterion", "scope", "policy", "affine")
FREE_ON_RESUME = (
    "device", "cuda_graphs", "offload", "spread", "mining_steps", "finetune_steps", "snapshot_every", "patience",
    "keep", "log_every", "report",
)  # fmt: skip
# Of these the contents count, which the run compares, and not where they lie.
PATHS = ("source", "images", "critic", "held_out", "features", "loss_features")


# What nobody means is refused at once, and not when memory, time or a generator of random numbers gives out.
_STEPS, _IMAGES = (0, 10**9), (1, 10**7)
_WHOLE = {
    "mining_steps": _STEPS, "finetune_steps": _STEPS, "reselect_every": _STEPS, "critic_warmup": _STEPS,
    "patience": _STEPS, "snapshot_every": (1, 10**9), "log_every": (1, 10**9), "r1_every": (1, 10**9),
    "path_length_every": (1, 10**9), "batch": _IMAGES, "part": _IMAGES, "score_samples": _IMAGES,
    "eval_samples": (2, 10**7), "grid": (1, 10**4), "views": (1, 10**4), "keep": (1, 10**6), "miner_depth": (1, 100),
    "miner_width": (1, 2**16), "freeze_blocks": (1, 100), "resize": (1, 2**14), "seed": (-(2**63), 2**63 - 1),
}  # fmt: skip
_LARGEST = int(sys.float_info.max)
_WEIGHTS = (
    "r1_gamma", "gradient_penalty_weight", "mmd_weight", "prior_weight", "ewc_weight", "path_length_weight",
)  # fmt: skip


def setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def open_setting(help: str) -> Any:
    """A setting that may be left open, as None: the configuration then chooses its value from the other settings.

    The field is annotated with the type of the chosen value, since that is what everyone else reads.
    """
    return dataclasses.field(default=None, metadata={"help": help, "open": True})


@dataclass
class TransferConfig:
    """Settings of `transfer`. None means: chosen from the other settings (`methods.chosen`), or from the networks.

    The learning rates are None until `fit` has seen the generator.
    """

    source: str | list | None = None
    images: str | None = None
    critic: str | None = setting(
        None, "Checkpoint of the critic; default: the source file's discriminator. features: heads on --loss-features."
    )
    method: str = open_setting(
        f"What trains: {', '.join(METHODS)}. Default: minegan under mmd where nothing is said of the selection, else "
        "minegan++."
    )
    mining_steps: int = open_setting(
        "Steps of stage 1: the miner trains, the generator is frozen. Default: 120 under mmd, else 1000."
    )
    finetune_steps: int = open_setting(
        "Steps of stage 2: the selected neurons of the generator train too. Default: 480 under mmd, else 2000."
    )
    density: float = open_setting("Fraction of the generator that trains in stage 2. Default: 0.1; of minegan 1.")
    batch: int = open_setting("Images a step, of all processes together. Default: 32 under mmd, else 16.")
    part: int | None = setting(None, "Images that are in memory at once under mmd, whatever the batch; default: all.")
    lr: float = open_setting(
        "Learning rate: the critic's; the generator's is half of it. Default: 2e-3; under mmd 1.6e-2 for Progressive "
        "GAN, StyleGAN and StyleGAN2, whose weights are equalised.",
    )
    loss: str = open_setting(
        f"Loss of both stages: {', '.join(LOSSES)} (adversarial), or mmd: the kernel distance of pretrained features, "
        "without a critic. Default: mmd where there are loss features, else nonsaturating.",
    )
    mining_loss: str = open_setting("Loss of stage 1, if not --loss.")
    finetune_loss: str = open_setting("Loss of stage 2, if not --loss.")
    loss_features: str | None = setting(
        None,
        "What mmd compares: a file of a feature network (TorchScript, Inception's weights), critic (the source's own), "
        "or digits. Default: the source's critic where its file has one.",
    )
    mmd_weight: float = setting(0.0, "Weight of the kernel distance beside an adversarial loss.")
    device: str | None = setting(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one.")
    seed: int = setting(0, "Seed of everything random.")
    snapshot_every: int = open_setting(
        "Steps between snapshots, each with metrics and a sample grid. Default: a sixth of all steps."
    )
    metrics: tuple[str, ...] = setting(("fid", "kid", "kmmd", "mv"), f"Metrics of a snapshot: {', '.join(METRICS)}.")
    budget: str = open_setting("What density counts: neurons, parameters. Default: parameters.")
    criterion: str = open_setting(f"Neurons' score: {', '.join(CRITERIA)}. Default: fisher.")
    scope: str = open_setting(
        "Which neurons compete: those of all layers (global), of each layer (layer), of all in units of their layer's "
        "mean score (normalised). Default: global.",
    )
    policy: str = open_setting(
        "train_top: the highest scored train; freeze_top: the lowest scored. Default: train_top."
    )
    affine: bool = open_setting(
        "Whether gains, shifts and biases of all neurons train, whatever is selected. Default: no."
    )
    score_samples: int = setting(64, "Generated images that score the neurons.")
    reselect_every: int = setting(0, "Score and select anew after so many steps of stage 2; 0: never.")
    train_miner: bool = open_setting("Whether there is a miner. Default: as the method has it.")
    prior: str | None = setting(
        None, f"What keeps the mined latents in their prior: {', '.join(PRIORS)}. Default: by the generator's family."
    )
    prior_weight: float = open_setting(
        "Weight of the prior's penalty, where it has one. Default: 0.003 under mmd, else 0.1."
    )
    train_critic: str = open_setting(
        "What of the critic trains: all, sparse (as the generator), freezed (FreezeD). Default: all."
    )
    freeze_blocks: int = setting(3, "Blocks nearest to the image that FreezeD freezes.")
    critic_warmup: int | None = setting(
        None,
        "Steps that the critic trains alone before it may move the miner. Default: 0; of a new one 200, or a quarter.",
    )
    ewc_weight: float = setting(50.0, "Weight of EWC's penalty, of method ewc.")
    mine: str = setting("z", "Where the miner acts: z, or w (behind the mapping network of StyleGAN and StyleGAN2).")
    mine_constant: bool = setting(False, "Mine the learned constant of StyleGAN and StyleGAN2 too.")
    mined_class: int | str | None = setting(
        None, "Labels at whose embeddings the class miner starts: 207, or 207,208; default: all of the source's."
    )
    miner_depth: int = setting(2, "Linear layers of the miner.")
    miner_width: int | None = setting(None, "Width of the miner; default: the latent size.")
    miner_lr: float = open_setting("Learning rate of the miner. Default: twice --lr; under mmd --lr, and at most 4e-3.")
    generator_lr: float = open_setting("Learning rate of the generator's neurons.")
    critic_lr: float = open_setting("Learning rate of the critic.")
    beta1: float = open_setting("Adam's first moment decay. Default: 0.9 under mmd, else 0.")
    beta2: float = setting(0.99, "Adam's second moment decay.")
    r1_gamma: float = setting(1.0, "Weight of R1, halved in the loss; 0 turns it off.")
    r1_every: int = setting(16, "Lazy R1: every so many steps, weighted accordingly.")
    path_length_weight: float | None = setting(
        None, "Weight of path length in stage 2; default: 2 for StyleGAN2 under an adversarial loss, else 0."
    )
    path_length_every: int = setting(4, "Lazy path length: every so many steps, weighted accordingly.")
    gradient_penalty_weight: float = open_setting("Weight of WGAN-GP; default 10 for wgan, else 0.")
    augment: str = setting(
        "color,translation,cutout",
        "DiffAugment of what a critic sees: color, translation, cutout, flip, jitter; empty: none.",
    )
    view_augment: str = setting(
        "jitter", "Random changes of generated and target images before mmd compares them: words as of --augment."
    )
    views: int = setting(3, "Versions of each target image under mmd, of other random changes each.")
    flips: bool | None = setting(
        None,
        "Whether mirror images of the target count as target under mmd. Default: where they look alike, as faces do "
        "and letters do not.",
    )
    ema_decay: float = open_setting(
        "Decay of the averages of miner and selected neurons. Default: 0.98 under mmd, else 0.998."
    )
    precision: str = setting("fp32", "fp32, bf16 or fp16 (autocast; penalties stay in fp32).")
    held_out: float | str = setting(
        0.1, "Fraction of the images set aside, where that makes 5 or more, or a folder of other images."
    )
    features: str | None = setting(
        None, "Features of the metrics: critic, pixels, digits, or a file: TorchScript, Inception's weights."
    )
    eval_samples: int = setting(1000, "Generated images that the metrics see.")
    patience: int = setting(0, "Stop after so many snapshots without a gain in held-out KID; 0: never.")
    keep: int = setting(2, "Newest snapshots that stay on the disk.")
    grid: int = setting(64, "Images in a sample grid.")
    log_every: int = setting(10, "Steps between rows of history.jsonl.")
    report: bool = setting(True, "Write report.html at the end.")
    resize: int | None = setting(
        None, "Resolution of the images of several sources, where theirs differ; default: they must not."
    )
    explore: float = setting(
        0.0,
        "Share of a batch that several sources get at random under an adversarial loss, which keeps one that seldom "
        "wins learning.",
    )
    offload: str | None = setting(
        None,
        "Where generators of several sources sleep: cpu, in pinned memory of the host, with two at most on the GPU; "
        "those in which neurons train stay there. Default: none, all are on the GPU.",
    )
    spread: bool = setting(
        False,
        "Share several sources among the processes in stage 1, each of which has its own on its device; in stage 2 "
        "each has all.",
    )
    cuda_graphs: bool = setting(
        False, "Capture the steps as CUDA graphs, which spares small batches the time of the host. It needs one GPU."
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type, field.metadata.get("open", False))
        self.metrics = tuple(self.metrics)
        self.offload = None if self.offload == "none" else self.offload  # which --resume may have to say
        if self.mined_class is not None:
            self.mined_class = str(self.mined_class)
        self.loss = self.loss or (KERNEL if self.loss_features else "nonsaturating")
        self.mining_loss, self.finetune_loss = self.mining_loss or self.loss, self.finetune_loss or self.loss
        if self.method is None:
            selects = any(getattr(self, name) is not None for name in OF_THE_SELECTION) or self.reselect_every
            self.method = "minegan++" if selects or self.finetune_loss != KERNEL else "minegan"
        _one_of("method", self.method, METHODS)
        if self.train_miner is False and self.mining_steps is None:
            self.mining_steps = 0
        for name, value in chosen(self.method, self.mining_loss, self.finetune_loss).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.gradient_penalty_weight is None:
            self.gradient_penalty_weight = 10.0 if "wgan" in self.losses else 0.0
        if self.lr is not None:
            self._derive_rates()
        if self.snapshot_every is None:
            self.snapshot_every = max(1, self.total_steps // 6)
        self._check()

    def fit(self, generator: nn.Module) -> None:
        """Chooses the settings that depend on the generator."""
        if self.lr is None:
            self.lr = kernel_lr(generator)
            self._derive_rates()

    def _derive_rates(self) -> None:
        if self.miner_lr is None:
            self.miner_lr = min(self.lr, MINER_LR) if self.mining_loss == KERNEL else 2 * self.lr
        self.generator_lr = self.lr / 2 if self.generator_lr is None else self.generator_lr
        self.critic_lr = self.lr if self.critic_lr is None else self.critic_lr

    @property
    def total_steps(self) -> int:
        return self.mining_steps + self.finetune_steps

    @property
    def hosted(self) -> bool:
        """Whether generators are in the memory of the host, and on the device only while they are needed there."""
        return self.offload is not None or self.spread

    @property
    def losses(self) -> set[str]:
        """The losses of the stages that take steps."""
        stages = ((self.mining_loss, self.mining_steps), (self.finetune_loss, self.finetune_steps))
        return {loss for loss, steps in stages if steps}

    @property
    def adversarial(self) -> bool:
        """Whether a critic trains."""
        return bool(self.losses - {KERNEL})

    @property
    def kernel(self) -> bool:
        """Whether a loss needs the kernel distance of features."""
        return KERNEL in self.losses or self.mmd_weight > 0

    def _check(self) -> None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and low <= value <= high):
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        for name in ("lr", "miner_lr", "generator_lr", "critic_lr"):
            if (value := getattr(self, name)) is not None:
                _positive(name, value)
        for name in _WEIGHTS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.total_steps == 0:
            raise ValueError("mining_steps and finetune_steps are both 0: nothing would train")
        if self.mining_steps and not self.train_miner:
            raise ValueError(
                f"mining_steps is {self.mining_steps}, but without a miner (train_miner false, as in method "
                f"{self.method}) nothing trains in stage 1: leave mining_steps out, or take method minegan or minegan++"
            )
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density is the fraction of the generator that trains, above 0 and at most 1; got {self.density!r}"
            )
        if isinstance(self.mined_class, str) and not re.fullmatch(r"\d+(,\d+)*", self.mined_class):
            raise ValueError(f"mined_class takes labels, as in 207 or 207,208; got {self.mined_class!r}")
        if isinstance(self.source, list) and self.path_length_weight:
            raise ValueError("path_length_weight is for one source, and there are several: leave it out")
        if not isinstance(self.source, list) and (self.resize or self.explore):
            raise ValueError("resize and explore are for several sources, and there is one: leave them out")
        if not isinstance(self.source, list) and self.hosted:
            raise ValueError("offload and spread are for several sources, and there is one: leave them out")
        if self.spread and not self.mining_steps:
            raise ValueError("spread shares the sources among processes in stage 1, which takes no steps: leave it out")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore is a share of a batch, from 0 to 1, got {self.explore!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay!r}")
        for name, known in (
            ("loss", (*LOSSES, KERNEL)), ("mining_loss", (*LOSSES, KERNEL)), ("finetune_loss", (*LOSSES, KERNEL)),
            ("train_critic", CRITIC_TRAINING), ("precision", PRECISIONS), ("criterion", CRITERIA), ("scope", SCOPES),
            ("budget", ("neurons", "parameters")), ("policy", ("train_top", "freeze_top")), ("mine", PLACES),
            ("prior", (None, *PRIORS)), ("offload", (None, "cpu")),
        ):  # fmt: skip
            _one_of(name, getattr(self, name), known)
        self._check_critic()
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"metrics are {', '.join(METRICS)}, got {metric!r}")
        if isinstance(self.held_out, float) and not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a fraction in [0, 1) or a folder, got {self.held_out!r}")
        for policy in (self.augment, self.view_augment):
            parse_policy(policy)

    def _check_critic(self) -> None:
        """Checks the settings that depend on whether a critic trains."""
        if self.train_critic == "sparse" and self.criterion == "contrast":
            raise ValueError(
                "criterion contrast compares with the source's own samples, which say nothing of a critic's neurons: "
                "take another criterion, or train_critic all"
            )
        if self.adversarial:
            return
        if self.train_critic != "all":
            raise ValueError(
                f"train_critic is {self.train_critic} ({self.method}), but the loss is mmd, which has no critic: leave "
                f"it out, or take an adversarial loss ({', '.join(LOSSES)})"
            )
        if self.explore:
            raise ValueError(
                "explore is for a critic's choice among several sources; under mmd their shares are solved for"
            )
        if self.mmd_weight:
            raise ValueError("mmd_weight is for a kernel distance beside an adversarial loss; the loss is mmd alone")
        if self.criterion in ("agreement",) and self.score_samples < 2:
            raise ValueError("criterion agreement compares samples: set score_samples to 2 or more")
        if self.batch < 2:
            raise ValueError("batch is 1, but an unbiased kernel distance needs 2 generated images at least")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def differences(self, other: "TransferConfig") -> list[str]:
        """ "name: mine -> theirs" for every setting in which the two would compute something else."""
        return [
            f"{field.name}: {mine!r} -> {theirs!r}"
            for field in dataclasses.fields(self)
            if field.name not in FREE_ON_RESUME
            and (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
            and not (field.name in PATHS and _are_paths(mine) and _are_paths(theirs))
        ]


def _are_paths(value: Any) -> bool:
    """Whether a setting names files, in full, and no choice such as "critic"."""
    named = value if isinstance(value, list) else [value]
    return all(isinstance(one, str) and (Path(one).is_absolute() or hub.is_named(one)) for one in named)


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings in a configuration file, for `TransferConfig(**settings)`. ValueError: not JSON, unknown names."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no configuration at {path}; a run writes its own as config.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON configuration: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object of settings, as a run's config.json does")
    try:
        check_names(settings)
        for field in dataclasses.fields(TransferConfig):
            if field.name in settings:
                _check_type(field.name, settings[field.name], field.type, field.metadata.get("open", False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return settings


def check_names(settings: Iterable[str]) -> None:
    """TypeError: names that are no settings, with those that are most like them."""
    known = [field.name for field in dataclasses.fields(TransferConfig)]
    if unknown := [name for name in settings if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise TypeError(f"there are no settings of the name {', '.join(map(repr, unknown))}: {hint}")


def _check_type(name: str, value: Any, annotation: Any, may_be_open: bool) -> None:
    if annotation == tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
            raise ValueError(f"{name} must be a list of words, got {value!r}")
        return
    kinds = get_args(annotation) or (annotation,)
    kinds = (*kinds, type(None)) if may_be_open else kinds
    if float in kinds and type(value) is int and abs(value) > _LARGEST:
        raise ValueError(
            f"{name} must be a number that a float can hold, got a whole number of {len(str(value))} digits"
        )
    fits = isinstance(value, (*kinds, int) if float in kinds else kinds) and isinstance(value, bool) <= (bool in kinds)
    if not fits:
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        names |= {list: "a list", type(None): "null"}
        raise ValueError(f"{name} must be {' or '.join(names[kind] for kind in kinds)}, got {value!r}")
    if isinstance(value, list) and not all(isinstance(one, (str, type(None))) for one in value):
        raise ValueError(f"{name} must be a list of paths, got {value!r}")
    if float in kinds and isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number, and is larger than any that is computed with")


def _one_of(name: str, value: Any, known) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, filter(None, known)))}, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
