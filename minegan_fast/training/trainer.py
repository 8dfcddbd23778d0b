"""The networks and optimizers of a run, and what one step does with them.

Stage 1 trains the miners while the generator is frozen. Stage 2 selects the generator's neurons on the target and
trains them too (MineGAN++: Wang et al. 2021, arXiv 2104.13742). The loss of a stage is that of a critic, which then
trains beside them, or the kernel distance of pretrained features, which needs no critic. The generator is in eval mode
in both stages, because batch statistics of a few images are noisy, and a delta holds no buffers.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ..collectives import gradients
from ..finetune import Selection, SparseFinetuner
from ..layers import path_length_penalty
from ..mining import MultiGenerator, Spread
from ..mining.offload import Transfers
from .adversary import WARM_UP, Adversary
from .captured import CapturedSteps, CaptureError, CudaGraphs
from .config import TransferConfig
from .elastic import ElasticWeights
from .generators import Generator, Several, networks, placed
from .kernel_loss import KernelLoss, gathering
from .kernel_mixture import KernelMixture
from .machine import Machine
from .methods import KERNEL
from .miners import Network, branches, latents_of, miners_of, mixed, new_network, shares, spread_of
from .processes import Processes
from .randomness import set_random_state
from .relevance import score

T = TypeVar("T")


class StepKind(NamedTuple):
    """What a step does: whether critic and generator train, and with which lazy penalties."""

    critic: bool
    generator: bool
    r1: bool
    path_length: bool


class Trainer:
    """One run's state: `mined` (generator and miners), their averages and optimizers, and what gives the losses.

    images: uint8 [N, C, R, R] on the CPU. critic: for adversarial losses; new_critic: whether it knows nothing yet.
    kernel: for the kernel distance. graphs: captures the steps; what they cannot capture runs as without. sleep: where
        generators sleep whose device does not hold all of them.

    why_eager: why steps are not captured any more; empty where nothing went wrong.

    Every step's randomness follows from (config.seed, step). On several processes each takes its part of every batch,
    and after every step all have the same weights and state. ValueError: a part is missing that the settings need.
    """

    def __init__(
        self,
        config: TransferConfig,
        generator: Generator,
        critic: nn.Module | None,
        images: Tensor,
        device,
        processes: Processes | None = None,
        kernel: KernelLoss | None = None,
        new_critic: bool = False,
        graphs: CudaGraphs | None = None,
        sleep: Transfers | None = None,
    ):
        self.config, self.device, self.processes = config, torch.device(device), processes or Processes()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.machine = Machine(config, self.device, self.processes, self.scaler, fixed=graphs is not None)
        self.captured, self.why_eager = CapturedSteps(graphs), ""
        self.generator = generator.eval().requires_grad_(False)
        if not config.hosted:
            self.generator.to(self.device)
        for network in networks(self.generator):
            with placed(network, self.device):
                self.processes.equalise([*network.parameters(), *network.buffers()])
        self.sleep = sleep
        self.mined: Network = new_network(config, self.generator, self.processes, self.device, sleep)
        self.branches = branches(self.mined)
        self.kernel, self.mixture = kernel, None
        if isinstance(generator, Several) and KERNEL in config.losses:
            self.mixture = KernelMixture(
                _given(kernel, "kernel distance"), generator.names, config.batch, self.processes
            )
        self.adversary: Adversary | None = None
        if config.adversarial:
            images = images.to(self.device) if self.machine.fixed else images
            self.adversary = Adversary(self.machine, _given(critic, "critic"), images)
        critic_tensors = (
            [*self.adversary.critic.parameters(), *self.adversary.critic.buffers()] if self.adversary else []
        )
        self.processes.equalise([*miners_of(self.mined), *critic_tensors])
        self.average = self._averages()
        self.finetuner: SparseFinetuner | None = None
        self.elastic: ElasticWeights | None = None
        self._begin_shares()

        self.betas = (config.beta1, config.beta2)
        self.miner_optimizer: torch.optim.Adam | None = None
        if config.train_miner:
            self.miner_optimizer = torch.optim.Adam(
                self.mined.mining_parameters(), self.machine.rate(config.miner_lr), betas=self.betas, fused=True
            )
        else:
            for branch in self.branches:
                branch.miner.requires_grad_(False)
        self.penalised = bool(config.train_miner and config.prior_weight)
        mines = config.mining_steps and config.mining_loss != KERNEL
        first, steps = (0, config.mining_steps) if mines else (config.mining_steps, config.finetune_steps)
        warm_up = min(WARM_UP, steps // 4) if new_critic else 0
        warm_up = warm_up if config.critic_warmup is None else config.critic_warmup
        self.alone = range(first, first + warm_up)  # the steps in which the critic trains alone
        self.path_length_weight = path_length_weight(config, generator)
        self.path_length_mean = torch.zeros((), device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def _averages(self) -> Network:
        average = self.mined.before(self.generator)
        for parameter in average.mining_parameters():
            parameter.requires_grad_(False)
        return average

    @property
    def spread(self) -> Spread | None:
        """The processes over which the generators are spread in this stage; None where each has all of them."""
        return spread_of(self.mined)

    @property
    def loss_name(self) -> str:
        return self.config.finetune_loss if self.finetuner else self.config.mining_loss

    def loss(self, fake: Tensor) -> Tensor:
        """The loss of the present stage, of generated images [B, C, R, R]; a scalar."""
        if self.loss_name == KERNEL:
            return _given(self.kernel, "kernel distance")(fake)
        return _given(self.adversary, "critic").loss(self.loss_name, fake)

    def step(self, number: int) -> dict[str, Tensor]:
        """Trains critic, miners and, after `select`, the selected neurons once; returns the losses of the batch."""
        config, adversarial = self.config, self.loss_name != KERNEL
        kind = StepKind(
            critic=adversarial,
            generator=not (adversarial and number in self.alone),
            r1=adversarial and config.r1_gamma > 0 and number % config.r1_every == 0,
            path_length=bool(self.finetuner and self.path_length_weight) and number % config.path_length_every == 0,
        )
        decay = min(config.ema_decay, (number + 1) / (number + 10))
        inputs = [torch.full((), 1 - decay, device=self.device)]
        if adversarial:
            inputs.append(_given(self.adversary, "critic").samples(number))
        set_random_state(config.seed, "step", number)
        try:
            return self.captured.run(kind, functools.partial(self._step, kind), inputs)
        except CaptureError as error:
            self.why_eager = str(error)
            self.stop_capturing()
            return self.step(number)

    def _step(self, kind: StepKind, average_weight: Tensor, samples: Tensor | None = None) -> dict[str, Tensor]:
        """A step, whose numbers are all on the device. average_weight: how far, 0-d, the averages move to the miners.
        samples: which images the critic sees."""
        values = {}
        if kind.critic:
            adversary, samples = _given(self.adversary, "critic"), _given(samples, "batch of images")
            values["loss_D"] = adversary.step(samples, self.loss_name, self.mined, kind.r1)
        if kind.generator:
            values |= self._train_generator(kind.path_length)
        self.scaler.update()
        with torch.no_grad():
            pairs = zip(self.average.mining_parameters(), self.mined.mining_parameters(), strict=True)
            for average, live in pairs:
                average.lerp_(live, average_weight.to(average.dtype))
        for value in values.values():
            self.finite &= torch.isfinite(value)
        return values | {f"p_{name}": torch.tensor(p, dtype=torch.float64) for name, p in self.shares_of().items()}

    def shares_of(self) -> dict[str, float]:
        """{name of a source: its share in the mixture}; empty where there is one."""
        names = self.generator.names if isinstance(self.generator, Several) else []
        return dict(zip(names, shares(self.mined), strict=False))

    def interval(self) -> list[list[float]] | None:
        """Where each share lies, in 9 of 10 cases; None where the critic chooses, who tells no such thing."""
        if self.mixture is None or self.loss_name != KERNEL:
            return None
        return self.mixture.mixture.interval().tolist()

    def _begin_shares(self) -> None:
        """p at the beginning of a stage: as far as it is solved for what is known, else equal for all generators whose
        images are numbers."""
        if not isinstance(self.generator, Several) or not isinstance(self.mined, MultiGenerator):
            return
        self.mined.reset(self.generator.finite)
        if self.mixture and self.loss_name == KERNEL and self.mixture.mixture.batches:
            self.mined.take(self.mixture.mixture.p)

    def stop_capturing(self) -> None:
        """From now on every step runs as it is, also after a capture that failed: it has left its marks in objects of
        Python, gradients and the scaler's records, but written nothing on the GPU."""
        self.captured, self.machine.fixed = CapturedSteps(), False
        for optimizer in self._rates():
            optimizer.zero_grad()
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        scaler.load_state_dict(self.scaler.state_dict())
        self.scaler = self.machine.scaler = scaler

    def _rates(self) -> dict[torch.optim.Optimizer, float]:
        """All optimizers, with the learning rates of the configuration."""
        critic = None if self.adversary is None else self.adversary.optimizer
        config = self.config
        pairs = (
            (self.miner_optimizer, config.miner_lr),
            (self.finetuner, config.generator_lr),
            (critic, config.critic_lr),
        )
        return {optimizer: lr for optimizer, lr in pairs if optimizer is not None}

    def _train_generator(self, path_length: bool) -> dict[str, Tensor]:
        config = self.config
        optimizers = [o for o in (self.miner_optimizer, self.finetuner) if o is not None]
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        for optimizer in optimizers:
            self.machine.zero_grad(optimizer)
        with self.machine.batch(self.mined) as count:
            if self.mixture and self.loss_name == KERNEL:
                us, loss = self.mixture_backward(count)
            else:
                u = self.machine.latents(self.mined, count)
                loss = self._kernel_step(u) if self.loss_name == KERNEL else self._adversarial_step(u, trained)
                us = [u] * len(self.branches)
            if self.penalised:
                self._penalise(us)
        if self.spread:
            self.spread.share_gradients(self.mined.mining_parameters())
        if path_length:
            self._regularise_path_length(trained)
        if self.elastic:
            self.elastic.add_gradients(config.ewc_weight, self._scale)
        if len(self.branches) > 1:  # one that has no part in this batch gets zeros, as of the formulas
            for optimizer in optimizers:
                gradients(optimizer.param_groups)
        return {"loss_G": self.machine.update(loss, *optimizers, agreed=self.spread is not None)}

    def _penalise(self, us: list[Tensor]) -> None:
        """Adds the gradient of the prior's penalty, of the latents of all processes: of several generators the mean by
        their shares. It runs the miners once more, which costs nothing beside a step. Of spread generators each process
        has those of the whole batch of its own."""
        gather = None if self.spread else gathering(self.processes, self.config.batch)
        processes = 1 if self.spread else self.processes.size
        for i, (branch, share, u) in enumerate(zip(self.branches, shares(self.mined), us, strict=True)):
            if branch.prior in ("sphere", "none") or not share or (self.spread and i not in self._own):
                continue
            latents = latents_of(self.mined, i, u)
            if gather is not None:
                (others,), own = gather([latents.detach()])
                latents = torch.cat([others[: own.start], latents, others[own.stop :]])  # only this process's learn
            weight = share * self.config.prior_weight * processes  # gradients become means
            self.scaler.scale(weight * branch.penalty(latents)).backward()

    def _adversarial_step(self, u: Tensor, trained: list[nn.Parameter]) -> Tensor:
        with self.machine.autocast():
            made, _ = self.mined.best(u, _given(self.adversary, "critic").critic)
        with self.machine.judged(self.mined, made) as fake:
            images = fake.detach().requires_grad_()  # so that the generators have one backward, and the critic none
            with self.machine.autocast():
                loss = self.loss(images)
            self.scaler.scale(loss).backward(inputs=[images])
            if weight := self.config.mmd_weight:
                self._kernel_backward(lambda *_: images.float(), len(images), None, weight)
        fake.backward(images.grad, inputs=trained)
        return loss.detach()

    def _kernel_step(self, u: Tensor) -> Tensor:
        return self._kernel_backward(self._making(self.mined, u), len(u), self._part, 1.0)

    def _making(self, images: Callable[[Tensor], Tensor], u: Tensor) -> Callable[[int, int], Tensor]:
        def make(first: int, last: int) -> Tensor:
            with self.machine.autocast():
                return images(u[first:last]).float()

        return make

    @property
    def _own(self) -> Collection[int]:
        """Of several generators, which this process runs."""
        return self.mined.runner.own if isinstance(self.mined, MultiGenerator) else range(1)

    @property
    def _part(self) -> int | None:
        return self.config.part and -(-self.config.part // (1 if self.spread else self.processes.size))

    def mixture_backward(self, count: int, learn: bool = True) -> tuple[list[Tensor], Tensor]:
        """Adds the gradient of the kernel distance of the mixture of all generators, each of which makes `count`
        samples, and returns their latents and the distance. learn: as of `KernelMixture.backward`."""
        mixture, several = _given(self.mixture, "mixture"), cast(MultiGenerator, self.mined)
        us = [self.machine.latents(several, count) for _ in self.branches]
        makes = [
            self._making(functools.partial(several.images_of, i), u) if i in self._own else None
            for i, u in enumerate(us)
        ]
        loss = mixture.backward(makes, count, self._part, self._scale, learn, self.spread)
        if learn:
            several.take(mixture.mixture.p)
        return us, loss

    def _kernel_backward(self, make, count: int, part: int | None, weight: float) -> Tensor:
        """Adds the gradient of the kernel distance of the samples of all processes, and returns the distance."""
        gather = gathering(self.processes, self.config.batch)
        kernel = _given(self.kernel, "kernel distance")
        validate = not self.machine.fixed
        return kernel.backward(make, count, part, weight * self._scale, gather, self.processes.size, validate)

    @property
    def _scale(self) -> Tensor:
        """The factor by which fp16 scales losses; 1 in the other precisions."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def _regularise_path_length(self, trained: list[nn.Parameter]) -> None:
        """Adds the gradient of path length.

        A process compares with the running mean after its own samples have moved it by a hundredth; the mean that is
        kept is moved by the samples of all processes.
        """
        batch, mean = max(1, self.config.batch // 2), self.path_length_mean
        with self.processes.part(batch) as count:
            share = count * self.processes.size / batch  # 1 where all have as many samples
            if count:
                images, latents = self.mined(self.machine.latents(self.mined, count), return_latents=True)
                penalty, mean, _ = path_length_penalty(images, latents, mean)
                weight = self.path_length_weight * self.config.path_length_every * share
                self.scaler.scale(weight * penalty).backward(inputs=trained)
        self.path_length_mean.copy_(mean * share)
        self.processes.average([self.path_length_mean])

    def begin_finetuning(self) -> SparseFinetuner:
        """Gives the generator its optimizer (and the critic a sparse one, if asked for); nothing is selected yet."""
        config = self.config
        if self.spread:
            self._gather()
        common = {
            "betas": self.betas, "density": config.density, "budget": config.budget, "criterion": config.criterion,
            "scope": config.scope, "policy": config.policy, "seed": config.seed,
        }  # fmt: skip
        self.generator.requires_grad_(True)
        self._keep_awake()
        for branch in self.branches:
            if branch.constant is not None:  # the generator's own is not read: no neuron of it is to be selected
                branch.generator.learned_constant.requires_grad_(False)
        own = {"ema_decay": config.ema_decay, "affine": config.affine}
        self.finetuner = SparseFinetuner(self.generator, self.machine.rate(config.generator_lr), **common, **own)
        if config.train_critic == "sparse":
            _given(self.adversary, "critic").begin_sparse(**common)
        return self.finetuner

    def select(self) -> tuple[SparseFinetuner, Selection]:
        """Scores the neurons by the finetuning loss on the target and selects them; the first time it begins stage 2.

        Returns the optimizer of the generator's neurons, and the selection. Generators that sleep are awake while
        neurons are scored, and those in which none is selected sleep again.
        """
        begins = self.finetuner is None
        finetuner = self.finetuner or self.begin_finetuning()
        self._keep_awake()
        self.captured.forget()
        if self.config.method == "scale_shift":
            selection = finetuner.select({})  # beside what trains in every neuron
        else:
            score(self, finetuner)
            selection = finetuner.select()
            if self.config.method == "shuffled":
                selection = finetuner.select(selection.shuffled(self.config.seed))
        if self.adversary and isinstance(self.adversary.optimizer, SparseFinetuner):
            score(self, self.adversary.optimizer)
            self.adversary.optimizer.select()
        if self.config.method == "ewc":
            self.elastic = ElasticWeights(finetuner)
            self.elastic.measure(self)
        self._keep_awake(training=True)
        if begins:  # only now: the neurons are scored by samples of the mixture as it was mined
            self._begin_shares()
        return finetuner, selection

    def _gather(self) -> None:
        """Ends the spreading: from now on each process has all generators, behind the miners that it has, and takes its
        part of every batch."""
        several, generator = cast(MultiGenerator, self.mined), cast(Several, self.generator)
        if several.runner.offload:
            several.runner.offload.rest()
        average = self.average.mining_state()
        sleep = self.sleep if self.config.offload else None
        self.mined = mixed(self.config, generator, self.branches, self.processes, self.device, sleep)
        self.mined.set_extra_state(several.get_extra_state())
        self.branches = branches(self.mined)
        self.average = self._averages()
        self.average.load_mining_state(average)

    def _keep_awake(self, training: bool = False) -> None:
        """Of generators that sleep, lets all stay awake, or only those in which something trains."""
        offload = self.mined.runner.offload if isinstance(self.mined, MultiGenerator) else None
        if offload is None:
            return
        trains = [any(p.requires_grad for p in network.parameters()) for network in networks(self.generator)]
        offload.keep_awake([i for i, it in enumerate(trains) if it or not training])

    def result(self) -> Network:
        """What samples as the run's result does: averaged miners before a copy of the generator with averaged neurons,
        or in stage 1, in which it does not change, before the generator itself. One process alone may call it."""
        generator = self.finetuner.ema_model().requires_grad_(False) if self.finetuner else self.generator
        found = self.average.before(generator)
        if self.spread:
            generator = cast(Several, copy.deepcopy(generator))
            found = mixed(self.config, generator, branches(found), self.processes, self.device, self.sleep)
        found = found.eval().requires_grad_(False)
        if isinstance(found, MultiGenerator):
            found.take(cast(MultiGenerator, self.mined).probabilities)
        return found

    def state_dict(self) -> dict:
        def of(part):
            return None if part is None else part.state_dict()

        return {
            "generator": self.generator.state_dict(),
            "mined": self.mined.mining_state(),
            "average": self.average.mining_state(),
            "miner_optimizer": of(self.miner_optimizer),
            "adversary": of(self.adversary),
            "finetuner": of(self.finetuner),
            "elastic": of(self.elastic),
            "mixture": of(self.mixture and self.mixture.mixture),
            "scaler": self.scaler.state_dict(),
            "path_length_mean": self.path_length_mean,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()`; the networks must be those that the run began with."""
        self.captured.forget()
        if state["finetuner"] is not None:
            finetuner = self.begin_finetuning()
            finetuner.load_state_dict(state["finetuner"])
            self._keep_awake(training=True)
            if state["elastic"] is not None:
                self.elastic = ElasticWeights(finetuner)
                self.elastic.load_state_dict(state["elastic"])
        for part in (self.adversary, self.miner_optimizer):
            if part is not None:
                part.load_state_dict(state["adversary" if part is self.adversary else "miner_optimizer"])
        self.generator.load_state_dict(state["generator"])
        for name in ("mined", "average"):
            getattr(self, name).load_mining_state(state[name])
        if self.mixture:
            self.mixture.mixture.load_state_dict(state["mixture"])
        self.scaler.load_state_dict(state["scaler"])
        self.path_length_mean.copy_(state["path_length_mean"])
        for optimizer, lr in self._rates().items():  # the run so far may have had them elsewhere
            for group in optimizer.param_groups:
                group["lr"] = self.machine.rate(lr)


def _given(part: T | None, name: str) -> T:
    """A part that the settings ask for. ValueError: the trainer was made without it."""
    if part is None:
        raise ValueError(f"these settings need a {name}, and the trainer was given none")
    return part


def path_length_weight(config: TransferConfig, generator: nn.Module) -> float:
    """The configured weight, or by default 2 under an adversarial loss for generators that return their latents and 0
    for others, among them StyleGAN, which was trained without."""
    if isinstance(generator, Several):
        return 0.0
    able = "return_latents" in inspect.signature(generator.forward).parameters
    if config.path_length_weight and not able:
        raise ValueError(
            f"path_length_weight needs a generator with a return_latents argument, which {type(generator).__name__} "
            "has not; set path_length_weight to 0"
        )
    if config.path_length_weight is not None:
        return config.path_length_weight
    regular = able and getattr(generator, "family", None) != "stylegan"
    return 2.0 if regular and config.finetune_loss != KERNEL else 0.0
