"""`minegan-fast export`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Base, MinerFile, Result, Which
from .modules import named_base


def export(
    run: Result,
    out: Annotated[Path, typer.Argument(help="Folder for the files: new, or empty.")],
    to: Annotated[str, typer.Option(help="rosinality, nvidia, biggan or safetensors.")],
    which: Which = "best",
    source: Base = None,
    miner: MinerFile = None,
) -> None:
    """Writes an adapted GAN as another program has its own, with its miner.

    Example: minegan-fast export run adapted --to rosinality
    """
    from ..training.export import export_run

    files, notes = export_run(run, out, to, which, named_base(source), miner)
    for file in files:
        print(f"written: {file}")
    for note in notes:
        print(f"note: {note}")
