"""Reports of runs: every panel shows what the run's folder holds."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from report_pages import Page
from tiny_conditional import Conditional
from tiny_run import RUN

import minegan_fast as mf
from minegan_fast.finetune import Selection
from minegan_fast.training import reporting
from minegan_fast.training.folder import RunFolder
from minegan_fast.training.images import load_images
from minegan_fast.training.reporting import neighbours, write_report

pytestmark = pytest.mark.filterwarnings("ignore:by held-out KID no snapshot")

EVIL = "<script>alert(1)<_script>.png"


def copied(tiny, folder):
    """The images of `tiny`, one of them with a name that a page must escape."""
    folder.mkdir()
    for number, path in enumerate(sorted(tiny["images"].iterdir())):
        (folder / (EVIL if number == 0 else path.name)).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """{"stylegan": ..., "module": ..., "several": ...}: runs whose names hold mark-up."""
    folder = tmp_path_factory.mktemp("reported")
    images, out = copied(tiny, folder / "<b>images"), folder / "<i>run&"
    out.mkdir()
    whole = {**RUN, "report": True, "images": str(images), "grid": 9}
    array = torch.stack([load_images(images, 8, 1).images]).squeeze(0)
    torch.manual_seed(1)
    files = [tiny["source"], folder / "other.safetensors"]
    files[1].write_bytes(tiny["source"].read_bytes())
    hinge = {"loss": "hinge", "features": "pixels", "density": 0.3}
    return {
        "stylegan": mf.transfer(source=tiny["source"], critic=tiny["critic"], **whole, out=out / "<u>1"),
        "module": mf.transfer(source=Conditional(), **whole | {"images": array, "held_out": 0.0}, out=out / "2"),
        "several": mf.transfer(source=files, **whole | hinge, out=out / "3"),
    }


def read(result) -> Page:
    return Page((result.folder / "report.html").read_text())


@pytest.mark.parametrize("kind", ["stylegan", "module", "several"])
def test_numbers_are_the_historys(results, kind):
    result = results[kind]
    page, series = read(result), read(result).series()
    for row in result.history:
        for name, value in row.items():
            shown = {"kid_train": "training images", "kid": "held-out images" if kind != "module" else "kid"}.get(name)
            name = shown or name.removeprefix("p_")
            if isinstance(value, float) and name in series:
                assert series[name][row["step"]] == value
    losses = {row["step"]: row["loss_G"] for row in result.history if "loss_G" in row}
    assert series["loss_G"] == losses
    measured = {row["step"]: row["kid"] for row in result.history if "kid" in row}
    assert series["held-out images" if kind != "module" else "kid"] == measured
    assert ("training images" in series) == (kind != "module")
    values = [float(a["value"]) for a, _ in page.all("data")]
    assert {result.metrics[name] for name in ("kid", "fid", "kmmd", "mv")} <= set(values)
    assert f"best snapshot is that of step {result.step}." in page.all("p", id="summary")[0][1]


def test_panels(results):
    common = ["Images", "Metrics", "Curves", "Neurons", "Nearest training images", "Messages", "Settings", "Versions"]
    assert read(results["stylegan"]).titles() == read(results["module"]).titles() == common
    assert read(results["several"]).titles() == [*common[:3], "Sources", *common[3:]]


def test_names_are_escaped(results):
    page = read(results["stylegan"])
    assert page.all("h1")[0][1] == "<u>1"
    assert len(page.all("script")) == 2
    assert not page.all("u")
    assert not page.all("b")
    captions = [text for _, text in page.all("figcaption")]
    names = {path.name for path in (results["stylegan"].folder.parents[1] / "<b>images").iterdir()}
    assert {text.split(" · ")[1] for text in captions if " · " in text} <= names


def test_the_map_is_the_selection(results):
    for result in results.values():
        selection = Selection.load(result.folder / "selection.safetensors")
        layers = read(result).all("tr", kind="layer")
        assert len(layers) == len(selection.sizes)
        for (attributes, _), (name, (neurons, _)) in zip(layers, selection.sizes.items(), strict=True):
            stretches = [part.split("-") for part in attributes["data-trained"].split(",") if part]
            rows = [row for ends in stretches for row in range(int(ends[0]), int(ends[-1]) + 1)]
            assert name.endswith(attributes["data-layer"])
            assert int(attributes["data-neurons"]) == neurons
            assert rows == (selection.rows[name].tolist() if name in selection.rows else [])


def test_shares_are_those_of_the_best(results):
    result = results["several"]
    shares = json.loads((result.folder / "best" / "shares.json").read_text())
    rows = [text for _, text in read(result).all("tr")]
    for name, p in zip(shares["names"], shares["p"], strict=True):
        assert sum(row.startswith(f"{name}{p:.1%}") for row in rows) == 1


def test_grids_are_those_of_the_folder(results):
    result = results["stylegan"]
    page = read(result)
    data = json.loads(page.all("script", id="grids")[0][1])
    named = {a["data-step"]: a["src"] for a, _ in page.all("img") if "data-step" in a}
    files = {int(path.stem): path for path in (result.folder / "samples").iterdir()}
    assert data["steps"] == sorted(files)
    for step, path in files.items():
        source = (data["pictures"] | named)[str(step)]
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert shown.tobytes() == Image.open(path).convert("RGB").tobytes()


def test_neighbours_are_the_nearest(results, tiny):
    result = results["stylegan"]
    target = load_images(result.folder.parents[1] / "<b>images", 8, 1)
    train, _ = target.split(RUN["held_out"], 0)
    found = neighbours(result.folder / "samples" / f"{result.step:06d}.png", 9, train)
    assert len(found) == 9
    pixels = train.images.double().flatten(1)
    for one in found:
        drawn = torch.frombuffer(bytearray(one.sample.tobytes()), dtype=torch.uint8).double()
        distances = (pixels - drawn).square().mean(1).sqrt()
        assert one.distance == pytest.approx(distances.min().item())
        assert one.name == train.names[distances.argmin()]


def test_a_copy_has_distance_0(results, tmp_path):
    from minegan_fast.training.plots import save_grid

    target = load_images(results["stylegan"].folder.parents[1] / "<b>images", 8, 1)
    save_grid(tmp_path / "grid.png", target.images[5:9])
    found = neighbours(tmp_path / "grid.png", 4, target)
    assert [one.name for one in found] == target.names[5:9]
    assert [one.distance for one in found] == [0.0] * 4


def test_written_again_it_is_the_same_where_the_images_are(results):
    result = results["stylegan"]
    first = (result.folder / "report.html").read_bytes()
    assert write_report(result.folder).read_bytes() == first
    array = results["module"]
    write_report(array.folder)
    notes = {text for _, text in read(array).all("p", kind="note")}
    assert "Not compared: the training images were an array, which the folder does not hold." in notes


def test_other_training_images_are_not_compared_with(results):
    result = results["several"]
    images = result.folder.parents[1] / "<b>images"
    path = images / load_images(images, 8, 1).split(RUN["held_out"], 0)[0].names[-1]
    before = path.read_bytes()
    Image.new("L", (8, 8)).save(path)
    try:
        write_report(result.folder)
    finally:
        path.write_bytes(before)
    assert any("are not those that the run trained on" in text for _, text in read(result).all("p", kind="note"))
    write_report(result.folder)


def test_what_the_run_said_and_ran_on(results):
    text = "".join(content for _, content in read(results["stylegan"]).all("td"))
    assert "18 images to train on, 6 held out" in text
    assert torch.__version__ in text
    assert '"mining_steps"' not in text
    assert "mining_steps4" in text


def test_intervals_hold_the_value(results):
    lines = (results["stylegan"].folder / "log.jsonl").read_text().splitlines()
    row = next(json.loads(line) for line in lines if "intervals" in line)
    values = row["intervals"]["values"]
    assert row["step"] == results["stylegan"].step
    assert {"kid", "kid_train", "kmmd", "mv", "diversity"} == values.keys()
    for name, (low, high) in values.items():
        assert low < results["stylegan"].metrics[name] < high


def test_a_report_that_fails_is_a_warning(tiny, tmp_path, monkeypatch):
    def fails(facts):
        raise RuntimeError("no room for it")

    monkeypatch.setattr(reporting, "page", fails)
    settings = {
        **RUN,
        "source": tiny["source"],
        "critic": tiny["critic"],
        "images": str(tiny["images"]),
        "report": True,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("old")
    with pytest.warns(
        UserWarning, match=r"report could not be written .RuntimeError: no room for it.; the run is whole"
    ) as warned:
        result = mf.transfer(**settings, out=tmp_path / "run")
    assert [w.filename for w in warned if "report could not" in str(w.message)] == [__file__]
    assert result.step in {row["step"] for row in result.history}
    assert (tmp_path / "run" / "report.html").read_text() == "old"
    assert not list((tmp_path / "run").glob(".report*"))


def test_runs_without_a_report(tiny, tmp_path):
    settings = {**RUN, "source": tiny["source"], "critic": tiny["critic"], "images": str(tiny["images"])}
    result = mf.transfer(**settings, out=tmp_path / "run")
    assert not RunFolder(result.folder).report.exists()
    (result.folder / "log.jsonl").unlink()  # as an older version left it
    page = Page(write_report(result.folder).read_text())
    notes = " ".join(text for _, text in page.all("p", kind="note"))
    assert "an older version began it" in notes
    assert "Without intervals" in notes
    with pytest.raises(ValueError, match=r"no run in .*: give the folder that transfer wrote"):
        write_report(tmp_path)
