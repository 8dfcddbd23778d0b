# ruff: noqa: RUF001
"""The tables of docs/quality.md, from bench/results/quality.json: every number and every verdict follows from cells."""

from collections.abc import Callable, Iterable
from pathlib import Path

import quality_curves
import quality_goals
import quality_merge
from quality_plan import ADVERSARIAL_ATTEMPTS, ATTEMPTS
from quality_results import COLLAPSED, DEFAULT, SPARSE, Estimate, Results, estimate
from quality_settings import SETTINGS
from quality_settings import TUNING as SETTINGS_FOR_TUNING

RESULTS = Path("bench") / "results" / "quality.json"
NOTHING = "Nothing has been measured yet.\n"
PICTURES = {
    "curves": quality_curves.NAMES,
    "pictures": {f"quality-{name}.png": setting.title for name, setting in SETTINGS.items()},
}


def render(root: Path) -> dict[str, str]:
    """The text between the markers of every section of docs/quality.md."""
    results = Results.load(root / RESULTS)
    sections = {name: section(results) if results.records else NOTHING for name, section in SECTIONS.items()}
    sections["tuning"] = tuning(root)
    for name, files in PICTURES.items():
        there = [(file, title) for file, title in files.items() if (root / quality_curves.FOLDER / file).exists()]
        sections[name] = "".join(f"![{title}](images/{file})\n\n" for file, title in there) or NOTHING
    return {f"quality-{name}": text for name, text in sections.items()}


def plot(root: Path) -> None:
    results = Results.load(root / RESULTS)
    if results.records:
        quality_curves.plot(results, root)


def facts(results: Results) -> str:
    known = results.facts
    hours = sum(record["seconds"] for record in results.records) / 3600
    diverged = sum(bool(record["diverged"]) for record in results.records)
    return (
        f"{len(results.records)} runs, {hours:.1f} hours of one core; {known['processor']}, torch {known['torch']}, "
        f"commit {known['commit']}; {diverged} runs diverged and "
        "are left out of the means.\n"
    )


def overview(results: Results) -> str:
    """Held-out KID at the last step of all ways, under each loss."""
    parts = []
    for loss in ("kernel", "adversarial"):
        ways = [way for way in results.ways() if way[0] == loss]
        if ways:
            rows = [[title(place), *(shown(results.mean(place, way)) for way in ways)] for place in results.places]
            rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
            parts.append(f"The {loss} loss:\n\n" + table(["target, images", *(method for _, method in ways)], rows))
    return "\n".join(parts)


def mining(results: Results) -> str:
    pairs = [(way, ("kernel", "transfergan")) for way in (DEFAULT, SPARSE, ("kernel", "mined"))]
    pairs += [(DEFAULT, ("kernel", "scratch")), (DEFAULT, ("adversarial", "freezed"))]
    pairs += [(("adversarial", "minegan"), ("adversarial", "transfergan"))]
    return comparisons(results, pairs)


def losses(results: Results) -> str:
    methods = dict.fromkeys(method for _, method in results.ways())
    return comparisons(results, [(("kernel", m), ("adversarial", m)) for m in methods])


def sparsity(results: Results) -> str:
    pairs = [
        ((loss, "minegan++"), (loss, other)) for loss in ("kernel", "adversarial") for other in ("minegan", "random")
    ]
    return comparisons(results, pairs) + "\n" + densities(results)


def densities(results: Results) -> str:
    """Chosen and random neurons at every density, where it was varied."""
    values = list(results.densities().values())
    rows = []
    for place in varied(results, "density="):
        for method in ("minegan++", "random"):
            row = [title(place), method]
            rows.append([*row, *(shown(results.mean(place, ("kernel", method), value)) for value in values)])
        pairs = [results.differences(place, SPARSE, ("kernel", "random"), (value, value)) for value in values]
        rows.append([title(place), "chosen − random", *(shown(estimate(pair), signed=True) for pair in pairs)])
    return table(["target, images", "", *(f"{density:g}" for density in results.densities())], rows) if rows else ""


