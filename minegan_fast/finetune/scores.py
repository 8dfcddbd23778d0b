"""How much a neuron matters: the evidence that gradients give, reduced to one number per neuron.

With g_s the gradient of piece of evidence s (one backward pass, or one step's accumulated gradient) with respect to all
parameters of a neuron, w these parameters and S the number of pieces:

    fisher     1/S Σ_s |g_s|²         (diagonal of the empirical Fisher information, summed over the neuron)
    gradient   |1/S Σ_s g_s|
    saliency   |1/S Σ_s g_s·w|        (first-order change of the loss when the neuron is removed)
    movement   |w_S - w_0|            after S ordinary dense steps
    magnitude  |w|
    random     uniform in [0, 1)
"""

import torch
from torch import Tensor, nn

from .neurons import Layer, Member, flat_rows

CRITERIA = ("fisher", "gradient", "saliency", "movement", "magnitude", "random")
WITHOUT_EVIDENCE = ("magnitude", "random")


class Evidence:
    """What the pieces of evidence have shown so far, for one criterion; on the devices of the parameters."""

    def __init__(self, criterion: str, layers: list[Layer], seed: int):
        self.criterion, self.layers, self.seed = criterion, layers, seed
        self.clear()

    def clear(self):
        self.count = 0
        self.sums: dict[str, Tensor] = {}  # per layer; per parameter for "gradient"
        self.start: dict[str, Tensor] = {}  # the parameters before the first step of "movement"

    @torch.no_grad()
    def add(self, layer: Layer, member: Member, grad: Tensor):
        """Adds one piece's gradient of one parameter. Not a number stays visible: it makes the neuron's score NaN."""
        if self.criterion == "fisher":
            self._accumulate(layer.name, flat_rows(_wide(grad).square(), member.axis).sum(1).double())
        elif self.criterion == "saliency":
            products = _wide(grad) * _wide(member.parameter)
            self._accumulate(layer.name, flat_rows(products, member.axis).sum(1).double())
        elif self.criterion == "gradient":
            self._accumulate(member.name, _wide(grad))

    def _accumulate(self, name: str, value: Tensor):
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Per layer float32 [neurons], on the CPU. RuntimeError without evidence."""
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            names = sorted((layer.name, layer.neurons) for layer in self.layers)
            return {name: torch.rand(n, generator=generator) for name, n in names}
        if self.criterion != "magnitude" and self.count == 0:
            raise RuntimeError(
                f"criterion {self.criterion!r} needs evidence and there is none; call backward() inside "
                "`with ft.scoring():`, or step() with gradients"
            )
        scores = {}
        for layer in self.layers:
            if self.criterion in ("fisher", "saliency"):
                parameter = layer.members[0].parameter
                total = self.sums.get(layer.name, torch.zeros(layer.neurons, device=parameter.device))
                score = (total / self.count).abs()
            else:
                score = sum(flat_rows(self._vector(m).square(), m.axis).sum(1) for m in layer.members).sqrt()
            scores[layer.name] = score.float().cpu()
        return scores

    def _vector(self, member: Member) -> Tensor:
        """The quantity whose norm over the neuron is the score."""
        if self.criterion == "gradient":
            total = self.sums.get(member.name)
            return torch.zeros_like(_wide(member.parameter)) if total is None else total / self.count
        if self.criterion == "movement":
            moved = self.sums.get(member.name, torch.zeros(()))
            if self.start:
                moved = moved.to(member.parameter.device) + _wide(member.parameter) - _wide(self.start[member.name])
            return moved
        return _wide(member.parameter)

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
        for layer in self.layers:
            shapes = {layer.name: torch.empty(layer.neurons, dtype=torch.float64)}
            if self.criterion in ("gradient", "movement"):
                shapes = {m.name: _wide(m.parameter) for m in layer.members}
            for name, like in shapes.items():
                total = self.sums.get(name)
                total = torch.zeros_like(like, device=device) if total is None else total.contiguous()
                torch.distributed.all_reduce(total, group=group)
                self.sums[name] = total
        if self.criterion == "movement":
            for total in self.sums.values():
                total /= torch.distributed.get_world_size(group)
        self.count = int(count)

    def state_dict(self) -> dict:
        return {"criterion": self.criterion, "count": self.count, "sums": dict(self.sums), "start": dict(self.start)}

    def load_state_dict(self, state: dict):
        devices = {m.name: m.parameter.device for layer in self.layers for m in layer.members}
        self.count = state["count"]
        self.sums = {name: t.to(devices[name], copy=True) for name, t in state["sums"].items()}
        self.start = {name: t.to(devices[name], copy=True) for name, t in state["start"].items()}


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: squares of half-precision gradients overflow."""
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
