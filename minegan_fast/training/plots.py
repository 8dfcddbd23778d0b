"""Pictures of a run: sample grids, labelled rows, loss curves. Every file is whole or not there."""

import math
import os
from collections.abc import Sequence
from numbers import Real

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files.atomic import atomic_path
from .images import to_pil

_GAP = 2
_SMALL = 64  # pixels: smaller images are enlarged to about this
METRICS = ("fid", "kid", "kmmd", "mv", "diversity")


def image_grid(images: Tensor, columns: int | None = None, *, scale: int | None = None) -> Image.Image:
    """images [N, C, H, W], C 1 to 4, floating point in [-1, 1] or uint8 -> one RGB picture, row by row.

    columns: None makes it about square. scale: every pixel becomes scale x scale; None enlarges images below 64 pixels.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images [N, C, H, W] with N > 0, got {list(images.shape)}")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    height, width = images.shape[2:]
    scale = scale or max(1, _SMALL // max(height, width))
    height, width = height * scale, width * scale
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, image in enumerate(images.detach().cpu()):
        row, column = divmod(number, columns)
        tile = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        mask = tile.getchannel("A") if tile.has_transparency_data else None  # what is transparent lies on white
        grid.paste(tile.convert("RGB"), (column * (width + _GAP), row * (height + _GAP)), mask)
    return grid


def tiles(grid: Image.Image, count: int, resolution: int) -> list[Image.Image]:
    """The images of `image_grid` of `count` images, whose columns were None, at their own resolution. ValueError: the
    picture is too small for them."""
    columns = math.ceil(math.sqrt(count))
    size = (grid.width + _GAP) // columns
    if min(size, (grid.height + _GAP) // math.ceil(count / columns)) <= _GAP:
        raise ValueError(f"a picture of {grid.width} x {grid.height} pixels is no grid of {count} images")
    corners = [(column * size, row * size) for row, column in (divmod(i, columns) for i in range(count))]
    cut = [grid.crop((left, top, left + size - _GAP, top + size - _GAP)) for left, top in corners]
    return [tile.resize((resolution, resolution), Image.Resampling.NEAREST) for tile in cut]


def save_grid(path: str | os.PathLike, images: Tensor, columns: int | None = None, *, scale: int | None = None) -> None:
    """Writes `image_grid(images, columns)` to `path`; the suffix names the format."""
    grid = image_grid(images, columns, scale=scale)
    with atomic_path(path) as temporary:
        grid.save(temporary)


def labelled_rows(path: str | os.PathLike, rows: Sequence[tuple[str, Tensor]], columns: int = 10) -> None:
    """Writes one picture: per (label, images [N, C, H, W]) the label on the left and the images beside it.

    Images as for `image_grid`, which may differ in size between rows; more than `columns` of them wrap below.
    """
    if not rows:
        raise ValueError("labelled_rows needs at least one (label, images)")
    grids = [image_grid(images, columns) for _, images in rows]
    font = ImageFont.load_default(18)
    margin, between = 10, 8
    left = 2 * margin + math.ceil(max(font.getlength(label) for label, _ in rows))
    width = left + max(grid.width for grid in grids) + margin
    height = 2 * margin + sum(grid.height for grid in grids) + between * (len(grids) - 1)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    top = margin
    for (label, _), grid in zip(rows, grids, strict=True):
        draw.text((margin, top + grid.height / 2), label, fill="black", font=font, anchor="lm")
        picture.paste(grid, (left, top))
        top += grid.height + between
    with atomic_path(path) as temporary:
        picture.save(temporary)


def loss_curves(path: str | os.PathLike, history: Sequence[dict], metrics: Sequence[str] = METRICS) -> None:
    """Plots a run's history, rows {"step": int, "stage": str, name: float, ...}, over the steps.

    Series whose names contain "loss" share the upper axes. Series whose names begin with one of `metrics` share the
    lower axes, which are logarithmic, and absent without them. Between them are those that begin with "p_", the shares
    of several sources, where there are any. A row may lack any field; a vertical line marks a new stage.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, tuple[list[int], list[float]]] = {}
    stages: list[tuple[int, str]] = []
    last = 0
    for row in history:
        if "stage" in row and (not stages or stages[-1][1] != row["stage"]):
            if stages and stages[-1][0] == last:
                stages.pop()  # there is nothing to see of the source before the first step
            stages.append((last, row["stage"]))
        last = row["step"]
        for name, value in row.items():
            if isinstance(value, Real) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    losses = [name for name in series if "loss" in name.lower()]
    measured = [name for name in series if name.lower().startswith(tuple(metrics))]

    shares = [name for name in series if name.startswith("p_")]
    parts = [("loss", losses), ("share", shares), ("metric", measured)]
    parts = [part for part in parts if part[1] or part[0] == "loss"]
    count = len(parts)
    figure = Figure(figsize=(8, 3.5 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, names) in zip(axes, parts, strict=True):
        for name in names:
            steps, values = series[name]
            sparse = len(steps) <= 30  # few points are hard to see as a line, one not at all
            axis.plot(
                steps, values, label=name.removeprefix("p_"), linewidth=1, marker="o" if sparse else None, markersize=3
            )
        for step, stage in stages:
            axis.axvline(step, color="grey", linewidth=0.8, linestyle=":")
            axis.text(step, 1, f" {stage}", transform=axis.get_xaxis_transform(), va="bottom", fontsize=8)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if names:
            axis.legend(fontsize=8, loc="upper right")
    if measured and all(min(series[name][1]) > 0 for name in measured):
        axes[-1].set_yscale("log")
    elif measured:
        axes[-1].set_yscale("symlog", linthresh=1e-2)  # KID and KMMD are unbiased and may fall below 0
    axes[-1].set_xlabel("step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
