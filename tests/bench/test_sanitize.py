"""bench/sanitize.py: a check that raises counts as wrong, and each result is written down."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("sanitize")


def check(name, ours, expected=1.0):
    def fails():
        raise RuntimeError("a planted failure")

    make = (lambda: fails) if ours is None else lambda: lambda: (torch.tensor(ours),)
    return name, torch.float32, make, lambda: lambda: (torch.tensor(expected, dtype=torch.float64),)


CHECKS = [check("right", 1.0), check("raises", None), check("off", 1.1), check("close", 1.0 + 1e-7)]


def run(sanitize, monkeypatch, *arguments) -> int:
    monkeypatch.setitem(sanitize.OPS, "bias_act", lambda device: iter(CHECKS))
    monkeypatch.setattr("sys.argv", ["sanitize.py", "--backend", "cpp", "bias_act", *map(str, arguments)])
    return sanitize.main()


def test_a_check_that_raises_ends_nothing(sanitize, monkeypatch, tmp_path, capsys):
    assert run(sanitize, monkeypatch, "--record", tmp_path / "found.jsonl") == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "bias_act raises: RuntimeError: a planted failure"
    assert printed[1].startswith("bias_act off: wrong by 1.00e-01")
    assert printed[2] == "bias_act, cpp: 4 calls, 2 wrong"
    head, *rows = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert head["describes"].keys() >= {"device", "torch", "triton", "commit", "date"}
    assert [(row["check"], row["right"]) for row in rows] == [
        ("right", True), ("raises", False), ("off", False), ("close", True),
    ]  # fmt: skip
    assert rows[1]["fault"] == "RuntimeError: a planted failure"
    assert rows[2]["error"] == pytest.approx(0.1)


def test_slices_are_all_checks_once(sanitize, monkeypatch, capsys):
    codes = [run(sanitize, monkeypatch, "--slice", k, 2) for k in (0, 1)]
    printed = capsys.readouterr().out
    assert codes == [1, 1]
    assert printed.count("2 calls, 1 wrong") == 2


def test_a_process_that_goes_on_for_another_keeps_its_count(sanitize, monkeypatch, capsys):
    assert run(sanitize, monkeypatch, "--done", 3, 2) == 1
    assert capsys.readouterr().out == "bias_act, cpp: 4 calls, 2 wrong\n"
    assert run(sanitize, monkeypatch, "--done", 3, 0) == 0


def test_processes_beside_each_other_do_all_of_an_op(sanitize, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sanitize.py", "--backend", "triton", "--list"])
    assert sanitize.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in printed} == {*sanitize.OPS}
    assert "upfirdn2d --slice 0 1" in printed
    assert [line for line in printed if line.startswith("mmd ")] == [f"mmd --slice {k} 4" for k in range(4)]
