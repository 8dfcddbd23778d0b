"""Feature maps of several stages of a network, found by running it, whatever its layers are called.

A network is a sequence of calls. Those that its own forward makes are its trunk; a call that is itself such a sequence
(an `nn.Sequential`, or a module within which the maps shrink twice) is replaced by the calls that it makes. Along the
trunk the maps become smaller, and a stage ends at the last map before a markedly smaller one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

OUTPUT = "(output)"  # the network's own output, as the name of a tap
_SAME = 0.7  # a convolution without padding takes a few pixels from the sides of a map; a stage takes about half


@dataclass
class _Call:
    """A call of a module in a forward.

    path: of the module. number: of the call, among the calls of this module. inner: the calls that it made.
    output: the features that it gave; None where it gave something else.
    """

    path: str
    number: int
    module: nn.Module
    inner: list["_Call"] = field(default_factory=list)
    output: Tensor | None = None

    @property
    def name(self) -> str:
        return self.path + (f"#{self.number}" if self.number > 1 else "")

    @property
    def shape(self) -> torch.Size:
        """Of the features; empty where it gave none."""
        return torch.Size() if self.output is None else self.output.shape

    @property
    def gives_maps(self) -> bool:
        return len(self.shape) == 4

    @property
    def size(self) -> int:
        return min(self.shape[2:])

    @property
    def channels(self) -> int:
        return self.shape[1]


class Stages:
    """Feature maps of several stages of a network, found without naming layers.

    network: images [B, C, H, W] -> anything; it is called in the mode that it is in, and nothing of it changes.
    probe: images [at least 1, C, H, W] as the network takes them; the first is run twice in eval mode, each time
        with another one beside it, to find the stages.
    taps: module paths as `network.named_modules()` has them, whose outputs are the stages; "PATH#2" is the second call
        of a module that a forward calls more than once, and "(output)" what the network itself returns. None: the ends
        of the last `count` stages. Maps as large as the input are left out, and so are logits, means over all
        pixels and what depends on the rest of the batch. A network without maps, or whose modules take no hooks, as
        TorchScript's, has one stage, its output.

    names: the taps.

    Raises ValueError: a tap that is not there, is not reached or gives neither maps [B, C, h, w] nor vectors [B, D];
        features of an image that depend on the rest of its batch or on chance.
    """

    def __init__(self, network: nn.Module, probe: Tensor, taps: Sequence[str] | None = None, count: int = 4):
        if isinstance(taps, str) or (taps is not None and not taps) or count < 1:
            raise ValueError(f"taps must be a list of names or None, and count at least 1, got {taps!r} and {count}")
        self.network = network
        first = probe[:1].detach()
        with torch.no_grad(), evaluating(network):
            root = _recorded(network, torch.cat([first, -first.flip(3)]))
            other = _recorded(network, torch.cat([first, first.flip(2) / 2]))
        calls, others = ({call.name: call for call in _all(tree)} for tree in (root, other))
        pure = {name for name, call in calls.items() if name in others and _same(call.output, others[name].output)}
        if taps is None:
            trunk = [c for c in _trunk(root, min(first.shape[2:])) if c.gives_maps and c.name in pure]
            self.names = [call.name for call in _ends(trunk, min(first.shape[2:]))[-count:]] or [OUTPUT]
        else:
            self.names = list(taps)
            _check(self.names, calls, network)
        if mixing := [name for name in self.names if name not in pure]:
            if calls[mixing[0]].shape[:1] != (2,):
                raise ValueError(
                    f"{mixing[0]} of {type(network).__name__} gives no maps [B, C, h, w] or vectors [B, D]"
                )
            raise ValueError(
                f"features {mixing[0]!r} of an image depend on the other images of its batch, or on chance: "
                f"{type(network).__name__} must be in eval mode, also before it is traced or scripted"
            )

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] or vectors [B, D] of the taps, in the order of `names`, differentiable in x [B, C, H, W].

        The forward ends where the last of them is there.
        """
        wanted, found, calls, handles = set(self.names), {}, Counter(), []

        def hook(path):
            def seen(module, arguments, output):
                calls[path] += 1
                name = _Call(path, calls[path], module).name
                if name in wanted:
                    found[name] = _features(output)
                    if len(found) == len(wanted):
                        raise _Reached

            return seen

        try:
            for path in sorted({_path(name) for name in wanted - {OUTPUT}}):
                handles.append(self.network.get_submodule(path).register_forward_hook(hook(path)))
            found[OUTPUT] = _features(self.network(x))
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if found.get(name) is None:
                raise ValueError(
                    f"{name!r} of {type(self.network).__name__} was not reached, or gave no maps or vectors"
                )
        return [found[name] for name in self.names]


