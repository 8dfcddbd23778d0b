"""How much a neuron matters: the evidence that gradients give, reduced to one number per neuron.

With g_s the gradient of piece of evidence s (one backward pass, one step's accumulated gradient, or for "fisher",
"agreement" and "contrast" in a scoring() block one sample) with respect to all parameters of a neuron, w these
parameters and S the number of pieces:

    fisher     F = 1/S Σ_s |g_s|²       (diagonal of the empirical Fisher information, summed over the neuron)
    gradient   |1/S Σ_s g_s|
    saliency   |1/S Σ_s g_s·w|          (first-order change of the loss when the neuron is removed)
    movement   |w_S - w_0|              after S ordinary dense steps
    agreement  |1/S Σ_s g_s|² / F       in [0, 1], whatever the gradients' size: 1 where all pieces pull the same way,
                                        1/S on average where they are independent around zero; S at least 2
    contrast   F / (F_src + 0.01 F̄_src) F on the target, F_src on the source's own samples, F̄_src its mean over the
                                        layer, or over all neurons where the layer's is zero
    magnitude  |w|
    random     uniform in [0, 1)
"""

import torch
from torch import Tensor

from ..ops import row_score
from ..ops._op import wide_dtype
from .neurons import Member, NeuronGroup

CRITERIA = ("fisher", "gradient", "saliency", "movement", "agreement", "contrast", "magnitude", "random")
WITHOUT_EVIDENCE = ("magnitude", "random")
BY_SAMPLE = ("fisher", "agreement", "contrast")  # their pieces of evidence are samples where these can be told apart
ROW_SUMS = {"saliency": "product"} | dict.fromkeys(BY_SAMPLE, "square")  # what is added up per neuron
VECTOR_SUMS = ("gradient", "movement", "agreement")  # what is added up per parameter
DAMPING = 0.01  # of "contrast": a neuron that the source hardly uses must not win by that alone


