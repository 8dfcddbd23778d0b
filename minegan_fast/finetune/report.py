"""What trains and what it costs, in numbers."""

_MOMENTS = {"adam": 2, "adamw": 2}


def summary(ft) -> str:
    """A plain text table: layer, neurons trained/all, parameters trained/all, how the gradient reaches them."""
    table = [("layer", "neurons", "parameters", "gradient")]
    trained = total = trained_cost = total_cost = 0
    for layer in ft.layers:
        n, cost = layer.neurons, layer.cost
        k = len(ft.selection.rows.get(layer.name, ())) if ft.selection else 0
        path = _gradient(layer) if k else "none: frozen"
        if ft.selection is None:
            path = "dense: not selected yet"
        if any(m.name in ft.evidence.by_batch for m in layer.members):
            path += "; scored by the batch's gradient"
        table.append((layer.name, f"{k}/{n}", f"{k * cost}/{n * cost}", path))
        trained, total = trained + k, total + n
        trained_cost, total_cost = trained_cost + k * cost, total_cost + n * cost
    for i, group in enumerate(ft.added_groups, 1):
        numel = sum(p.numel() for p in group["params"])
        table.append((f"added group {i}", "-", f"{numel}/{numel}", "dense: added"))
    table.append(("total", f"{trained}/{total}", f"{trained_cost}/{total_cost}", f"criterion {ft.criterion}"))
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


def memory(ft) -> dict[str, dict[str, int]]:
    """Bytes of dense training of the candidates and of the sparse one that is set up; moments as if stepped once."""
    dense_weights = sum(p.nbytes for _, p in ft.model.named_parameters())
    candidates = sum(m.parameter.nbytes for layer in ft.layers for m in layer.members)
    added = [p for group in ft.added_groups for p in group["params"]]
    inside = {id(p) for _, p in ft.model.named_parameters()}
    outside = sum(p.nbytes for p in added if id(p) not in inside)
    moments = _MOMENTS.get(ft.optimizer, 1 if any(g.get("momentum") for g in ft.param_groups) else 0)

    def cost(weights, trained, undo):
        return {
            "weights": weights + outside,
            "gradients": trained,
            "optimizer_state": moments * trained,
            "ema": trained if ft.ema_decay is not None else 0,
            "undo": undo,
        }

    extra = sum(p.nbytes for p in added)
    if ft.selection is None:
        undo = sum(t.nbytes for t in ft.evidence.start.values())
        return {
            "dense": cost(dense_weights, candidates + extra, 0),
            "sparse": cost(dense_weights, candidates + extra, undo),
        }
    leaves = sum(p.nbytes for group in ft.own_groups for p in group["params"])
    undo = sum(values.nbytes + frozen.nbytes for values, frozen in ft.held.hashes.values())
    return {
        "dense": cost(dense_weights, candidates + extra, 0),
        "sparse": cost(dense_weights + leaves, leaves + extra, undo),
    }
