"""The networks and optimizers of a run, and what one step does with them.

Stage 1 trains the miners and the critic while the generator is frozen. Stage 2 selects the generator's neurons on the
target and trains them too (MineGAN++: Wang et al. 2021, arXiv 2104.13742). The generator is in eval mode in both:
batch statistics of a few images are noisy ones, and a delta holds no buffers.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..finetune import SparseFinetuner
from ..finetune.distributed import gradients
from ..mining import Mined
from ..ops import gradient_penalty, path_length_penalty, r1_penalty
from .augment import diff_augment
from .config import TransferConfig
from .critics import freeze_lower_blocks
from .images import to_float
from .losses import critic_loss, generator_loss
from .places import new_mined
from .processes import Processes
from .randomness import DataOrder, seed_all

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """One run's state: `mined` (generator and miners), `critic`, their averages and optimizers.

    images: uint8 [N, C, R, R] on the CPU. Every step's randomness follows from (config.seed, step). On several
    processes each takes its part of every batch, and after every step all have the same weights and state.
    """

    def __init__(
        self,
        config: TransferConfig,
        generator: nn.Module,
        critic: nn.Module,
        images: Tensor,
        device,
        processes: Processes | None = None,
    ):
        self.config, self.device, self.processes = config, torch.device(device), processes or Processes()
        self.images, self.order = images, DataOrder(len(images), config.batch, config.seed)
        self.generator = generator.to(self.device).eval().requires_grad_(False)
        self.critic = critic.to(self.device).train().requires_grad_(True)
        self.mined = new_mined(config, self.generator).to(self.device)
        self.processes.equalise([t for net in (self.mined, self.critic) for t in (*net.parameters(), *net.buffers())])
        self.average = self.mined.before(self.generator)
        for parameter in self.average.mining_parameters():
            parameter.requires_grad_(False)
        self.finetuner: SparseFinetuner | None = None

        if config.train_critic == "freezed":
            freeze_lower_blocks(self.critic, config.freeze_blocks)
        self.betas = (config.beta1, config.beta2)
        trained = [p for p in self.critic.parameters() if p.requires_grad]
        self.critic_optimizer = torch.optim.Adam(trained, config.critic_lr, betas=self.betas, fused=True)
        self.miner_optimizer = torch.optim.Adam(
            self.mined.mining_parameters(), config.miner_lr, betas=self.betas, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.path_length_weight = path_length_weight(config, generator)
        self.path_length_mean = torch.zeros((), device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def step(self, number: int) -> dict[str, Tensor]:
        """Trains critic, miners and, after `select`, the selected neurons once; returns the losses of the batch."""
        seed_all(self.config.seed, "step", number)
        values = {"loss_D": self._train_critic(number), "loss_G": self._train_generator(number)}
        self.scaler.update()
        decay = min(self.config.ema_decay, (number + 1) / (number + 10))
        with torch.no_grad():
            pairs = zip(self.average.mining_parameters(), self.mined.mining_parameters(), strict=True)
            for average, live in pairs:
                average.lerp_(live, 1 - decay)
        for value in values.values():
            self.finite &= torch.isfinite(value)
        return values

    def _train_critic(self, number: int) -> Tensor:
        config = self.config
        with self.processes.part(config.batch) as count:
            real = to_float(self.images[self.processes.own(self.order[number])]).to(self.device)
            with torch.no_grad(), self._autocast():
                fake = self.mined(self._latents(count)).float()
            real, fake = (diff_augment(x, config.augment) for x in (real, fake))
            with self._autocast():
                loss = critic_loss(config.loss, self.critic(real), self.critic(fake))
            total = loss
            if config.r1_gamma and number % config.r1_every == 0:
                total = total + config.r1_gamma / 2 * config.r1_every * r1_penalty(self.critic, real)
            if config.gradient_penalty_weight:
                total = total + config.gradient_penalty_weight * gradient_penalty(self.critic, real, fake)
        self.critic_optimizer.zero_grad()
        self.scaler.scale(total).backward()
        return self._update(loss.detach(), self.critic_optimizer)

    def _train_generator(self, number: int) -> Tensor:
        config = self.config
        optimizers = [self.miner_optimizer] + ([self.finetuner] if self.finetuner else [])
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        for optimizer in optimizers:
            optimizer.zero_grad()
        with self.processes.part(config.batch) as count, self._autocast():
            fake = self.mined(self._latents(count))
            loss = generator_loss(config.loss, self.critic(diff_augment(fake, config.augment)))
        # `inputs` leaves the critic's weight gradients out.
        self.scaler.scale(loss).backward(inputs=trained)
        if self.finetuner and self.path_length_weight and number % config.path_length_every == 0:
            self._regularise_path_length(trained)
        return self._update(loss.detach(), *optimizers)

    def _regularise_path_length(self, trained: list[nn.Parameter]) -> None:
        """Adds to the gradients. The length that a process compares with is the running mean moved, by a hundredth, by
        its own samples; the mean that is kept is moved by those of all."""
        batch, mean = max(1, self.config.batch // 2), self.path_length_mean
        with self.processes.part(batch) as count:
            share = count * self.processes.size / batch  # 1 where all have as many samples
            if count:
                images, latents = self.mined(self._latents(count), return_latents=True)
                penalty, mean, _ = path_length_penalty(images, latents, mean)
                weight = self.path_length_weight * self.config.path_length_every * share
                self.scaler.scale(weight * penalty).backward(inputs=trained)
        self.path_length_mean = mean * share
        self.processes.average([self.path_length_mean])

    def _update(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
        """Steps by the gradients of the whole batch, of whose loss this returns the mean. One message carries all: the
        dense parameters' gradients, the selected rows of the others, and the loss."""
        if self.processes.size > 1:
            loss = loss.clone()
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            self.processes.average([*gradients(groups), loss])
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        return loss

    def begin_finetuning(self) -> None:
        """Gives the generator its optimizer (and the critic a sparse one, if asked for); nothing is selected yet."""
        config = self.config
        common = {
            "betas": self.betas, "density": config.density, "budget": config.budget, "criterion": config.criterion,
            "scope": config.scope, "policy": config.policy, "seed": config.seed,
        }  # fmt: skip
        self.generator.requires_grad_(True)
        if self.mined.constant is not None:  # the generator's own is not read: no neuron of it is to be selected
            self.generator.learned_constant.requires_grad_(False)
        self.finetuner = SparseFinetuner(self.generator, config.generator_lr, ema_decay=config.ema_decay, **common)
        if config.train_critic == "sparse":
            self.critic_optimizer = SparseFinetuner(self.critic, config.critic_lr, **common)

    def select(self) -> None:
        """Scores the neurons by the finetuning loss on the target and selects them, after `begin_finetuning`."""
        self._score(self.finetuner, self.critic, self._generator_evidence)
        self.finetuner.select()
        if isinstance(self.critic_optimizer, SparseFinetuner):
            self._score(self.critic_optimizer, self.generator, self._critic_evidence)
            self.critic_optimizer.select()

    def _score(self, optimizer: SparseFinetuner, other: nn.Module, evidence) -> None:
        config = self.config
        if config.criterion in ("magnitude", "random"):
            return
        # The Fisher information is the mean of per-sample squares: one sample a backward.
        batch = 1 if config.criterion == "fisher" else config.batch
        still = [*other.parameters(), *self.mined.mining_parameters()]
        flags = [p.requires_grad for p in still]
        for parameter in still:
            parameter.requires_grad_(False)
        self.critic.eval()  # on several processes its buffers would see other samples
        processes, hooks = self.processes, []
        with optimizer.scoring(samples=1 if batch == 1 else None):
            if config.criterion == "movement" and processes.size > 1:  # its dense steps are steps of the whole batch
                hooks = [m.parameter.register_hook(self._mean) for layer in optimizer.layers for m in layer.members]
            for k in range(-(-config.score_samples // batch)):
                seed_all(config.seed, "score", k)
                samples = torch.arange(k * batch, (k + 1) * batch)
                if batch % processes.size == 0:
                    with processes.part(batch):
                        evidence(processes.own(samples)).backward()
                elif k % processes.size == processes.rank:
                    evidence(samples).backward()
        for hook in hooks:
            hook.remove()
        self.critic.train()
        for parameter, flag in zip(still, flags, strict=True):
            parameter.requires_grad_(flag)

    def _mean(self, grad: Tensor) -> Tensor:
        grad = grad.clone()
        self.processes.average([grad])
        return grad

    def _generator_evidence(self, samples: Tensor) -> Tensor:
        fake = self.mined(self._latents(len(samples)))
        return generator_loss(self.config.loss, self.critic(diff_augment(fake, self.config.augment)))

    def _critic_evidence(self, samples: Tensor) -> Tensor:
        real = to_float(self.images[samples % len(self.images)]).to(self.device)
        pair = (diff_augment(x, self.config.augment) for x in (real, self.mined(self._latents(len(samples)))))
        return critic_loss(self.config.loss, *(self.critic(x) for x in pair))

    def result(self) -> Mined:
        """A copy that samples as the run's result does: averaged miners before the generator with averaged neurons."""
        generator = self.finetuner.ema_model() if self.finetuner else copy.deepcopy(self.generator)
        return self.average.before(generator).eval().requires_grad_(False)

    def state_dict(self) -> dict:
        return {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "mined": self.mined.mining_state(),
            "average": self.average.mining_state(),
            "miner_optimizer": self.miner_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "finetuner": self.finetuner.state_dict() if self.finetuner else None,
            "scaler": self.scaler.state_dict(),
            "path_length_mean": self.path_length_mean,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()`; the networks must be those that the run began with."""
        if state["finetuner"] is not None:
            self.begin_finetuning()
            self.finetuner.load_state_dict(state["finetuner"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.miner_optimizer.load_state_dict(state["miner_optimizer"])
        for name in ("generator", "critic"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("mined", "average"):
            getattr(self, name).load_mining_state(state[name])
        self.scaler.load_state_dict(state["scaler"])
        self.path_length_mean = state["path_length_mean"].to(self.device)

    def _latents(self, batch: int) -> Tensor:
        return torch.randn(batch, self.mined.input_dim, device=self.device)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield


def path_length_weight(config: TransferConfig, generator: nn.Module) -> float:
    """The configured weight, or by default 2 for generators that return their latents and 0 for others, among them
    StyleGAN, which was trained without."""
    able = "return_latents" in inspect.signature(generator.forward).parameters
    if config.path_length_weight and not able:
        raise ValueError(
            f"path_length_weight needs a generator with a return_latents argument, which {type(generator).__name__} "
            "has not; set path_length_weight to 0"
        )
    if config.path_length_weight is not None:
        return config.path_length_weight
    return 2.0 if able and getattr(generator, "family", None) != "stylegan" else 0.0