def scores(results: Results) -> str:
    """Each way to choose neurons against random ones, as many of every layer, seed by seed."""
    rows = []
    for loss, attempts in (("kernel", ATTEMPTS), ("adversarial", ADVERSARIAL_ATTEMPTS)):
        for name, (variant, (method, other)) in attempts.items():
            way, control = (loss, "minegan++"), (loss, method)
            each = {place: results.differences(place, way, control, (variant, other)) for place in results.places}
            each = {place: values for place, values in each.items() if values}
            total = estimate([value for values in each.values() for value in values])
            if total:
                said = (f"{title(p)}: {shown(results.mean(p, way, variant))}, {shown(estimate(v), True)}"
                        for p, v in each.items())  # fmt: skip
                rows.append([name, loss, "; ".join(said), shown(total, signed=True), total.verdict])
    head = ["choice of neurons", "loss", "KID, and that minus its control's", "minus the control's, all", "than chance"]
    return table(head, rows) if rows else NOTHING


def tuning(root: Path) -> str:
    """Of the targets that are not reported elsewhere each way's KID at its best learning rate, one seed."""
    results = Results.load(root / quality_merge.TUNING)
    settings = [setting.name for setting in SETTINGS_FOR_TUNING.values()]
    best: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
    for (name, _, loss, method, variant, _), record in results.by_key.items():
        value = results.relative(record)
        if value is not None:
            found = best.setdefault((loss, method), {})
            found[name] = min(found.get(name, (value, variant)), (value, variant))
    rows = []
    for way in sorted(best, key=lambda way: (way[0] != "kernel", min(best[way].values()))):
        cells = (best[way].get(name) for name in settings)
        rows.append([named(way), *(f"{c[0]:.3f} ({float(c[1].split('=')[1]):g})" if c else "–" for c in cells)])
    return table(["way", *settings], rows) if rows else NOTHING


def counts(results: Results) -> str:
    """For each number of images the ways by their mean over targets, relative to the best way there."""
    rows = []
    for count in sorted({count for _, count in results.places}):
        places = [place for place in results.places if place[1] == count]
        best = {place: results.mean(place, results.best_way(place)).mean for place in places if results.best_way(place)}
        excess = {}
        for way in results.ways(count=count):
            means = {place: results.mean(place, way) for place in best}
            if all(means.values()):
                excess[way] = sum(means[place].mean - best[place] for place in best) / len(best)
        for way in sorted(excess, key=excess.get)[:3]:
            wins = sum(results.best_way(place) == way for place in places)
            rows.append([str(count), named(way), f"{excess[way]:.3f}", f"{wins} of {len(places)}"])
    return table(["images", "way", "KID above the best way of a target, mean", "best way of so many targets"], rows)


def steps(results: Results) -> str:
    """Where over training the held-out KID is lowest, and what a choice by a few images set aside gives."""
    rows = []
    for place in results.places:
        for way in (DEFAULT, SPARSE, ("kernel", "transfergan")):
            for variant in (
                "",
                *sorted({k[4] for k in results.by_key if k[:2] == place and k[4].startswith("steps=")}),
            ):
                records = [r for r in results.seeds(place, way, variant).values() if results.relative(r) is not None]
                if not records:
                    continue
                name = named(way) + (f", {variant.split('=')[1]} as long" if variant else "")
                rows.append([title(place), name, *chosen_steps(results, records)])
    head = ["target, images", "way", "last step", "KID there", "train KID there", "best step, median", "KID there"]
    return table([*head, "KID at the step that 10 images set aside choose"], rows)


