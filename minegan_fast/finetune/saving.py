"""What the state dict of a `SparseFinetuner` holds besides torch's: the entry "neurons"."""

import torch
from torch import Tensor

from .evidence import Evidence
from .rows.freezing import Held
from .rows.link import Link
from .rows.parameters import HeldWeight
from .samples.buffers import BufferCopy
from .selection import Selection, selection_by_hand


def describe(held: Held, evidence: Evidence, buffers: BufferCopy | None) -> dict:
    """Tensors, numbers and names only, so that torch.load(weights_only=True) reads it."""
    selection = held.selection
    return {
        "selection": selection and {"rows": dict(selection.rows), "sizes": dict(selection.sizes)},
        "affine": _affine(held),
        "evidence": evidence.state_dict(),
        "buffers": dict(buffers.copies) if buffers and selection is None else None,
        "masters": {name: leaf.detach() for name, leaf in _masters(held).items()},
        "ever": dict(held.ever),
        "hashes": dict(held.hashes),
        "base": held.base,
    }


def check_fits(
    state_dict: dict, held: Held, budget: str, optimizer: str, criterion: str, groups: int
) -> Selection | None:
    """The selection in a state dict of an optimizer of the same kind; ValueError where it is of another.

    groups: how many parameter groups the optimizer has.
    """
    if not isinstance(state_dict, dict) or "neurons" not in state_dict:
        raise ValueError("this state dict is not a SparseFinetuner's; load it into the optimizer that it came from")
    neurons = state_dict["neurons"]
    affine, own = neurons.get("affine", False), _affine(held)
    if affine != own:
        raise ValueError(f"the state dict is of affine={affine}, this optimizer has {own}; build it with the same one")
    saved = neurons["selection"]
    if saved is not None:
        saved = Selection(saved["rows"], {name: tuple(size) for name, size in saved["sizes"].items()}, budget)
        saved = selection_by_hand(saved, held.layers, budget)
    if held.selection is not None and saved != held.selection:
        raise ValueError(
            "the state dict has another selection than this optimizer; load it into a new SparseFinetuner, or "
            "select(...) its neurons first"
        )
    theirs = neurons.get("optimizer", optimizer)
    if theirs != optimizer:
        raise ValueError(
            f"the state dict is of optimizer={theirs!r}, this one is {optimizer!r}; build it with the same one"
        )
    theirs = neurons["evidence"]["criterion"]
    if theirs != criterion:
        raise ValueError(
            f"the state dict was scored by {theirs!r}, this optimizer by {criterion!r}; build it with the same one"
        )
    theirs = len(state_dict["param_groups"])
    if theirs != groups:
        raise ValueError(
            f"the state dict has {theirs} parameter groups, this optimizer has {groups}; add the same ones before you "
            "load it"
        )
    return saved


def adopt(neurons: dict, held: Held, evidence: Evidence, buffers: BufferCopy | None):
    """Takes over what `describe` wrote."""
    evidence.load_state_dict(neurons["evidence"])
    if buffers is not None and neurons["buffers"] is not None:
        buffers.adopt(neurons["buffers"])
    masters = _masters(held)
    with torch.no_grad():
        for name, saved in neurons.get("masters", {}).items():
            if name in masters:
                masters[name].copy_(saved)
    held.ever, held.hashes, held.base = neurons["ever"], neurons["hashes"], neurons["base"]


def _affine(held: Held) -> bool:
    return any(layer.always for layer in held.layers)


def _masters(held: Held) -> dict[str, Tensor]:
    """The leaves that hold more than the model does: float32 rows of half-precision weights."""
    members = [m for layer in held.layers for m in layer.members] if held.selection is not None else []
    links: dict[str, Link] = {m.name: m.parameter.link for m in members if isinstance(m.parameter, HeldWeight)}
    for link in links.values():
        link.sync()
    return {n: link.leaf for n, link in links.items() if link.leaf is not None and link.leaf.dtype != link.plain.dtype}


@torch.no_grad()
def carry(state: dict, old_rows: Tensor, rows: Tensor, leaf: Tensor) -> dict:
    """The state of a leaf with `rows` from that of its predecessor with `old_rows`: kept rows keep theirs, the moments
    of new ones start at zero, their EMA at their value."""
    rows, old_rows = rows.cpu(), old_rows.cpu()
    kept = torch.isin(rows, old_rows)
    source = torch.searchsorted(old_rows, rows[kept])
    carried = {}
    for key, old in state.items():
        new = leaf.detach().clone() if key == "ema" else old.new_zeros(len(rows), *old.shape[1:])
        new[kept.to(new.device)] = old[source.to(old.device)]
        carried[key] = new
    return carried
