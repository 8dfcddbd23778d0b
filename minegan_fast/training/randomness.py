"""Randomness as a function of (seed, step): nothing to save, and a resumed run repeats the uninterrupted one."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

AHEAD = 256  # batches


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def set_random_state(seed: int, *purpose: int | str) -> None:
    """Sets PyTorch's default generators of all devices, for one purpose. The state that they had is lost."""
    torch.manual_seed(derived_seed(seed, *purpose))


def keep_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Gives the random state of the CPU, and of this device, back after the block. It sets none."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def keep_and_set_random_state(seed: int, *purpose: int | str) -> Iterator[None]:
    """Draws on the CPU in the block are those after `set_random_state`; afterwards the CPU's state is the old one.

    The state of a GPU is neither set nor kept.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(derived_seed(seed, *purpose))  # torch.manual_seed would reach GPUs too
        yield


class DataOrder:
    """Endless passes over n samples, each in a new order; batch k holds positions k·batch to (k+1)·batch - 1.

    device: where the indices are given. They go there for `AHEAD` batches at once, so that few steps copy any.
    """

    def __init__(self, n: int, batch: int, seed: int, device: torch.device | str = "cpu"):
        self.n, self.batch, self.seed, self.device = n, batch, seed, device
        self._first, self._ahead = 0, torch.empty(0, batch)

    def __getitem__(self, k: int) -> Tensor:
        """Indices [batch] of batch k."""
        if not self._first <= k < self._first + len(self._ahead):
            batches = self._batches(k, k + AHEAD)
            if torch.device(self.device).type == "cuda":
                batches = batches.pin_memory()  # else the step would wait for its copy
            self._first, self._ahead = k, batches.to(self.device, non_blocking=True)
        return self._ahead[k - self._first]

    def _batches(self, first: int, end: int) -> Tensor:
        """[end - first, batch]"""
        start, stop = first * self.batch, end * self.batch
        passes = range(start // self.n, (stop - 1) // self.n + 1)
        order = torch.cat([self._permutation(p) for p in passes])
        return order[start - passes[0] * self.n :][: stop - start].view(-1, self.batch)

    def _permutation(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "pass", number))
        return torch.randperm(self.n, generator=generator)
