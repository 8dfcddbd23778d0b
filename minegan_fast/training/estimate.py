"""What a run will need, before it starts: memory by counting what steps of a few samples take, time by a few steps."""

import bisect
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..layers import gradient_penalty, path_length_penalty
from ..mining import Mined, device_bytes
from .augment import diff_augment
from .config import TransferConfig
from .critics import begin_training, critic_r1
from .evaluation import at_once
from .footprint import peak, without_gradients
from .generators import Generator, Several, image_channels, networks, placed
from .kernel_loss import KernelLoss
from .losses import LOSSES, critic_loss, generator_loss
from .machine import DTYPES
from .miners import new_branches
from .randomness import keep_random_state
from .trainer import Trainer, path_length_weight

COUNTED = 2, 4  # samples of which steps are counted; path length takes half of a batch
# What an allocator takes for a byte of tensors: there are gaps between them, and operations have workspaces. Measured
# on the CPU (bench/memory.py).
HEADROOM = {"cpu": 1.25, "cuda": 1.1}
LATER = {"cpu": 192 << 20}  # libraries and compiled code that come into memory while a run goes on
LEFT = {"cpu": 0.5}  # of the second largest work: what it leaves is in pieces, of which the largest one cannot use all
MOST = 10**7  # images of a batch


class DoesNotFit(RuntimeError):  # noqa: N818
    """The run needs more memory than there is."""


class Work(NamedTuple):
    """Bytes that some work takes for a while: fixed, and for each sample, of which there are `most` at once."""

    fixed: int
    per_sample: int = 0
    most: int | None = None

    def bytes(self, samples: int) -> int:
        return self.fixed + self.per_sample * (samples if self.most is None else min(samples, self.most))


