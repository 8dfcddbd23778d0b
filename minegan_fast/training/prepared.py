"""What a run works with, from what the user named: networks, images, losses, features."""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..files.reading import Contents
from ..finetune import fingerprint
from ..mining.offload import Transfers, pinned_memory
from .captured import CudaGraphs, obstacle
from .config import TransferConfig
from .critics import without_labels
from .estimate import estimate_memory
from .evaluation import choose_features, judge_name
from .feature_critic import FeatureCritic
from .generators import Generator, Several, check_samples, image_channels, networks, own_samples, remember_finite
from .images import ImageSet, to_float
from .kernel_loss import KernelLoss
from .loss_features import LossFeatures
from .methods import KERNEL, fresh_weights
from .names import short_names
from .processes import Processes, local_index
from .randomness import keep_and_set_random_state
from .sources import (
    Checkpoints,
    Networks,
    choose_device,
    listed,
    open_critic,
    open_images,
    open_networks,
    source_critic,
)
from .stages import evaluating
from .trainer import Trainer

SOURCE_BATCH, SOURCE_BATCHES = 4, 16  # images of the source that tell how far from the target it is

NAMED_LOSS_FEATURES = ("critic", "digits")


class Materials(NamedTuple):
    """What the user named, or gave as an object, for a run: see the arguments of `transfer`."""

    source: Any
    images: Any
    critic: Any
    features: Any
    loss_features: Any


