"""`minegan-fast sample` and `minegan-fast interpolate`."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from PIL import features

from ..mining import MultiGenerator
from . import arguments as args
from .modules import named_base

FORMATS = ("gif", "webp", "none")


def sample(
    run: args.Result,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for grid.png and the single images.")],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 16,
    source: args.Base = None,
    miner: args.MinerFile = None,
    which: args.Which = "best",
    by_source: Annotated[
        bool,
        typer.Option("--by-source", help="Of several sources: a row of the grid for each, and its name in the files'."),
    ] = False,
    seed: args.Seed = 0,
    device: args.Device = None,
    seeds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="One image of each, whatever the others are, instead of --number and --seed: 1,2,10-20."),
    ] = None,
    truncation: args.Truncation = 1.0,
    noise: args.Noise = None,
    classes: args.Class = None,
) -> None:
    """Writes a grid and single images of an adapted GAN, or a checkpoint's own.

    Example: minegan-fast sample run --out samples -n 64

    Example: minegan-fast sample ffhq.pkl --out samples --seeds 1,2,10-20 --truncation 0.7
    """
    from ..training.drawing import of_seeds
    from ..training.evaluation import generate, generate_named
    from ..training.images import save_folder
    from ..training.plots import labelled_rows, save_grid

    chosen = None if seeds is None else args.numbers(seeds, "--seeds")
    sampler = _opened(run, which, device, source, miner, truncation, noise, classes)
    several = sampler if by_source and isinstance(sampler, MultiGenerator) else None
    if by_source and several is None:
        raise ValueError("--by-source is for a run with several sources, and this one has one")
    names: list[str] = []
    if chosen is not None:
        images, who = of_seeds(sampler, chosen)
        names = [] if several is None else [several.names[i] for i in who]
    elif several is not None:
        images, names = generate_named(several, number, seed)
    else:
        images = generate(sampler, number, seed)
    ends = [[] if chosen is None else [f"seed{one}" for one in chosen], names]
    called = ["-".join(parts) for parts in zip(*filter(None, ends), strict=True)]
    paths = save_folder(out, images, names=called or None)
    if several is not None:
        rows = {name: [i for i, other in enumerate(names) if other == name] for name in several.names}
        labelled_rows(out / "grid.png", [(f"{name} {len(r)}", images[r]) for name, r in rows.items() if r])
    else:
        save_grid(out / "grid.png", images)
    print(f"{len(paths)} images and grid.png in {out}")


def interpolate(
    run: args.Result,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the frames and the animation.")],
    seeds: Annotated[str, typer.Option(help="From the image of each to that of the next: 1,2,10-20.")] = "0-3",
    frames: Annotated[int, typer.Option(min=1, help="From one seed to the next.")] = 24,
    space: Annotated[str, typer.Option(help="z, or w of a StyleGAN, in which images change more evenly.")] = "z",
    way: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="spherical or linear; default: spherical in z, linear in w."),
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="At last back to the first seed.")] = False,
    animation: Annotated[str, typer.Option("--format", help=f"Of the animation: {', '.join(FORMATS)}.")] = "gif",
    fps: Annotated[float, typer.Option(min=0.1, max=100, help="Frames a second; GIF rounds to 10 ms.")] = 20,
    of: Annotated[Optional[str], typer.Option("--of", help="Of several sources: the name of one.")] = None,  # noqa: UP045
    source: args.Base = None,
    miner: args.MinerFile = None,
    which: args.Which = "best",
    device: args.Device = None,
    truncation: args.Truncation = 1.0,
    noise: args.Noise = None,
    classes: args.Class = None,
) -> None:
    """Writes the images between those of some seeds, as frames and as an animation.

    The noise of a StyleGAN is constant unless --noise says otherwise, since new noise in every frame flickers.

    Example: minegan-fast interpolate run --out walk --seeds 1,2,10-20 --loop
    """
    from ..files.atomic import atomic_path
    from ..models.styles import StyleBased
    from ..training.drawing import frames as between
    from ..training.drawing import one_branch, steer
    from ..training.images import save_folder
    from ..training.plots import image_grid

    if animation not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {animation!r}")
    if animation == "webp" and not features.check("webp"):
        raise ValueError("this Pillow writes no WebP: take --format gif")
    sampler = _opened(run, which, device, source, miner, truncation, noise, classes)
    branch = one_branch(sampler, of)
    if noise is None and isinstance(branch.generator, StyleBased):
        steer(branch, noise="constant")
    pictures = []
    for number, image in enumerate(between(branch, args.numbers(seeds, "--seeds"), frames, space, way, loop)):
        save_folder(out, image, start=number)
        if animation != "none":
            pictures.append(image_grid(image))
    said = f"{number + 1} frames"
    if animation != "none":
        path = out / f"animation.{animation}"
        with atomic_path(path) as temporary:
            pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
        said += f" and {path.name}"
    print(f"{said} in {out}")


def _opened(run: Path, which, device, source, miner, truncation: float, noise: str | None, classes: str | None):
    """The result, drawn from as the options say, on which each has been checked before anything is written."""
    from ..training.drawing import is_bare, steer
    from ..training.generators import image_channels
    from ..training.images import PICTURED
    from ..training.miners import branches
    from ..training.results import open_result

    labels = [] if classes is None else args.numbers(classes, "--class")
    sampler = open_result(run, which, device, named_base(source), miner, labels=labels)
    if (channels := image_channels(branches(sampler)[0].generator)) not in PICTURED:
        raise ValueError(
            f"the images have {channels} channels, which no PNG shows: in Python minegan_fast.load_generator gives them"
        )
    for line in steer(sampler, truncation, "constant" if noise == "const" else noise):
        print(line)
    if is_bare(sampler):
        print(f"{run} holds no miner: these are the checkpoint's own images")
    return sampler
