"""What is drawn for samples: from a generator of random numbers, again, or for a part of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def draw_inputs(batch: int, size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """u ~ N(0, I) [batch, size] of the dtype and on the device of `like`, from `generator` where there is one."""
    source = like.device if generator is None else generator.device
    return torch.randn(batch, size, generator=generator, device=source, dtype=like.dtype).to(like.device)


@contextmanager
def seeded_by(generator: torch.Generator | None, like: Tensor) -> Iterator[None]:
    """What the block draws on the CPU and the device of `like` follows from one seed, which comes from `generator`; the
    random state is as before after it. Without a generator nothing of it happens."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with seeded(seed, like.device):
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What the block draws on the CPU and the device follows from the seed; the random state is as before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach GPUs that are not forked
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """Of the CPU, and of the device where it is a GPU."""
    own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return torch.get_rng_state(), *own


def set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


class RowsOfBatch(TorchFunctionMode):
    """Makes draws for `count` samples for the whole batch, and keeps the rows of these samples.

    rows: which of the batch's samples they are: indices or a slice. The samples are the first dimension of that size;
    of the first dimensions, where `leading` says so, only the first counts. Draws of other shapes and kinds, such as a
    dropout's mask, stay as they are.
    """

    def __init__(self, rows: Tensor | slice, count: int, batch: int, leading: bool = False):
        super().__init__()
        self.rows, self.count, self.batch, self.leading = rows, count, batch, leading

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function in (torch.rand, torch.randn)
        if made:
            given = args or (kwargs.get("size", ()),)
            shape = torch.Size(given if isinstance(given[0], int) else given[0])
        elif function in (torch.rand_like, torch.randn_like, Tensor.normal_, Tensor.uniform_):
            shape = args[0].shape
        else:
            return function(*args, **kwargs)
        if self.count not in (shape[:1] if self.leading else shape):
            return function(*args, **kwargs)
        axis = shape.index(self.count)
        whole = (*shape[:axis], self.batch, *shape[axis + 1 :])
        if made:
            kwargs.pop("size", None)
            drawn = function(whole, **kwargs)
        else:
            # In memory as the samples' own are, since it is filled in that order.
            order = sorted(range(len(shape)), key=args[0].stride, reverse=True)
            like = {"dtype": args[0].dtype, "device": args[0].device}
            drawn = function(torch.empty_permuted(whole, order, **like), *args[1:], **kwargs)
        own = drawn.movedim(axis, 0)[self.rows].movedim(0, axis)
        return args[0].copy_(own) if function in (Tensor.normal_, Tensor.uniform_) else own.contiguous()
