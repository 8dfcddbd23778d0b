"""Arguments that several commands share, and how their texts are read."""

import re
from pathlib import Path
from typing import Annotated, Optional

import typer

Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU where there is one.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Which = Annotated[
    str, typer.Option(help="Which result of the run: best (by held-out KID), last, or mined (after stage 1).")
]
Result = Annotated[
    Path,
    typer.Argument(
        help="Folder of a run, a delta file (then with --source), a checkpoint of the original MineGAN, any "
        "checkpoint that is read here: without a miner, as it was published; or hf://user/name, a result that was "
        "shared."
    ),
]
Base = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="Checkpoint that the delta was trained from; of a run on a module FILE.py:FUNCTION, which is executed, of "
        "one on several modules each, in their order."
    ),
]
MinerFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--miner", help="File of the miner; default: the one beside the delta, or in the checkpoint."),
]
Truncation = Annotated[
    float,
    typer.Option(
        help="Of a StyleGAN's w, or a BigGAN's z: 1 leaves it alone, 0.7 is common, 0 gives one image.",
        show_default=True,
    ),
]
Class = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--class", help="Of a class-conditional checkpoint without a miner: 207, or 207,300-310; default: all."
    ),
]
Noise = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Of a StyleGAN: random, constant (the same maps in every image) or none."),
]

MOST_NUMBERS = 100_000


def numbers(text: str, name: str) -> list[int]:
    """[1, 2, 10, 11, 12] for "1,2,10-12".

    ValueError: another form, a number of 2⁶³ or more, or more than 100,000 numbers.
    """
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", word, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= 2**63:
            raise ValueError(f"{name} must be numbers and ranges such as 1,2,10-20, got {word.strip()!r} in {text!r}")
        if len(found) + last - first >= MOST_NUMBERS:
            raise ValueError(f"{name} names more than {MOST_NUMBERS:,} numbers: take fewer at once")
        found += range(first, last + 1)
    return found
