"""Where a tensor that is followed comes from, so that it can be computed anew from its parameters."""

from collections.abc import MutableSet
from dataclasses import dataclass
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from ..._torch import version_of
from ..rows.containers import map_tensors, tensors_in


class Listener(Protocol):
    """Who is told where followed parameters meet samples; `Passes` is it.

    uses: nodes of the graph at which that happened. distributed: whether DDP waits for gradients.
    """

    distributed: bool

    @property
    def uses(self) -> MutableSet: ...

    def exact(self, use) -> bool: ...

    def fired(self, use) -> None: ...


@dataclass(eq=False)
class Trail:
    """Where a tensor comes from.

    roots: the parameters. host: who is told. scale: its elements are those of its root, in their order, times
    that; None where they are something else. call: the function and arguments that made it, and which of the results it
    is. constants: the other tensors among these; and version, its own: with what they were then.
    """

    roots: tuple[nn.Parameter, ...]
    host: Listener
    scale: float | None
    call: tuple | None = None
    constants: tuple[tuple[Tensor, int], ...] = ()
    version: int = 0

    def outdated(self) -> bool:
        """Whether something that it was computed from was written to in place since: it cannot be computed anew."""
        sources = [t.trail for part in (self.call or ())[1:3] for t in tensors_in(part) if is_followed(t)]
        return any(version_of(t) != version for t, version in self.constants) or any(t.outdated() for t in sources)

    def replay(self, made: dict[int, Tensor]) -> Tensor:
        """Computes the tensor anew; made: what exists already, {id of a root or trail: tensor}."""
        if self.call is None:
            return made[id(self.roots[0])]
        if id(self) not in made:
            func, args, kwargs, which = self.call
            again = lambda t: t.trail.replay(made) if is_followed(t) else t  # noqa: E731
            result = func(*map_tensors(again, args), **map_tensors(again, kwargs))
            made[id(self)] = result if which is None else result[which]
        return made[id(self)]


class Followed(Tensor):
    """A tensor with a trail."""

    trail: Trail


def is_followed(x) -> TypeGuard[Followed]:
    return isinstance(x, Followed)


def is_foreign(x) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Followed)