class _Reached(BaseException):
    """The last tap is there. This is no Exception, because a network might catch one."""


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network is in eval mode in the block; all flags come back."""
    modes = [(module, getattr(module, "training", None)) for module in network.modules()]  # a frozen script has none
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if training is not None:
                module.training = training


def _features(output) -> Tensor | None:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.is_floating_point() and output.dim() in (2, 4):
        return output
    return None


def _path(name: str) -> str:
    return name.partition("#")[0]


def _recorded(network: nn.Module, x: Tensor) -> _Call:
    """All calls of a forward, as a tree whose root is the call of the network itself."""
    root = _Call(OUTPUT, 1, network)
    stack, numbers, handles = [root], Counter(), []

    def before(path):
        def begin(module, arguments):
            numbers[path] += 1
            call = _Call(path, numbers[path], module)
            stack[-1].inner.append(call)
            stack.append(call)

        return begin

    def after(module, arguments, output):
        stack.pop().output = _features(output)

    try:
        for path, module in network.named_modules():
            if module is not network and not isinstance(module, torch.jit.ScriptModule):  # which take none
                handles += [module.register_forward_pre_hook(before(path)), module.register_forward_hook(after)]
        root.output = _features(network(x))
    finally:
        for handle in handles:
            handle.remove()
    return root


def _all(call: _Call) -> Iterator[_Call]:
    """In the order in which the calls end."""
    for inner in call.inner:
        yield from _all(inner)
    yield call


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the first image's features are the same in two batches of two images."""
    if a is None or b is None or a.shape != b.shape or len(a) != 2:
        return False
    difference = (a[0] - b[0]).float().square().mean().sqrt()
    # NaN counts as the same: it is reported where values are looked at.
    return not bool(difference > 100 * torch.finfo(a.dtype).eps * a[0].float().square().mean().sqrt())


def _trunk(call: _Call, size: int) -> Iterator[_Call]:
    """The calls that follow each other on the way through this one, whose input are maps of this size."""
    for inner in call.inner:
        opened = [c for c in _trunk(inner, size) if c.gives_maps]
        sizes = {c.size for c in _ends(opened, size) if c.size < _SAME * size}
        if opened and (isinstance(inner.module, nn.Sequential) or len(sizes) > 1):
            yield from opened
        elif inner.output is not None:
            yield inner
        if inner.gives_maps:
            size = min(size, inner.size)


def _ends(trunk: list[_Call], size: int) -> list[_Call]:
    """The last call of each stage, but not of the one of maps of the input's size, unless there is nothing else."""
    ends, first = [], 0  # first: the size of the first map of the present stage
    for call in trunk:
        if ends and call.size > first:
            continue  # a branch, or the way up of a network that enlarges its maps again
        if ends and _is_head(call, ends[-1]):
            continue
        if ends and call.size >= _SAME * first:
            ends[-1] = call
        else:
            ends.append(call)
            first = call.size
    return [call for call in ends if call.size < _SAME * size] or ends


def _is_head(call: _Call, before: _Call) -> bool:
    """Whether the call gives logits, or means over the pixels, which add nothing to the maps before."""
    pooled = call.size == 1 and (before.size > 1 or call.channels < before.channels)
    return (pooled and call.channels <= before.channels) or call.channels < before.channels / 4


def _check(names: list[str], calls: dict[str, _Call], network: nn.Module) -> None:
    there = [name for name, call in calls.items() if call.output is not None]
    for name in names:
        if name not in calls:
            some = ", ".join(there[:: max(1, len(there) // 6)][-6:])
            why = "is not reached by a forward" if _path(name) in dict(network.named_modules()) else "is not there"
            raise ValueError(f"the tap {name!r} of {type(network).__name__} {why}; some that are: {some}")
