"""The kernel distance of a mixture of several generators, as the loss of their miners: what `KernelLoss` is to one.

The shares p of the mixture come from `mining.Mixture`, which solves for them; the miners follow the gradient of the
distance at that p. Every generator makes a batch of its own in each step, without a graph. Those with a share make it
once more with a graph, one after the other, so the memory is that of one.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..mining import Mixture, Spread
from .kernel_loss import KernelLoss, cut, gathering
from .processes import Processes

Make = Callable[[int, int], Tensor]


class KernelMixture:
    """names: of the generators. batch: samples a step of each, of all processes together."""

    def __init__(self, kernel: KernelLoss, names: Sequence[str], batch: int, processes: Processes):
        self.kernel, self.names, self.processes = kernel, list(names), processes
        self.gather = gathering(processes, batch)
        self.mixture = Mixture(len(self.names), kernel.target)
        self._named: set[int] = set()
        self._repeating: set[int] = set()

    def backward(
        self,
        makes: Sequence[Make | None],
        count: int,
        part: int | None,
        scale: "float | Tensor",
        learn: bool = True,
        spread: Spread | None = None,
    ) -> Tensor:
        """The distance of this batch, 0-d, detached; its gradient, times `scale`, is added to what the `makes` depend
        on, one for each generator, as `KernelLoss.backward` says of its own.

        learn: whether the batch enters what is known of the mixture, and p is solved for anew. False: for evidence, of
            which every process makes all samples.
        spread: the processes over which the generators are spread. Then `count` is the whole batch, the `makes` of
            others' generators are None, and the gradient of each miner is on the owner of its generator.

        A generator whose images hold NaN or inf has no share; a warning names it, once. ValueError: all of them do, and
        as in `KernelLoss.backward`.
        """
        parts, apart = cut(count, part), learn and spread is None
        made: list[tuple | None] = []
        finite = torch.ones(len(makes), device=self.kernel.features.device)
        for i, make in enumerate(makes):
            if make is None:
                self.kernel.skip(parts)
                made.append(None)
                continue

            def looked_at(first: int, last: int, i=i, make=make) -> Tensor:
                images = make(first, last)
                finite[i] *= torch.isfinite(images).all()
                return images

            made.append(self.kernel.made(looked_at, parts, validate=False))
        if learn:
            self.processes.average([finite])
        there = [share == 1 for share in finite.tolist()]
        self._name_others(there)
        everyone = [found[0] if found and ok else None for found, ok in zip(made, there, strict=True)]
        rows = slice(0, count)
        if spread is not None:
            everyone = spread.features(everyone, self.kernel.target)
        elif apart and self.gather is not None:
            for i, own in enumerate(everyone):
                if own is not None:
                    everyone[i], rows = self.gather(own)
        if learn or not self.mixture.batches:  # without a batch nothing is known of p
            means = self.mixture.measure(everyone)
            if learn:
                self.processes.equalise([means])
            self.mixture.add(means)
        shares = self.mixture.p.tolist()
        leaves = {
            i: [group.detach().requires_grad_() for group in groups]
            for i, groups in enumerate(everyone)
            if groups is not None and shares[i]
        }
        with torch.enable_grad():
            loss = self.mixture.loss([leaves.get(i) for i in range(len(makes))])
            slopes = torch.autograd.grad(loss, [group for groups in leaves.values() for group in groups])
        scale = scale * self.processes.size if apart else scale
        for i, slope in zip(leaves, _chunks(slopes, len(self.kernel.names)), strict=True):
            make, found = makes[i], made[i]
            if make is None or found is None:
                continue
            own, states = found
            mine = [s[rows] * scale for s in slope]
            self.kernel.again(make, parts, states, own, mine, check=i not in self._repeating)
            self._repeating.add(i)
        return loss.detach().float()

    def _name_others(self, there: list[bool]) -> None:
        for i in {i for i, ok in enumerate(there) if not ok} - self._named:
            self._named.add(i)
            warnings.warn(f"{self.names[i]} gets no share: its images hold NaN or inf", stacklevel=4)
        if not any(there):
            raise ValueError(f"the images of all {len(there)} sources hold NaN or inf")


def _chunks(values: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
