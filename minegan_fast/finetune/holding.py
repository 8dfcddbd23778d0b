"""A model under sparse finetuning: which rows train, which ever did, and the proof that the others stand still."""

import torch
from torch import Tensor, nn

from . import distributed
from .hashing import dense_parameters, fingerprint, row_hashes
from .hosting import hold, loosen, mark_hosts
from .leaves import Linked, Rows
from .neurons import Layer
from .selection import Selection


class FrozenNeuronsChanged(RuntimeError):  # noqa: N818 - a public name
    """A value that the selection froze has other bits than it had then."""


def _is_plain(parameter: nn.Parameter) -> bool:
    """Not of a class with a behaviour of its own, a quantized or sharded tensor say; a held one is plain underneath."""
    kind = type(parameter)
    return kind is Linked or kind.__torch_function__ is nn.Parameter.__torch_function__


def check_parameters(model: nn.Module):
    """Raises RuntimeError, ValueError or TypeError, with a name, where a parameter cannot be held."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Linked):
            raise RuntimeError(f"{name!r} is held by another SparseFinetuner; call its release() first")
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape yet; run the model once before you build the optimizer")
        if parameter.requires_grad and not _is_plain(parameter):
            raise TypeError(f"{name!r} is a {type(parameter).__name__}; only plain parameters can train by rows")
        if parameter.requires_grad and not parameter.is_floating_point():
            raise TypeError(f"{name!r} is {parameter.dtype}; only real floating-point parameters can train by rows")


class Held:
    """The model's side of a SparseFinetuner.

    base: fingerprint before anything trained, None until then. ever: {layer: mask of the rows that were ever selected}.
    hashes: {parameter: (hashes of its rows, mask of the frozen ones)} at the selection.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]):
        self.model, self.layers = model, layers
        self.selection: Selection | None = None
        self.base: str | None = None
        self.ever: dict[str, Tensor] = {}
        self.hashes: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self):
        """Takes the fingerprint of the base: call it before anything trains."""
        if self.base is None:
            self.base = fingerprint(self.model)

    def apply(self, selection: Selection, added: set[int]) -> list[tuple[nn.Parameter, Tensor | None, Rows | None]]:
        """Freezes the model but for the selected rows, and but for parameters whose id is in `added`.

        Returns what the candidates were and are, in the layers' order: (what trained: dense weight or old leaf, its
        rows or None, leaf or None).
        """
        candidates = {id(m.parameter): m.name for layer in self.layers for m in layer.members}
        lost = candidates.keys() - {id(p) for p in self.model.parameters()}
        if lost:
            raise RuntimeError(
                f"{', '.join(sorted(candidates[i] for i in lost))} left the model since this optimizer was built: "
                "another parameter is in its place; build a new SparseFinetuner"
            )
        self.begin()
        for _, parameter in dense_parameters(self.model):
            if id(parameter) not in candidates and id(parameter) not in added and _is_plain(parameter):
                hold(self.model, parameter, 0, None)
        changes = []
        for layer in self.layers:
            for m in layer.members:
                old = m.parameter.link if isinstance(m.parameter, Linked) else None
                leaf = hold(self.model, m.parameter, m.axis, selection.rows.get(layer.name))
                before = m.parameter if old is None else old.leaf
                changes.append((before, None if old is None else old.rows, leaf))
        mark_hosts(self.model)
        self.selection = selection
        for name, rows in selection.rows.items():
            self.ever.setdefault(name, torch.zeros(selection.sizes[name][0], dtype=torch.bool))[rows] = True
        distributed.rebuild_reducers(self.model)
        return changes

    def record(self):
        """Takes the hashes of all frozen rows."""
        self.hashes = {}
        for name, parameter in dense_parameters(self.model):
            if isinstance(parameter, Linked):
                values = row_hashes(parameter.detach(), parameter.link.axis).cpu()
                frozen = torch.ones(len(values), dtype=torch.bool)
                if parameter.link.leaf is not None:
                    frozen[parameter.link.rows.cpu()] = False
                self.hashes[name] = values, frozen

    def verify(self):
        """Raises FrozenNeuronsChanged if a frozen row has another hash than at the selection."""
        if self.selection is None:
            raise RuntimeError("nothing is frozen before a selection; call select() first")
        parameters = dict(dense_parameters(self.model))
        changed = []
        for name, (values, frozen) in self.hashes.items():
            parameter = parameters.get(name)
            if not isinstance(parameter, Linked):
                changed.append(f"{name} was replaced or removed")
                continue
            now = row_hashes(parameter.detach(), parameter.link.axis).cpu()
            if now.shape != values.shape:
                changed.append(f"{name} was resized")
                continue
            rows = ((now != values) & frozen).nonzero().flatten().tolist()
            if rows:
                changed.append(f"{name} rows {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}")
        if changed:
            raise FrozenNeuronsChanged(
                f"{len(changed)} parameters changed that were frozen at the selection: {'; '.join(changed)}. Something "
                "besides this optimizer wrote to them: another optimizer, a loaded checkpoint, an in-place operation, "
                "a change of dtype"
            )

    def thaw(self, parameter: nn.Parameter):
        """Makes a frozen parameter that is no candidate plain and trainable."""
        name = next(n for n, p in dense_parameters(self.model) if p is parameter)
        loosen(self.model, parameter)
        parameter.requires_grad_(True)
        del self.hashes[name]

    def release(self):
        for _, parameter in dense_parameters(self.model):
            if isinstance(parameter, Linked):
                loosen(self.model, parameter)
        mark_hosts(self.model)
        distributed.rebuild_reducers(self.model)
