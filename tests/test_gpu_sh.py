"""bench/gpu.sh among stand-ins for python, nvcc and compute-sanitizer: order, table, exit code; and without a GPU."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MOST_FILES = 8  # that come back from a machine which gives few

PYTHON = """#!/bin/bash
echo "python $*" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 90 ;;
  *--list*) printf '%s\\n' "row_update --slice 0 1" "mmd --slice 0 2" "mmd --slice 1 2" ;;
  *--collect-only*) ;;
  *test_iteration*) exit "${FAIL_ITERATION:-0}" ;;
  *tests/ops*) exit "${FAIL_TEST:-0}" ;;
  *sanitize.py*) exit "${FAIL_SANITIZE:-0}" ;;
esac
"""
TOOL = """#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
[[ ${0##*/} != cmake ]] || sleep "${BUILD_SECONDS:-0}"
for last; do [[ $previous == -o ]] && touch "$last"; previous=$last; done
exit 0
"""
SANITIZER = """#!/bin/bash
echo "compute-sanitizer $*" >>"$CALLS"
for word; do [[ $previous == --log-file ]] && log=${word/\\%p/$$}; previous=$word; done
case "$*" in
  *planted*) exit "${FOUND:-9}" ;;
  *) echo "========= ERROR SUMMARY: ${FOUND_IN_KERNELS:-0} errors" >"$log" ;;
esac
"""
ONE, TWO = (
    ("build", "checks", "iteration", "demo", "bench"),
    ("build", "test", "gpu", "sanitize", "compile"),
)


@pytest.fixture
def run(tmp_path):
    """run(*arguments, **environment) -> (exit code, output, calls) of gpu.sh in a tree of stand-ins."""
    for folder in ("bench", "csrc", "bin"):
        (tmp_path / folder).mkdir()
    for name in ("gpu.sh", "planted.cu", "bench_bias_act.py"):
        shutil.copy(ROOT / "bench" / name, tmp_path / "bench" / name)
    for name in ("CMakeLists.txt", "csrc/bias_act.cu"):
        (tmp_path / name).write_text(name)
    tools = {
        "python3": PYTHON,
        "nvcc": TOOL,
        "cmake": TOOL,
        "compute-sanitizer": SANITIZER,
        "nvidia-smi": "#!/bin/bash\n",
    }
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments, interrupt_after: float | None = None, **environment):
        environment = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "CUDA_HOME": "/nowhere",
            "OUT": "results",
        } | environment
        calls = tmp_path / "calls"
        calls.write_text("")
        script = subprocess.Popen(
            ["bash", "bench/gpu.sh", *arguments], cwd=tmp_path, env=environment | {"CALLS": str(calls)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `make test &` has it ignored
        )  # fmt: skip
        try:
            output = script.communicate(timeout=interrupt_after)[0]
        except subprocess.TimeoutExpired:
            script.send_signal(signal.SIGINT)
            output = script.communicate()[0]
        return script.returncode, output, calls.read_text()

    run.folder = tmp_path
    return run


def table(output: str) -> dict[str, str]:
    lines = output.splitlines()
    last = lines[max(i for i, line in enumerate(lines) if "results in" in line) + 1 :]
    return {line.split()[0]: " ".join(line.split()[1:-2]) for line in last}


def in_order(text: str, *parts: str) -> bool:
    places = [text.index(part) for part in parts]
    return places == sorted(places)


def test_the_first_part(run):
    code, output, calls = run("1")
    assert (code, table(output)) == (0, dict.fromkeys(ONE, "ok"))
    assert in_order(
        calls, "--backend triton --record", "--backend cuda --record", "test_iteration", "test_demo", "--budget"
    )
    assert "cmake --build" in calls
    assert calls.count("mmd --slice 1 2") == 2
    assert "--largest --no-compile --budget 0.2" in calls
    assert f"--record={run.folder}/results" in calls
    assert (run.folder / "results" / "gpu.log").read_text() == output
    assert len(list((run.folder / "results").iterdir())) <= MOST_FILES


def test_the_second_part(run):
    code, output, calls = run("2")
    assert (code, table(output)) == (0, dict.fromkeys(TWO, "ok"))
    tests = "tests/ops -k triton or cuda", "tests -m gpu"
    assert in_order(calls, *tests, "planted racecheck", "memcheck-cuda-%p", "racecheck-cuda-%p", "--budget 0.2")
    assert "--no-compile" not in calls
    assert len(list((run.folder / "results").iterdir())) <= MOST_FILES


def test_triton_has_compiled_before_the_sanitizer_watches(run):
    code, output, calls = run("memcheck")
    assert (code, table(output)) == (0, {"build": "ok", "memcheck": "ok"})
    watched = [line for line in calls.splitlines() if "sanitize.py --backend triton --record" in line]
    assert "compute-sanitizer" not in watched[0]
    assert watched[-1].startswith("compute-sanitizer --tool memcheck")


def test_a_failing_step_stops_no_other_and_shows_in_the_exit_code(run):
    code, output, calls = run("1", FAIL_ITERATION="1")
    assert (code, table(output)) == (1, dict.fromkeys(ONE, "ok") | {"iteration": "FAILED"})
    assert "--budget 0.2" in calls
    assert table(run("2", FAIL_TEST="1")[1])["test"] == "FAILED"
    assert table(run("1", FAIL_SANITIZE="1")[1])["checks"] == "FAILED"


def test_an_interrupt_ends_the_build_too(run):
    start = time.monotonic()
    code, output, _ = run("1", interrupt_after=2, BUILD_SECONDS="60")
    assert time.monotonic() - start < 30
    assert code == 130
    assert table(output)["checks"] == "interrupted"
    assert "the build failed" not in output


def test_one_step_with_its_arguments_builds_first_and_only_once(run):
    code, output, calls = run("--out", "elsewhere", "bench", "bias_act")
    assert (code, list(table(output))) == (0, ["build", "bench"])
    assert "bench/bench_bias_act.py --largest" in calls
    assert (run.folder / "elsewhere" / "gpu.log").exists()
    code, output, calls = run("test", "tests/ops", "-x")
    assert (code, list(table(output))) == (0, ["build", "test"])
    assert "cmake" not in calls
    assert "tests/ops -x" in calls
    (run.folder / "csrc" / "bias_act.cu").write_text("changed")
    assert "cmake --build" in run("test")[2]


@pytest.mark.parametrize(
    "trouble", [{"FOUND": "0"}, {"FOUND_IN_KERNELS": "3"}], ids=["planted fault overlooked", "fault in a kernel"]
)
def test_sanitize_fails(run, trouble):
    code, output, _ = run("sanitize", **trouble)
    assert (code, table(output)["sanitize"]) == (1, "FAILED")


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path="/usr/bin:/bin") is not None, reason="it cannot be hidden here"
)
def test_a_missing_sanitizer_is_named_and_skipped(run):
    (run.folder / "bin" / "compute-sanitizer").unlink()
    code, output, _ = run("sanitize")
    assert (code, table(output)["sanitize"]) == (0, "skipped")
    assert "compute-sanitizer: not found on PATH" in output


def test_a_missing_nvcc_is_named(run):
    (run.folder / "bin" / "nvcc").unlink()
    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("nvcc cannot be hidden here")
    code, output, _ = run("build")
    assert code == 1
    assert "nvcc: not found on PATH\nthe build failed" in output


@pytest.mark.parametrize("arguments", [("nonsense",), ("bench", "no_such_op"), ()])
def test_what_is_not_there_is_named(run, arguments):
    code, output, calls = run(*arguments)
    assert code == 2
    assert (arguments[-1] if arguments else "bench/gpu.sh [--out FOLDER]") in output
    assert not calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_run(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    environment.pop("MINEGAN_GPU_REHEARSAL", None)
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), "1"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "no usable GPU: torch sees no CUDA device. Nothing was run" in done.stderr
    assert not (tmp_path / "out").exists()
