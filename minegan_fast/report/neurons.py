"""Which neurons train: a row of cells for each layer, one cell a channel."""

from collections.abc import Sequence
from html import escape

from ..finetune import Selection


def runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each stretch of neighbours in sorted numbers."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return found


def neuron_map(selection: Selection, sources: Sequence[str]) -> str:
    """A table; of several sources, whose layers begin with "generators.", a part for each."""
    body = []
    counts = selection.counts()
    parts = {f"generators.{i}.": source for i, source in enumerate(sources)}
    shown = ""
    for layer, (trained, neurons) in counts.items():
        part = next((part for part in parts if layer.startswith(part)), "")
        name = layer.removeprefix(part)
        if part != shown:
            shown, own = part, [c for other, c in counts.items() if other.startswith(part)]
            total = f"{sum(k for k, _ in own)} of {sum(n for _, n in own)}"
            body.append(f'<tr><th colspan="3">{escape(parts.get(part, ""))}: {total}</th></tr>')
        stretches = runs(selection.rows[layer].tolist() if layer in selection.rows else [])
        path = "".join(f"M{first} 0h{last - first + 1}v1H{first}z" for first, last in stretches)
        listed = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in stretches)
        body.append(
            f'<tr class="layer" data-layer="{escape(name)}" data-neurons="{neurons}" data-trained="{listed}">'
            f'<td>{escape(name)}</td><td><svg viewBox="0 0 {neurons} 1" preserveAspectRatio="none" role="img" '
            f'aria-label="{trained} of {neurons} train"><path d="{path}"/></svg></td>'
            f"<td>{trained} of {neurons}</td></tr>"
        )
    counted = "neurons" if selection.budget == "neurons" else "parameters"
    total, whole = sum(k for k, _ in counts.values()), sum(n for _, n in counts.values())
    return (
        f"<p>{total} of {whole} neurons train, {selection.density:.1%} of the candidates' {counted}. A row is a layer; "
        'what is coloured trains, channel 0 is on the left.</p><p class="values" id="neuron" aria-live="polite"></p>'
        f'<div class="map"><table class="neurons">{"".join(body)}</table></div>'
    )
