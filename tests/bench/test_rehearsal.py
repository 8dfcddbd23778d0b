"""What bench/gpu.sh has found is in its files whenever it is stopped, and how long it would take is a sum.

The steps run here over the driver that launches nothing (bench/rehearsal.py).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import rehearsal

ROOT = Path(__file__).parents[2]
FACTS = {"device", "torch", "triton", "commit", "date"}


def start(command: list, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """In a session of its own. Not in Triton's interpreter, which launches nothing."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINEGAN_BACKEND", "OUT")}
    kept = {k: v for k, v in kept.items() if not k.startswith("PYTEST_")}  # this run may be distributed
    environment = kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MINEGAN_COMMIT": "abc"} | environment
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `make test &` has it ignored
    )  # fmt: skip


def kill_session(leader: int) -> None:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)


def wait_for(rows, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not rows():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no rows came"
        time.sleep(0.05)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_step_leaves_what_it_measured(tmp_path, how):
    """SIGINT stops the checks in order; after SIGKILL of every process at once rows of benchmarks are there too."""
    pytest.importorskip("triton")
    steps = {"checks": ("bias_act", "upfirdn2d", "noise_bias_act"), "bench": ("bias_act", "upfirdn2d")}
    name = "checks" if how == signal.SIGINT else "bench"
    step = [name, *steps[name]]
    process = start(["bash", "bench/gpu.sh", "--out", str(tmp_path), *step], MINEGAN_GPU_REHEARSAL="1")
    checks, table = tmp_path / "checks.jsonl", tmp_path / "stand-in-for-a-gpu.json"
    try:
        if how == signal.SIGINT:
            wait_for(lambda: len(lines_of(checks)) > 3, process)
            process.send_signal(how)
            output = process.communicate(timeout=60)[0]
            assert process.returncode == 130, output
            assert "checks     interrupted" in output
            head, *rows = lines_of(checks)
            assert head["describes"].keys() >= FACTS
            assert all(row["right"] and row["op"] in step and row["run"] == head["run"] for row in rows)
        else:
            wait_for(table.exists, process)
            kill_session(process.pid)
            process.communicate(timeout=60)
            found = json.loads(table.read_text())
            (run,) = found["runs"].values()
            assert run.keys() >= FACTS
            assert found["rows"][0]["op"] == "bias_act"
            assert found["rows"][0]["median_us"] > 0
            assert process.returncode != 0  # it had not come to its end
    finally:
        kill_session(process.pid)


def test_results_of_tests_are_there_before_the_run_ends(tmp_path):
    tests = "def test_right(): pass\ndef test_wrong(): assert 1 == 2\ndef test_endless(): time.sleep(1000)\n"
    (tmp_path / "test_three.py").write_text(f"import time\n{tests}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "at_once", "--at-once", "found.jsonl", "test_three.py"]
    process = start(command, tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'bench'}")
    try:
        wait_for(lambda: len(lines_of(tmp_path / "found.jsonl")) == 3, process)
    finally:
        kill_session(process.pid)
        process.communicate()
    head, right, wrong = lines_of(tmp_path / "found.jsonl")
    assert head["describes"].keys() >= FACTS
    assert (right["test"], right["outcome"]) == ("test_three.py::test_right", "passed")
    assert wrong["outcome"] == "failed"
    assert "assert 1 == 2" in wrong["says"]


def test_a_file_that_cannot_be_imported_is_in_the_results(tmp_path):
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_sound.py").write_text("def test_right(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "at_once", "--at-once", "found.jsonl"]
    running = start([*command, "--continue-on-collection-errors"], tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'bench'}")
    output = running.communicate(timeout=120)[0]
    assert running.returncode == 1, output
    _, broken, right = lines_of(tmp_path / "found.jsonl")
    assert (broken["test"], broken["outcome"]) == ("test_broken.py", "error")
    assert "No module named 'no_such_module'" in broken["says"]
    assert right["outcome"] == "passed"


def process(step, units, specialisations, seconds=1.0, compile_seconds=1.0):
    line = {"step": step, "units": units, "seconds": seconds, "specialisations": specialisations}
    return line | {"sampled": 2, "compile_seconds": compile_seconds}


def test_an_estimate_is_that_of_the_longest_process_or_of_all_cores():
    lines = [process("a", 5, 100), process("a", 5, 10), {"step": "a", "limit": 20}]
    found = rehearsal.estimate(lines, 16)["a"]
    assert found["seconds"] == pytest.approx(rehearsal.START + 100 * 0.5 + 1)
    assert (found["specialisations"], found["compiling"], found["limit"]) == (110, 55, 20)
    assert rehearsal.estimate(lines, 1)["a"]["seconds"] == pytest.approx(rehearsal.START + 110 * 0.5 + 2)
    spread = rehearsal.estimate([*lines, {"step": "a", "spread": 14}], 16)["a"]
    assert spread["seconds"] == pytest.approx(rehearsal.START + (110 * 0.5 + 2) / 14)


def test_an_estimate_grows_with_what_was_not_rehearsed_and_takes_budgets_for_granted():
    lines = [process("a", 4, 8), {"step": "a", "units": 40}, process("b", 1, 0)]
    found = rehearsal.estimate(lines, 16)
    assert found["a"]["seconds"] == pytest.approx(rehearsal.START + 10 * (8 * 0.5 + 1))
    assert found["a"]["specialisations"] == 80
    assert found["b"]["seconds"] == pytest.approx(rehearsal.START + 1)
    budget = rehearsal.estimate([*lines, {"step": "a", "budget": 0.2}], 16)["a"]
    assert budget["seconds"] == pytest.approx(rehearsal.START + 10 * (8 * 0.5 + 4 * 0.2))
    alone = rehearsal.estimate([{"step": "c", "units": 3}, {"step": "c", "budget": 7}], 16)["c"]
    assert alone["seconds"] == pytest.approx(rehearsal.START + 21)
    assert rehearsal.estimate([{"step": "d", "limit": 30}, {"step": "d", "limit": 10}], 16)["d"]["seconds"] == 40


def test_an_estimate_counts_what_no_core_shortens_and_says_what_is_assumed():
    lines = [process("a", 1, 0, seconds=3.0), {"step": "a", "serial": 5}, {"step": "a", "start": 24}]
    assert rehearsal.estimate(lines, 16)["a"]["seconds"] == pytest.approx(24 + 5 + 3)
    found = rehearsal.estimate([*lines, {"step": "a", "factor": 10}], 16)["a"]
    assert found["seconds"] == pytest.approx(24 + 5 + 10 * 3)
    assert found["assumed"] == ["a start of 24 s", "10 times as long from then on as without the tool"]
    assert rehearsal.estimate([{"step": "b", "units": 2}, {"step": "b", "budget": 6}], 16)["b"]["assumed"] == [
        "2 times 6 s"
    ]


def test_a_compilers_process_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("MINEGAN_GPU_REHEARSAL", str(tmp_path / "notes"))
    monkeypatch.setenv("MINEGAN_GPU_STEP", "build")
    command = [sys.executable, str(ROOT / "bench" / "rehearsal.py"), "--timed", sys.executable, "-c"]
    work = "import sys, time\nwhile time.process_time() < 0.5: pass\nsys.exit(3)"
    assert subprocess.run([*command, work]).returncode == 3
    (line,) = lines_of(tmp_path / "notes")
    assert 0.4 <= rehearsal.estimate([line], 16)["build"]["seconds"] - rehearsal.START < 5
