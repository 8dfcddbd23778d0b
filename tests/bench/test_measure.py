"""The benchmarks' own machinery: what is timed when, what is refused, what a row holds, which rows a file keeps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import clock
import machine
from clock import ROUNDS, Provider, interleave, peak_bytes
from measure import Case, WrongResultError, check, make_pass, run_case

CEILINGS = {"copy_gb_s": 10.0}
X = torch.linspace(-1, 1, 1000)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(clock, "flusher", lambda device: lambda: None)


def provider(name, function, backend=""):
    return Provider(name, lambda: lambda: (function(X),), backend)


def case(**changes):
    known = {"op": "double", "which": "forward", "shape": (1000,), "dtype": torch.float32, "bytes": 8000}
    return Case(**known | {"expected": [2 * X.double()]} | changes)


def test_providers_take_turns_and_each_begins_once():
    order = []
    providers = [Provider(name, lambda name=name: lambda: order.append(name)) for name in "ABC"]
    samples = interleave(providers, "cpu", True, 0.0)
    assert "".join(order) == "ABC" * 2 + ("ABCBCACAB" * 3)[: 3 * ROUNDS[0]]
    assert {len(s.seconds) for s in samples.values()} == {ROUNDS[0]}


def test_set_up_is_not_timed():
    def slow_to_prepare():
        sum(range(200_000))
        return lambda: None

    samples = interleave([Provider("A", slow_to_prepare)], "cpu", True, 0.0)["A"]
    assert sorted(samples.seconds)[ROUNDS[0] // 2] < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 2 * x + 1e-4,
        lambda x: (2 * x)[:-1],
        lambda x: torch.where(x == x[-1], torch.nan, 2 * x),
        torch.empty_like,
    ],
    ids=["a little off", "another shape", "one NaN", "unwritten"],
)
def test_a_wrong_result_is_refused_before_any_timing(wrong):
    providers = [provider("eager", lambda x: x + x), provider("minegan_fast", wrong, "reference")]
    with pytest.raises(WrongResultError, match="minegan_fast:reference is off by"):
        run_case(case(), providers, "cpu", CEILINGS, 0.0)


def test_a_backend_that_is_not_here_has_no_row_and_a_compiler_that_refuses_says_so():
    def refuse():
        raise RuntimeError("torch.compile does not currently support double backward")

    def missing():
        from minegan_fast.ops import BackendUnavailable

        raise BackendUnavailable("no such thing here")

    providers = [provider("eager", lambda x: x + x), Provider("torch.compile", refuse)]
    providers.append(Provider("minegan_fast", missing, "cuda"))
    errors, notes = check(case(which="double backward"), providers)
    assert (list(errors), notes) == (["eager"], {"torch.compile": "not supported by torch.compile"})
    with pytest.raises(RuntimeError, match="double backward"):
        check(case(which="backward"), providers)


def test_a_row_holds_rates_ratios_and_the_case():
    providers = [provider("minegan_fast", lambda x: x * 2, "reference"), provider("eager", lambda x: x + x)]
    ours, eager = run_case(case(bytes=8_000_000, flops=4_000_000), providers, "cpu", CEILINGS, 0.0)
    assert {ours[key] for key in ("op", "pass", "dtype", "backend")} == {"double", "forward", "float32", "reference"}
    assert ours["q1_us"] <= ours["median_us"] <= ours["q3_us"]
    assert ours["gb_s"] == pytest.approx(8000 / ours["median_us"], rel=0.01)
    assert ours["tflop_s"] == pytest.approx(4 / ours["median_us"], abs=1e-3)
    assert ours["percent_of_copy"] == pytest.approx(10 * ours["gb_s"], rel=0.01)
    assert ours["ratio"] == {"eager": pytest.approx(eager["median_us"] / ours["median_us"], abs=0.01)}
    assert run_case(case(), providers, "cpu", CEILINGS, 0.0)[0]["percent_of_copy"] is None  # it never left the cache


def test_passes_are_what_they_are_called():
    x, dy = X.clone().requires_grad_(), torch.ones(1000, requires_grad=True)
    given = lambda which: make_pass(which, lambda x: x**3, (x,), dy, (torch.full((1000,), 5.0),))()()  # noqa: E731
    assert not given("inference")[0].requires_grad
    assert given("forward")[0].requires_grad
    torch.testing.assert_close(given("backward")[0], 3 * X**2)
    torch.testing.assert_close(given("double backward")[0], 15 * X**2)


def test_peak_memory_counts_what_a_call_holds_at_once():
    def call(x):
        first = torch.zeros(1 << 18)
        second = first + 1
        del first
        return second * 2

    assert peak_bytes(provider("A", call), "cpu") == pytest.approx(2 << 20, abs=100)  # and the scalars 1 and 2


def row(op, shape, provider="eager"):
    return {"op": op, "pass": "forward", "shape": shape, "dtype": "float32", "provider": provider, "backend": ""}


def test_rows_replace_those_of_the_same_case_and_no_others(tmp_path):
    first = {"device": "Some CPU (v2), 2 cores", "date": "day 1", "commit": "a"}
    second = first | {"date": "day 2", "commit": "b"}
    machine.merge(tmp_path, first, [row("a", [1]), row("a", [1], "gone"), row("a", [2])])
    path = machine.merge(tmp_path, second, [row("a", [1])])
    kept = json.loads(path.read_text())
    assert path.name == "some-cpu-v2-2-cores.json"
    assert [(r["shape"], r["provider"], r["run"]) for r in kept["rows"]] == [
        ([2], "eager", "day 1 a"),
        ([1], "eager", "day 2 b"),
    ]
    machine.merge(tmp_path, second, [row("a", [2])])
    assert list(json.loads(path.read_text())["runs"]) == ["day 2 b"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_commit_is_named_without_git_too(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == "unknown"
    monkeypatch.setenv("MINEGAN_COMMIT", "abc")
    assert machine.commit() == "abc"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    (tmp_path / "bench").mkdir()
    for name in machine.MEASURED[:4]:
        (tmp_path / name).write_text("1")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = machine.commit()
    assert len(clean) == 10
    (tmp_path / "csrc").write_text("2")
    assert machine.commit() == clean + "+"


def test_lines_of_several_runs_say_whose_they_are(monkeypatch, tmp_path):
    path = tmp_path / "new" / "found.jsonl"
    monkeypatch.setattr(machine, "commit", lambda: "a")
    machine.Lines(path, "cpu").add({"check": 1})
    monkeypatch.setattr(machine, "commit", lambda: "b")
    machine.Lines(path, "cpu").add({"check": 2})
    heads, rows = [], []
    for line in map(json.loads, path.read_text().splitlines()):
        (heads if "describes" in line else rows).append(line)
    assert [head["describes"]["commit"] for head in heads] == ["a", "b"]
    assert [(row["check"], row["run"]) for row in rows] == [(1, heads[0]["run"]), (2, heads[1]["run"])]


def test_a_run_on_a_gpu_names_driver_and_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(machine, "driver", lambda: "570.1")
    run = machine.describe_run("cuda", {})
    assert (run["device"], run["driver"], run["cuda"]) == ("A GPU", "570.1", torch.version.cuda)
    assert "driver" not in machine.describe_run("cpu", {})


def test_every_op_has_a_largest_case_on_a_gpu():
    """And bench/gpu.sh measures each of them."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--collect-only", "--largest", "--device", "cuda"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    printed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True).stdout
    cases = re.findall(r"^bench/bench_(\w+)\.py::(.*)$", printed, re.MULTILINE)
    here = {path.stem.removeprefix("bench_") for path in (root / "bench").glob("bench_*.py")}
    of_no_op = {"instructions", "kernel_step", "launches", "multi", "step", "stylegan2"}
    assert {op for op, _ in cases} == here - of_no_op
    assert all("16x128x256x256" in name for op, name in cases if op in ("bias_act", "upfirdn2d", "noise_bias_act"))
    listed = re.search(r"^ops=\(([^)]*)\)", (root / "bench/gpu.sh").read_text(), re.MULTILINE)[1].split()
    assert {*listed} == here - of_no_op
