"""The curves of docs/quality.md: held-out KID over training, overfitting, density."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from quality_results import DEFAULT, SPARSE, Results, estimate

from minegan_fast.files.atomic import atomic_path

FOLDER = Path("docs") / "images"
SHOWN = [("kernel", m) for m in ("scratch", "transfergan", "mined", "minegan", "minegan++", "random")]
SHOWN += [("adversarial", m) for m in ("freezed", "minegan++")]
NAMES = {
    "quality-training.png": "held-out KID over training",
    "quality-overfitting.png": "KID of training images and of held-out ones in longer runs",
    "quality-density.png": "held-out KID over the fraction of neurons that train",
}


def plot(results: Results, root: Path) -> None:
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, draw in zip(NAMES, (training, overfitting, density), strict=True):
        if (figure := draw(results)) is not None:
            save(figure, root / FOLDER / name)


def training(results: Results):
    """A panel for each target at its largest number of images: KID over steps, means over seeds."""
    places = [place for place in results.places if place[1] == 100]
    if not places:
        return None
    lines, columns = -(-len(places) // 3), min(3, len(places))
    figure = Figure(figsize=(4 * columns, 3.6 * lines))
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, place in zip(axes, places, strict=False):
        for way in SHOWN:
            steps, means = means_over_seeds(results, place, way)
            if steps:
                axis.plot(steps, means, "-" if way[0] == "kernel" else "--", label=f"{way[1]}, {way[0]}")
        axis.set(title=f"{place[0]}, {place[1]} images", xlabel="step", ylim=(0, 1.3))
    axes[0].set_ylabel("held-out KID, in the source's")
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def overfitting(results: Results):
    """KID of training images and of held-out ones, over the longest runs there are."""
    kinds = {(*key[:2], key[4]) for key in results.by_key if key[4].startswith("steps=")}
    if not kinds:
        return None
    setting, count, variant = sorted(kinds)[0]
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    for way, colour in zip((SPARSE, DEFAULT, ("kernel", "transfergan")), ("C0", "C1", "C2"), strict=True):
        for name, line in (("kid", "-"), ("kid_train", ":")):
            steps, means = means_over_seeds(results, (setting, count), way, variant, name)
            if steps:
                axis.plot(steps, means, line, color=colour, label=f"{way[1]}, {'held out' if line == '-' else 'train'}")
    axis.set(title=f"{setting}, {count} images", xlabel="step", ylabel="KID, in the source's")
    axis.legend(fontsize="small")
    figure.tight_layout()
    return figure


def density(results: Results):
    """KID at the last step over the fraction of neurons that train."""
    places = [p for p in results.places if any(k[:2] == p and k[4].startswith("density=") for k in results.by_key)]
    if not places:
        return None
    figure = Figure(figsize=(5 * len(places), 3.6))
    axes = figure.subplots(1, len(places), squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        for method in ("minegan++", "random"):
            found = {d: results.mean(place, ("kernel", method), v) for d, v in results.densities().items()}
            points = [(density, mean) for density, mean in found.items() if mean]
            halves = [mean.half or 0 for _, mean in points]
            axis.errorbar([d for d, _ in points], [m.mean for _, m in points], halves, capsize=3, label=method)
        if dense := results.mean(place, ("kernel", "minegan")):
            axis.axhline(dense.mean, color="grey", linestyle=":", label="minegan (all)")
        axis.set(title=f"{place[0]}, {place[1]} images", xlabel="neurons that train", xscale="log")
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("held-out KID, in the source's")
    figure.tight_layout()
    return figure


def means_over_seeds(results: Results, place, way, variant: str = "", name: str = "kid") -> tuple[list, list]:
    """(steps, mean relative KID there) of the seeds that came to the last step."""
    records = [r for r in results.seeds(place, way, variant).values() if results.relative(r) is not None]
    if not records:
        return [], []
    steps = [row["step"] for row in records[0]["curve"]]
    return steps, [estimate([results.relative(r, i, name) for r in records]).mean for i in range(len(steps))]


def save(figure, path: Path) -> None:
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
