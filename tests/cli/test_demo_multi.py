import json

import pytest
import torch
from rich.console import Console

from minegan_fast import data
from minegan_fast.cli import demo_multi


def test_settled():
    errors = torch.tensor([0.3, 0.05, 0.2, 0.08, 0.01])
    assert demo_multi._settled(errors) == 4
    assert demo_multi._settled(errors[1:2]) == 1
    assert demo_multi._settled(errors[:3]) is None


def test_demo(tmp_path, monkeypatch):
    """A few steps of one target by both selectors; a second call takes what is there."""
    monkeypatch.setattr(demo_multi, "SHARES", (0.5,))
    monkeypatch.setattr(demo_multi, "STEPS", 2)
    settings = demo_multi.SETTINGS | {"mining_steps": 2, "snapshot_every": 2, "batch": 4, "eval_samples": 8}
    monkeypatch.setattr(demo_multi, "SETTINGS", settings)
    report = demo_multi.run_multi_demo(tmp_path, 0, "cpu", Console(quiet=True))
    assert [row["selector"] for row in report["rows"]] == ["mixture", "winner"]
    for row in report["rows"]:
        assert sum(row["p"]) == pytest.approx(1, abs=2e-4)
        assert row["error"] == pytest.approx(
            max(abs(p - q) for p, q in zip(row["p"], (0, 0.5, 0.5), strict=True)), abs=1e-3
        )
    assert json.loads((tmp_path / "demo.json").read_text())["rows"] == report["rows"]
    assert (tmp_path / "demo.png").stat().st_size > 1000
    again = demo_multi.run_multi_demo(tmp_path, 0, "cpu", Console(quiet=True))
    assert again["rows"] == report["rows"]
    assert len([*(tmp_path / "fours-50" / "target").iterdir()]) == len(data.fours_and_sevens(0.5))
