"""How much a neuron matters: the evidence that gradients give, reduced to one number per neuron.

With g_s the gradient of piece of evidence s (one backward pass, one step's accumulated gradient, or for "fisher" in a
scoring() block one sample) with respect to all parameters of a neuron, w these parameters and S the number of pieces:

    fisher     1/S Σ_s |g_s|²         (diagonal of the empirical Fisher information, summed over the neuron)
    gradient   |1/S Σ_s g_s|
    saliency   |1/S Σ_s g_s·w|        (first-order change of the loss when the neuron is removed)
    movement   |w_S - w_0|            after S ordinary dense steps
    magnitude  |w|
    random     uniform in [0, 1)
"""

import torch
from torch import Tensor, nn

from ..ops import row_score
from .neurons import Layer, Member

CRITERIA = ("fisher", "gradient", "saliency", "movement", "magnitude", "random")
WITHOUT_EVIDENCE = ("magnitude", "random")


class Evidence:
    """What the pieces of evidence have shown so far, for one criterion; on the devices of the parameters.

    totals: per device float64 [rows of all members], for "fisher" and "saliency"; the rows of a member begin at its
    slot. sums: per parameter, for "gradient" and "movement". count: pieces of evidence. by_batch: names of parameters
    of which a batch's gradient stood for its samples' in "fisher".
    """

    def __init__(self, criterion: str, layers: list[Layer], seed: int):
        self.criterion, self.layers, self.seed = criterion, layers, seed
        self.slots: dict[str, int] = {}
        self.length = 0
        for layer in layers:
            for member in layer.members:
                self.slots[member.name] = self.length
                self.length += layer.neurons
        self.clear()

    def clear(self):
        self.count = 0
        self.by_batch: set[str] = set()
        self.totals: dict[torch.device, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}  # the parameters before the first step of "movement"

    @torch.no_grad()
    def add(self, gradients: list[tuple[Member, Tensor]], factor: float = 1.0):
        """Adds one piece's gradients, `factor` times. Not a number stays visible: it makes the neuron's score NaN.

        TypeError, and nothing is added, where one is sparse.
        """
        check_dense(gradients)
        if self.criterion == "gradient":
            for member, grad in gradients:
                self._accumulate(member.name, grad)
        elif self.criterion in ("fisher", "saliency"):
            kind = "square" if self.criterion == "fisher" else "product"
            self._add_rows(self.totals, gradients, kind, factor**2 if kind == "square" else factor)

    def add_samples(self, member: Member, grads: Tensor, factor: float):
        """Adds the squares of per-sample gradients [samples, *shape of the parameter], each `factor` times."""
        grads = grads[:, None] if grads.dim() == 1 else grads  # of a 0-dimensional parameter, which is one neuron
        self._add_rows(self.totals, [(member, grads)], "square", factor**2, member.axis + 1)

    def add_squares(self, member: Member, squares: Tensor):
        """Adds squared gradients [neurons] that are reduced already."""
        total = self._totals_on(squares.device).clone()
        total[self.slots[member.name] :][: len(squares)] += squares
        self.totals[squares.device] = total

    def _totals_on(self, device: torch.device) -> Tensor:
        if device not in self.totals:
            self.totals[device] = torch.zeros(self.length, dtype=torch.float64, device=device)
        return self.totals[device]

    def _add_rows(self, totals, tensors: list[tuple[Member, Tensor]], kind="square", factor=1.0, axis=None):
        """totals {device: [rows]} gets the rows' sums of the members' tensors."""
        by_device: dict[torch.device, list[tuple[Member, Tensor]]] = {}
        for member, tensor in tensors:
            by_device.setdefault(tensor.device, []).append((member, tensor))
        for device, group in by_device.items():
            totals[device] = row_score(
                totals[device] if device in totals else torch.zeros(self.length, dtype=torch.float64, device=device),
                [tensor for _, tensor in group],
                [self.slots[member.name] for member, _ in group],
                axes=[member.axis if axis is None else axis for member, _ in group],
                weights=[member.parameter for member, _ in group] if kind == "product" else None,
                kind=kind,
                factor=factor,
            )

    def _accumulate(self, name: str, value: Tensor):
        if name in self.sums:
            self.sums[name] += value
        else:  # at least float32: sums of half-precision gradients lose the small ones
            self.sums[name] = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Per layer float32 [neurons], on the device of the first parameter. RuntimeError without evidence."""
        device = self.layers[0].members[0].parameter.device
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            names = sorted((layer.name, layer.neurons) for layer in self.layers)
            return {name: torch.rand(n, generator=generator).to(device) for name, n in names}
        if self.criterion != "magnitude" and self.count == 0:
            raise RuntimeError(
                f"criterion {self.criterion!r} needs evidence and there is none; call backward() inside "
                "`with ft.scoring():`, or step() with gradients"
            )
        totals, norm = self.totals, self.criterion not in ("fisher", "saliency")
        if norm:
            totals = {}
            members = [m for layer in self.layers for m in layer.members]
            self._add_rows(totals, [(m, v) for m in members if (v := self._vector(m)) is not None])
        flat = sum((total.to(device) for total in totals.values()), torch.zeros(self.length, device=device))
        scores = {}
        for layer in self.layers:
            total = sum(flat[self.slots[m.name] :][: layer.neurons] for m in layer.members)
            if self.criterion != "magnitude" and self.criterion != "movement":
                total = total / (self.count**2 if norm else self.count)
            scores[layer.name] = (total.sqrt() if norm else total.abs()).float()
        return scores

    def _vector(self, member: Member) -> Tensor | None:
        """What the score is the norm of, over the neuron; for "gradient" the count times that. None stands for zero."""
        if self.criterion == "magnitude":
            return member.parameter.detach()
        vector = self.sums.get(member.name)
        if self.start:
            moved = _wide(member.parameter) - _wide(self.start[member.name])
            return moved if vector is None else vector.to(moved.device) + moved
        return vector

    def begin_movement(self):
        self.start = {m.name: m.parameter.detach().clone() for layer in self.layers for m in layer.members}

    @torch.no_grad()
    def end_movement(self):
        """Measures how far the parameters went, and gives them their old bits back."""
        for layer in self.layers:
            for m in layer.members:
                start = self.start[m.name].to(m.parameter.device)
                self._accumulate(m.name, _wide(m.parameter) - _wide(start))
                m.parameter.copy_(start)
        self.start = {}

    def reduce(self, group):
        """Adds up the evidence of all processes, so that every rank sees the same scores. Collective."""
        device = self.layers[0].members[0].parameter.device
        count = torch.tensor(float(self.count), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(count, group=group)
        if self.criterion in ("fisher", "saliency"):
            total = torch.zeros(self.length, dtype=torch.float64, device=device)
            for part in self.totals.values():
                total += part.to(device)
            torch.distributed.all_reduce(total, group=group)
            self.totals = {device: total}
        elif self.criterion in ("gradient", "movement"):
            for member in (m for layer in self.layers for m in layer.members):
                total = self.sums.get(member.name)
                total = torch.zeros_like(_wide(member.parameter)) if total is None else total.contiguous()
                torch.distributed.all_reduce(total, group=group)
                self.sums[member.name] = total
        if self.criterion == "movement":
            for total in self.sums.values():
                total /= torch.distributed.get_world_size(group)
        self.count = int(count)

    def state_dict(self) -> dict:
        sums = dict(self.sums)
        for layer in self.layers if self.totals else ():
            for m in layer.members:
                rows = [total[self.slots[m.name] :][: layer.neurons] for total in self.totals.values()]
                sums[m.name] = sum((r.to(rows[0].device) for r in rows[1:]), rows[0].clone())
        return {"criterion": self.criterion, "count": self.count, "sums": sums, "start": dict(self.start)}

    def load_state_dict(self, state: dict):
        devices = {m.name: m.parameter.device for layer in self.layers for m in layer.members}
        self.clear()
        self.count = state["count"]
        sums = {name: t.to(devices[name], copy=True) for name, t in state["sums"].items()}
        if self.criterion in ("fisher", "saliency"):
            for name, rows in sums.items():
                self._totals_on(rows.device)[self.slots[name] :][: len(rows)] = rows
        else:
            self.sums = sums
        self.start = {name: t.to(devices[name], copy=True) for name, t in state["start"].items()}


def check_dense(gradients: list[tuple[Member, Tensor]]):
    """Raises TypeError, with the parameter's name, where a gradient is sparse."""
    for member, grad in gradients:
        if grad.layout != torch.strided:
            raise TypeError(
                f"the gradient of {member.name!r} is sparse; neurons are scored by dense ones: build its layer with "
                "sparse=False, or exclude it"
            )


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: differences of half-precision values are small."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class BufferCopy:
    """The buffers of a model, to be given back bit for bit."""

    def __init__(self, model: nn.Module):
        self.copies = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.versions = [p._version for p in model.parameters()]

    def outdated(self, model: nn.Module) -> bool:
        """Whether parameters were written since, by load_state_dict say: then the buffers were, too."""
        return self.versions is not None and self.versions != [p._version for p in model.parameters()]

    def adopt(self, copies: dict[str, Tensor]):
        """Takes the copies of a run that goes on here; that its model is loaded as well does not outdate them."""
        self.copies, self.versions = copies, None

    @torch.no_grad()
    def restore(self, model: nn.Module):
        for name, buffer in model.named_buffers():
            if name in self.copies:
                buffer.copy_(self.copies[name])
