"""The page: its panels, in the order of their reading."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from importlib.resources import files
from string import Template

from .charts import chart, thin
from .facts import Facts, series_of
from .neurons import neuron_map
from .pictures import encoded, opened

LARGEST = 4_900_000  # bytes of all panels, of the 5 MB that a page may have
GRIDS, NEIGHBOURS = 2_800_000, 500_000  # bytes for pictures, where the other panels leave as much
STEPS, SNAPSHOTS = 40, 300  # grids behind the slider, rows of the table
METRICS = ("kid", "kid_train", "fid", "kmmd", "mv", "diversity")
_NAMES = {"kid_train": "KID, training images", "kid": "KID", "fid": "FID", "kmmd": "KMMD", "mv": "Mean variance"}
_NAMES["diversity"] = "Diversity"
_MEANING = {
    "Mean variance": "Of the features: higher is more diverse.",
    "Diversity": "Mean distance of two images' features, in that of the real ones: 1 is as diverse.",
    "Latents": "Of the mined latents: |z|²/d, 1 in the prior, and the effective dimension in that of the prior.",
}


def page(facts: Facts) -> str:
    """The HTML, at most 5 MB, of which nothing comes from elsewhere. Every text of the run is escaped, and a policy in
    the page lets no script but its own run."""
    script = _own("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_own("page.html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=escape(facts.name),
        style=_own("page.css"),
        script=script,
        summary=_summary(facts),
        panels="\n".join(_panels(facts)),
    )


def _own(name: str) -> str:
    return files("minegan_fast.report").joinpath(name).read_text(encoding="utf-8")


def _panels(facts: Facts) -> Iterator[str]:
    panels: dict[str, Callable[[Facts], str | None]] = {
        "Metrics": _metrics,
        "Curves": _curves,
        "Sources": _shares,
        "Neurons": lambda facts: facts.selection and neuron_map(facts.selection, facts.sources),
        "Nearest training images": _neighbours,
        "Messages": _messages,
        "Settings": _settings,
        "Versions": lambda facts: _table([], [[escape(n), escape(v)] for n, v in facts.versions.items()], "texts"),
    }
    drawn = {title: draw(facts) for title, draw in panels.items()}
    room = min(GRIDS, LARGEST - sum(len(content.encode()) for content in drawn.values() if content))
    for title, content in {"Images": _grids(facts, room), **drawn}.items():
        if not content:
            if title not in facts.missing:
                continue
            content = f'<p class="note">{escape(facts.missing[title])}</p>'
        yield f'<section id="{title.split()[0].lower()}"><h2>{title}</h2>{content}</section>'


def _summary(facts: Facts) -> str:
    last = max((row["step"] for row in facts.history), default=0)
    series, said = series_of(facts.history), []
    for name in ("kid", "kid_train"):
        values = series.get(name, {})
        if 0 in values and facts.best in values:
            said.append(f"{_title(name)} {_number(values[0])} at the source, {_number(values[facts.best])} at the best")
    on = f"; on {facts.judge} features" if facts.judge else ""
    compared = f" {'; '.join(said)}{on}." if said else ""
    return escape(f"{last} steps, the best snapshot is that of step {facts.best}.{compared}")


def _grids(facts: Facts, room: int) -> str:
    steps = [step for step in facts.marks if step in facts.grids]
    others = [step for step in facts.grids if step not in facts.marks]
    every = -(-len(others) // STEPS) if others else 1
    files = {step: facts.grids[step] for step in sorted({*steps, *others[::every]})}
    found = {step: picture for step, file in files.items() if (picture := opened(file)) is not None}
    if not found:
        return ""
    steps, shown = [step for step in steps if step in found], [*found]
    pictures = dict(zip(shown, encoded([*found.values()], room), strict=True))
    figures = "".join(
        f'<figure><img data-step="{step}" src="{pictures[step]}" alt="Images at step {step}">'
        f"<figcaption>{escape(facts.marks[step])}, step {step}</figcaption></figure>"
        for step in steps
    )
    stages = {row["step"]: row.get("stage", "") for row in facts.history}
    labels = {step: facts.marks.get(step) or stages.get(step, "") for step in shown}
    behind = {step: picture for step, picture in pictures.items() if step not in steps}
    data = {"steps": shown, "labels": [labels[step] for step in shown], "pictures": behind}
    slider = (
        '<div class="slider" hidden><label>Step <input type="range" id="step" min="0" value="0" '
        f'max="{len(shown) - 1}"></label> <output id="shown-step"></output><img id="shown" alt=""></div>'
    )
    note = "The same latents at every step." + (f" Every {_ordinal(every)} snapshot." if every > 1 else "")
    return f'<div class="grids">{figures}</div>{slider}<p class="note">{note}</p>{_json("grids", data)}'


def _metrics(facts: Facts) -> str:
    series = series_of(facts.history)
    names = [name for name in METRICS if name in series]
    if not names:
        return ""
    measured = sorted({step for name in names for step in series[name]})

    def cells(step: int, intervals: Mapping) -> list[str]:
        found = []
        for name in names:
            value = series[name].get(step)
            text = "" if value is None else f'<data value="{value!r}">{_number(value)}</data>'
            if text and name in intervals:
                low, high = intervals[name]
                text += f" <small>({_number(low)} to {_number(high)})</small>"
            found.append(text)
        return found

    head = ["", "step", *map(_title, names)]
    rows = [
        [escape(mark), str(step), *cells(step, facts.intervals if step == facts.best else {})]
        for step, mark in facts.marks.items()
        if step in measured
    ]
    every = _table(head[1:], [[str(step), *cells(step, {})] for step in thin(dict.fromkeys(measured, 0.0), SNAPSHOTS)])
    on = f"On {escape(facts.judge)} features. " if facts.judge else ""
    why = facts.intervals_of or facts.missing.get("Intervals", "")
    return (
        f'{_table(head, rows)}<p class="note">{on}{escape(why)}</p><details><summary>All snapshots</summary>'
        f"{every}</details>"
    )


def _curves(facts: Facts) -> str:
    series = series_of(facts.history)
    stages: list[tuple[int, str]] = []
    last = 0
    for row in facts.history:
        if row.get("stage") and (not stages or stages[-1][1] != row["stage"]):
            if stages and stages[-1][0] == last:
                stages.pop()  # there is nothing to see of the source before the first step
            stages.append((last, row["stage"]))
        last = row["step"]
    groups = {"KID": ["kid", "kid_train"], **{_title(n): [n] for n in METRICS[2:]}}
    groups["Losses"] = [name for name in series if "loss" in name.lower()]
    groups["Latents"] = ["latent_norm", "latent_dimensions"]
    groups["Shares"] = [name for name in series if name.startswith("p_")]
    drawn = []
    for title, names in groups.items():
        found = {_label(name, title, facts): series[name] for name in names if name in series}
        if found:
            drawn.append(chart(title, found, stages, _MEANING.get(title, "")))
    return "".join(drawn)


def _label(name: str, group: str, facts: Facts) -> str:
    if group == "KID" and "kid_train" in series_of(facts.history):
        return {"kid": "held-out images", "kid_train": "training images"}[name]
    return name.removeprefix("p_") if group == "Shares" else name


def _shares(facts: Facts) -> str:
    rows = []
    for name, (p, interval) in facts.shares.items():
        between = f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
        rows.append([
            escape(name), f'<data value="{p!r}">{p:.1%}</data>', between,
            f'<meter min="0" max="1" value="{p:.4f}">{p:.1%}</meter>',
        ])  # fmt: skip
    note = '<p class="note">The share of each source in the images of the best snapshot.</p>'
    return _table(["source", "p", "interval", ""], rows) + note if rows else ""


def _neighbours(facts: Facts) -> str:
    found = sorted(facts.neighbours, key=lambda one: one.relative)
    if not found:
        return ""
    pictures = encoded([picture for one in found for picture in (one.sample, one.image)], NEIGHBOURS)
    pairs = "".join(
        f'<figure data-distance="{one.distance!r}"><img src="{sample}" alt="generated"><img src="{image}" '
        f'alt="training image"><figcaption>{one.relative:.2f} · {escape(one.name)}</figcaption></figure>'
        for one, sample, image in zip(found, pictures[::2], pictures[1::2], strict=True)
    )
    return (
        "<p>Left a generated image, right the training image nearest to it in pixels, the nearest pair first. The "
        "number is the distance in that of a training image from the nearest other one, at the median: near 0 it is a "
        f'copy. Blurred images are nearer to everything.</p><div class="pairs">{pairs}</div>'
    )


def _messages(facts: Facts) -> str:
    once = dict.fromkeys(text for _, text in facts.messages)
    first = {text: step for step, text in reversed(facts.messages)}
    return _table(["step", ""], [[str(first[text]), escape(text)] for text in once], "texts") if once else ""


def _settings(facts: Facts) -> str:
    def rows(default: bool) -> list[list[str]]:
        found = facts.settings.items()
        return [[escape(name), escape(json.dumps(value))] for name, (value, own) in found if own == default]

    if not facts.settings:
        return ""
    given, own = (_table([], rows(default), "texts") for default in (False, True))
    return f"{given}<details><summary>Defaults</summary>{own}</details>"


def _table(head: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    """Cells are HTML. kind: "numbers", or "texts", in which lines break anywhere."""
    if not rows:
        return ""
    top = "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _json(name: str, data) -> str:
    """Data for the page's script; "<" could end the element."""
    return f'<script type="application/json" id="{name}">{json.dumps(data).replace("<", chr(92) + "u003c")}</script>'


def _title(metric: str) -> str:
    return _NAMES.get(metric, metric)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
