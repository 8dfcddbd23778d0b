"""Generators spread over the ranks of a torch.distributed group: each holds and runs its own, all get what one would.

Generator i is held by the rank i mod the number of ranks. Miners are small, so every rank has those of all generators,
and all have the same critic and are given the same u. What travels: the scores; the images that won, from their owners;
their gradients; and, under a kernel loss, features. Everything else each rank computes for itself, alike.

The loss is the mean of the ranks' losses, as under DDP. A rank may compute it from all images, so that all have the
same, or from a part of equal size. The backward of the exchange takes the mean of the gradients by the images over the
ranks, and hands each image's to the rank that made it. So

    the miner, constant and generator of branch i   get the gradient of that loss on the owner of i, none elsewhere;
                                                    `share_gradients` then gives that of the miners to all ranks
    u                                               gets on each rank the part that goes through its own branches
    a critic that judges the images                 gets that of its rank's own loss, to be averaged as ever

With `features` the loss is computed from all features by every rank, and each gets the gradient by its own. There, too,
miners have it on their owner, and `share_gradients` is what follows.

A backward is a message as well: all ranks run it, in the same order. What a generator draws (for noise) it draws from a
random state of its own, which follows from that of the rank and i. So the images of a generator that draws are other
ones than in one process, and all ranks' random states go on in step.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Function

from ..collectives import Group, average, coalesced, portable
from ..ops._op import wide_dtype
from ..ops.mmd_groups import MmdTarget
from .draws import random_state, seeded
from .passes import same

T = TypeVar("T")
Features = Sequence[Tensor]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_KNOWN = ("latent_dim", "style_dim", "class_dim", "num_classes", "resolution", "image_channels")


class Elsewhere(nn.Module):
    """A generator that another rank holds: what `Mined` asks of it, and no weights.

    Attributes: kind (the name of its class), and latent_dim and the like, where it has them.
    """

    like: Tensor

    def __init__(self, known: dict[str, Any], device: torch.device):
        super().__init__()
        self.kind, self.rank = known["kind"], known["rank"]
        self.register_buffer("like", torch.empty(0, dtype=known["dtype"], device=device), persistent=False)
        for name, value in known["attributes"].items():
            setattr(self, name, value)
        if known["mapping"]:
            self.mapping = self.forward
        if known["constant"] is not None:
            self.register_buffer("learned_constant", known["constant"].to(device), persistent=False)

    def forward(self, *args, **keywords):
        raise RuntimeError(f"this {self.kind} is held by rank {self.rank}")


class Spread:
    """The ranks of a group, over which a `MultiGenerator` spreads its generators.

    group: a torch.distributed process group; None: the default one. There may be fewer generators than ranks; a rank
        without one needs the miners given, on its device.

    Attributes: rank, size. All methods but `own` and `owner` are collective: every rank calls them, in the same order.
    Where something fails on one rank, all raise its error.
    """

    def __init__(self, group: Group = None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._drew = False

    def __deepcopy__(self, memo) -> "Spread":
        return self

    def owner(self, i: int) -> int:
        """The rank that holds generator i."""
        return i % self.size

    def own(self, count: int) -> range:
        """Which of `count` generators this rank holds."""
        return range(self.rank, count, self.size)

    def placed(self, generators: Sequence[nn.Module | None]) -> list[nn.Module]:
        """The generators of all ranks, `Elsewhere` in the place of those that another one holds, where None may be.

        A caller needs it to put a `Mined` around each; `MultiGenerator` does it otherwise. ValueError: a rank lacks one
        of its own; the ranks have other numbers of them.
        """
        own, N = self.own(len(generators)), len(generators)

        def describe() -> tuple[int, dict[int, dict]]:
            for i in own:
                if not isinstance(generators[i], nn.Module) or isinstance(generators[i], Elsewhere):
                    raise ValueError(f"rank {self.rank} of {self.size} holds generator {i}, and was not given it")
            return N, {i: _known(generators[i], self.rank) for i in own}

        found = self._gather(describe)
        if len({count for count, _ in found}) > 1:
            raise ValueError(f"the ranks were given {[count for count, _ in found]} generators: give all of them all")
        known = {i: what for _, part in found for i, what in part.items()}
        here = next((p.device for i in own for p in _tensors(generators[i])), torch.device("cpu"))
        return [
            g if i in own and g is not None else g if isinstance(g, Elsewhere) else Elsewhere(known[i], here)
            for i, g in enumerate(generators)
        ]

    def agreed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The first rank's values; the message goes by way of `device`."""
        sent = tensor.to(device, copy=True).contiguous()
        dist.broadcast(sent, self._first, group=self.group)
        return sent.to(tensor.device)

    def equalise(self, tensors: list[Tensor]) -> None:
        """Gives all ranks the first one's values."""
        coalesced(tensors, lambda flat: dist.broadcast(flat, self._first, group=self.group))

    def collect(self, own: Callable[[], list[tuple[int, T]]]) -> list[tuple[int, T]]:
        """What all ranks find of their own generators, (i, what it is), in the order of i."""
        return sorted((pair for part in self._gather(own) for pair in part), key=lambda pair: pair[0])

    @contextmanager
    def drawing(self, i: int, device: torch.device, gives: T) -> Iterator[T]:
        """A block whose draws are generator i's own: they follow from the random state, which stays as it is until the
        next exchange."""
        state = b"".join(part.numpy().tobytes() for part in random_state(device)) + i.to_bytes(4, "little")
        with seeded(int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "little"), device):
            before = random_state(device)
            yield gives
            self._drew |= not same(before, random_state(device))

    def scores(self, make: Callable[[], list[Tensor]], count: int, batch: int, device: torch.device) -> Tensor:
        """The scores [count, batch], float64, of the branches of all ranks. make gives those of its own, [batch]."""
        made, _ = self._attempt(make, device, 0)
        whole = torch.zeros(count, batch, dtype=torch.float64, device=device)
        for i, scores in zip(self.own(count), made, strict=True):
            whole[i] = scores
        self._sum(whole)
        return whole

    def exchange(
        self, make: Callable[[], list[Tensor]], rows: Tensor, batch: int, device: torch.device, reached: list[Tensor]
    ) -> Tensor:
        """The images [batch, C, H, W] of all ranks. make gives those of this one, and `rows` says which they are.

        reached: whatever a backward from the images may be asked for on this rank. Each rank takes part in the backward
        even if none of the images is its own, and the engine comes by only where it is on its way.
        """

        def describe(parts: list[Tensor]) -> list[int]:
            if not parts:
                return [0] * 4
            kind = parts[0].dtype if len(parts) == 1 else torch.cat([part.detach()[:0] for part in parts]).dtype
            return [_DTYPES.index(kind), *parts[0].shape[1:]]

        parts, (kind, *shape) = self._attempt(make, device, 4, describe)
        dtype = _DTYPES[kind]
        wide = wide_dtype(dtype)
        own = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=dtype, device=device)
        whole = torch.zeros(batch, *shape, dtype=wide, device=device)
        whole[rows] = own.detach().to(wide)
        self._sum(whole)
        whole = whole.to(dtype)
        if not torch.is_grad_enabled():
            return whole
        anchor = torch.zeros((), device=device, requires_grad=True)
        return _Exchange.apply(self, [whole], rows, own, anchor, *[t for t in reached if t.requires_grad])

    def features(self, own: Sequence[Features | None], target: MmdTarget) -> list[Features | None]:
        """The features of the branches of all ranks, as `Mixture` takes them: the rank's own as they are, with their
        graph, the others' without one.

        own: for each branch that this rank holds its groups of features [n, D_g], n may differ; None for the others,
            and for one that has no part, which is then None on every rank.
        ValueError, TypeError: features of a branch that another rank holds, or that do not fit the target.
        """
        N, device, widths = len(own), target.device, target.sizes

        def check() -> list[int]:
            for i, groups in enumerate(own):
                if groups is not None and i not in self.own(N):
                    raise ValueError(f"the features of branch {i} come from rank {self.owner(i)}, which holds it")
                if groups is not None and [x.shape[1] for x in groups] != widths:
                    raise ValueError(
                        f"branch {i} has groups of {[x.shape[1] for x in groups]} dimensions, not {widths}"
                    )
                if groups is not None and any(x.dtype == torch.float64 != target.dtype for x in groups):
                    raise TypeError(f"the features of branch {i} are float64, the target float32: convert one of them")
            return [0 if groups is None else len(groups[0]) for groups in own]

        _, counts = self._attempt(check, device, N, lambda counts: counts)
        whole = torch.zeros(sum(counts), sum(widths), dtype=target.dtype, device=device)
        parts = whole.split(counts)
        for part, groups in zip(parts, own, strict=True):
            if groups is not None:
                part.copy_(torch.cat([x.detach().to(target.dtype) for x in groups], 1))
        self._sum(whole)
        if torch.is_grad_enabled() and not any(x.requires_grad for groups in own for x in groups or ()):
            whole.requires_grad_()  # so that a loss of these has a backward here as it has on the other ranks
        parts = whole.split(counts)
        return [
            groups if groups is not None else [*part.split(widths, 1)] if len(part) else None
            for part, groups in zip(parts, own, strict=True)
        ]

    @torch.no_grad()
    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives the parameters, which all ranks have, the sum of the ranks' gradients. One that has a gradient nowhere
        stays without. So all ranks' optimizers take the step that one process takes."""
        if not parameters:
            return
        there = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
        dist.all_reduce(there, dist.ReduceOp.MAX, group=self.group)
        found = []
        for p, wanted in zip(parameters, there.tolist(), strict=True):
            if wanted:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                found.append(p.grad)
        coalesced(found, self._sum)

    @property
    def _first(self) -> int:
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    def _sum(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def _gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, or the error of the lowest rank on which it fails."""
        mine: tuple[Exception | None, T | None]
        try:
            mine = None, work()
        except Exception as error:
            mine = portable(error), None
        found: list = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        for rank, (error, _) in enumerate(found):
            if error is not None:
                raise mine[0] if rank == self.rank and mine[0] else error
        return [value for _, value in found]

    def _attempt(
        self, work: Callable[[], T], device: torch.device, width: int, numbers: Callable[[T], list[int]] | None = None
    ) -> tuple[T, list[int]]:
        """What `work` gives, and of the `width` numbers of it the largest of all ranks'; or the error of the lowest
        rank on which it fails. One small message, and a wait for a GPU, if it fails nowhere."""
        made, failed = None, None
        try:
            made = work()
            told = [] if numbers is None else numbers(made)
        except Exception as error:
            failed, told = error, [0] * width
        header = torch.tensor([failed is not None, self._drew, *told], dtype=torch.int64, device=device)
        dist.all_reduce(header, dist.ReduceOp.MAX, group=self.group)
        fails, drew, *told = header.tolist()
        if fails:
            self._gather(lambda: _raise(failed))
        if drew:
            self._drew = False
            for where in {torch.device("cpu"), device}:
                torch.rand((), device=where)
        return made, told  # pyright: ignore[reportReturnType]


class _Exchange(Function):
    """The images of all ranks, as a function of this rank's own."""

    @staticmethod
    def forward(ctx, spread, whole, rows, own, *reached):
        ctx.spread, ctx.rows, ctx.dtype, ctx.count = spread, rows, own.dtype, len(reached)
        return whole.pop()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise NotImplementedError("images of other ranks have no second derivative: leave create_graph=True out")
        g = g.to(wide_dtype(g.dtype), copy=True).contiguous()
        average([g], ctx.spread.group)
        own = g[ctx.rows].to(ctx.dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, own, *[None] * ctx.count


def _tensors(module: nn.Module | None) -> Iterator[Tensor]:
    return iter(()) if module is None else iter([*module.parameters(), *module.buffers()])


def _known(generator: nn.Module | None, rank: int) -> dict[str, Any]:
    """What `Elsewhere` tells of it."""
    attributes = {name: getattr(generator, name) for name in _KNOWN if isinstance(getattr(generator, name, None), int)}
    constant = getattr(generator, "learned_constant", None)
    return {
        "kind": type(generator).__name__,
        "rank": rank,
        "dtype": next(_tensors(generator), torch.empty(())).dtype,
        "attributes": attributes,
        "mapping": hasattr(generator, "mapping"),
        "constant": constant.detach().cpu() if isinstance(constant, Tensor) else None,
    }


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
