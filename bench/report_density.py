"""The plots of time and memory over density, one a machine that has measured them."""

import io
from pathlib import Path

from machine import slug
from report_rows import COMPACT, MASK, OURS, Machine, updates


def plot_path(machine: Machine) -> str:
    return f"images/density-{slug(machine.name)}.png"


def plot(machines: list[dict], root: Path):
    """Writes the plots that `render` names."""
    for machine in map(Machine, machines):
        rows = updates(machine)
        if rows:
            path = root / "docs" / plot_path(machine)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(_figure(machine, rows))


def _figure(machine: Machine, rows: list[dict]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for color, network in enumerate(dict.fromkeys(row["network"] for row in rows)):
        cases = sorted((r for r in rows if r["network"] == network), key=lambda r: r["density"])
        for provider, style in ((OURS, "o-"), (COMPACT, "s--"), (MASK, ":")):
            times = [r[machine.time] * (1 if provider == OURS else machine.ratio(r, provider)) / 1e3 for r in cases]
            shares = [100 * r["fraction"] for r in cases]
            left.plot(shares, times, style, color=f"C{color}", markersize=4, label=f"{network}, {provider}")
    left.set(
        xscale="log", yscale="log", xlabel="% of the parameters", ylabel="ms", title="an Adam step of the selected rows"
    )
    left.legend(fontsize=6)
    memory = sorted((r for r in machine.ours("step") if r["pass"].startswith("memory")), key=lambda r: r["density"])
    if memory:
        shares = [100 * r["density"] for r in memory]
        right.plot(shares, [r["held_bytes"] / 1e6 for r in memory], "o-", markersize=4, label=OURS)
        dense = [r["held_bytes"] * r["ratio"]["dense fused Adam"] / 1e6 for r in memory]
        right.plot(shares, dense, ":", color="C0", label="dense fused Adam")
        right.set(xscale="log", yscale="log", xlabel="% of the parameters", ylabel="MB")
        right.set_title("StyleGAN2-256 G: all but weights and activations")
        right.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
