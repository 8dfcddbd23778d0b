"""Curves as inline SVG by matplotlib, in the colours of the page, with what a pointer over them shows."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

POINTS, ALL = 1000, 20_000  # of a curve, of a figure: more are not to be told apart
COLOURS = 8  # --s1 to --s8 in page.css
SIZE = (7.2, 2.7)  # inches of 72 units
_INK = "#010203"  # becomes the page's own
_WIDE = 50  # values that differ by more are shown on a logarithmic axis


def chart(title: str, series: Mapping[str, Mapping[int, float]], stages: Sequence[tuple[int, str]], note="") -> str:
    """One figure of {name: {step: value}}; stages: (step, name) where each begins."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    most = max(20, min(POINTS, ALL // len(series)))
    thinned = {name: thin(points, most) for name, points in series.items()}
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for number, points in enumerate(thinned.values()):
            marker = "o" if len(points) <= 30 else None  # few points are hard to see as a line, one not at all
            axes.plot(
                [*points], [*points.values()], color=_stand_in(number), linewidth=1.6, marker=marker, markersize=3
            )
        for step, stage in stages:
            axes.axvline(step, color=_INK, linewidth=0.7, linestyle=":")
            axes.text(step, 1, f" {stage}", transform=axes.get_xaxis_transform(), va="bottom", parse_math=False)
        values = [value for points in thinned.values() for value in points.values()]
        if min(values) > 0 and max(values) > _WIDE * min(values):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, color=_INK, linewidth=0.5)
        axes.set_xlabel("step")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        steps = sorted({step for points in thinned.values() for step in points})
        pixels = [round(float(axes.transData.transform((step, values[0]))[0]), 2) for step in steps]
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace(_INK, "currentColor")  # the same ids are in every figure
    for number in range(len(thinned)):
        svg = svg.replace(_stand_in(number), f"var(--s{number % COLOURS + 1})")
    data = {
        "steps": steps,
        "x": pixels,
        "width": SIZE[0] * 72,
        "series": {name: [points.get(step) for step in steps] for name, points in thinned.items()},
    }
    spans = [f'<span class="key s{i % COLOURS + 1}">{escape(name)}</span>' for i, name in enumerate(thinned)]
    keys = "".join(spans) if len(spans) > 1 else ""
    if any(len(points) > len(thinned[name]) for name, points in series.items()):
        note = f"{note} At most {most} points of a curve are drawn.".strip()
    said = note and f'<p class="note">{escape(note)}</p>'
    return (
        f'<figure class="chart" tabindex="0" data-points="{escape(json.dumps(data))}"><figcaption>{escape(title)} '
        f'{keys}</figcaption><div class="plot">{svg}<div class="line" hidden></div></div>'
        f'<output class="values" aria-live="polite"></output>{said}</figure>'
    )


def thin(points: Mapping[int, float], most: int) -> dict[int, float]:
    """Every so many of them, about `most`, and the last one."""
    every = -(-len(points) // most)
    last = len(points) - 1
    return {step: value for i, (step, value) in enumerate(points.items()) if i % every == 0 or i == last}


def _stand_in(number: int) -> str:
    return f"#a0{number % COLOURS:02x}01"