class Prepared:
    """Networks, images, losses and features of one configuration, checked; `Run` is what trains them.

    checkpoints: reads the networks' files; it is cleared when the networks are there.

    Attributes:
        generator, critic: the networks that `trainer` copies, on the device of the run, or in the memory of the host
            where only some generators are to be on it; critic None: none trains.
        sleep: where generators sleep that the device does not hold; None where there are none.
        source: the generator before a method gave it new weights.
        judging: the pretrained critic, of the source's file or given; None where none is needed.
        new_critic: whether the critic knows nothing yet.
        target, held_out: the training images, and the images set aside, uint8 [N, C, R, R], or None.
        reference: the real images that metrics compare with.
        features, judge: what measures the metrics, and its name, which says so where it also trained the run.
        kernel: the kernel distance to the target, where a loss needs it.
        why_eager: why the steps are not captured although the configuration asks for it; empty where nothing is wrong.
        notes: lines that tell a user what was chosen. warned: the warnings of the preparation.
        estimate: of the memory that the run will need.
    """

    def __init__(self, config: TransferConfig, materials: Materials, processes: Processes, checkpoints: Checkpoints):
        self.config, self.processes = config, processes
        self.warned: list[str] = []
        if config.batch % processes.size:
            raise ValueError(
                f"batch {config.batch} cannot be divided among {processes.size} processes: take a multiple of "
                f"{processes.size}, or another number of processes"
            )
        self.device = choose_device(config.device, local_index() if processes.size > 1 else None)
        by_features = isinstance(materials.critic, str) and materials.critic == "features"
        if by_features:
            materials = materials._replace(critic=None)
        if config.spread and processes.size == 1:
            raise ValueError(
                "spread shares the sources among processes, and this is the only one: start several with torchrun, or "
                "leave it out (--no-spread)"
            )
        self.sleep: Transfers | None = None
        if config.offload or (config.spread and self.device.type == "cuda"):  # there the first process measures all
            self.sleep = pinned_memory(self.device)
        found, self.judging = self._open(materials, checkpoints, needed=config.adversarial and not by_features)
        self.generator = self.source = found.generator if config.hosted else found.generator.to(self.device)
        config.fit(self.generator)
        notes = list(found.notes)
        with keep_and_set_random_state(config.seed, "check"):
            notes += self._check_sources(listed(materials.source))
        if config.method == "scratch":
            self.source = copy.deepcopy(self.generator)
            fresh_weights(self.generator, config.seed, self.device)
        moves = config.criterion == "movement" and config.finetune_loss != KERNEL
        if isinstance(self.generator, Several) and processes.size > 1 and moves:
            raise ValueError(
                "criterion movement is not offered for several sources on several processes: take another criterion, "
                "or one process"
            )
        self.critic, self.new_critic = found.critic, not found.pretrained
        if self.critic is not None:
            self.critic = without_labels(self.critic, config.mined_class)
        judging = self.judging
        if judging is not None:
            judging = copy.deepcopy(judging).eval().requires_grad_(False).to(self.device)
        self.target, self.held_out = open_images(materials.images, self.generator, config)
        if config.patience and self.held_out is None:
            raise ValueError(
                f"patience waits for a better KID on images held out, and of {len(self.target)} images none are: leave "
                "it out, set more aside (held_out), or give a folder of others (held_out, --held-out)"
            )
        self.reference = self.target.images if self.held_out is None else self.held_out
        self.features = choose_features(materials.features, judging, self.reference, self.device)
        self.kernel: KernelLoss | None = None
        loss_choice = None
        if config.kernel or by_features:
            loss_choice = materials.loss_features or "critic"
            features = self._choose_loss_features(materials.loss_features, judging)
            if config.kernel:
                views = config.views if config.view_augment else 1
                images = self.target.images
                # A generator with new weights has no images to speak of: measured from there, kernels made it worse.
                batches = 0 if config.method == "scratch" else max(SOURCE_BATCHES, len(networks(self.generator)))
                source = (own_samples(self.generator, SOURCE_BATCH, k, self.device) for k in range(batches))
                with evaluating(self.generator):
                    self.kernel = KernelLoss(
                        features, images, config.flips, views, config.view_augment, seed=config.seed, source=source
                    )
            if by_features and config.adversarial:
                with keep_and_set_random_state(config.seed, "critic"):
                    shape = self.generator.resolution, image_channels(self.generator)
                    self.critic = FeatureCritic(features.maps, *shape).to(self.device)
        own_critic = config.adversarial and not self.new_critic
        self.judge = judge_name(self.features, materials.features, loss_choice, own_critic)
        self.why_eager = obstacle(config, self.device, processes) if config.cuda_graphs else ""
        self.notes = list(self._notes(notes))
        self.estimate = estimate_memory(config, self.generator, self.critic, self.kernel, self.device, processes.size)

    def _open(self, materials: Materials, checkpoints: Checkpoints, needed: bool) -> tuple[Networks, nn.Module | None]:
        """(the networks, a pretrained critic whose features may judge images, also where no critic trains).

        needed: whether a critic trains that is to be read or built here.
        """

        def opened(network) -> Contents | nn.Module:
            return network if isinstance(network, nn.Module) else checkpoints.open(network)

        sources, given = listed(materials.source), materials.critic
        read, names = [opened(source) for source in sources], short_names(sources)
        critic = opened(given) if given is not None and needed else None
        found = open_networks(read, critic, self.config, needed, names)
        judging = found.critic if found.pretrained else None
        by_loss = self.config.kernel and materials.loss_features == "critic"
        if found.critic is None and (materials.features in (None, "critic") or by_loss):
            if given is None:
                judging = source_critic(read, found.generator)[0]
            else:
                judging = open_critic(opened(given), found.generator)
        checkpoints.clear()  # the networks have the weights, and the run needs the memory
        return found, judging

    def _check_sources(self, sources: list) -> list[str]:
        """Runs the modules of a user, and of several sources all, and returns what a user should know of them."""
        notes: list[str] = []
        for source, network in zip(sources, networks(self.generator), strict=True):
            if isinstance(source, nn.Module):
                notes += check_samples(cast(Generator, network), device=self.device)
        if isinstance(self.generator, Several):
            with torch.no_grad():
                images = [own_samples(network, SOURCE_BATCH, device=self.device) for network in self.generator]
            notes += remember_finite(self.generator, images)
        return notes

    def _choose_loss_features(self, choice, critic: nn.Module | None) -> LossFeatures:
        if isinstance(choice, LossFeatures):
            return choice
        probe = to_float(self.target.images[:2]).to(self.device)
        if choice is None or choice == "critic":
            if critic is not None:
                return LossFeatures(critic, name="critic", probe=probe)
            raise ValueError(
                "the loss needs pretrained features, and the source has no critic of its own to take them from: give "
                "loss_features (--loss-features), a network or a file that FeatureExtractor reads, or take an "
                "adversarial loss (--loss nonsaturating)"
            )
        if choice == "digits":
            from ..data import classifier

            taps = ["convs.0", "convs.1", "convs.2", "convs.3", "convs.4", "hidden"]  # the last one tells the digit
            return LossFeatures(classifier().to(self.device), name="digits", probe=probe, taps=taps)
        return LossFeatures(choice, device=self.device, probe=probe)

    def _notes(self, notes: list[str]) -> Iterator[str]:
        config, processes = self.config, self.processes
        held_out = "none held out: the last snapshot is taken"
        if self.held_out is not None:
            held_out = f"{len(self.held_out)} held out"
        if isinstance(self.generator, Several):
            yield f"{len(self.generator)} sources: {', '.join(self.generator.names)}"
        yield f"{len(self.target)} images to train on, {held_out}; metrics on {self.judge} features"
        if self.kernel is not None:
            features = self.kernel.features
            yield f"kernel distance of {features.name} features, at {', '.join(features.taps)}"
            if config.flips is None and self.kernel.flips:
                yield "mirror images of the target look alike, so they count as target too (--no-flips)"
        yield from notes
        if self.critic is not None and self.new_critic:
            yield (
                "a new critic is trained, which takes more steps and, of few images, often fails: the kernel distance "
                "of pretrained features needs none (--loss-features)"
            )
        if processes.size > 1:
            yield f"{processes.size} processes, {config.batch // processes.size} images of a step each"
        if config.spread:
            yield f"stage 1 shares the sources among the {processes.size} processes; in stage 2 each has all of them"
        if config.offload:
            yield "the sources sleep in the memory of the host; those in which neurons train stay on the device"
        if self.why_eager:
            yield f"no CUDA graphs: {self.why_eager}"

    def contents(self) -> dict[str, str]:
        """Of each input that a path names, a digest of what is there: by it a run knows its inputs again."""
        config = self.config
        found = {"images": self.target.fingerprint()}
        if any(listed(config.source)):
            found["source"] = " ".join(fingerprint(network) for network in networks(self.source))
        if config.critic not in (None, "features") and self.judging is not None:
            found["critic"] = fingerprint(self.judging)
        if isinstance(config.held_out, str) and self.held_out is not None:
            found["held_out"] = ImageSet(self.held_out, []).fingerprint()
        for name, given in (("features", config.features), ("loss_features", config.loss_features)):
            if given and Path(given).is_file():
                digest = hashlib.sha256()
                with open(given, "rb") as file:
                    while part := file.read(1 << 20):
                        digest.update(part)
                found[name] = digest.hexdigest()
        return found

    def identity(self) -> dict:
        """What all processes must agree on."""
        return self.config.to_dict() | {"device": None, "images": self.target.fingerprint()}

    def trainer(self) -> Trainer:
        """A trainer of copies of the networks."""
        graphs = CudaGraphs(self.device) if self.config.cuda_graphs and not self.why_eager else None
        return Trainer(
            self.config, *copy.deepcopy((self.generator, self.critic)), self.target.images, self.device, self.processes,
            self.kernel, self.new_critic, graphs, self.sleep,
        )  # fmt: skip