@dataclass
class Estimate:
    """Bytes on its device that one process needs.

    held: what it has already. networks: beside that, for copies of the networks, gradients, moments and averages, all
    the time. work: of which one is done at a time. available: what is free on the device. processes: how many share a
    batch. spread: whether they share the generators instead, and each makes whole batches. left: how much of a work's
    memory the others cannot use.
    """

    held: int
    networks: int
    work: list[Work]
    available: int
    processes: int = 1
    spread: bool = False
    left: float = 0.0

    def needed(self, batch: int) -> int:
        """Beside what the process has already."""
        samples = -(-batch // (1 if self.spread else self.processes))
        largest, second, *_ = sorted((*(work.bytes(samples) for work in self.work), 0), reverse=True)
        return self.networks + largest + int(self.left * second)

    def total(self, batch: int) -> int:
        """The most that the process will have."""
        return self.held + self.needed(batch)

    def largest_batch(self) -> int:
        """0: not even one sample of each process fits."""
        counts = range(self.processes, MOST + 1, self.processes)
        return self.processes * bisect.bisect_right(counts, self.available, key=self.needed)

    def check(self, batch: int) -> None:
        """Raises DoesNotFit, which names the batch that would fit, where this one would not."""
        if self.needed(batch) <= self.available:
            return
        advice = f"batch {self.largest_batch()} would fit" if self.largest_batch() else "no batch would fit"
        raise DoesNotFit(
            f"the run needs about {_gb(self.needed(batch))} at batch {batch}, but {_gb(self.available)} are free: "
            + advice
        )


def estimate_memory(
    config: TransferConfig,
    generator: Generator,
    critic: nn.Module | None,
    kernel: KernelLoss | None,
    device: torch.device,
    processes: int = 1,
) -> Estimate:
    """Counts what steps of a few samples take, and what networks and optimizers will hold.

    What is on the device of the run already is not counted again: the networks, unless generators are in the memory of
    the host. Of several generators one at a time has a graph of all samples at most.
    """
    several = isinstance(generator, Several)
    shaped, finite = (generator.resized, generator.finite) if several else (nn.Identity(), [True])
    held, available = memory_held(device), available_memory(device)
    regular = bool(config.finetune_steps and path_length_weight(config, generator))
    with keep_random_state(device):
        mined = new_branches(config, generator, device)
        parts = [
            list(_work(config, one, shaped, critic, kernel, device, regular))
            for one in itertools.compress(mined, finite)
        ]
    work = [max(kind, key=lambda one: one.bytes(config.batch)) for kind in zip(*parts, strict=True)]
    work.append(_evaluating(config, generator, work.pop(), device))
    room, dense = HEADROOM[device.type], _bytes(generator)
    # A copy of the generator, then density x (values, gradient, two moments, average); before that, while neurons are
    # scored, gradients of all its weights. Of the critic a copy, gradients and two moments.
    weights = int(dense * (1 + 5 * config.density)) if config.finetune_steps else dense
    if config.hosted:
        weights = max(_bytes_in_stage_1(config, generator, processes), weights if config.finetune_steps else 0)
    weights += 4 * (_bytes(critic) if critic else 0)
    if device.type == "cpu":  # torchrun says how many processes share this machine
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if processes > 1 else 1
    return Estimate(
        held,
        LATER.get(device.type, 0) + int(room * weights),
        [w._replace(fixed=int(room * w.fixed), per_sample=int(room * w.per_sample)) for w in work],
        available,
        processes,
        config.spread,
        LEFT.get(device.type, 0.0),
    )


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _bytes_in_stage_1(config: TransferConfig, generator: Generator, processes: int) -> int:
    """What the device holds of generators that are in the memory of the host: of the process that holds most."""
    each = networks(generator)
    with without_gradients(generator):
        generator.requires_grad_(False)  # as they will be
        own = max(device_bytes(each, config.offload is not None, processes if config.spread else 1))
        measured = device_bytes(each, offload=True)[0] if config.spread else 0  # a copy of all, of which two are awake
    return own + measured


def _work(
    config: TransferConfig,
    mined: Mined,
    shaped: Callable[[Tensor], Tensor],
    critic: Any,
    kernel: Any,
    device: torch.device,
    regular: bool,
) -> Iterator[Work]:
    """The kinds of work of a run, with one generator; the last one is the making of a snapshot's images. regular: with
    path length."""
    dtype, generator = DTYPES[config.precision], cast(Generator, mined.generator)
    loss_name = next((loss for loss in (config.finetune_loss, config.mining_loss) if loss in LOSSES), "")
    judge: Any = nn.Identity() if critic is None else copy.deepcopy(critic)
    if critic is not None:
        begin_training(judge)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def latents(count: int) -> Tensor:
        return torch.randn(count, mined.input_dim, device=device, requires_grad=True)

    def images(u: Tensor) -> Tensor:
        with autocast():
            return shaped(mined(u)).float()

    def critic_step(count: int) -> None:
        fake = images(latents(count)).detach()
        real, fake = (diff_augment(x, config.augment) for x in (torch.rand_like(fake), fake))
        with autocast():
            loss = critic_loss(loss_name, judge(real), judge(fake))
        if config.r1_gamma:
            loss = loss + critic_r1(judge, real)
        if config.gradient_penalty_weight:
            loss = loss + gradient_penalty(judge, real, fake)
        loss.backward()

    def generator_step(count: int) -> None:
        u = latents(count)
        with autocast():
            loss = generator_loss(loss_name, judge(diff_augment(images(u), config.augment)))
        torch.autograd.grad(loss, u)  # what the selected rows get is counted with the networks

    def scoring() -> None:
        with autocast():
            loss = generator_loss(loss_name, judge(images(latents(1))))
        loss.backward(inputs=[p for p in generator.parameters() if p.requires_grad])

    def kernel_step(count: int) -> None:
        u = latents(count)
        kernel.backward(lambda first, last: images(u[first:last]), count)

    def path_length(count: int) -> None:
        made, w = mined(latents(max(1, count // 2)), return_latents=True)
        penalty, _, _ = path_length_penalty(made, w, torch.zeros((), device=device))
        torch.autograd.grad(penalty, [p for p in generator.parameters() if p.requires_grad], allow_unused=True)

    @torch.no_grad()
    def sampling(count: int) -> None:
        images(latents(count))  # what the features take was taken when they looked at the real images

    def counted(step: Callable[[int], None], most: int | None = None) -> Work:
        few, more = (peak(lambda count=count: step(count), device) for count in COUNTED)
        per_sample = max(1, (more - few) // (COUNTED[1] - COUNTED[0]))
        return Work(max(0, few - COUNTED[0] * per_sample), per_sample, most)

    with placed(generator, device), without_gradients(generator):
        generator.requires_grad_(config.finetune_steps > 0)
        if critic is not None and loss_name:
            yield counted(critic_step)
            judge.requires_grad_(False)
            yield counted(generator_step)
            if config.finetune_steps:
                yield Work(peak(scoring, device))
        if kernel is not None:
            yield counted(kernel_step, config.part)
        if regular:
            yield counted(path_length)
        yield counted(sampling)


def _evaluating(config: TransferConfig, generator: Generator, sampling: Work, device: torch.device) -> Work:
    """What a snapshot takes: a copy of the generator with averaged weights, the images that are made at once, and on
    the CPU all of them, twice when they become one tensor, and the file that is written."""
    each = networks(generator)
    size = max(network.resolution for network in each)
    all_images = config.eval_samples * image_channels(each[0]) * size**2 * 4
    fixed = _bytes(generator) * (2 if device.type == "cpu" else 1) + 2 * all_images * (device.type == "cpu")
    return Work(fixed + sampling.bytes(min(config.eval_samples, at_once(size))))


def memory_held(device: torch.device) -> int:
    """What this process has on the device; on the CPU what is of it in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0  # on a system that does not tell


def available_memory(device: torch.device) -> int:
    """Free bytes on the device; on the CPU what the system gives without swapping, within the control group's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def estimate_seconds(trainer: Trainer, steps: int = 3) -> tuple[float, float]:
    """Measured seconds of a mining step and of a finetuning step, without CUDA graphs; 0 for a stage without steps.

    This trains `trainer`: give one to throw away.
    """
    config = trainer.config
    trainer.alone = range(0)
    trainer.stop_capturing()

    def timed(first: int) -> float:
        trainer.step(first)
        trainer.finite.item()
        start = time.perf_counter()
        for number in range(first + 1, first + 1 + steps):
            trainer.step(number)
        trainer.finite.item()  # waits for a GPU
        return (time.perf_counter() - start) / steps

    # A stage that takes no steps may have nothing to train, or no loss.
    mining = timed(1) if config.mining_steps else 0.0
    if config.finetune_steps == 0:
        return mining, 0.0
    trainer.select()
    return mining, timed(1)


def _gb(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
