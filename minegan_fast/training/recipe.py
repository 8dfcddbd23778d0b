"""The whole recipe: mining, selection, sparse finetuning, with snapshots that a kill at any moment leaves whole."""

import copy
import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from .config import TransferConfig, load_config
from .estimate import DoesNotFit, Estimate, estimate_memory, estimate_seconds
from .evaluation import NAMED, choose_features
from .execution import Execution, TransferResult
from .folder import RunFolder
from .processes import Processes, join, local_index
from .sources import choose_device, open_images, open_networks
from .trainer import Trainer

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def transfer(
    source,
    images,
    out,
    critic=None,
    mining_steps: int = 1000,
    finetune_steps: int = 2000,
    density: float = 0.05,
    batch: int = 16,
    lr: float = 2e-3,
    loss: str = "nonsaturating",
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    snapshot_every: int = 500,
    metrics: tuple[str, ...] = ("fid", "kid", "kmmd", "mv"),
    features=None,
    **settings,
) -> TransferResult:
    """Adapts a pretrained GAN to a few images: mining, then finetuning of the neurons that matter.

    Of a class-conditional source the class is mined too, in the space of its class embeddings; the critic judges
    without labels. In both stages the generator runs in eval mode: its batch-norm statistics and spectral-norm vectors
    stay the source's, of which a few images would tell little.

    Args:
        source: a checkpoint's path, or a generator module with `latent_dim` and `resolution` (copied, not changed). One
            with `num_classes` > 0 takes (z, class embedding) and has `class_embeddings()` [num_classes, class_dim].
        images: a folder, or a tensor [N, C, R, R], float in [-1, 1] or uint8.
        out: the run's folder. One that holds a run is refused unless `resume`; what a run left that ended before its
            first snapshot is no run, and a new one takes its place. A folder that another process is writing to is
            refused also before that one's first snapshot, where the file system has locks.
        critic: path or module; None takes the source file's discriminator, or a new one, with a message.
        mining_steps: stage 1, the generator frozen. finetune_steps: stage 2. Steps count from 0.
        density: fraction of the generator's neurons that train in stage 2.
        batch: images a step, of all processes together.
        lr: the critic's learning rate; the miner's is twice, the generator's half of it, unless `miner_lr`,
            `generator_lr` or `critic_lr` say otherwise.
        loss: "nonsaturating" | "wgan" (with a gradient penalty of weight 10) | "hinge".
        device: None takes a GPU where there is one, each process its own.
        resume: go on from the newest snapshot in `out`, or begin where there is none.
        snapshot_every: steps between snapshots; there is one after mining and one at the end too.
        metrics: of "fid", "kid", "kmmd", "mv", "diversity", at every snapshot.
        features: for the metrics: None (the source critic's), "critic", "pixels", "digits", a TorchScript file or one
            of Inception's weights, a module or a `metrics.FeatureExtractor`.
        **settings: any other field of `TransferConfig`: held_out (fraction set aside where that makes 5 images or more,
            or a folder), patience (snapshots without a gain in held-out KID after which stage 2 stops; 0 never),
            criterion, scope, budget, policy, score_samples, train_critic ("all" | "sparse" | "freezed") and
            freeze_blocks, mine ("z" | "w": behind a StyleGAN's mapping network), mine_constant (a StyleGAN's learned
            constant too), mined_class (a label, or "207,208": where the class miner starts; by default at the
            distribution of all classes' embeddings), miner_depth, miner_width, r1_gamma, r1_every, path_length_weight,
            path_length_every, gradient_penalty_weight, augment, ema_decay, precision ("fp32" | "bf16" | "fp16"),
            eval_samples, keep, grid, log_every.

    Returns a `TransferResult`; the folder holds the same and more (see README).

    On several processes (`torchrun`, or torch.distributed initialised by the caller) every process calls this with the
    same arguments and sees the same files, computes its part of each batch, and gets the same result; the first one
    writes. Steps are those of one process but for rounding and for what is computed across a batch: StyleGAN2's
    minibatch standard deviation where its groups do not divide among the processes, batch norm, and a hundredth of the
    length that path length compares with. A run may be resumed on another number of processes.

    Raises: ValueError/FileNotFoundError for input that cannot be used, DoesNotFit where memory would not do,
    TrainingDiverged for NaN losses (the last good snapshot stays), RuntimeError for a full disk.
    """
    if isinstance(settings.get("held_out"), (str, Path)):
        settings["held_out"] = _name(settings["held_out"])
    features_name = features if features in NAMED else _name(features)
    config = TransferConfig(
        source=_name(source), images=_name(images), critic=_name(critic), mining_steps=mining_steps,
        finetune_steps=finetune_steps, density=density, batch=batch, lr=lr, loss=loss, device=device, seed=seed,
        snapshot_every=snapshot_every, metrics=metrics, features=features_name, **settings,
    )  # fmt: skip
    with _prepared(config, source, images, critic, features) as run:
        return run.execute(Path(out), resume, progress)


