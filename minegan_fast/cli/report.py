"""`minegan-fast report`."""

from pathlib import Path
from typing import Annotated

import typer


def report_run(run: Annotated[Path, typer.Argument(help="Folder of a run, which may still be going on.")]) -> None:
    """Writes report.html to a run's folder: images, curves, metrics, neurons and settings on one page.

    Example: minegan-fast report run
    """
    from ..training.reporting import write_report

    print(f"written: {write_report(run)}")
