"""How those branches of a `MultiGenerator` run that are on this rank: from the host's memory, beside other ranks'."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from .offload import Offload
from .passes import drawing_again, in_order, rows_of
from .spread import Spread

T = TypeVar("T")
States = Sequence[tuple[Tensor, ...] | None]


class Runner:
    """spread, offload: None where all generators are on this rank, or all of these on the device. own: those here."""

    def __init__(self, count: int, spread: Spread | None):
        self.spread = spread
        self.offload: Offload | None = None
        self.own = range(count) if spread is None else spread.own(count)

    def awake(self, i: int, following: int | None) -> AbstractContextManager[None]:
        return self.offload.awake(i, following) if self.offload else nullcontext()

    @contextmanager
    def turn(self, i: int, device: torch.device) -> Iterator[None]:
        """A pass of branch i, of all in turn; after the last one the first is on its way, which may have won."""
        following = self.own[(self.own.index(i) + 1) % len(self.own)]
        with self.awake(i, following), self._drawing(i, device, None):
            yield

    def collect(self, own: Callable[[], list[tuple[int, T]]]) -> list[tuple[int, T]]:
        """What `own` finds of the branches that are here, (i, what it is), of all branches."""
        return own() if self.spread is None else self.spread.collect(own)

    def agreed(self, drawn: Tensor, device: torch.device) -> Tensor:
        """What has been drawn, or what the first rank has."""
        return drawn if self.spread is None else self.spread.agreed(drawn, device)

    def scores(self, score: Callable[[], list[Tensor]], count: int, u: Tensor) -> Tensor:
        """The scores [count, B] of all branches; `score` gives those of the branches that are here."""
        return torch.stack(score()) if self.spread is None else self.spread.scores(score, count, len(u), u.device)

    def rows(self, order: Tensor, counts: list[int]) -> list[tuple[int, Tensor]]:
        """(i, the samples that are i's) for each i that has any, and is here."""
        return [(i, rows) for i, rows in rows_of(order, counts) if i in self.own]

    def parts(
        self,
        images: Callable[[int, Tensor, Tensor | None], Tensor],
        order: Tensor,
        counts: list[int],
        u: Tensor,
        latents: Sequence[Tensor | None] | None = None,
        states: States | None = None,
    ) -> list[tuple[int, Tensor, Tensor]]:
        """(i, rows, images) of each branch that is here, of its samples.

        images: of branch i, of some of u and of its latents. states: the random states at which the branches began with
        all of the batch, where they did.
        """
        found: list[tuple[int, Tensor, Tensor]] = []
        turns = self.rows(order, counts)
        for turn, (i, rows) in enumerate(turns):

            def run(u: Tensor, z: Tensor | None, i=i, rows=rows) -> Tensor:
                draws = drawing_again(states[i], rows, len(u)) if states else self._drawing(i, u.device, rows)
                with draws as again:
                    return images(i, u[again], None if z is None else z[again])[: len(rows)]

            z = None if latents is None else latents[i]
            before, following = (turns[n][0] if 0 <= n < len(turns) else None for n in (turn - 1, turn + 1))
            if self.offload and self.offload.sleeps(i) and torch.is_grad_enabled():
                part = self.offload.differentiable(i, run, (u, z), following, before)
            else:
                with self.awake(i, following):
                    part = run(u, z)
            found.append((i, rows, part))
        return found

    def together(
        self, make: Callable[[], list[Tensor]], order: Tensor, counts: list[int], u: Tensor, trained: Sequence[Tensor]
    ) -> Tensor:
        """The images of the batch; `make` gives those of the branches that are here. trained: whatever a backward may
        reach."""
        if self.spread is None:
            return in_order(make(), order)
        rows = torch.cat([order[:0], *[rows for _, rows in self.rows(order, counts)]])
        return self.spread.exchange(make, rows, len(u), u.device, [u, *trained])

    def _drawing(self, i: int, device: torch.device, gives: Tensor | None) -> AbstractContextManager:
        """Where a branch draws that has other ranks beside it."""
        return nullcontext(gives) if self.spread is None else self.spread.drawing(i, device, gives)