def chosen_steps(results: Results, records: list[dict]) -> list[str]:
    def at(choose: Callable[[list[dict]], int], name: str = "kid") -> str:
        return shown(estimate([results.relative(r, choose(r["curve"]), name) for r in records]))

    def least(name: str) -> Callable[[list[dict]], int]:
        return lambda curve: min(range(len(curve)), key=lambda i: curve[i][name])

    best = sorted(r["curve"][least("kid")(r["curve"])]["step"] for r in records)
    last = records[0]["curve"][-1]["step"]
    return [str(last), at(lambda curve: -1), at(lambda curve: -1, "kid_train"), str(best[len(best) // 2]),
            at(least("kid")), at(least("kid_validation"))]  # fmt: skip


def quality(results: Results) -> str:
    """What else is said of the images at the last step: of the default's, sparse ones, and those without a miner."""
    rows = []
    names = ("precision", "recall", "nearest", "diversity")
    for place in results.places:
        for way in (DEFAULT, SPARSE, ("kernel", "transfergan")):
            if results.final(place, way):
                rows.append([title(place), named(way), *(shown(results.mean(place, way, name=n)) for n in names)])
    return table(["target, images", "way", *names], rows)


def prior(results: Results) -> str:
    """How far mined latents are from the prior, and whether a hidden class was found."""
    rows = []
    for setting in dict.fromkeys(place[0] for place in results.places):
        noted = [
            record["curve"][-1]["noted"]
            for key, record in results.by_key.items()
            if key[0] == setting and key[2:4] == DEFAULT and not key[4] and record["curve"]
        ]
        found = [r["class"]["found"] for k, r in results.by_key.items() if k[0] == setting and "class" in r]
        cells = [span(row[name] for row in noted if name in row) for name in ("latent_norm", "latent_norm_spread")]
        cells.append(span(row["latent_dimensions"] for row in noted if "latent_dimensions" in row))
        rows.append([SETTINGS[setting].title, *cells, f"{sum(found)} of {len(found)}" if found else "–"])
    return table(["target", "|z|²/d, mean", "its spread", "effective dimension, of the prior's", "class found"], rows)


def limits(results: Results) -> str:
    """Every place where another way has a lower mean than the default, and every collapse."""
    rows = []
    for place in results.places:
        for way in results.ways(*place):
            difference = estimate(results.differences(place, DEFAULT, way))
            if way != DEFAULT and difference and difference.mean > 0:
                clear = "yes" if difference.verdict == "worse" else "no"
                rows.append([title(place), named(way), shown(difference, signed=True), clear])
    behind = table(["target, images", "lower KID by", "default's KID minus it", "beyond the interval"], rows)
    collapsed = [
        f"{title(k[:2])}, {named(k[2:4])}{', ' + k[4] if k[4] else ''}, seed {k[5]}"
        for k, r in results.by_key.items()
        if r["curve"] and r["curve"][-1]["diversity"] < COLLAPSED
    ]
    said = "; ".join(collapsed) if collapsed else "none"
    return f"{behind}\nRuns whose images have less than a third of the real ones' diversity: {said}.\n"


def goals(results: Results) -> str:
    """What was wanted of the defaults: of how many targets it is so, at each number of images."""
    rows = []
    for count in sorted({count for _, count in results.places}):
        for name, wanted in quality_goals.GOALS.items():
            met = {place[0]: wanted(results, place) for place in results.places if place[1] == count}
            met = {setting: value for setting, value in met.items() if value is not None}
            if met:
                rows.append([name, str(count), f"{sum(met.values())} of {len(met)}", ", ".join(met) or "–"])
    return table(["wanted", "images", "targets where it is so", "measured on"], rows) if rows else NOTHING


def comparisons(results: Results, pairs: Iterable[tuple]) -> str:
    """Of each pair of ways the mean difference of relative KID over all places and seeds, and how many places of each
    verdict there are."""
    rows = []
    for way, other in pairs:
        each = {place: results.differences(place, way, other) for place in results.places}
        each = {place: values for place, values in each.items() if values}
        if not each:
            continue
        verdicts = [estimate(values).verdict for values in each.values()]
        lower = sum(estimate(values).mean < 0 for values in each.values())
        total = estimate([value for values in each.values() for value in values])
        counted = [str(verdicts.count(name)) for name in ("better", "not told apart", "worse")]
        rows.append([named(way), named(other), shown(total, signed=True), f"{lower} of {len(each)}", *counted])
    head = ["way", "against", "difference of KID", "lower mean", "better", "not told apart", "worse"]
    return table(head, rows) if rows else NOTHING


def varied(results: Results, kind: str) -> list[tuple[str, int]]:
    found = {k[:2] for k in results.by_key if k[4].startswith(kind)}
    return [place for place in results.places if place in found]


def title(place: tuple[str, int]) -> str:
    return f"{place[0]}, {place[1]}"


def named(way: tuple[str, str]) -> str:
    return f"{way[1]}, {way[0]}"


def shown(value: Estimate | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    mean = f"{value.mean:+.3f}" if signed else f"{value.mean:.3f}"
    return mean if value.half is None else f"{mean} ± {value.half:.3f}"


def span(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.2f}–{max(values):.2f}" if values else "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


SECTIONS = {
    "facts": facts, "overview": overview, "mining": mining, "losses": losses, "sparsity": sparsity, "scores": scores,
    "counts": counts, "steps": steps, "quality": quality, "prior": prior, "limits": limits, "goals": goals,
}  # fmt: skip
NAMES = tuple(f"quality-{name}" for name in (*SECTIONS, "tuning", *PICTURES))