class Evidence:
    """What the pieces of evidence have shown so far, for one criterion; on the devices of the parameters.

    totals: per device float64 [rows of all members], for the criteria of ROW_SUMS; the rows of a member begin at its
    slot. sums: per parameter, for those of VECTOR_SUMS. count: pieces of evidence. by_batch: names of parameters of
    which a batch's gradient stood for its samples'. source: for "contrast" the evidence of the source's samples.
    """

    def __init__(self, criterion: str, layers: list[NeuronGroup], seed: int):
        self.criterion, self.layers, self.seed = criterion, layers, seed
        self.source = Evidence("fisher", layers, seed) if criterion == "contrast" else None
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
        if self.source is not None:
            self.source.clear()

    def of(self, whose: str) -> "Evidence":
        """Of the samples of the "target" or, for "contrast", of the "source"."""
        return self if whose == "target" or self.source is None else self.source

    @property
    def summed(self) -> bool:
        """Whether gradients are added up per parameter."""
        return self.criterion in VECTOR_SUMS

    @torch.no_grad()
    def add(self, gradients: list[tuple[Member, Tensor]], factor: float = 1.0):
        """Adds one piece's gradients, `factor` times. Not a number stays visible: it makes the neuron's score NaN.

        TypeError, and nothing is added, where one is sparse.
        """
        check_dense(gradients)
        if self.summed and self.criterion != "movement":
            for member, grad in gradients:
                self._accumulate(member.name, grad, factor)
        kind = ROW_SUMS.get(self.criterion)
        if kind is not None:
            self._add_rows(self.totals, gradients, kind, factor**2 if kind == "square" else factor)

    def add_samples(self, member: Member, grads: Tensor, factor: float):
        """Adds what per-sample gradients [samples, *shape of the parameter] show, each `factor` times."""
        if self.summed:
            self._accumulate(member.name, grads.sum(0, dtype=wide_dtype(grads.dtype)), factor)
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

    def _accumulate(self, name: str, value: Tensor, factor: float = 1.0):
        # at least float32: sums of half-precision gradients lose the small ones; a new tensor: the old one may be kept
        value = _wide(value) * factor
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def snapshot(self) -> tuple[dict, dict]:
        """All that adding changes; `restore` takes back what was added since."""
        return dict(self.totals), dict(self.sums)

    def restore(self, snapshot: tuple[dict, dict]):
        self.totals, self.sums = snapshot

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Per layer float32 [neurons], on the device of the first parameter. RuntimeError without enough evidence."""
        if self.criterion == "random":
            device = self.layers[0].members[0].parameter.device
            generator = torch.Generator().manual_seed(int(self.seed))
            names = sorted((layer.name, layer.neurons) for layer in self.layers)
            return {
                name: torch.rand(n, generator=generator, dtype=torch.float32, device="cpu").to(device)
                for name, n in names
            }
        self._check_enough()
        scores: dict[str, Tensor] = {}
        if self.criterion in ROW_SUMS:
            scores = {name: total.abs() / self.count for name, total in self._per_neuron(self.totals).items()}
        if self.summed or self.criterion == "magnitude":
            squares: dict[torch.device, Tensor] = {}
            members = [m for layer in self.layers for m in layer.members]
            self._add_rows(squares, [(m, v) for m in members if (v := self._vector(m)) is not None])
            pieces = self.count if self.criterion in ("gradient", "agreement") else 1
            norms = {name: total / pieces**2 for name, total in self._per_neuron(squares).items()}
            if self.criterion == "agreement":
                # at most 1 but for the rounding of the sums
                scores = {n: torch.where(f == 0, f, norms[n] / f).clamp(max=1) for n, f in scores.items()}
            else:
                scores = {name: norm.sqrt() for name, norm in norms.items()}
        if self.source is not None:
            totals = self.source._per_neuron(self.source.totals)
            fishers = {name: total / self.source.count for name, total in totals.items()}
            overall = torch.cat(list(fishers.values())).mean()
            for name, fisher in fishers.items():
                mean = torch.where(fisher.mean() == 0, overall, fisher.mean())
                scores[name] = scores[name] / (fisher + DAMPING * mean)
        return {name: score.float() for name, score in scores.items()}

    def _check_enough(self):
        if self.criterion != "magnitude" and self.count == 0:
            raise RuntimeError(
                f"criterion {self.criterion!r} needs evidence and there is none; call backward() inside "
                "`with ft.scoring():`, or step() with gradients"
            )
        if self.criterion == "agreement" and self.count < 2:
            raise RuntimeError(
                "criterion 'agreement' compares gradients and there is one alone; give it at least 2 samples, or 2 "
                "backward passes, inside `with ft.scoring():`"
            )
        if self.source is not None and not any(total.any() for total in self.source.totals.values()):
            raise RuntimeError(
                "criterion 'contrast' compares with the source, of which there is no evidence, or all of it is zero; "
                'call backward() on losses of the source\'s own samples inside `with ft.scoring(of="source"):`'
            )

    def _per_neuron(self, totals: dict[torch.device, Tensor]) -> dict[str, Tensor]:
        """Per layer float64 [neurons]: the members' rows added up, on the device of the first parameter."""
        device = self.layers[0].members[0].parameter.device
        zero = torch.zeros(self.length, dtype=torch.float64, device=device)
        flat = sum((total.to(device) for total in totals.values()), zero)
        parts = {x.name: [flat[self.slots[m.name] :][: x.neurons] for m in x.members] for x in self.layers}
        return {name: torch.stack(rows).sum(0) for name, rows in parts.items()}

    def _vector(self, member: Member) -> Tensor | None:
        """A member's part of the vector whose norm is taken over the neuron, a mean's times the count; None is zero."""
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
        if self.criterion in ROW_SUMS:
            total = torch.zeros(self.length, dtype=torch.float64, device=device)
            for part in self.totals.values():
                total += part.to(device)
            torch.distributed.all_reduce(total, group=group)
            self.totals = {device: total}
        if self.summed:
            for member in (m for layer in self.layers for m in layer.members):
                total = self.sums.get(member.name)
                total = torch.zeros_like(_wide(member.parameter)) if total is None else total.contiguous()
                torch.distributed.all_reduce(total, group=group)
                self.sums[member.name] = total
        if self.criterion == "movement":
            for total in self.sums.values():
                total /= torch.distributed.get_world_size(group)
        self.count = int(count)
        if self.source is not None:
            self.source.reduce(group)

    def state_dict(self) -> dict:
        totals = {}
        for layer in self.layers if self.totals else ():
            for m in layer.members:
                rows = [total[self.slots[m.name] :][: layer.neurons] for total in self.totals.values()]
                totals[m.name] = sum((r.to(rows[0].device) for r in rows[1:]), rows[0].clone())
        state = {"criterion": self.criterion, "count": self.count, "sums": dict(self.sums), "totals": totals}
        state["start"] = dict(self.start)
        return state if self.source is None else {**state, "source": self.source.state_dict()}

    def load_state_dict(self, state: dict):
        devices = {m.name: m.parameter.device for layer in self.layers for m in layer.members}
        self.clear()
        self.count = state["count"]
        sums, totals = state["sums"], state.get("totals")
        if totals is None:  # of a version in which no criterion had both
            sums, totals = ({}, sums) if self.criterion in ROW_SUMS else (sums, {})
        for name, rows in totals.items():
            self._totals_on(devices[name])[self.slots[name] :][: len(rows)] = rows.to(devices[name])
        self.sums = {name: t.to(devices[name], copy=True) for name, t in sums.items()}
        self.start = {name: t.to(devices[name], copy=True) for name, t in state["start"].items()}
        if self.source is not None:
            self.source.load_state_dict(state["source"])


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
    return tensor.detach().to(wide_dtype(tensor.dtype))
