"""`minegan-fast push`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from .arguments import Device, Seed, Which


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The model on the Hugging Face Hub.")],
    which: Which = "best",
    whole: Annotated[
        bool, typer.Option("--whole", help="The adapted network in the delta's place, which needs no base.")
    ] = False,
    licence: Annotated[
        str, typer.Option("--license", help="Identifier of the licence, as the Hub has it: mit, cc-by-4.0, ...")
    ] = "unknown",
    base: Annotated[
        str, typer.Option(help="Where the source is to be had, for the card: USER/NAME on the Hub, or an address.")
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; default: as the Hub makes new ones.")
    ] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write what would be shared to this folder, to look at, and share nothing."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Real images for the card's metrics; default: those that the run held out."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Generated images for the card's metrics; 0: the run's numbers, no intervals.")
    ] = 500,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Shares a result on the Hugging Face Hub: a delta or the network, its miner, a picture and a card.

    Example: minegan-fast push run user/cats --license cc-by-4.0 --folder look

    Example: minegan-fast push run user/cats --license cc-by-4.0 --private

    The token is that of hf auth login, or HF_TOKEN; nothing is asked. HF_ENDPOINT names another Hub. It needs
    huggingface_hub: pip install 'minegan_fast[hub]'. mf.load_delta(G, "hf://user/cats") takes it back.
    """
    from ..training.share import pack, push_run

    if samples == 1:
        raise ValueError("--samples must be 0 or at least 2: metrics compare images with each other")
    choices = {
        "which": which, "whole": whole, "licence": licence, "base": base, "images": images, "samples": samples,
        "device": device, "seed": seed,
    }  # fmt: skip
    if folder is not None:
        notes, said = pack(run, repo, folder, **choices), f"written: {folder}; nothing was shared"
    else:
        address, notes = push_run(run, repo, private, message, **choices)
        said = f"shared: {address}"
    for note in notes:
        print(f"note: {note}")
    print(said)
