"""A run on several processes: each computes a part of every batch, the first one writes, and all end together.

Process r of n takes the samples r, r + n, r + 2n, ... of every batch. Every process draws the random numbers of the
whole batch and keeps those of its samples, so n processes train on what one would train on. In that order the groups of
StyleGAN2's minibatch standard deviation are also those that a single process would form, wherever n divides the groups.
"""

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..collectives import active, average, coalesced, portable
from ..mining.draws import RowsOfBatch

T = TypeVar("T")
# Longer than any evaluation, during which the other processes wait. A process that ends is noticed at once even so.
TIMEOUT = timedelta(hours=6)
_run = itertools.count()


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is; alone where torch.distributed is not in use.

    Every method but `own` and `part` is collective: all processes call it, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own(self, samples: Tensor) -> Tensor:
        """This process's part of a batch [B, ...]."""
        return samples[self.rank :: self.size]

    @contextmanager
    def part(self, batch: int) -> Iterator[int]:
        """Gives the number of this process's samples of a batch. In the block, draws for so many samples are this
        process's part of the draws for the whole batch."""
        count = len(range(self.rank, batch, self.size))
        own = slice(self.rank, None, self.size)
        with RowsOfBatch(own, count, batch) if self.size > 1 else nullcontext():
            yield count

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces the tensors, of which every process has its own values, by their means over the processes."""
        if self.size > 1:
            average(tensors, None)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of whole numbers."""
        if self.size == 1:
            return tensor
        summed = tensor.clone()
        average([summed], None)
        return summed.mul_(self.size).round_()

    def equalise(self, tensors: list[Tensor]) -> None:
        """Gives all processes the first one's values."""
        if self.size > 1:
            coalesced(tensors, functools.partial(dist.broadcast, src=0))

    def from_first(self, function: Callable[[], T]) -> T:
        """The first process calls `function`; all of them return its result, or raise its error."""
        if self.size == 1:
            return function()
        outcome: list = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = _portable(error)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on one process fails on all of them, with the error of the lowest rank that failed."""
        if self.size == 1:
            yield
            return
        mine = None
        try:
            yield
        except Exception as error:
            mine = _portable(error)
        errors = [None] * self.size
        dist.all_gather_object(errors, mine)
        for error in errors:
            if error is not None:
                raise error

    def check_equal(self, value, message: str) -> None:
        """ValueError with this message on all processes where they have different values."""
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
            if any(other != values[0] for other in values):
                raise ValueError(message)


@contextmanager
def join(cuda: bool) -> Iterator[Processes]:
    """The processes of this run: those of torch.distributed where the caller has initialised it, else those that
    torchrun (or whatever sets RANK and WORLD_SIZE) has started; a group that is made here is destroyed afterwards."""
    if dist.is_available() and dist.is_initialized():
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        except Exception as error:
            if _is_loss(error):
                raise _portable(error) from error
            raise
    elif dist.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from torch.distributed.distributed_c10d import PrefixStore  # not in a torch without torch.distributed

        store, rank, size = _rendezvous()
        backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
        # Keys of its own: those of an earlier run in these processes would be taken for the new ones.
        store = PrefixStore(f"minegan_fast/{next(_run)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        try:
            yield Processes(rank, size)
        except BaseException as error:
            if isinstance(error, Exception):
                error = _first_error(store, error)
            if backend == "gloo":  # the others notice by it; with NCCL it would wait for them
                dist.destroy_process_group()
            raise error
        dist.destroy_process_group()
    else:
        yield Processes()


@functools.cache
def _rendezvous():
    """(store, rank, size). One store serves as long as the program lives: a later run would find it half closed."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))


def local_index() -> int | None:
    """The number of this process on its machine, for the choice of its GPU; None where nothing says so."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    if dist.is_available() and active(None) and torch.cuda.is_available():
        return torch.cuda.current_device()
    return None


def _first_error(store, error: Exception) -> Exception:
    """The error of the process that failed first: the other processes only see that it has gone."""
    error = _portable(error)
    mine = pickle.dumps(error).hex()
    try:
        first = store.compare_set("error", "", mine).decode()
    except RuntimeError:  # the store went with the first process
        return error
    return error if first == mine else pickle.loads(bytes.fromhex(first))


def _portable(error: Exception) -> Exception:
    """The error in a form that can be sent. For a lost connection it is one of ours: the messages of the backends name
    neither cause nor remedy."""
    if not _is_loss(error):
        return portable(error)
    return RuntimeError(
        "another process of this run was lost: what that one printed last may say why, or the system's log, if it was "
        "killed for want of memory; the run goes on from its last snapshot with --resume (resume=True)"
    )


def _is_loss(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
