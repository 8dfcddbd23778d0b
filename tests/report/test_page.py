"""A page of facts: its size, its texts, and what stands in for data that are not there."""

import json
import re

import pytest
import torch
from PIL import Image
from report_pages import Page

from minegan_fast.finetune import Selection
from minegan_fast.report import Facts, Neighbour, page, series_of
from minegan_fast.report.charts import thin
from minegan_fast.report.neurons import runs
from minegan_fast.report.pictures import encoded, opened

EVIL = "</title><script>alert(1)</script>\"'&$x$"


@pytest.fixture
def history():
    row = {"fid": 3.25, "kid": 0.125, "kid_train": 0.0625, "judge": "pixels", EVIL: float("nan")}
    rows = [{"step": step, "stage": EVIL, f"p_{EVIL}": 0.5, "loss_G": 1 / step} for step in range(1, 5)]
    return [{"step": 0, "stage": "source", **row}, *rows, {"step": 4, "stage": EVIL, **row, "kid": -0.5}]


def noise(side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), torch.randint(0, 256, (3 * side * side,), dtype=torch.uint8).numpy())


def test_texts_of_a_run_are_texts(history, tmp_path):
    noise(8).save(tmp_path / "0.png")
    facts = Facts(EVIL, history, {0: EVIL, 4: "last"}, 4, EVIL, {0: tmp_path / "0.png"}, sources=[EVIL, "b"])
    facts.selection = Selection({f"generators.0.{EVIL}": torch.tensor([1])}, {f"generators.0.{EVIL}": (3, 2)})
    facts.shares = {EVIL: (0.5, (0.25, 0.75)), "b": (0.5, None)}
    facts.neighbours = [Neighbour(noise(8), noise(8), EVIL, 0.5, 0.25)]
    facts.settings, facts.versions = {EVIL: ([EVIL], False)}, {EVIL: EVIL}
    facts.messages, facts.intervals_of, facts.intervals = [(1, EVIL)], EVIL, {"kid": (-1.0, 0.0)}
    found = Page(text := page(facts))
    scripts = found.all("script")
    assert [a.get("type") for a, _ in scripts] == ["application/json", None]
    assert found.all("title")[0][1] == found.all("h1")[0][1] == EVIL
    assert {EVIL, "held-out images"} <= found.series().keys()
    for tag in ("td", "th", "tr"):
        assert EVIL in "".join(content for _, content in found.all(tag))
    assert found.all("tr", kind="layer")[0][0]["data-layer"] == EVIL
    assert found.all("figcaption")[-1][1] == f"0.25 · {EVIL}"
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+|http-equiv", "", text)  # names of XML, no addresses to load
    assert EVIL in found.all("text")[-1][1], "mathematics was set of a name"


def test_pages_of_large_pictures_stay_below_5_mb(history, tmp_path):
    for step in range(12):
        noise(640).save(tmp_path / f"{step}.png")
    facts = Facts("run", history, {0: "source"}, 0, grids={step: tmp_path / f"{step}.png" for step in range(12)})
    facts.neighbours = [Neighbour(noise(300), noise(300), "a", 1.0, 1.0)] * 16
    facts.history = [{"step": s, "loss_G": s / 7, **{f"p_{i}": s / 3 for i in range(30)}} for s in range(3000)]
    text = page(facts)
    sources = [a["src"] for a, _ in Page(text).all("img") if "src" in a]
    assert 2_000_000 < len(text.encode()) < 5_000_000
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_small_pictures_keep_their_pixels_and_large_ones_fit():
    uri = encoded([noise(16)], 10_000)[0]
    assert uri.startswith("data:image/png;base64,")
    assert sum(map(len, encoded([noise(600)] * 3, 60_000))) <= 60_000


def test_large_grids_are_shrunk_and_what_is_none_is_passed_over(tmp_path):
    noise(1500).resize((3000, 1500)).save(tmp_path / "large.png")
    noise(8).save(tmp_path / "small.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert opened(tmp_path / "large.png").size == (1024, 512)
    assert opened(tmp_path / "small.png").tobytes() == Image.open(tmp_path / "small.png").tobytes()
    assert opened(tmp_path / "bomb.png") is None
    assert opened(tmp_path) is None


def test_grids_get_what_other_panels_leave(history, tmp_path):
    for step in range(12):
        noise(640).save(tmp_path / f"{step}.png")
    rows, sizes = {}, {}
    for i in range(64):
        for layer in range(26):
            name = f"generators.{i}.layers.{layer}"
            sizes[name], rows[name] = (512, 1), torch.randperm(512)[:256].sort().values
    facts = Facts("run", history, {0: "source"}, 0, grids={step: tmp_path / f"{step}.png" for step in range(12)})
    facts.selection, facts.sources = Selection(rows, sizes), [f"GAN {i}" for i in range(64)]
    text = page(facts)
    assert len(text.encode()) < 5_000_000
    assert len([a for a, _ in Page(text).all("tr", kind="layer")]) == 64 * 26
    assert len(json.loads(Page(text).all("script", id="grids")[0][1])["steps"]) == 12


def test_panels_without_data_say_so(history, tmp_path):
    (tmp_path / "0.png").write_bytes(b"cut off")
    missing = {"Images": "No grids & none.", "Neurons": "None were selected."}
    found = Page(page(Facts("run", history, {0: "source"}, 0, grids={0: tmp_path / "0.png"}, missing=missing)))
    assert found.titles() == ["Images", "Metrics", "Curves", "Neurons"]
    assert {"No grids & none.", "None were selected."} <= {text for _, text in found.all("p", kind="note")}


def test_of_long_histories_few_points_are_kept_the_last_among_them():
    points = {step: float(step) for step in range(2501)}
    kept = thin(points, 1000)
    assert len(kept) <= 1000
    assert kept.items() <= points.items()
    assert 2500 in kept
    assert thin(points, 5000) == points


def test_stretches_of_rows():
    assert runs([0, 1, 2, 5, 7, 8]) == [(0, 2), (5, 5), (7, 8)]
    assert runs([]) == []


def test_numbers_of_a_history_are_the_finite_ones():
    rows = [{"step": 0, "a": float("inf"), "b": 1, "c": "text"}, {"step": 2, "a": 0.5}]
    assert series_of(rows) == {"a": {2: 0.5}, "b": {0: 1.0}}
