"""The critic of a run: how it trains, and the loss that it gives to generator and miner."""

import torch
from torch import Tensor, nn

from ..finetune import SparseFinetuner
from ..layers import gradient_penalty
from .augment import diff_augment
from .critics import begin_training, critic_r1, freeze_lower_blocks
from .images import to_float
from .losses import critic_loss, generator_loss
from .machine import Machine
from .miners import Network
from .randomness import DataOrder

# A new critic trains alone for so many steps before it may move the miner, or for a quarter of its stage if that is
# less.
WARM_UP = 50


class Adversary:
    """A critic that trains against what the miners find; of several generators, against what it scores highest. Its
    parameters that came frozen stay frozen.

    images: uint8 [N, C, R, R], on the CPU or the device of the run.
    """

    def __init__(self, machine: Machine, critic: nn.Module, images: Tensor):
        self.machine, self.config, self.images = machine, machine.config, images
        self.order = DataOrder(len(images), self.config.batch, self.config.seed, images.device)
        self.critic = critic.to(machine.device)
        begin_training(self.critic)
        if self.config.train_critic == "freezed":
            freeze_lower_blocks(self.critic, self.config.freeze_blocks)
        trained = [p for p in self.critic.parameters() if p.requires_grad]
        betas = (self.config.beta1, self.config.beta2)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            trained, machine.rate(self.config.critic_lr), betas=betas, fused=True
        )

    def samples(self, number: int) -> Tensor:
        """Which images this process has of batch `number`, int64, where the images are."""
        return self.machine.processes.own(self.order[number])

    def step(self, samples: Tensor, loss_name: str, mined: Network, penalised: bool) -> Tensor:
        """Trains the critic on the images of these numbers, and where it is `penalised` by R1; returns its loss without
        penalties."""
        config, machine = self.config, self.machine
        real = to_float(self.images[samples]).to(machine.device)
        with machine.batch(mined) as count:
            with torch.no_grad(), machine.autocast():
                made = mined.best(machine.latents(mined, count), self.critic)[0].float()
            with machine.judged(mined, made) as fake:
                real, fake = (diff_augment(x, config.augment) for x in (real, fake))
                with machine.autocast():
                    loss = critic_loss(loss_name, self.critic(real), self.critic(fake))
                total = loss
                if penalised:
                    total = total + config.r1_gamma / 2 * config.r1_every * critic_r1(self.critic, real)
                if config.gradient_penalty_weight:
                    # Drawn here, since `interpolate` draws other numbers within a CUDA graph than outside.
                    alpha = torch.rand(len(fake), device=machine.device)
                    penalty = gradient_penalty(self.critic, real, fake, alpha=alpha)
                    total = total + config.gradient_penalty_weight * penalty
        machine.zero_grad(self.optimizer)
        machine.scaler.scale(total).backward()
        return machine.update(loss.detach(), self.optimizer)

    def loss(self, loss_name: str, fake: Tensor) -> Tensor:
        """The loss that generator and miner minimise, of generated images [B, C, R, R]; a scalar."""
        return generator_loss(loss_name, self.critic(diff_augment(fake, self.config.augment)))

    def begin_sparse(self, **settings) -> None:
        """Gives the critic's neurons an optimizer of their own; nothing is selected yet."""
        self.optimizer = SparseFinetuner(self.critic, self.machine.rate(self.config.critic_lr), **settings)

    def evidence(self, loss_name: str, samples: Tensor, mined: Network) -> Tensor:
        """The critic's loss on the real images of these numbers and on as many generated ones."""
        real = to_float(self.images[samples % len(self.images)]).to(self.machine.device)
        fake = mined(self.machine.latents(mined, len(samples)))
        return critic_loss(loss_name, *(self.critic(diff_augment(x, self.config.augment)) for x in (real, fake)))

    def state_dict(self) -> dict:
        return {"critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.critic.load_state_dict(state["critic"])
