"""What a run will need, before it starts: memory by counting what a sample saves, time by a few real steps."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..mining import Mined, device_bytes
from .config import TransferConfig
from .critics import critic_r1
from .generators import Generator, Several, networks, placed
from .kernel_loss import KernelLoss
from .losses import generator_loss
from .machine import DTYPES
from .miners import new_branches
from .randomness import keep_random_state
from .trainer import Trainer

# Gradients of activations, workspaces and the allocator's rounding come on top of what is saved for backward.
HEADROOM = 2.0


class DoesNotFit(RuntimeError):  # noqa: N818
    """The run needs more memory than there is."""


@dataclass
class Estimate:
    """Bytes that one process needs.

    networks: for weights, gradients, moments and averages. per_sample: for each of its samples of a batch. available:
    what is free on the device. processes: how many share a batch. part: how many images of a batch are in memory at
    once; None: all. spread: whether the processes share the generators instead, and each makes whole batches.
    """

    networks: int
    per_sample: int
    available: int
    processes: int = 1
    part: int | None = None
    spread: bool = False

    def needed(self, batch: int) -> int:
        return self.networks + -(-min(batch, self.part or batch) // self._sharing) * self.per_sample

    def largest_batch(self) -> int:
        samples = self._sharing * max(0, (self.available - self.networks) // max(1, self.per_sample))
        return samples - samples % self.processes

    @property
    def _sharing(self) -> int:
        return 1 if self.spread else self.processes

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
    """Counts what steps at batch 2 and 3 save for their backward, and what networks and optimizers will hold.

    What is on the device of the run already is not counted again: the networks, unless generators are in the memory of
    the host.
    """
    dense, trained = (_bytes(net) if net else 0 for net in (generator, critic))
    # Generator: the dense gradient before the selection, a copy for evaluation, then density x (values, gradient, two
    # moments, average). Critic: gradient and two moments.
    weights = int(dense * (2 + 5 * config.density)) if config.finetune_steps or not config.hosted else 0
    if config.hosted:
        weights = max(_bytes_in_stage_1(config, generator, processes), weights and dense + weights)
    weights += 3 * trained
    # Of several generators one at a time has a graph of all samples at most.
    several = isinstance(generator, Several)
    shaped, finite = (generator.resized, generator.finite) if several else (nn.Identity(), [True])
    with keep_random_state(device):
        mined = new_branches(config, generator, device)
        counted = [
            [_saved_bytes(config, one, shaped, critic, kernel, device, batch) for batch in (2, 3)]
            for one in itertools.compress(mined, finite)
        ]
    per_sample = max(1, *(three - two for two, three in counted))
    fixed = max(0, *(two - 2 * max(1, three - two) for two, three in counted))
    available = available_memory(device)
    if device.type == "cpu":  # torchrun says how many processes share this machine
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if processes > 1 else 1
    return Estimate(weights + fixed, int(HEADROOM * per_sample), available, processes, config.part, config.spread)


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _bytes_in_stage_1(config: TransferConfig, generator: Generator, processes: int) -> int:
    """What the device holds of generators that are in the memory of the host: of the process that holds most."""
    each, trainable = networks(generator), [p for p in generator.parameters() if p.requires_grad]
    generator.requires_grad_(False)  # as they will be
    own = max(device_bytes(each, config.offload is not None, processes if config.spread else 1))
    measured = device_bytes(each, offload=True)[0] if config.spread else 0  # a copy of all, of which two are awake
    for parameter in trainable:
        parameter.requires_grad_()
    return own + measured


def _saved_bytes(
    config: TransferConfig,
    mined: Mined,
    shaped: Callable[[Tensor], Tensor],
    critic: nn.Module | None,
    kernel: KernelLoss | None,
    device: torch.device,
    batch: int,
) -> int:
    """The most bytes that a step saves for its backward: the generator's under each loss, or the critic's with R1."""
    dtype, steps = DTYPES[config.precision], []
    with placed(mined.generator, device):
        if critic is not None:
            with _counting() as step, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                fake = shaped(mined(torch.randn(batch, mined.input_dim, device=device)))
                generator_loss("nonsaturating", critic(fake))
            steps.append(step.total)
            with _counting() as step:
                critic_r1(critic, fake.detach().float())
            steps.append(step.total)
        if kernel is not None:
            with _counting() as step, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                kernel(shaped(mined(torch.randn(batch, mined.input_dim, device=device))).float())
            steps.append(step.total)
    return max(steps)


class _Count:
    """Counts the storages that a graph saves for its backward, each of them once."""

    def __init__(self):
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextlib.contextmanager
def _counting():
    count = _Count()
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
        yield count


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
    with contextlib.suppress(OSError, ValueError):
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
