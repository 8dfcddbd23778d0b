"""bench/quality.py: what it runs, that it goes on where it stopped, and a whole cell on the shipped digits."""

import io
import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import quality
import quality_cells as cells
import quality_networks as networks
import quality_plan as planned
import quality_settings
from rich.console import Console

from minegan_fast.training.config import TransferConfig

DIGITS = planned.Cell("nines", 10, "kernel", "minegan++", 0)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "cells").mkdir()
    return quality_settings.Places(tmp_path)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), markup=False)


def test_the_plan():
    plan = planned.plan()
    assert len({cell.name for cell in plan}) == len(plan)
    for setting in quality_settings.SETTINGS.values():
        for count in setting.counts:
            if count <= 100:
                same = [
                    c for c in plan if (c.setting, c.count, c.loss, c.variant) == (setting.name, count, "kernel", "")
                ]
                runs = Counter(cell.method for cell in same)
                assert set(planned.METHODS) <= set(runs)
                assert set(runs.values()) == {3}
    for variant, control in (*planned.attempts("kernel", False), *planned.attempts("adversarial", True)):
        both = {("minegan++", variant), control}
        assert both <= {(c.method, c.variant) for c in plan if (c.setting, c.count, c.seed) == ("nines", 100, 2)}
    whole = {c.setting for c in plan if {"scale_shift", "ewc", "freeze_top"} & {c.method}}
    assert len(whole) == 2
    assert len({c.setting for c in plan if c.count == 10}) == 2
    assert len(planned.quick("nines")) == 4


@pytest.mark.parametrize("cells_of", [planned.plan, planned.tuning], ids=["plan", "tuning"])
def test_every_cell_is_a_configuration_of_as_many_steps(cells_of):
    for cell in cells_of():
        chosen = planned.settings(cell, {})
        config = TransferConfig(**chosen | {"critic": str(chosen.get("critic"))})
        assert config.total_steps == cell.steps
        assert config.mining_steps == 0 or cell.method in planned.MINERS
        assert all(steps % config.snapshot_every == 0 for steps in (config.mining_steps, config.finetune_steps))
        assert config.adversarial == (cell.loss == "adversarial")


def test_rates_are_those_of_family_loss_and_method():
    known = {"digits kernel minegan++": 3e-3, "digits kernel minegan": 5e-3}
    assert planned.settings(DIGITS, known)["lr"] == 3e-3
    control = planned.Cell("inverted", 30, "kernel", "random", 1)
    assert planned.settings(control, known)["lr"] == 3e-3
    assert "lr" not in planned.settings(planned.Cell("hue", 30, "kernel", "random", 1), known)
    assert planned.settings(planned.Cell("flipped", 100, "kernel", "minegan", 0, "lr=0.004"), known)["lr"] == 0.004


def test_a_variant_is_some_settings():
    cell = planned.Cell("nines", 100, "kernel", "minegan++", 0, "affine=true,criterion=movement,reselect_every=4x")
    chosen = planned.settings(cell, {})
    assert (chosen["criterion"], chosen["affine"]) == ("movement", True)
    assert 4 * chosen["reselect_every"] == chosen["finetune_steps"]
    long = planned.Cell("nines", 100, "kernel", "minegan++", 0, f"steps={planned.LONGER}x")
    short, long = planned.settings(DIGITS, {}), planned.settings(long, {})
    assert long["finetune_steps"] == planned.LONGER * short["finetune_steps"]


def test_a_run_goes_on_where_it_stopped(places, console):
    plan = planned.quick("nines")
    ran, lock = [], threading.Lock()

    def work(cell, places, rates):
        with lock:
            ran.append(cell)
        if cell.method == "mined" and len(ran) <= len(plan):
            raise ValueError("broken")
        cells.finished(cell, places).write_text("{}")

    def left():
        return [cell for cell in plan if not cells.finished(cell, places).exists()]

    failed = quality.run(left(), places, {}, 2, None, console, work, ThreadPoolExecutor)
    assert failed == {"nines-100-kernel-mined-0": "ValueError: broken"}
    assert [cell.method for cell in left()] == ["mined"]
    assert quality.run(left(), places, {}, 2, None, console, work, ThreadPoolExecutor) == {}
    assert Counter(ran) == Counter({cell: 1 + (cell.method == "mined") for cell in plan})


