"""Reports of runs that have moved, lost something, were damaged, had little to show, or went on."""

import json
import re
import shutil
import warnings
from contextlib import suppress

import pytest
import torch
from PIL import Image
from report_pages import Page
from tiny_conditional import Conditional
from tiny_run import RUN

import minegan_fast as mf
from minegan_fast.training.images import save_folder
from minegan_fast.training.notes import Notes, heard
from minegan_fast.training.reporting import write_report

pytestmark = pytest.mark.filterwarnings("ignore:by held-out KID no snapshot")
NOISE = bytes(range(256))
ODD = [
    {"began": 3}, {"began": {"versions": {"a": 1}, "target": {}}}, {"message": 5}, {"intervals": []},
    {"intervals": {"values": {"kid": "ab"}, "generated": 1, "real": 1}}, {"intervals": {"values": {"kid": [0, 1]}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A folder with the images, and a run on two sources."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny["images"], folder / "images")
    shutil.copy(tiny["source"], folder / "other.safetensors")
    settings = {**RUN, "loss": "hinge", "features": "pixels", "images": str(folder / "images"), "report": True}
    mf.transfer([tiny["source"], folder / "other.safetensors"], **settings, out=folder / "run")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole / "run", tmp_path / "run")


def page(run) -> Page:
    return Page(write_report(run).read_text())


def notes(found: Page) -> str:
    return " ".join(text for _, text in found.all("p", kind="note"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


DAMAGED = {
    "selection cut": ("selection.safetensors", cut, "Not to be read: "),
    "selection gone": ("selection.safetensors", lambda path: path.unlink(), "No neurons were selected"),
    "shares cut": ("best/shares.json", cut, "No shares: .*shares.json is damaged"),
    "shares odd": ("best/shares.json", lambda path: path.write_text("[]"), "No shares: .*shares.json is damaged"),
    "shares gone": ("best/shares.json", lambda path: path.unlink(), "No shares: "),
    "log noise": ("log.jsonl", lambda path: path.write_bytes(NOISE), "The run has no log: log.jsonl is damaged"),
    "grids gone": ("samples", shutil.rmtree, "The run has no sample grids, .*the best snapshot is not there"),
    "grid cut": ("samples/*.png", cut, "The run has no sample grids, .*Not compared: "),
    "grid noise": ("samples/*.png", lambda path: path.write_bytes(NOISE), "no sample grids, .*cannot identify image"),
    "grid tiny": ("samples/*.png", lambda path: Image.new("L", (1, 1)).save(path), "1 x 1 pixels is no grid of 4"),
    "grid huge": ("samples/000000.png", bomb, "The same latents"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_the_other_panels_of_a_damaged_run_are_there(copied, case):
    name, damage, said = DAMAGED[case]
    for path in sorted(copied.glob(name)):
        damage(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)  # no file stays open
        found = page(copied)
    assert found.titles()[:4] == ["Images", "Metrics", "Curves", "Sources"]
    assert found.titles()[4:] == ["Neurons", "Nearest training images", "Messages", "Settings", "Versions"]
    assert found.series()["held-out images"]
    assert re.search(said, notes(found))


@pytest.mark.parametrize("row", ODD)
def test_rows_of_a_log_that_are_none_are_passed_over(copied, row):
    before = (copied / "report.html").read_text()
    with open(copied / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 8, **row}) + "\n")
    assert write_report(copied).read_text() == before


DEAD = {
    "settings": ("config.json", cut, "config.json is not a JSON configuration"),
    "settings odd": ("config.json", lambda path: path.write_text('{"grid": "a"}'), "grid must be a whole number"),
    "history gone": ("history.jsonl", lambda path: path.unlink(), "measured nothing: history.jsonl is damaged or not"),
    "history odd": ("history.jsonl", lambda path: path.write_text('{"step": 1, "kid": "a"}'), "measured nothing"),
}


@pytest.mark.parametrize("case", DEAD)
def test_what_no_report_can_be_made_of_is_named(copied, case):
    name, damage, said = DEAD[case]
    before = (copied / "report.html").read_text()
    damage(copied / name)
    with pytest.raises(ValueError, match=said):
        write_report(copied)
    assert (copied / "report.html").read_text() == before


def test_a_moved_run_finds_its_images_and_one_without_them_says_so(whole, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    whole.rename(whole.with_name("away"))
    try:
        pairs = [a for a, _ in page(moved / "run").all("figure") if "data-distance" in a]
        assert len(pairs) == RUN["grid"]
        shutil.rmtree(moved / "images")
        assert "Not compared: no image folder at" in notes(page(moved / "run"))
    finally:
        whole.with_name("away").rename(whole)


def test_a_run_with_its_first_snapshot_alone(copied):
    rows = (copied / "history.jsonl").read_text().splitlines(keepends=True)
    (copied / "history.jsonl").write_text(rows[0])
    (copied / "selection.safetensors").unlink()
    for path in sorted((copied / "samples").iterdir())[1:]:
        path.unlink()
    found = page(copied)
    assert found.series()["held-out images"] == {0: json.loads(rows[0])["kid"]}
    assert json.loads(found.all("script", id="grids")[0][1])["labels"] == ["source, best, last"]


@pytest.mark.parametrize(
    "changes",
    [{"held_out": 0.0}, {"finetune_steps": 0}, {"mining_steps": 0}, {"method": "scale_shift", "mining_steps": None}],
)
def test_runs_that_lack_a_part(run_settings, changes):
    result = mf.transfer(**run_settings | {"report": True, "source": Conditional(), "critic": None} | changes)
    found = Page((result.folder / "report.html").read_text())
    kid = found.series()["kid" if "held_out" in changes else "held-out images"]
    assert kid == {row["step"]: row["kid"] for row in result.history if "kid" in row}
    labels = [text for _, text in found.all("figcaption") if ", step" in text]
    assert ("mined" in " ".join(labels)) == ("mining_steps" not in changes)
    assert ("finetuned" in " ".join(labels)) == ("finetune_steps" not in changes)


def test_a_run_that_goes_on_writes_it_anew(run_settings):
    settings = run_settings | {"report": True}
    result = mf.transfer(**settings)
    report = result.folder / "report.html"
    report.unlink()
    mf.transfer(**settings, resume=True)
    assert max(Page(report.read_text()).series()["held-out images"]) == 8
    mf.transfer(**settings | {"finetune_steps": 6}, resume=True)
    found = Page(report.read_text())
    assert max(found.series()["held-out images"]) == 10
    assert "resumed at step 8" in "".join(text for _, text in found.all("td"))
    assert "10 steps, " in found.all("p", id="summary")[0][1]


def test_a_last_line_cut_off_costs_no_other(run_settings):
    mf.transfer(**run_settings)
    log = run_settings["out"] / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    mf.transfer(**run_settings, resume=True)
    assert [step for step, _ in Notes(log).read("began")] == [0, 8]


def test_warnings_are_in_it(tiny, run_settings, tmp_path):
    save_folder(tmp_path / "small", torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8))
    with pytest.warns(UserWarning, match="20 of 20 images are smaller than 8x8 and were enlarged"):
        result = mf.transfer(**run_settings | {"images": tmp_path / "small", "report": True})
    text = "".join(text for _, text in Page((result.folder / "report.html").read_text()).all("td"))
    assert "20 of 20 images are smaller than 8x8 and were enlarged" in text


def test_warnings_are_heard_and_go_on():
    def warns(text: str) -> None:
        warnings.warn(text, stacklevel=1)
        raise KeyError(text)

    with pytest.warns(UserWarning, match="first") as warned, suppress(KeyError), heard() as texts:
        warns("first")
    assert texts == ["first"]
    assert warned[0].filename == __file__
    with warnings.catch_warnings(record=True) as shown, suppress(KeyError), heard() as texts:
        warnings.simplefilter("ignore")
        warns("second")
    assert not texts
    assert not shown
