"""`minegan-fast demo | transfer | sample | interpolate | evaluate | report | push | export | convert | ...`."""

import dataclasses
import inspect
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..files.lines import one_line
from ..training.config import TransferConfig, load_config
from ..training.sources import Checkpoints, listed
from . import files, sampling
from .arguments import Base, Device, MinerFile, Result, Seed, Which
from .export import export
from .modules import named_base, named_module
from .push import push
from .report import report_run

app = typer.Typer(
    help="Adapts a pretrained GAN to a few images: mining, then finetuning of the neurons that matter.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
LONGEST = 4000  # letters of an error
INTERRUPTED = 130  # Typer's exit code after Ctrl-C


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.", callback=lambda v: _print_version(v))
    ] = False,
) -> None:
    pass


def _print_version(asked: bool) -> None:
    if asked:
        print(f"minegan-fast {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the program. A user's mistake is one line on standard error and exit code 1, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    log = logging.getLogger("minegan_fast")
    log.handlers = [_Lines()]
    log.setLevel(logging.INFO)
    if rank := _rank():
        warnings.simplefilter("ignore")  # the first process prints them
        log.setLevel(logging.ERROR)
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED and rank == 0:
            print("interrupted; a run that has written a snapshot goes on from it with --resume", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        print(f"error: {_line(error)}", file=sys.stderr)
        sys.exit(1)


def _line(error: Exception) -> str:
    """What an error says."""
    said = one_line(str(error))
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
    if said and isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        return said
    return f"{type(error).__name__}: {said} (minegan-fast did not foresee this: add --debug to see where it happened)"


class _Lines(logging.Handler):
    """Log records as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def _rank() -> int:
    """Which process this is under torchrun; only the first one talks."""
    return int(os.environ.get("RANK", 0))


def _transfer(
    source: Optional[str],  # noqa: UP045
    target: Optional[str],  # noqa: UP045
    sources: Optional[list[str]],  # noqa: UP045
    images: Optional[str],  # noqa: UP045
    out: Path,
    config: Optional[Path],  # noqa: UP045
    resume: bool,
    dry_run: bool,
    quiet: bool,
    **settings,
) -> None:
    from ..training import recipe
    from ..training.evaluation import MEASURES
    from ..training.folder import RunFolder
    from ..training.moved import located

    named, images = _named_once(source, target, sources or [], images)
    given = {name: value for name, value in settings.items() if value is not None}
    if "metrics" in given:
        given["metrics"] = tuple(filter(None, given["metrics"].split(",")))
    if "held_out" in given:
        given["held_out"] = _fraction_or_folder(given["held_out"])
    stored = load_config(config) if config else {}
    if config is None and resume:
        if (out / "config.json").is_file():
            stored = located(RunFolder(out), load_config(out))
        elif named is None:
            raise ValueError(f"there is no run in {str(out)!r} to go on with: check the path")
        if named is None and stored and None in listed(stored.get("source", "")):
            raise ValueError(
                f"the source of the run in {str(out)!r} is a module: name it again, as FILE.py:FUNCTION, or call "
                "minegan_fast.transfer(module, images, out, resume=True, ...) with the arguments that began it"
            )
    if named is not None:
        named = [named_module(one) for one in named] if isinstance(named, list) else named_module(named)
    given |= {name: value for name, value in (("source", named), ("images", images)) if value is not None}
    merged = stored | given
    for name in ("source", "images"):
        if not merged.get(name):
            raise ValueError(
                f"{name} is missing: minegan-fast transfer SOURCE IMAGES --out RUN, or for several sources --source A "
                "--source B --images FOLDER, or --config FILE"
            )
    if dry_run:
        checkpoints = Checkpoints()
        _print_estimate(recipe.configure(checkpoints, **merged), checkpoints, merged["source"])
        return
    quiet = quiet or _rank() > 0
    if quiet:
        logging.getLogger("minegan_fast").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    result = recipe.transfer(**merged, out=out, resume=resume, progress=not quiet)
    if not quiet:
        table = Table(title=f"step {result.step}, in {result.folder / 'best'}, on {result.judge} features")
        shown = {name: value for name, value in result.metrics.items() if name in MEASURES}
        for name in shown:
            table.add_column(name)
        table.add_row(*(f"{value:.4g}" for value in shown.values()))
        console.print(table)


def _named_once(
    first: str | None, second: str | None, sources: list[str], images: str | None
) -> tuple[str | list[str] | None, str | None]:
    """(source or sources, images), from the arguments and from the options --source and --images.

    With --source the arguments are what is left: at most the images.
    """
    if sources and images is None and second is None:
        first, second = None, first
    for name, argument, option in (("source", first, sources), ("images", second, images)):
        if argument is not None and option:
            raise ValueError(f"{name} is given twice: {argument!r} and --{name}; leave one of them out")
    return sources or first, images if second is None else second


def _fraction_or_folder(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _print_estimate(config: TransferConfig, checkpoints: Checkpoints, source) -> None:
    from ..training.recipe import dry_run

    memory, mining, finetuning = dry_run(config, checkpoints, source)
    if _rank() > 0:
        return
    seconds = mining * config.mining_steps + finetuning * config.finetune_steps
    duration = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.2g} seconds"
    gib = 2**30
    console.print(
        f"time: {duration} of training ({mining:.3g} s a mining step, {finetuning:.3g} s a finetuning "
        "step), metrics and files on top\n"
        f"memory: about {memory.total(config.batch) / gib:.2f} GiB at the most, of which this process has "
        f"{memory.held / gib:.2f} already; {memory.available / gib:.2f} GiB are free, and the largest batch that would "
        f"fit is {memory.largest_batch()}",
        highlight=False,
    )


_TRANSFER_HELP = """Adapts the GAN in SOURCE, or several together, to the images in a folder.

Example: minegan-fast transfer ffhq.pt cats/ --out run --batch 8

Example: minegan-fast transfer --source ffhq.pt --source church.pt --images cats/ --out run

Example: minegan-fast transfer my_gan.py:build cats/ --out run

A GAN of no family that is read here is named by a Python file of yours, WHICH IS EXECUTED, and a function in it that
returns the network with its weights: any module with latent_dim, resolution and forward(z). --resume and --dry-run
take it again.

The folder then holds best/ and last/ (generator, miner, delta), samples/, history.jsonl, losses.png, events/ for
TensorBoard, config.json, report.html with all of it on one page, and the snapshots that --resume goes on from.
"""


def _register_transfer() -> None:
    """Makes every setting of TransferConfig an option; one that is not given leaves --config or the default alone.

    Typer reads the options from a function's signature, so this writes one.
    """
    own = inspect.signature(_transfer).parameters
    text = {
        "source": "Checkpoint of the pretrained GAN; or FILE.py:FUNCTION, see above.",
        "target": "Folder with PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF images, searched recursively; or a dataset.zip.",
    }
    shown = {"source": "SOURCE", "target": "IMAGES"}
    parameters = [
        own[n].replace(default=typer.Argument(None, help=text[n], metavar=f"[{shown[n]}]"), annotation=Optional[str])  # noqa: UP045
        for n in text
    ]
    several = typer.Option(
        None, "--source", help="Checkpoint of one of several GANs, or FILE.py:FUNCTION; once for each."
    )
    options = {
        "sources": (Optional[list[str]], several),  # noqa: UP045
        "images": (Optional[str], typer.Option(None, help="The folder of images, beside --source.")),  # noqa: UP045
        "out": (Path, typer.Option(..., "--out", "-o", help="Folder of the run.")),
        "config": (Optional[Path], typer.Option(None, help="Settings from a run's config.json; options given win.")),  # noqa: UP045
        "resume": (bool, typer.Option(False, "--resume", help="Go on from the newest snapshot in --out.")),
        "dry_run": (bool, typer.Option(False, "--dry-run", help="Estimate time and memory, write nothing.")),
        "quiet": (bool, typer.Option(False, "--quiet", help="Print only errors.")),
    }
    parameters += [own[n].replace(default=d, annotation=a) for n, (a, d) in options.items()]
    for field in dataclasses.fields(TransferConfig):
        if "help" not in field.metadata:
            continue
        plain = next((kind for kind in (bool, int, float) if field.type in (kind, kind | None)), str)
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if default is None else f" Default: {default}."
        option = typer.Option(None, help=field.metadata["help"] + shown, show_default=False)
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=Optional[plain])  # noqa: UP045
        )

    def transfer(**keywords):
        _transfer(**keywords)

    keyword = inspect.Parameter.KEYWORD_ONLY
    transfer.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in parameters])
    app.command("transfer", help=_TRANSFER_HELP)(transfer)


_register_transfer()


app.command("sample")(sampling.sample)
app.command("interpolate")(sampling.interpolate)


@app.command()
def evaluate(
    run: Result,
    images: Annotated[Path, typer.Option(help="Folder of real images to compare with, best ones never trained on.")],
    samples: Annotated[int, typer.Option(min=2, help="Generated images.")] = 1000,
    features: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="critic, pixels, digits, or a file (TorchScript, Inception weights); default: the run's; else pixels."
        ),
    ] = None,
    source: Base = None,
    miner: MinerFile = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the numbers here too.")] = None,  # noqa: UP045
    which: Which = "best",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Prints FID, KID, KMMD, MV and diversity, in that of the real images, of an adapted GAN against a folder.

    Example: minegan-fast evaluate run --images more_cats/ --json metrics.json
    """
    from ..files.atomic import atomic_path
    from ..training.results import evaluate_result

    report = evaluate_result(run, which, device, named_base(source), miner, images, samples, features, seed)
    table = Table(title=f"{report['generated']} generated, {report['real']} real, {report['features']} features")
    for name in report["metrics"]:
        table.add_column(name)
    table.add_row(*(f"{value:.4g}" for value in report["metrics"].values()))
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False)
    if json_file:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    else:
        print(json.dumps(report))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the demo's run.")] = Path("minegan_demo"),
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also the neurons that matter, and as many random ones of every layer."),
    ] = False,
    multi: Annotated[
        bool,
        typer.Option("--multi", help="Several sources instead: GANs of 0-2, 3-5 and 6-8 for fours mixed with sevens."),
    ] = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Adapts a small embedded GAN of the digits 0 to 8 to a hundred nines; needs nothing else.

    Example: minegan-fast demo --out minegan_demo

    Example: minegan-fast demo --multi --out minegan_demo_multi
    """
    if multi and controls:
        raise ValueError("--controls are of the demo with one source: leave it or --multi out")
    if multi:
        from .demo_multi import run_multi_demo

        run_multi_demo(out, seed, device, console)
        return
    from .demo import run_demo

    run_demo(out, controls, seed, device, console)


app.command("convert")(files.convert)
app.command("inspect")(files.inspect)
app.command("export")(export)
app.command("push")(push)
app.command("report")(report_run)


@app.command()
def doctor(
    seed: Annotated[int, typer.Option(help="Unused: the report is not random.", hidden=True)] = 0,
    device: Device = None,
) -> None:
    """Prints versions, devices, and which backends are there and why the others are not.

    Example: minegan-fast doctor
    """
    from .doctor import report

    for section, rows in report(device).items():
        table = Table("", "", title=section, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
