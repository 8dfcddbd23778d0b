"""What trains and what it costs, in numbers."""

import logging

import torch

from ..collectives import active
from .evidence import Evidence
from .rows.freezing import Held
from .selection import Selection

_log = logging.getLogger(__name__)
_MOMENTS = {"adam": 2, "adamw": 2}


def announce(selection: Selection, steps: int) -> None:
    """Says in the log, of one process, that `step()` has selected: a resumed script may have meant not to."""
    if active(None) and torch.distributed.get_rank() > 0:
        return
    counts = selection.counts().values()
    _log.warning(
        "SparseFinetuner scored for %d steps and has selected: %d of %d neurons train from now on. A script that "
        "resumes a run and sees this line selects anew: it has to save the optimizer's state_dict() beside the "
        "model's and to load both.",
        steps, sum(k for k, _ in counts), sum(n for _, n in counts),
    )  # fmt: skip


def summary(held: Held, evidence: Evidence, added_groups: list[dict]) -> str:
    """A plain text table: layer, neurons trained/all, parameters trained/all, how the gradient reaches them."""
    selection = held.selection
    by_batch = evidence.by_batch | (evidence.source.by_batch if evidence.source else set())
    table = [("layer", "neurons", "parameters", "gradient")]
    trained = total = trained_cost = total_cost = 0
    for layer in held.layers:
        n, cost = layer.neurons, layer.cost
        k = len(selection.rows.get(layer.name, ())) if selection else 0
        path = _gradient(layer) if k else "none: frozen"
        if selection is None:
            path = "dense: not selected yet"
        if any(m.name in by_batch for m in layer.members):
            path += "; scored by the batch's gradient"
        table.append((layer.name, f"{k}/{n}", f"{k * cost}/{n * cost}", path))
        trained, total = trained + k, total + n
        trained_cost, total_cost = trained_cost + k * cost, total_cost + n * cost
    for i, group in enumerate(added_groups, 1):
        numel = sum(p.numel() for p in group["params"])
        table.append((f"added group {i}", "-", f"{numel}/{numel}", "dense: added"))
    table.append(("total", f"{trained}/{total}", f"{trained_cost}/{total_cost}", f"criterion {evidence.criterion}"))
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = [
        "  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3])).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _gradient(layer) -> str:
    """How the gradient has reached the rows until now: of them alone, or gathered from the dense one; in which uses."""
    links = [m.parameter.link for m in layer.members if m.parameter.numel() > layer.neurons]
    if not links:
        return "vector"
    rows = sorted(set().union(*(link.row_uses for link in links)))
    dense = sorted(set().union(*(link.dense_uses for link in links)))
    ways = [f"rows: {', '.join(rows)}"] * bool(rows) + [f"dense, then rows: {', '.join(dense)}"] * bool(dense)
    return "; ".join(ways) or "not used yet"


def memory(
    held: Held, evidence: Evidence, optimizer: str, own: list[dict], added: list[dict], ema: bool
) -> dict[str, dict[str, int]]:
    """Bytes of dense training of the candidates and of the sparse one that is set up; moments as if stepped once.

    own, added: parameter groups of the model's candidates and of what was added. ema: whether averages are kept.
    """
    parameters = list(held.model.parameters())
    dense_weights = sum(p.nbytes for p in parameters)
    candidates = sum(m.parameter.nbytes for layer in held.layers for m in layer.members)
    momentum = any(group.get("momentum") for group in [*own, *added])
    extra = [p for group in added for p in group["params"]]
    inside = set(map(id, parameters))
    outside = sum(p.nbytes for p in extra if id(p) not in inside)
    extra_bytes = sum(p.nbytes for p in extra)
    moments = _MOMENTS.get(optimizer, int(momentum))

    def cost(weights, trained, undo):
        return {
            "weights": weights + outside,
            "gradients": trained,
            "optimizer_state": moments * trained,
            "ema": trained if ema else 0,
            "undo": undo,
        }

    if held.selection is None:
        undo = sum(t.nbytes for t in evidence.start.values())
        return {
            "dense": cost(dense_weights, candidates + extra_bytes, 0),
            "sparse": cost(dense_weights, candidates + extra_bytes, undo),
        }
    leaves = sum(p.nbytes for group in own for p in group["params"])
    undo = sum(values.nbytes + frozen.nbytes for values, frozen in held.hashes.values())
    return {
        "dense": cost(dense_weights, candidates + extra_bytes, 0),
        "sparse": cost(dense_weights + leaves, leaves + extra_bytes, undo),
    }
