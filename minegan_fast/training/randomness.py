"""Randomness as a function of (seed, step): nothing to save, and a resumed run repeats the uninterrupted one."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(seed: int, *purpose: int | str) -> None:
    """Seeds PyTorch's default generators of all devices for one purpose."""
    torch.manual_seed(derived_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Draws on the CPU in the block are those after `seed_all`; the caller's random state comes back."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(derived_seed(seed, *purpose))  # torch.manual_seed would reach GPUs too
        yield


class DataOrder:
    """Endless passes over n samples, each in a new order; batch k holds positions k·batch to (k+1)·batch - 1."""

    def __init__(self, n: int, batch: int, seed: int):
        self.n, self.batch, self.seed = n, batch, seed
        self._passes: dict[int, Tensor] = {}

    def __getitem__(self, k: int) -> Tensor:
        """Indices [batch] of batch k."""
        positions = torch.arange(k * self.batch, (k + 1) * self.batch)
        numbers = positions // self.n
        needed = range(int(numbers[0]), int(numbers[-1]) + 1)
        self._passes = {p: self._passes[p] if p in self._passes else self._permutation(p) for p in needed}
        return torch.stack([self._passes[p][i] for p, i in zip(numbers.tolist(), (positions % self.n).tolist())])  # noqa: B905

    def _permutation(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "pass", number))
        return torch.randperm(self.n, generator=generator)
