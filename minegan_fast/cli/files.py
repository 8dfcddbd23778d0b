"""`minegan-fast convert` and `minegan-fast inspect`."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

Family = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="biggan, dcgan, pgan, stylegan or stylegan2; default: told by the file's keys."),
]
SHOWN = 8  # names of tensors in a row of the table; --json has them all
ROWS = 16  # rows for what else is in a file; --json has them all


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint, or folder, of any project that is read here.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    family: Family = None,
    only: Annotated[Optional[str], typer.Option(help="generator or discriminator; default: both.")] = None,  # noqa: UP045
    loose: Annotated[
        bool, typer.Option("--loose", help="Load what fits, name the rest; default: every tensor must fit.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    resolution: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Of a StyleGAN or Progressive GAN; default: the highest that was trained."),
    ] = None,
) -> None:
    """Writes a checkpoint of another project as safetensors of this one.

    Example: minegan-fast convert ffhq.pkl ffhq.safetensors
    """
    from .. import models

    models.convert(source, out, family, only, not loose, force, resolution)
    for network in models.inspect(out).networks:
        print(f"{network.role}: {network.source}")
    print(f"written to {out}")


def inspect(
    file: Annotated[str, typer.Argument(help="Checkpoint, or folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every name.")] = False,
) -> None:
    """Says what a checkpoint holds: family, sizes, EMA or not, what else, and what is missing.

    Example: minegan-fast inspect ffhq.pkl

    Exit code 1: no network is known, or one is not whole.
    """
    from .. import models

    report = models.inspect(file)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        console = Console()
        for network in report.networks:
            _show(console, network.role, _rows(network))
        others = dict(list(report.others.items())[:ROWS])
        if len(report.others) > ROWS:
            others[f"and {len(report.others) - ROWS} more"] = "--json has them all"
        _show(console, "also in the file", others)
        if report.unknown:
            print(f"No network of a layout known here. {report.unknown}")
    if report.unknown or any(n.problem or n.missing or n.unexpected or n.wrong for n in report.networks):
        raise typer.Exit(1)


def _show(console: Console, title: str, rows: dict[str, str]) -> None:
    if rows:
        table = Table("", "", title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(name, Text(value))
        console.print(table)


def _rows(network) -> dict[str, str]:
    if network.problem:
        return {"problem": network.problem}
    where = f", in {network.container!r}" if network.container else ""
    weights = {True: "averaged (EMA)", False: "raw, not averaged", None: "the file does not say whether averaged"}
    beside = f"; the same network is in {', '.join(map(repr, network.passed_over))}" if network.passed_over else ""
    channels = network.config.get("channels")
    if isinstance(channels, dict):
        channels = ", ".join(f"{r}: {c}" for r, c in channels.items())
    rows = {
        "family": network.family,
        "layout": f"{network.layout}{where}",
        "weights": "" if network.source else f"{weights[network.averaged]}{beside}",
        "converted from": network.source or "",
        "resolution": f"{network.resolution} x {network.resolution}, {network.image_channels} channels",
        "channels": str(channels) if channels else "",
        "latent": "" if network.latent_dim is None else str(network.latent_dim),
        "classes": str(network.num_classes) if network.num_classes else "none (unconditional)",
        "parameters": f"{network.parameters:,} ({', '.join(network.dtypes)})",
    }
    for name in ("missing", "unexpected", "wrong"):
        names = getattr(network, name)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        rows[name] = ", ".join(names[:SHOWN]) + more
    return {name: value for name, value in rows.items() if value}