def dry_run(config: TransferConfig) -> tuple[Estimate, float, float]:
    """(memory, seconds of a mining step, seconds of a finetuning step), measured without writing anything."""
    with _prepared(config, config.source, config.images, config.critic, config.features) as run, _seeded(run.device):
        with run.processes.together():
            run.estimate.check(config.batch)
        return run.estimate, *estimate_seconds(run.trainer())


@contextmanager
def _prepared(config: TransferConfig, *materials) -> Iterator["Run"]:
    """The run on every process, or the same error on all of them."""
    cuda = torch.cuda.is_available() if config.device is None else config.device.startswith("cuda")
    with join(cuda) as processes:
        with processes.together():
            run = Run(config, *materials, processes)
        processes.check_equal(run.identity(), "the processes were given different settings or see different images")
        with torch.cuda.device(run.device) if run.device.type == "cuda" else nullcontext():
            yield run


def _name(thing) -> str | None:
    """A path as the configuration keeps it: in full, so that a run may go on from any folder. None for a module."""
    if isinstance(thing, (list, tuple)) and len(thing) == 1:
        thing = thing[0]
    return str(Path(thing).resolve()) if isinstance(thing, (str, Path)) else None


def _seeded(device: torch.device):
    """The caller's random state comes back afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class Run:
    """Networks, images and features of one configuration, checked; `execute` runs it."""

    def __init__(self, config: TransferConfig, source, images, critic, features, processes: Processes):
        self.config, self.processes = config, processes
        if config.batch % processes.size:
            raise ValueError(
                f"batch {config.batch} cannot be divided among {processes.size} processes: take a multiple of "
                f"{processes.size}, or another number of processes"
            )
        self.device = choose_device(config.device, local_index() if processes.size > 1 else None)
        networks = open_networks(source, critic, config)
        self.generator, self.critic = networks.generator.to(self.device), networks.critic.to(self.device)
        self.target, self.held_out = open_images(images, self.generator, config)
        self.reference = self.target.images if self.held_out is None else self.held_out
        pretrained = copy.deepcopy(self.critic).requires_grad_(False) if networks.pretrained else None
        self.features = choose_features(features, pretrained, self.reference, self.device)
        held_out = "none held out: the last snapshot is taken"
        if self.held_out is not None:
            held_out = f"{len(self.held_out)} held out"
        self.notes = [f"{len(self.target)} images to train on, {held_out}; metrics on {self.features.name} features"]
        if not networks.pretrained:
            self.notes.append("the source has no discriminator: a new critic is trained, which takes more steps")
        if processes.size > 1:
            self.notes.append(f"{processes.size} processes, {config.batch // processes.size} images of a step each")
        self.estimate = estimate_memory(config, self.generator, self.critic, processes.size)

    def identity(self) -> dict:
        """What all processes must agree on."""
        return self.config.to_dict() | {"device": None, "images": self.target.fingerprint()}

    def trainer(self) -> Trainer:
        generator, critic = copy.deepcopy(self.generator), copy.deepcopy(self.critic)
        return Trainer(self.config, generator, critic, self.target.images, self.device, self.processes)

    def execute(self, out: Path, resume: bool, progress: bool) -> TransferResult:
        folder = RunFolder(out)
        with self.processes.together():
            self._check_folder(folder, resume)
            self.estimate.check(self.config.batch)
        with ExitStack() as claim:
            self.processes.from_first(lambda: self._claim(folder, resume, claim))
            return self._execute(folder, resume, progress)

    def _execute(self, folder: RunFolder, resume: bool, progress: bool) -> TransferResult:
        try:
            with _seeded(self.device):
                return Execution(self, folder, resume, progress).run()
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise RuntimeError(
                f"the disk is full or its quota is used up: cannot write below {str(folder.path)!r}; {folder.kept()}. "
                "Free some space and go on with --resume"
            ) from None
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            smaller = min(self.config.batch // 2, self.estimate.largest_batch())
            smaller -= smaller % self.processes.size
            advice = f"batch {smaller} should fit" if smaller else "even batch 1 may not fit on this device"
            raise DoesNotFit(f"out of memory at batch {self.config.batch}: {advice}; {folder.kept()}") from None

    def _claim(self, folder: RunFolder, resume: bool, claim: ExitStack) -> None:
        folder.create()
        claim.enter_context(folder.locked())
        self._check_folder(folder, resume)  # another process may have written a run since
        folder.clean()
        self.config.save(folder.config)

    def _check_folder(self, folder: RunFolder, resume: bool) -> None:
        if not folder.config.is_file() or not folder.holds_run():
            return
        if not resume:
            raise ValueError(
                f"{str(folder.path)!r} already holds a run: go on with it (--resume), or choose another folder (--out)"
            )
        changed = TransferConfig(**load_config(folder.config)).differences(self.config)
        if changed:
            raise ValueError(
                f"the run in {str(folder.path)!r} has other settings ({'; '.join(changed)}); "
                "leave those options out, or choose another folder (--out)"
            )
