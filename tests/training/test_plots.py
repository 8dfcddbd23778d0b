import json
import math
import sys

import pytest
import torch
from PIL import Image

from minegan_fast.training.events import EventWriter
from minegan_fast.training.plots import image_grid, labelled_rows, loss_curves, save_grid


def levels(*values, channels=3, size=32):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, size, size)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_row_by_row(channels):
    grid = image_grid(levels(-1.0, 0.0, 1.0, channels=channels, size=5), columns=2, scale=3)
    assert grid.mode == "RGB"
    assert grid.size == (2 * 15 + 2, 2 * 15 + 2)
    assert [grid.getpixel(at)[0] for at in [(0, 0), (14, 14), (17, 0), (0, 17)]] == [0, 0, 128, 255]
    assert grid.getpixel((15, 0)) == (255, 255, 255)
    assert grid.getpixel((17, 17)) == (255, 255, 255)  # no fourth image


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (28, 56), (32, 64), (64, 64), (100, 100)])
def test_small_images_are_enlarged_to_be_seen(size, shown):
    checkers = (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).mul(2.0).sub(1).expand(1, 1, -1, -1)
    grid = image_grid(checkers)
    assert grid.size == (shown, shown)
    assert {color for _, color in grid.getcolors()} == {(0, 0, 0), (255, 255, 255)}  # nothing is blurred


def test_grid_is_about_square_by_default():
    assert image_grid(levels(*[0.0] * 7), scale=1).size == (3 * 34 - 2, 3 * 34 - 2)
    assert image_grid(levels(0.0), columns=9, scale=1).size == (32, 32)


def test_uint8_and_graphs_are_taken():
    images = levels(0.0, 1.0).clone().requires_grad_()
    assert image_grid(images).tobytes() == image_grid(images.detach().mul(127.5).add(127.5).round().byte()).tobytes()


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8), torch.zeros(2, 5, 8, 8)])
def test_wrong_images_are_named(images):
    with pytest.raises(ValueError, match=r"got \["):
        image_grid(images)


def test_save_grid(tmp_path):
    save_grid(tmp_path / "grid.png", levels(0.0, 1.0), 2)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.tobytes() == image_grid(levels(0.0, 1.0), 2).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_labelled_rows_show_every_image_and_label(tmp_path):
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(3, 3, 64, 64)
    rows = [
        ("source", levels(*[-1.0] * 5)),
        ("a rather long label: real", red),
        ("|", levels(1.0, channels=1)),
    ]
    labelled_rows(tmp_path / "rows.png", rows, columns=4)
    with Image.open(tmp_path / "rows.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
            picture.height, picture.width, 3
        )
    shown = (pixels == torch.tensor([255, 0, 0])).all(2)
    assert shown.sum() == 3 * 64 * 64
    left = shown.any(0).nonzero().min()  # where the images begin; black right of it is image, left of it text
    black = (pixels == 0).all(2)
    assert black[:, left:].sum() == 5 * 64 * 64
    top = 10
    for height in (2 * 64 + 2, 64, 64):  # five images wrap into two lines
        band = pixels[top : top + height, :left]
        assert (band < 100).any()
        text = (band < 255).any(2).any(0).nonzero()
        assert text.min() >= 10
        assert text.max() < left
        top += height + 8
    assert top - 8 + 10 == pixels.shape[0]


def test_labelled_rows_refuse_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        labelled_rows(tmp_path / "rows.png", [])


def history(count):
    for step in range(count):
        row = {"step": step, "stage": "mining" if step < count // 2 else "finetuning", "loss G": math.sin(step)}
        if step % 10 == 9:
            row |= {"kid": 0.1 - step / 500, "kid_std": 0.01, "fid": None}
        yield row


@pytest.fixture
def drawn(monkeypatch):
    """The figures that loss_curves draws."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_loss_curves(tmp_path, drawn, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test may have brought it
    loss_curves(tmp_path / "curves.png", list(history(100)))
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500
    losses, metrics = drawn[0].axes
    (curve,) = (line for line in losses.lines if line.get_label() == "loss G")
    assert list(curve.get_xdata()) == list(range(100))
    assert list(curve.get_ydata()) == [math.sin(step) for step in range(100)]
    assert [text.get_text() for text in metrics.get_legend().get_texts()] == ["kid", "kid_std"]
    assert metrics.get_yscale() == "symlog"  # the KID falls below 0
    assert [text.get_text().strip() for text in losses.texts] == ["mining", "finetuning"]
    assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps every figure alive and may open a window"


def test_shares_have_axes_of_their_own(tmp_path, drawn):
    rows = [row | {"p_cats": row["step"] / 10, "p_dogs": 1 - row["step"] / 10} for row in history(10)]
    loss_curves(tmp_path / "curves.png", rows)
    _, shares, metrics = drawn[0].axes
    assert [line.get_label() for line in shares.lines if not line.get_label().startswith("_")] == ["cats", "dogs"]
    assert list(shares.lines[0].get_ydata()) == [step / 10 for step in range(10)]
    assert (shares.get_yscale(), metrics.get_yscale()) == ("linear", "log")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "stage": "mining"}],
        [{"step": 3, "stage": "mining", "loss G": 0.5, "kid": 0.2}],
        [{"step": 1, "loss G": math.nan}, {"step": 2, "loss D": 1}, {"step": 3, "note": "x", "loss D": math.inf}],
    ],
)
def test_thin_histories_are_drawn(tmp_path, drawn, rows):
    loss_curves(tmp_path / "curves.png", rows)
    finite = {(row["step"], row.get(name)) for row in rows for name in ("loss G", "loss D", "kid")}
    finite = {point for point in finite if point[1] is not None and math.isfinite(point[1])}
    lines = [line for axis in drawn[0].axes for line in axis.lines if not line.get_label().startswith("_")]
    assert {point for line in lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)} == finite
    assert all(line.get_marker() == "o" for line in lines)  # a single point shows


def test_history_survives_json(tmp_path):
    loss_curves(tmp_path / "curves.png", [json.loads(json.dumps(row)) for row in history(20)])
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_events_hold_scalars_and_pictures(tmp_path):
    with EventWriter(tmp_path) as events:
        events.scalars(3, {"loss G": torch.tensor(0.5, requires_grad=True), "kid": 0.25})
        events.grid(3, "samples", levels(0.0, 1.0))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss G")] == [(3, 0.5)]
    assert read.Scalars("kid")[0].value == 0.25
    (picture,) = read.Images("samples")
    assert (picture.width, picture.height) == image_grid(levels(0.0, 1.0)).size


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    for first, value in ((None, 1.0), (2, 2.0)):
        with EventWriter(tmp_path, first) as events:
            for step in range(first or 0, 4):
                events.scalars(step, {"kid": value})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in read.Scalars("kid")] == [1, 1, 2, 2]


def test_without_tensorboard_it_says_so_once_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="pip install tensorboard"):
        events = EventWriter(tmp_path)
    with events:  # a second warning would be an error
        events.scalars(0, {"kid": 1.0})
        events.grid(0, "samples", levels(0.0))
    assert list(tmp_path.iterdir()) == []
