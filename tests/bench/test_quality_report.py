# ruff: noqa: RUF001
"""docs/quality.md says what the cells hold: means, paired verdicts, curves, and where the defaults do not win."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import quality_curves
import quality_goals
import quality_merge
import quality_plan as planned
import report_quality
from quality_pictures import write_strip
from quality_results import SPARSE, Results, estimate
from quality_settings import Places, Target

KIDS = {"transfergan": 1.2, "minegan": 0.7, "minegan++": 0.5, "random": 0.6}
PLACE = ("nines", 100)


def record(method, seed, last, loss="kernel", variant="", diverged=None, setting="nines", count=100, **final):
    cell = {"setting": setting, "count": count, "loss": loss, "method": method, "seed": seed, "variant": variant}
    curve = []
    for step, kid in ((0, 2.0), (100, 0.9 * last), (200, last)):
        row = {"step": step, "stage": "finetuning", "kid": kid, "kid_train": kid / 2, "kid_validation": kid}
        row |= {"precision": 0.5, "recall": 0.25, "nearest": 0.9, "diversity": 0.8}
        noted = {"latent_norm": 1.0, "latent_norm_spread": 0.1, "latent_dimensions": 0.8}
        curve.append(row | {"noted": noted})
    curve[-1] |= final
    return {"cell": cell, "settings": {}, "curve": curve, "diverged": diverged, "seconds": 36.0}


@pytest.fixture
def records():
    return [record(method, seed, kid + 0.01 * seed) for method, kid in KIDS.items() for seed in range(3)]


def test_an_interval_of_students_t():
    value = estimate([1.0, 2.0, 3.0])
    assert (value.mean, value.n) == (2.0, 3)
    assert value.half == pytest.approx(4.303 / 3**0.5)
    assert estimate([1.0]).half is None
    assert estimate([]) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([-1.0, -1.1], "better"), ([1, 1.1], "worse"), ([-1, 1.1], "not told apart"), ([-1.0], "not told apart")],
)
def test_a_verdict_needs_an_interval_without_zero(values, verdict):
    assert estimate(values).verdict == verdict


def test_kids_are_in_the_sources_and_seeds_are_paired(records):
    results = Results(records)
    assert results.mean(PLACE, SPARSE).mean == pytest.approx((0.5 + 0.51 + 0.52) / 3 / 2)
    pair = results.differences(PLACE, SPARSE, ("kernel", "random"))
    assert pair == pytest.approx([-0.05] * 3)
    assert estimate(pair).verdict == "better"
    assert results.best_way(PLACE) == SPARSE


def test_scratch_is_measured_by_the_source_too(records):
    results = Results([record("scratch", 0, 3.0), *records])
    results.by_key["nines", 100, "kernel", "scratch", "", 0]["curve"][0]["kid"] = 50.0
    assert results.final(PLACE, ("kernel", "scratch")) == {0: 1.5}


def test_a_diverged_run_is_left_out_and_counted(records):
    results = Results([*records, record("minegan++", 3, 9.0, diverged="a loss became NaN")], FACTS)
    assert set(results.final(PLACE, SPARSE)) == {0, 1, 2}
    assert "13 runs" in report_quality.facts(results)
    assert "; 1 runs diverged" in report_quality.facts(results)


FACTS = {"processor": "a processor", "torch": "2.13", "commit": "abc", "rates": {}}


def test_the_tables(records):
    more = [record("minegan++", seed, 0.4, variant="criterion=movement,scope=layer") for seed in range(3)]
    more += [record("random", seed, 0.6 + 0.01 * seed, variant="scope=layer") for seed in range(3)]
    more += [record("random", seed, 0.9, variant="density=0.3") for seed in range(3)]
    more += [record("minegan++", seed, 0.8, variant="density=0.3") for seed in range(3)]
    more += [record("minegan++", seed, 0.9, loss="adversarial", diversity=0.1) for seed in range(3)]
    results = Results(records + more, FACTS)
    assert "| nines, 100 | 0.605 ± 0.012 | 0.355 ± 0.012 | 0.255 ± 0.012 |" in report_quality.overview(results)
    assert "| minegan, kernel | transfergan, kernel | -0.250 ± 0.000 | 1 of 1 | 1 | 0 | 0 |" in report_quality.mining(
        results
    )
    assert (
        "| minegan++, kernel | minegan++, adversarial | -0.195 ± 0.012 | 1 of 1 | 1 | 0 | 0 |"
        in report_quality.losses(results)
    )
    sparsity = report_quality.sparsity(results)
    assert "| minegan++, kernel | random, kernel | -0.050 ± 0.000 |" in sparsity
    assert "| target, images |  | 0.1 | 0.3 |" in sparsity
    assert "| nines, 100 | chosen − random | -0.050 ± 0.000 | -0.050 ± 0.000 |" in sparsity
    assert (
        "| movement, within layers | kernel | nines, 100: 0.200 ± 0.000, -0.105 ± 0.012 | -0.105 ± 0.012 | better |"
        in report_quality.scores(results)
    )
    assert "contrast" not in report_quality.scores(results)
    assert "| 100 | minegan++, kernel | 0.000 | 1 of 1 |" in report_quality.counts(results)
    steps = report_quality.steps(results)
    assert (
        "| nines, 100 | minegan++, kernel | 200 | 0.255 ± 0.012 | 0.128 ± 0.006 | 100 | 0.230 ± 0.011 | 0.230 ± 0.011 |"
        in steps
    )
    assert "nines, 100, minegan++, adversarial, seed 2" in report_quality.limits(results)
    assert "| digits 0 to 8 to nines | 1.00–1.00 | 0.10–0.10 | 0.80–0.80 | – |" in report_quality.prior(results)
    assert "| MineGAN++ lower than random neurons | 100 | 1 of 1 | nines |" in report_quality.goals(results)


def test_where_the_default_loses(records):
    better = [record("ewc", seed, 0.3 + 0.01 * seed) for seed in range(3)]
    text = report_quality.limits(Results(records + better, FACTS))
    assert "| nines, 100 | ewc, kernel | +0.200 ± 0.000 | yes |" in text
    assert "| minegan++, kernel | +0.100" in text
    assert "| transfergan, kernel |" not in text


def test_goals_say_nothing_of_what_was_not_run(records):
    results = Results([r for r in records if r["cell"]["method"] != "random"])
    assert quality_goals.below_random(results, PLACE) is None
    assert quality_goals.not_worse_than_dense(results, PLACE) is True
    assert quality_goals.quarter(results, PLACE) is False


def test_without_results_every_section_says_so(tmp_path):
    assert set(report_quality.render(tmp_path).values()) == {report_quality.NOTHING}
    assert set(report_quality.render(tmp_path)) == set(report_quality.NAMES)


def test_curves_are_written(tmp_path, records):
    more = [record("minegan++", 0, 0.8, variant=f"density={value}") for value in (0.1, 0.3)]
    more += [record("minegan", 0, 0.8, variant="steps=4x")]
    quality_curves.plot(Results(records + more), tmp_path)
    for name in quality_curves.NAMES:
        content = (tmp_path / "docs/images" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 300_000
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/quality.json").write_text(json.dumps({"facts": FACTS, "cells": records}))
    assert "](images/quality-training.png)" in report_quality.render(tmp_path)["quality-curves"]


def test_cells_and_pictures_are_merged(tmp_path, monkeypatch):
    cell = planned.quick("nines")[3]
    places = Places(tmp_path)
    (tmp_path / "cells").mkdir()
    images = torch.rand(10, 1, 32, 32) * 2 - 1
    write_strip(tmp_path / "cells" / f"{cell.name}.png", images)
    real = (images * 127.5 + 127.5).byte()
    monkeypatch.setattr(quality_merge, "target", lambda *_: Target(real, real, real))
    quality_merge.merge({cell: record("minegan++", 0, 0.5)}, places, tmp_path)
    assert Results.load(tmp_path / quality_merge.RESULTS).final(PLACE, SPARSE) == {0: 0.25}
    assert (tmp_path / "docs/images/quality-nines.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_rate_is_kept(tmp_path):
    found = {}
    for lr, kid, diverged in ((5e-4, 0.9, None), (1e-3, 0.4, None), (2e-3, 0.1, "a loss became NaN")):
        cell = planned.Cell("personas", 100, "kernel", "minegan", 0, f"lr={lr}")
        found[cell] = record("minegan", 0, kid, variant=cell.variant, diverged=diverged, setting="personas")
    quality_merge.merge_rates(found, tmp_path)
    assert "| minegan, kernel | 0.200 (0.001) | – | – |" in report_quality.tuning(tmp_path)
    assert planned.rates(tmp_path / "bench/results/quality-rates.json") == {"faces kernel minegan": 1e-3}
