"""A model under sparse finetuning: which rows train, which ever did, and the proof that the others stand still."""

import torch
from torch import Tensor, nn

from ..._torch import leave_weight_norm_to_python, own_modules, own_parameters
from ..hashing import buffer_hashes, fingerprint, row_hashes
from ..neurons import NeuronGroup, compact
from ..selection import Selection
from . import ddp
from .link import Link, master_dtype
from .parameters import HeldWeight, LeafParameter, held_class, watch_optimizers

WEIGHT_NORM = ("weight_g", ".original0")  # parameters that torch's weight_norm makes


class FrozenNeuronsChanged(RuntimeError):  # noqa: N818 - a public name
    """A value that the selection froze has other bits than it had then."""


def _is_plain(parameter: nn.Parameter) -> bool:
    """Not of a class with a behaviour of its own, a quantized or sharded tensor say; a held one is plain underneath."""
    kind = type(parameter)
    return kind is HeldWeight or kind.__torch_function__ is nn.Parameter.__torch_function__


def check_parameters(model: nn.Module):
    """Raises RuntimeError, ValueError or TypeError, with a name, where a parameter cannot be held."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, HeldWeight):
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
    hashes: {parameter: (hashes of its rows, mask of the frozen ones)} at the selection. buffers: hashes of the
    buffers at the start.
    """

    def __init__(self, model: nn.Module, layers: list[NeuronGroup]):
        self.model, self.layers = model, layers
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.buffers = buffer_hashes(model)
        self.selection: Selection | None = None
        self.base: str | None = None
        self.ever: dict[str, Tensor] = {}
        self.hashes: dict[str, tuple[Tensor, Tensor]] = {}
        self.tree: list[tuple[dict, str, nn.Module | None]] = []  # the modules' places in the model, at the last look

    def begin(self):
        """Takes the fingerprint of the base: call it before anything trains."""
        if self.base is None:
            self.base = fingerprint(self.model)

    def apply(
        self, selection: Selection, added: set[int]
    ) -> list[tuple[nn.Parameter, Tensor | None, LeafParameter | None]]:
        """Freezes the model but for the selected rows, and but for parameters whose id is in `added`.

        Returns what the candidates were and are, in the layers' order: (what trained: weight or old leaf, its
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
        if any(name.endswith(WEIGHT_NORM) for name, _ in self.model.named_parameters()):
            leave_weight_norm_to_python()
        places = _places(self.model)
        for parameter in self.trainable:
            if id(parameter) not in candidates and id(parameter) not in added and _is_plain(parameter):
                hold(parameter, 0, None)
        changes = []
        for layer in self.layers:
            for m in layer.members:
                old = m.parameter.link if isinstance(m.parameter, HeldWeight) else None
                link = hold(m.parameter, m.axis, selection.rows.get(layer.name))
                link.places, link.guessed = places[id(m.parameter)], m.guessed
                before = m.parameter if old is None else old.leaf
                changes.append((before, None if old is None else old.rows, link.leaf))
        self.selection, self.tree = selection, _tree(self.model)
        for name, rows in selection.rows.items():
            self.ever.setdefault(name, torch.zeros(selection.sizes[name][0], dtype=torch.bool, device="cpu"))[rows] = (
                True
            )
        ddp.changed(self.model)
        return changes

    def record(self, added: set[int]):
        """Takes the hashes of all frozen rows, but for parameters whose id is in `added`."""
        self.hashes = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in added or not _is_plain(parameter):
                continue
            link = getattr(parameter, "link", None)
            values = row_hashes(parameter.detach(), 0 if link is None else link.axis).cpu()
            frozen = torch.ones(len(values), dtype=torch.bool, device="cpu")
            if link is not None and link.leaf is not None:
                frozen[link.rows.cpu()] = False
            self.hashes[name] = values, frozen

    def check_modules(self, links: list[Link]):
        """Raises RuntimeError where a module left the model together with a weight whose rows train."""
        if all(children.get(name) is child for children, name, child in self.tree):
            return
        listed = {id(own_parameters(module)) for module in self.model.modules()}
        for link in links:
            if not all(id(parameters) in listed for parameters, _ in link.places):
                raise RuntimeError(
                    f"{link.places[0][1]!r} of shape {list(link.weight.shape)} left the model while its rows train "
                    "(its module was replaced, or a parametrization removed): release() the model first and build a "
                    "new SparseFinetuner on what it has become"
                )
        self.tree = _tree(self.model)

    def verify(self):
        """Raises FrozenNeuronsChanged if a frozen row has another hash than at the selection."""
        if self.selection is None:
            raise RuntimeError("nothing is frozen before a selection; call select() first")
        parameters = dict(self.model.named_parameters())
        candidates = {id(m.parameter) for layer in self.layers for m in layer.members}
        changed = []
        for name, (values, frozen) in self.hashes.items():
            parameter = parameters.get(name)
            if parameter is None or (id(parameter) in candidates and not isinstance(parameter, HeldWeight)):
                changed.append(f"{name} was replaced or removed")
                continue
            link = getattr(parameter, "link", None)
            now = row_hashes(parameter.detach(), 0 if link is None else link.axis).cpu()
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

    def thaw(self, parameter: Tensor):
        """Makes a frozen parameter that is no candidate plain and trainable."""
        if isinstance(parameter, HeldWeight):
            loosen(parameter)
            parameter.requires_grad_(True)
        self.hashes = {n: h for n, h in self.hashes.items() if dict(self.model.named_parameters())[n] is not parameter}

    def release(self):
        for parameter in self.model.parameters():
            if isinstance(parameter, HeldWeight):
                loosen(parameter)
        ddp.changed(self.model)


def _tree(model: nn.Module) -> list[tuple[dict, str, nn.Module | None]]:
    """Every module below the model: the dictionary that lists it, as what, and itself."""
    return [(own_modules(m), name, child) for m in model.modules() for name, child in own_modules(m).items()]


def _places(model: nn.Module) -> dict[int, list[tuple[dict, str]]]:
    """{id of a parameter: the modules' dictionaries that list it, and as what}; several where it is shared."""
    places: dict[int, list[tuple[dict, str]]] = {}
    for module in model.modules():
        own = own_parameters(module)
        for name, parameter in own.items():
            places.setdefault(id(parameter), []).append((own, name))
    return places


def hold(parameter: nn.Parameter, axis: int, rows: Tensor | None) -> Link:
    """Freezes a trainable `parameter` but for `rows` along `axis`, which train in the link's leaf; None: all of it.

    It may be held already, with other rows; its old leaf goes, with its gradient. A script may have turned its gradient
    off for the moment.
    """
    masters, wanted = None, parameter.requires_grad
    if isinstance(parameter, HeldWeight):
        link = parameter.link
        link.sync()
        if link.leaf is None if rows is None else link.leaf is not None and link.rows.tolist() == rows.tolist():
            return link
        wanted = link.wanted
        if rows is not None and link.leaf is not None and link.leaf.dtype != parameter.dtype:
            masters = link.rows, link.leaf.detach()
        loosen(parameter)
    kind, leaf = type(parameter), None
    if rows is not None:
        rows = rows.to(parameter.device)
        values = compact(parameter.detach(), axis, rows)
        dtype = master_dtype(values.dtype)
        values = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if masters is not None:  # rows that stay keep what half precision would round away
            kept = torch.isin(rows, masters[0])
            values[kept] = masters[1][torch.searchsorted(masters[0], rows[kept])]
        leaf = LeafParameter(values, requires_grad=wanted)
        watch_optimizers()
    parameter.grad = None
    parameter.requires_grad_(leaf is not None and wanted)
    link = Link(parameter, leaf, rows, axis)
    link.wanted, link.kind = wanted, kind
    vars(parameter)["link"] = link
    parameter.__class__ = held_class(kind)
    if leaf is not None:
        leaf.link = link
    return link


def loosen(parameter: HeldWeight):
    """Gives back the plain parameter, its trained values in place, trainable again."""
    link = parameter.link
    link.sync()
    link.gradient.write(None)
    parameter.__class__ = link.kind
    del parameter.link
    if link.leaf is not None:
        link.leaf.__class__ = nn.Parameter
        del vars(link.leaf)["link"]
    parameter.requires_grad_(True)
