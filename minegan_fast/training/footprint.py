"""How much memory a piece of work takes: its tensors, counted while it runs."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in its block make on a device: now, and the most at once."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.now, self.most = device, 0, 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = {storage._cdata for storage in self._storages((args, kwargs))}
        made = func(*args, **kwargs)
        for storage in self._storages(made):
            key = storage._cdata
            if key not in there and key not in self.sizes:  # else it is what an operation was given, or a view of it
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, key)
        return made

    def _storages(self, tree: Any) -> Iterator:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                yield leaf.untyped_storage()

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes on the device that `work` has beyond what is there before it, workspaces on a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive(device) as alive:
        work()
    return alive.most


@contextmanager
def without_gradients(*networks: torch.nn.Module) -> Iterator[None]:
    """A block after which the networks' parameters have the gradients, and ask for those, that they had before it."""
    parameters = [p for network in networks for p in network.parameters()]
    before = [(p.grad, p.requires_grad) for p in parameters]
    try:
        yield
    finally:
        for parameter, (gradient, wanted) in zip(parameters, before, strict=True):
            parameter.grad = gradient
            parameter.requires_grad_(wanted)
