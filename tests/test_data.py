"""What the package ships, and the demo on it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minegan_fast as mf
from minegan_fast import data
from minegan_fast.cli import demo
from minegan_fast.training.images import load_images, to_float


def test_sizes():
    limits = {
        data.GENERATOR: 4_000_000, data.CRITIC: 4_000_000, data.CLASSIFIER: 1_000_000, data.NINES: 1_000_000,
        **dict.fromkeys(data.SOURCES.values(), 1_000_000), data.FOURS_AND_SEVENS: 250_000,
    }  # fmt: skip
    for path, limit in limits.items():
        assert 0 < path.stat().st_size <= limit, path.name
    for name in ("NOTICE", "record.json"):
        assert (data.FOLDER / name).stat().st_size > 0
    record = json.loads((data.FOLDER / "record.json").read_text())
    assert {"seed", "torch", "gan", "classifier", "sources"} <= record.keys()


def test_no_nine_is_in_two_sets():
    target = load_images(data.TARGET, 32, 1).images
    assert len(target) == 100
    sets = {"target": target, **{split: data.nines(split) for split in ("validation", "floor", "test")}}
    assert len(sets["test"]) > 900
    seen: dict[bytes, str] = {}
    for name, images in sets.items():
        assert images.shape[1:] == (1, 32, 32)
        for image in images:
            assert seen.setdefault(image.numpy().tobytes(), name) == name
    with pytest.raises(ValueError, match="split must be one of"):
        data.nines("train")


def test_the_classifier_knows_nines_and_the_source_draws_others():
    judge, source = data.classifier(), mf.load_generator(data.GENERATOR)
    with torch.no_grad():
        on_real = judge.logits(to_float(data.nines("test"))).argmax(1)
        assert (on_real == 9).float().mean() > 0.95
        assert judge(to_float(data.nines("test"))).shape == (1009, 96)
        drawn = judge.logits(source(torch.randn(500, source.latent_dim)).clamp(-1, 1)).argmax(1)
    counts = torch.bincount(drawn, minlength=10)
    assert counts[9] < 50
    assert (counts[:9] > 5).all(), "the source has lost a digit"


@pytest.mark.parametrize("digits", data.SOURCES, ids=str)
def test_a_source_draws_its_digits_and_no_others(digits):
    stored = load_file(data.SOURCES[digits])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(name.startswith("generator.") for name in stored), "a critic is in the file"
    source = mf.load_generator(data.SOURCES[digits])
    assert {tensor.dtype for tensor in source.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        drawn = data.classifier().logits(source(torch.randn(500, source.latent_dim)).clamp(-1, 1)).argmax(1)
    shares = torch.bincount(drawn, minlength=10) / 500
    assert shares[[*digits]].sum() > 0.94, "the source draws digits of another"
    assert (shares[[*digits]] > 0.2).all(), "the source has lost a digit"


def test_the_record_describes_the_sources():
    record = json.loads((data.FOLDER / "record.json").read_text())["sources"]
    assert [tuple(entry["digits"]) for entry in record.values()] == [*data.SOURCES]
    assert len({entry["seed"] for entry in record.values()}) == 3, "two sources start from the same weights"
    for entry in record.values():
        assert entry["own_digits"] >= 0.96
        assert all(0.25 <= entry["shares_of_digits"][digit] <= 0.42 for digit in entry["digits"])


def test_fours_and_sevens():
    judge, seen = data.classifier(), set()
    for split, count in (("target", 100), ("validation", 200), ("test", 300)):
        fours, sevens = (data.fours_and_sevens(share, split) for share in (1.0, 0.0))
        for images, digit in ((fours, 4), (sevens, 7)):
            assert images.dtype == torch.uint8
            assert images.shape == (count, 1, 32, 32)
            with torch.no_grad():
                assert (judge.logits(to_float(images)).argmax(1) == digit).float().mean() > 0.95
            seen |= {image.numpy().tobytes() for image in images}
        mixed = data.fours_and_sevens(0.25, split)
        assert torch.equal(mixed[: count // 4], fours[: count // 4])
        assert torch.equal(mixed[count // 4 :], sevens[: count - count // 4])
    assert len(seen) == 1200, "an image is there twice"
    assert len(data.fours_and_sevens(1 / 3)) == 100
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share must be from 0 to 1"):
            data.fours_and_sevens(share)
    with pytest.raises(ValueError, match="split must be one of"):
        data.fours_and_sevens(0.5, "train")


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    """The whole demo with its controls, at a few steps: files, table, and what it reports."""
    from rich.console import Console

    few = {"mining_steps": 4, "finetune_steps": 4, "snapshot_every": 4, "batch": 8, "eval_samples": 32}
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **few})
    monkeypatch.setattr(demo, "SAMPLES", 64)
    monkeypatch.setattr(demo, "RESAMPLES", 4)
    report = demo.run_demo(tmp_path / "demo", True, 0, "cpu", Console(width=120))
    names = ["source", "mined", "mined + dense", "mined + sparse", "mined + random", "other real nines"]
    assert list(report["rows"]) == names
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"].keys() == report["rows"].keys()
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 1000
    for row in report["rows"].values():
        assert row["kmmd_95%"][0] <= row["kmmd_95%"][1]
        assert 0 <= row["nines"] <= 1
    random = demo.trained_parameters(tmp_path / "demo" / "random")
    assert abs(random - report["trained_parameters"]) < 0.01, "the random control trains another number of parameters"
    again = demo.run_demo(tmp_path / "demo", False, 0, "cpu", Console())
    assert again["rows"]["mined + dense"] == report["rows"]["mined + dense"], "a finished demo is shown again"
