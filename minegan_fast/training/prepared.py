"""What a run works with, from what the user named: networks, images, losses, features."""

import copy

from torch import nn

from .config import TransferConfig
from .estimate import estimate_memory
from .evaluation import choose_features, judge_name
from .feature_critic import FeatureCritic
from .images import to_float
from .kernel_loss import KernelLoss
from .loss_features import LossFeatures
from .methods import fresh_weights
from .processes import Processes, local_index
from .randomness import keep_and_set_random_state
from .sources import choose_device, image_channels, open_critic, open_images, open_networks, source_critic
from .trainer import Trainer

NAMED_LOSS_FEATURES = ("critic", "digits")


class Prepared:
    """Networks, images, losses and features of one configuration, checked; `Run` is what trains them."""

    def __init__(self, config: TransferConfig, source, images, critic, features, loss_features, processes: Processes):
        self.config, self.processes = config, processes
        if config.batch % processes.size:
            raise ValueError(
                f"batch {config.batch} cannot be divided among {processes.size} processes: take a multiple of "
                f"{processes.size}, or another number of processes"
            )
        self.device = choose_device(config.device, local_index() if processes.size > 1 else None)
        by_features = isinstance(critic, str) and critic == "features"
        critic = None if by_features else critic
        networks = open_networks(source, critic, config, needed=config.adversarial and not by_features)
        self.generator = networks.generator.to(self.device)
        config.fit(self.generator)
        if config.method == "scratch":
            fresh_weights(self.generator, config.seed)
        self.critic, self.new_critic = networks.critic, not networks.pretrained
        pretrained = self.critic if networks.pretrained else None
        if self.critic is None and (features in (None, "critic") or (config.kernel and loss_features == "critic")):
            # It trains nothing then, but knows images.
            pretrained = open_critic(critic, self.generator) if critic else source_critic(source, self.generator)[0]
        if pretrained is not None:
            pretrained = copy.deepcopy(pretrained).eval().requires_grad_(False).to(self.device)
        self.target, self.held_out = open_images(images, self.generator, config)
        self.reference = self.target.images if self.held_out is None else self.held_out
        self.features = choose_features(features, pretrained, self.reference, self.device)
        self.loss_features = self.kernel = None
        if config.kernel or by_features:
            self.loss_features = self._choose_loss_features(loss_features, pretrained)
        if config.kernel:
            views = config.views if config.view_augment else 1
            self.kernel = KernelLoss(
                self.loss_features, self.target.images, config.flips, views, config.view_augment, seed=config.seed
            )
        if by_features and config.adversarial:
            with keep_and_set_random_state(config.seed, "critic"):
                shape = self.generator.resolution, image_channels(self.generator)
                self.critic = FeatureCritic(self.loss_features.maps, *shape).to(self.device)
        loss_choice = (loss_features or "critic") if config.kernel or by_features else None
        own_critic = config.adversarial and not self.new_critic
        self.judge = judge_name(self.features, features, loss_choice, own_critic)
        self.notes = list(self._notes(networks.notes))
        self.estimate = estimate_memory(config, self.generator, self.critic, self.kernel, processes.size)

    def _choose_loss_features(self, choice, critic: nn.Module | None) -> LossFeatures:
        if isinstance(choice, LossFeatures):
            return choice
        probe = to_float(self.target.images[:2]).to(self.device)
        if choice is None and critic is not None:
            choice = "critic"
        if choice is None or (choice == "critic" and critic is None):
            raise ValueError(
                "the loss needs pretrained features, and the source has no critic of its own to take them from: give "
                "loss_features (--loss-features), a network or a file that FeatureExtractor reads, or take an "
                "adversarial loss (--loss nonsaturating)"
            )
        if choice == "critic":
            return LossFeatures(critic, name="critic", probe=probe)
        if choice == "digits":
            from ..data import classifier

            # which digit it is, is in the last
            taps = ["convs.0", "convs.1", "convs.2", "convs.3", "convs.4", "hidden"]
            return LossFeatures(classifier().to(self.device), name="digits", probe=probe, taps=taps)
        return LossFeatures(choice, device=self.device, probe=probe)

    def _notes(self, notes: tuple[str, ...]):
        config, processes = self.config, self.processes
        held_out = "none held out: the last snapshot is taken"
        if self.held_out is not None:
            held_out = f"{len(self.held_out)} held out"
        yield f"{len(self.target)} images to train on, {held_out}; metrics on {self.judge} features"
        if self.kernel is not None:
            names = ", ".join(self.loss_features.taps)
            yield f"kernel distance of {self.loss_features.name} features, at {names}"
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

    def identity(self) -> dict:
        """What all processes must agree on."""
        return self.config.to_dict() | {"device": None, "images": self.target.fingerprint()}

    def trainer(self) -> Trainer:
        return Trainer(
            self.config, *copy.deepcopy((self.generator, self.critic)), self.target.images, self.device, self.processes,
            self.kernel, self.new_critic,
        )  # fmt: skip
