"""What the state dict of a `SparseFinetuner` holds besides torch's: the entry "neurons"."""

import torch
from torch import Tensor

from .selection import Selection, selection_by_hand


def describe(ft) -> dict:
    """Tensors, numbers and names only, so that torch.load(weights_only=True) reads it."""
    selection = ft.selection
    return {
        "selection": selection and {"rows": dict(selection.rows), "sizes": dict(selection.sizes)},
        "optimizer": ft.optimizer,
        "affine": any(layer.always for layer in ft.layers),
        "evidence": ft.evidence.state_dict(),
        "evidence_used": ft.evidence_used,
        "buffers": dict(ft.buffers.copies) if ft.buffers and selection is None else None,
        "masters": {name: leaf.detach() for name, leaf in _masters(ft).items()},
        "ever": dict(ft.held.ever),
        "hashes": dict(ft.held.hashes),
        "base": ft.held.base,
    }


def check(ft, state_dict: dict) -> Selection | None:
    """The selection in a state dict that fits `ft`; ValueError where it does not fit."""
    if not isinstance(state_dict, dict) or "neurons" not in state_dict:
        raise ValueError("this state dict is not a SparseFinetuner's; load it into the optimizer that it came from")
    neurons = state_dict["neurons"]
    affine, own = neurons.get("affine", False), any(layer.always for layer in ft.layers)
    if affine != own:
        raise ValueError(f"the state dict is of affine={affine}, this optimizer has {own}; build it with the same one")
    saved = neurons["selection"]
    if saved is not None:
        saved = Selection(saved["rows"], {name: tuple(size) for name, size in saved["sizes"].items()}, ft.budget)
        saved = selection_by_hand(saved, ft.layers, ft.budget)
    if ft.selection is not None and saved != ft.selection:
        raise ValueError(
            "the state dict has another selection than this optimizer; load it into a new SparseFinetuner, or "
            "select(...) its neurons first"
        )
    optimizer = neurons.get("optimizer", ft.optimizer)
    if optimizer != ft.optimizer:
        raise ValueError(
            f"the state dict is of optimizer={optimizer!r}, this one is {ft.optimizer!r}; build it with the same one"
        )
    criterion = neurons["evidence"]["criterion"]
    if criterion != ft.criterion:
        raise ValueError(
            f"the state dict was scored by {criterion!r}, this optimizer by {ft.criterion!r}; build it with the same "
            "criterion"
        )
    groups, own = len(state_dict["param_groups"]), len(ft.param_groups)
    if groups != own:
        raise ValueError(
            f"the state dict has {groups} parameter groups, this optimizer has {own}; add the same groups before you "
            "load it"
        )
    return saved


def adopt(ft, neurons: dict):
    """Takes over what `describe` wrote."""
    ft.evidence.load_state_dict(neurons["evidence"])
    if neurons["buffers"] is not None:
        ft.buffers.adopt(neurons["buffers"])
    ft.evidence_used = neurons["evidence_used"]
    masters = _masters(ft)
    with torch.no_grad():
        for name, saved in neurons.get("masters", {}).items():
            if name in masters:
                masters[name].copy_(saved)
    ft.held.ever, ft.held.hashes, ft.held.base = neurons["ever"], neurons["hashes"], neurons["base"]


def _masters(ft) -> dict[str, Tensor]:
    """The leaves that hold more than the model does: float32 rows of half-precision weights."""
    links = {m.name: m.parameter.link for layer in ft.layers for m in layer.members if ft.selection is not None}
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