def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""import os, sys, time
sys.path.insert(0, {str(Path(quality.__file__).parent)!r})
import quality
if __name__ == "__main__":
    pool = quality.processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) != process.pid
    process.kill()
    process.communicate(timeout=60)  # until nobody can write there any more


def test_a_budget_starts_nothing_more(places, console):
    def work(cell, places, rates):
        raise AssertionError

    assert quality.run(planned.quick("nines"), places, {}, 2, -1.0, console, work, ThreadPoolExecutor) == {}


def test_time_left_follows_what_was_measured():
    done, rest = planned.quick("nines")[:1], planned.quick("nines")[1:]
    assert quality.time_left(20.0, done, rest) == pytest.approx(60.0)
    assert quality.said(3700) == "1 h 2 min"


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    assert quality.main(["--only", "avataaars-100-kernel-minegan-0", "--cache", str(tmp_path)], tmp_path) == 1
    assert "pip install" in capsys.readouterr().out


def test_missing_avatars_and_archives_are_named(places, tmp_path):
    setting = quality_settings.SETTINGS["lorelei"]
    with pytest.raises(networks.MissingError, match="npm install"):
        quality_settings.target(setting, 30, 0, places)
    with pytest.raises(networks.MissingError, match="train_images"):
        quality_settings.digits(tmp_path / "none.npz")


def test_nothing_matches(tmp_path, capsys):
    assert quality.main(["--only", "nothing*", "--cache", str(tmp_path)], tmp_path) == 2
    assert "--list" in capsys.readouterr().out


def test_targets_share_nothing_and_differ_by_seed(places):
    images = torch.arange(3000, dtype=torch.int64).view(-1, 1, 1, 1)
    seen = []
    for seed in range(3):
        train, validation, test = quality_settings._cut(images, seed, 100)
        parts = [set(part.flatten().tolist()) for part in (train, validation, test)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 510
        seen.append(parts[0])
    assert not set.intersection(*seen)
    train, validation, test = quality_settings._cut(images, 0, 1000)
    assert not set(train.flatten().tolist()) & {*validation.flatten().tolist(), *test.flatten().tolist()}


def test_a_whole_cell(monkeypatch, places):
    """On the shipped digits and their classifier, with a judge that has hardly learnt."""
    monkeypatch.setattr(networks, "JUDGE_STEPS", 2)
    monkeypatch.setitem(planned.SAMPLES, "digits", 16)
    monkeypatch.setitem(planned.STEPS, "digits", 8)
    cells.judging.cache_clear()
    images = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8)
    networks.digit_judge(places.judge(planned.setting_of(DIGITS)), images, torch.arange(64) % 10)
    path = cells.run_cell(DIGITS, places, {}, score_samples=2)
    record = json.loads(path.read_text())
    assert [row["step"] for row in record["curve"]] == [0, 2, 4, 6, 8]
    assert [row["stage"] for row in record["curve"]] == ["source", "mining", *["finetuning"] * 3]
    assert record["settings"]["loss"] == "mmd"
    assert record["diverged"] is None
    for row in record["curve"]:
        assert row["kid_low"] < row["kid"] < row["kid_high"]
        assert 0 <= row["precision"] <= 1
    assert cells.load_cells([DIGITS], places, {})[DIGITS] == record
    assert cells.picture(DIGITS, places).exists()


def test_a_cell_under_other_conditions_is_not_finished(places):
    kept = cells.conditions(DIGITS, places, {}) | {"curve": []}
    cells.finished(DIGITS, places).write_text(json.dumps(kept))
    assert cells.load_cells([DIGITS], places, {}) == {DIGITS: kept}
    assert cells.load_cells([DIGITS], places, {"digits kernel minegan++": 3e-3}) == {}
    mnist = quality_settings.Places(places.cache, mnist=places.cache)
    assert cells.load_cells([DIGITS], mnist, {}) == {}


def test_a_judge_that_saw_other_sets_is_not_believed():
    sets = [torch.randn(n, 3) for n in (10, 4, 4)]
    history = [{"step": 0, "stage": "source", "kid": 1.0}]
    with pytest.raises(RuntimeError, match="the judge saw"):
        cells.measured(sets, history, 4, sets[0], sets[0])
