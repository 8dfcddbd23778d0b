"""The whole recipe: mining, selection, sparse finetuning, with snapshots that a kill at any moment leaves whole."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import hub
from ..models import has_discriminator, load_generator
from .config import TransferConfig, check_names
from .estimate import Estimate, estimate_seconds
from .evaluation import NAMED
from .methods import KERNEL
from .notes import heard
from .prepared import NAMED_LOSS_FEATURES, Materials, Prepared
from .processes import join
from .randomness import keep_random_state
from .run import TransferResult, execute
from .sources import Checkpoints, listed, source_critic

Source = str | os.PathLike | nn.Module


def transfer(
    source: Source | Sequence[Source] | Mapping[str, Source],
    images: str | os.PathLike | torch.Tensor,
    out: str | os.PathLike,
    critic: Source | None = None,
    mining_steps: int | None = None,
    finetune_steps: int | None = None,
    density: float | None = None,
    batch: int | None = None,
    lr: float | None = None,
    loss: str | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    snapshot_every: int | None = None,
    metrics: tuple[str, ...] = ("fid", "kid", "kmmd", "mv"),
    features: Any = None,
    loss_features: Any = None,
    **settings: Any,
) -> TransferResult:
    """Adapts a pretrained GAN to a few images: mining, then finetuning of the neurons that matter.

    In a class-conditional source the class is mined too, in the space of its class embeddings; a critic judges without
    labels. In both stages the generator runs in eval mode: its batch-norm statistics and spectral-norm vectors stay the
    source's, because a few images would give poor ones.

    Settings that are None follow the loss and the method (`methods.py`; the help of `minegan-fast transfer` names
    them).

    Args:
        source: a checkpoint's path or its place on the Hub (`hf://user/name/file`), or a generator module with
            `latent_dim` and `resolution` (copied, not changed). One with `num_classes` > 0 takes (z, class embedding)
            and has `class_embeddings()` [num_classes, class_dim]. Or a list of several, which are mined together: see
            below.
        images: a folder, or a tensor [N, C, R, R], float in [-1, 1] or uint8.
        out: the run's folder. A folder that holds a run is refused unless `resume`. A run that ended before its first
            snapshot does not count, and a new one takes its place. Where the file system has locks, a folder that
            another process is writing to is refused even before that process's first snapshot.
        critic: for an adversarial loss. A path or a module, whose frozen parameters stay frozen; "features": small
            heads on the network of `loss_features`. None takes the source file's discriminator, or a new one, which
            first trains alone (`critic_warmup`).
        mining_steps: steps of stage 1, with the generator frozen. finetune_steps: of stage 2. Steps count from 0.
        density: fraction of the generator's parameters (`budget`: of its neurons) that train in stage 2.
        batch: images a step, of all processes together.
        lr: the critic's learning rate; the generator's is half of it, the miner's twice, under "mmd" the same and at
            most 4e-3, unless `miner_lr`, `generator_lr` or `critic_lr` say otherwise. None: 2e-3; under "mmd" 1.6e-2
            for generators of equalised weights.
        loss: "mmd", the kernel distance between pretrained features of generated and of target images, which needs no
            critic; or the adversarial "nonsaturating" | "wgan" (with a gradient penalty of weight 10) | "hinge". None:
            "mmd" where there are loss features (the source file's discriminator is some), else "nonsaturating".
        device: None takes a GPU where there is one, each process its own.
        resume: go on from the newest snapshot in `out`, or begin where there is none.
        snapshot_every: steps between snapshots; there is one after mining and one at the end too.
        metrics: of "fid", "kid", "kmmd", "mv", "diversity", at every snapshot.
        features: for the metrics: None (the source critic's), "critic", "pixels", "digits", a TorchScript file or one
            of Inception's weights, a module or a `metrics.FeatureExtractor`. The result says so where the network that
            judges also trained the run.
        loss_features: what "mmd" compares: an image network as a module (differentiable, images in [-1, 1]; copied and
            frozen), a `metrics.FeatureExtractor`, a file that this reads, "critic" (the source's own), "digits", or a
            `LossFeatures` with taps of your choice.
        **settings: any other field of `TransferConfig`: method (a published recipe, see `methods.py`), mining_loss and
            finetune_loss (a loss for one stage), mmd_weight (of the kernel distance beside an adversarial loss), part
            (images in memory at once under "mmd"), resize (the resolution of several sources whose own differ), explore
            (share of a batch that several sources get at random under an adversarial loss), view_augment, views and
            flips (what "mmd" sees of the target), prior ("sphere" | "moments" | "sphere+moments" | "shell" | "none":
            what keeps mined latents where the generator's own are) and prior_weight, train_miner, critic_warmup,
            held_out (fraction set aside where that makes 5 images or more, or a folder), patience (snapshots without a
            gain in held-out KID after which stage 2 stops; 0 never), criterion, scope, budget, policy, affine,
            score_samples, reselect_every, train_critic ("all" | "sparse" | "freezed") and freeze_blocks, mine ("z" |
            "w": behind a StyleGAN's mapping network), mine_constant (a StyleGAN's learned constant too), mined_class (a
            label, or "207,208": where the class miner starts; by default at the distribution of all classes'
            embeddings), miner_depth, miner_width, r1_gamma, r1_every, path_length_weight, path_length_every,
            gradient_penalty_weight, augment, ema_decay, ewc_weight, precision ("fp32" | "bf16" | "fp16"), eval_samples,
            keep, grid, log_every, report (False: no report.html at the end), cuda_graphs (capture the steps on one GPU,
            on which the target images then lie too: the same steps to rounding, prepared by the host once; each kind of
            step runs three times as it is before, and so do all steps from then on where one cannot be captured, with
            the reason in the run's output).

    Returns a `TransferResult`; the folder holds the same and more (see README).

    Several sources: one miner each, one target. Under "mmd" the shares p of their mixture are solved for, and the
    miners follow the gradient of that mixture; under an adversarial loss each sample is that of the generator that the
    critic scores highest, and p is how often each one is it, anew in stage 2. p is in every row of the history
    (`p_NAME`). Stage 2 spends one budget of neurons on all. `result.mined` is a `MultiGenerator`, which draws by p.

    On several processes (`torchrun`, or torch.distributed initialised by the caller) every process calls this with the
    same arguments and sees the same files, computes its part of each batch, and gets the same result; the first one
    writes. The steps are those of one process, but for rounding and for what is computed across a batch: StyleGAN2's
    minibatch standard deviation where its groups do not divide among the processes, batch norm, and a hundredth of the
    length that path length compares with. A run may be resumed on another number of processes.

    Raises: ValueError/FileNotFoundError for input that cannot be used, DoesNotFit where the memory does not suffice,
    TrainingDiverged for NaN losses (the last good snapshot stays), RuntimeError for a full disk.
    """
    checkpoints = Checkpoints()
    config = configure(
        checkpoints,
        source=source, images=images, critic=critic, mining_steps=mining_steps, finetune_steps=finetune_steps,
        density=density, batch=batch, lr=lr, loss=loss, device=device, seed=seed, snapshot_every=snapshot_every,
        metrics=metrics, features=features, loss_features=loss_features, **settings,
    )  # fmt: skip
    # Paths and names as the configuration spells them, by which a network is known again; objects as they are.
    materials = Materials(
        source,
        images,
        critic if config.critic is None else config.critic,
        features if config.features is None else config.features,
        loss_features if config.loss_features is None else config.loss_features,
    )
    with _prepared(config, materials, checkpoints) as prepared:
        return execute(prepared, Path(out), resume, progress)


def configure(checkpoints: Checkpoints | None = None, **settings) -> TransferConfig:
    """The configuration of these arguments of `transfer`: paths in full, modules as None, and the loss that follows
    from what the source's file holds.

    checkpoints: reads the file, and keeps what it read for the run.
    """
    check_names(settings)
    named = {"critic": ("features",), "features": NAMED, "loss_features": NAMED_LOSS_FEATURES}
    source, critic = settings["source"], settings.get("critic")
    chosen = any(settings.get(name) for name in ("loss", "mining_loss", "finetune_loss"))
    trains_critic = settings.get("train_critic") not in (None, "all") or settings.get("method") == "freezed"
    if settings.get("loss_features") is not None:
        if not chosen:
            settings["loss"] = KERNEL
    elif (
        not chosen
        and not trains_critic
        and critic is None
        and _has_critic(source, settings.get("resize"), checkpoints or Checkpoints())
    ):
        settings |= {"loss": KERNEL, "loss_features": "critic"}
    for name in ("source", "images", "critic", "features", "loss_features", "held_out"):
        value = settings.get(name)
        if value is not None and value not in named.get(name, ()) and not (name == "held_out" and _is_number(value)):
            settings[name] = _name(value)
    return TransferConfig(**settings)


def dry_run(
    config: TransferConfig, checkpoints: Checkpoints | None = None, source=None
) -> tuple[Estimate, float, float]:
    """(memory, seconds of a mining step, seconds of a finetuning step), measured without writing anything.

    checkpoints: those of `configure`, where it has made the configuration. source: the modules, where it names some.
    """
    source = config.source if source is None else source
    materials = Materials(source, config.images, config.critic, config.features, config.loss_features)
    with _prepared(config, materials, checkpoints or Checkpoints()) as prepared, keep_random_state(prepared.device):
        with prepared.processes.together():
            prepared.estimate.check(config.batch)
        return prepared.estimate, *estimate_seconds(prepared.trainer())


@contextmanager
def _prepared(config: TransferConfig, materials: Materials, checkpoints: Checkpoints) -> Iterator[Prepared]:
    """What a run needs, on every process, or the same error on all of them."""
    cuda = torch.cuda.is_available() if config.device is None else config.device.startswith("cuda")
    with join(cuda) as processes:
        with processes.together(), heard() as warned:
            prepared = Prepared(config, materials, processes, checkpoints)
        prepared.warned = warned
        message = "the processes were given different settings or see different images"
        processes.check_equal(prepared.identity(), message)
        with torch.cuda.device(prepared.device) if prepared.device.type == "cuda" else nullcontext():
            yield prepared


def _name(thing):
    """A path as the configuration keeps it: in full, so that a run can go on from any folder. None for a module. Of
    several things a list."""
    if isinstance(thing, (list, tuple)) and len(thing) == 1:
        thing = thing[0]
    if isinstance(thing, (list, tuple, nn.ModuleList)):
        return [_name(one) for one in thing]
    if hub.is_named(thing):
        return str(thing)
    return str(Path(thing).resolve()) if isinstance(thing, (str, Path)) else None


def _has_critic(source, resize: int | None, checkpoints: Checkpoints) -> bool:
    """Whether a source's file holds a critic that can judge its generator's images, as large as they will be."""
    for one in listed(source):
        if isinstance(one, (str, Path)) and (hub.is_named(one) or Path(one).exists()):
            contents = checkpoints.open(one)
            if has_discriminator(contents):
                generator = load_generator(contents)
                fits = resize in (None, generator.resolution)
                if fits and source_critic(contents, generator)[0] is not None:
                    return True
    return False


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
