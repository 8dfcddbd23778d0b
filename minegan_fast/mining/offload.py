"""Generators that sleep in the memory of the host, and wake on the device for a pass each.

A weight that does not train has its values in pinned memory of the host. While its generator is awake it reads a copy
on the device, which is dropped without a way back. The generator that comes next is copied on a stream of its own while
the present one runs, so the weights of two are on the device at most. Buffers, and weights that train, with what an
optimizer knows of them, stay on the device. A weight that was written to while it was awake, and one that no longer
trains, is copied back when it falls asleep.

A backward pass reads weights too. If each graph kept those that it saw, the weights of all generators that have won a
sample would be there at once. So a pass that is to be differentiated (`Offload.differentiable`) keeps no graph: its
backward wakes the generator and makes the images a second time, under the random state and autocast of the first.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .._torch import PastSubclasses, leaves_of, own_data, set_own_data, version_of
from .draws import random_state, set_random_state


class Transfers(Protocol):
    """Where sleeping weights are, and how they come from there."""

    def host(self, tensor: Tensor) -> Tensor:
        """A copy that sleeps."""
        ...

    def fetch(self, hosts: list[Tensor], device: torch.device) -> tuple[list[Tensor], Any]:
        """Begins to copy: the tensors on the device, and what `arrive` and `release` wait for."""
        ...

    def arrive(self, tensors: list[Tensor], copying: Any) -> None:
        """From here on the current stream may read the tensors. It is asked before each pass."""
        ...

    def release(self, tensors: list[Tensor], copying: Any) -> None:
        """From here on nobody reads them."""
        ...


class PinnedMemory:
    """`Transfers` between a GPU and pinned memory.

    The copies on the device belong to the stream that is current when they are fetched, and the stream that fills them
    waits for what this one was to do before. So the memory of a generator that has just gone to sleep serves the next.
    """

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo) -> "PinnedMemory":
        return PinnedMemory()

    def host(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def fetch(self, hosts: list[Tensor], device: torch.device) -> tuple[list[Tensor], Any]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        tensors = [torch.empty_like(host, device=device) for host in hosts]
        present = torch.cuda.current_stream(device)
        side.wait_stream(present)
        with torch.cuda.stream(side):
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
            return tensors, (present, side.record_event())

    def arrive(self, tensors: list[Tensor], copying: Any) -> None:
        first, event = copying
        present = torch.cuda.current_stream(first.device)
        present.wait_event(event)
        if present != first:
            for tensor in tensors:
                tensor.record_stream(present)

    def release(self, tensors: list[Tensor], copying: Any) -> None:
        first, event = copying
        first.wait_event(event)  # the memory is free for this stream, which may not have waited for it yet


def pinned_memory(device: torch.device) -> PinnedMemory:
    """Where generators sleep whose miners are on this device. ValueError: it is no GPU."""
    if device.type != "cuda":
        raise ValueError(f"offload is for a GPU, whose memory is short, and the miners are on {device}: leave it out")
    return PinnedMemory()


class _Awake:
    """What the parameters of one generator read on the device, and their versions when that was copied."""

    def __init__(self, parameters: list[nn.Parameter], tensors: list[Tensor], copying: Any):
        self.parameters, self.tensors, self.copying = parameters, tensors, copying
        self.versions = [version_of(p) for p in parameters]
        self.arrived = False

    def what(self) -> dict[nn.Parameter, tuple[Tensor, int]]:
        return {p: (t, v) for p, t, v in zip(self.parameters, self.tensors, self.versions, strict=True)}


class Offload:
    """The weights of `modules` {i: module}, which sleep and wake as the module's docstring says.

    device: where they wake. A parameter that several modules have stays there.
    """

    def __init__(self, modules: Mapping[int, nn.Module], device: torch.device, transfers: Transfers):
        self.modules, self.device, self.transfers = dict(modules), device, transfers
        owners = Counter(id(p) for module in self.modules.values() for p in module.parameters())
        self._shared = {key for key, count in owners.items() if count > 1}
        self._hosts: dict[int, dict[nn.Parameter, Tensor]] = {i: {} for i in self.modules}
        self._here: dict[int, _Awake] = {}
        self._kept: frozenset[int] = frozenset()
        with torch.no_grad(), PastSubclasses():
            for module in self.modules.values():
                for p in module.parameters():
                    if p.requires_grad or id(p) in self._shared:
                        set_own_data(p, own_data(p).to(device))
                for buffer in module.buffers():
                    buffer.data = buffer.data.to(device)
        self.rest()

    @contextmanager
    def awake(self, i: int, following: int | None = None) -> Iterator[None]:
        """A block in which module i is on the device, and module `following` is on its way there."""
        if self.sleeps(i):
            # A tensor of inference mode could not serve a pass that is differentiated.
            with torch.inference_mode(False), torch.no_grad(), PastSubclasses():
                self._wake(i)
                if following is not None and following != i and self.sleeps(following):
                    self._fetch(following, beside=i)
        yield

    def sleeps(self, i: int) -> bool:
        """Whether module i is one that sleeps between its passes."""
        return i in self.modules and i not in self._kept

    def rest(self) -> None:
        """Puts all modules to sleep but those that are kept awake."""
        with torch.inference_mode(False), torch.no_grad(), PastSubclasses():
            for i in filter(self.sleeps, self.modules):
                self._sleep(i)

    def keep_awake(self, kept: Collection[int]) -> None:
        """From now on these modules stay on the device, with graphs as ever, and all others sleep."""
        self.rest()
        with torch.inference_mode(False), torch.no_grad(), PastSubclasses():
            for i in {*kept} & {*self.modules} - self._kept:
                for p, host in self._hosts[i].items():
                    self._settle(p, host, awake=False)
                self._hosts[i].clear()
        self._kept = frozenset(kept)
        self.rest()

    def applied(self, apply: Callable[[Callable[[Tensor], Tensor]], nn.Module], fn: Callable) -> nn.Module:
        """`apply`, by which a module moves or converts its tensors, with sleeping ones asleep. ValueError: `fn` moves
        them to another kind of device."""
        moved = fn(torch.empty(0, device=self.device)).device
        if moved.type != self.device.type:
            raise ValueError(f"a MultiGenerator with offload stays on {self.device.type}, it cannot go to {moved.type}")
        self.rest()
        sleeping = {id(p) for hosts in self._hosts.values() for p in hosts}
        module = apply(lambda t: self.transfers.host(fn(t)) if id(t) in sleeping else fn(t))
        self.device = moved
        for hosts in self._hosts.values():
            hosts.update({p: own_data(p) for p in hosts})
        return module

    def __deepcopy__(self, memo) -> "Offload":
        self.rest()
        modules = {i: copy.deepcopy(module, memo) for i, module in self.modules.items()}
        return Offload(modules, self.device, copy.deepcopy(self.transfers, memo))

    def _fetch(self, i: int, beside: int | None) -> None:
        if i in self._here:
            return
        for j in [j for j in self._here if j != beside]:
            self._sleep(j)
        self._sleep(i)  # takes in what was frozen, moved or converted meanwhile
        hosts = self._hosts[i]
        self._here[i] = _Awake([*hosts], *self.transfers.fetch([*hosts.values()], self.device))

    def _wake(self, i: int) -> None:
        here, hosts = self._here.get(i), self._hosts[i]
        if here and not here.arrived:
            stale = here.versions != [version_of(p) for p in here.parameters]
            if stale or any(own_data(p).data_ptr() != host.data_ptr() for p, host in hosts.items()):
                self._sleep(i)  # weights were loaded, or given other memory, while it was on its way
        self._fetch(i, beside=None)
        here = self._here[i]
        self.transfers.arrive(here.tensors, here.copying)
        if not here.arrived:
            for p, tensor in zip(here.parameters, here.tensors, strict=True):
                set_own_data(p, tensor)
            here.arrived = True

    def _sleep(self, i: int) -> None:
        here, hosts = self._here.pop(i, None), self._hosts[i]
        read = here.what() if here and here.arrived else {}
        for p in self.modules[i].parameters():
            if p.requires_grad or id(p) in self._shared:
                self._settle(p, hosts.pop(p, None), awake=p in read)
                continue
            tensor, version = read.get(p, (hosts.get(p), version_of(p)))
            # Another module's to() or half() gives a parameter another memory.
            if tensor is None or own_data(p).data_ptr() != tensor.data_ptr() or version != version_of(p):
                hosts[p] = self.transfers.host(own_data(p))
            set_own_data(p, hosts[p])
        if here:
            gone = [t for p, t in zip(here.parameters, here.tensors, strict=True) if p in hosts]
            self.transfers.release(gone, here.copying)

    def _settle(self, p: nn.Parameter, host: Tensor | None, awake: bool) -> None:
        """A weight trains from now on: it stays on the device."""
        if host is not None and not awake:
            tensors, copying = self.transfers.fetch([host], self.device)
            self.transfers.arrive(tensors, copying)
            set_own_data(p, tensors[0])

    def differentiable(
        self,
        i: int,
        run: Callable[..., Tensor],
        inputs: Sequence[Tensor | None],
        following: int | None = None,
        before: int | None = None,
    ) -> Tensor:
        """run(*inputs), the images of module i, whose backward runs it once more.

        following: the module that runs next; before: the one that ran before this one, whose backward is next.
        NotImplementedError in the backward: it was asked for create_graph=True.
        """
        state, autocast = random_state(self.device), _autocast_of(self.device.type)
        sources = [t for t in inputs if t is not None and t.requires_grad]

        def again(*given: Tensor, following: int | None = before) -> Tensor:
            left = iter(given)
            with self.awake(i, following):
                return run(*[next(left) if t is not None and t.requires_grad else t for t in inputs])

        stand_ins = [t.detach().requires_grad_() for t in sources]  # the graph of `sources` stays out of this one
        images = again(*stand_ins, following=following)
        if not images.requires_grad:
            return images
        leaves = [leaf for leaf in leaves_of(images) if not any(leaf is t for t in stand_ins)]

        def repeat(*given: Tensor) -> Tensor:
            after = random_state(self.device)
            set_random_state(state, self.device)
            try:
                with torch.enable_grad(), autocast():
                    return again(*given)
            finally:
                set_random_state(after, self.device)

        return cast(Tensor, _Again.apply(repeat, [images.detach()], len(sources), *sources, *leaves))


class _Again(Function):
    """Images that were made, as what `repeat` of the first `count` tensors makes; the others are its leaves."""

    @staticmethod
    def forward(ctx, repeat, made, count, *tensors):
        ctx.repeat, ctx.count = repeat, count
        ctx.save_for_backward(*tensors)
        return made.pop()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "images of an offloaded generator have no second derivative: leave create_graph=True out"
            )
        saved = ctx.saved_tensors
        sources = [t.detach().requires_grad_() for t in saved[: ctx.count]]
        tensors = [*sources, *saved[ctx.count :]]
        needed = ctx.needs_input_grad[3:]
        images = ctx.repeat(*sources)
        with PastSubclasses():
            wanted = [t for t, needs in zip(tensors, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(images, wanted, g, allow_unused=True))
        return None, None, None, *[next(found) if needs else None for needs in needed]


def _autocast_of(device_type: str) -> Callable[[], AbstractContextManager]:
    """A context in which autocast is as it is now, but keeps no weight, whose graph a later pass would not find."""
    kinds = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {device_type, "cpu"}]

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in kinds:
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            yield

    return context


def device_bytes(generators: Sequence[nn.Module], offload: bool = False, ranks: int = 1) -> list[int]:
    """The most bytes of weights and buffers that each rank's device holds of generators, which may be anywhere.

    offload: as of `MultiGenerator`: what sleeps counts for the two largest of a rank, one that is awake and one on its
        way.
    ranks: over how many they are spread, as `spread=` does it.
    """
    found = []
    for rank in range(ranks):
        own = generators[rank::ranks]
        sleeping = [
            sum(p.nbytes for p in generator.parameters() if not p.requires_grad) if offload else 0 for generator in own
        ]
        whole = sum(t.nbytes for generator in own for t in (*generator.parameters(), *generator.buffers()))
        found.append(whole - sum(sleeping) + sum(sorted(sleeping)[-2:]))
    return found
