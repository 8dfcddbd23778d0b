"""The launches of every op and of StyleGAN2's steps, through Triton's own JITFunction.run (bench/launch_driver.py).

Each kernel gets through the compiler's front end for batches of 1, 2 and 4, and no repetition waits for the GPU.
Planted faults show that these tests can fail.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minegan_fast.ops import _op

ROOT = Path(__file__).parents[2]
BATCHES = (1, 2, 4)
OPS = (
    "bias_act", "minibatch_stddev", "upfirdn2d", "noise_bias_act", "modulated_conv2d", "demodulation", "row_gradient",
    "winner", "penalty", "interpolate", "row_score", "row_update", "mmd2", "mmd_groups", "kernel_means", "miner",
)  # fmt: skip
KERNELS = [
    f"{path.stem}.{name}"
    for path in sorted((ROOT / "kernels").glob("*.py"))
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
]
# It copies addresses, which differ from call to call, to the GPU, without waiting.
COPYING = ("row_score",)


@pytest.fixture(scope="module")
def found():
    """What the processes print, by name. A process of Triton's interpreter launches nothing, so each has its own."""
    batches = [str(B) for B in BATCHES]
    commands = {
        "ops": ["bench/launches.py", "ops", "--json", "--batch", *batches],
        "step": ["bench/launches.py", "step", "--json", "--size", "8", "--batch", *batches],
        "planted": ["tests/bench/planted_launches.py"],
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINEGAN_BACKEND")}
    running = {
        name: subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    printed = {name: process.communicate()[0] for name, process in running.items()}
    codes = {name: process.returncode for name, process in running.items()}
    return {name: json.loads(text) for name, text in printed.items()} | {"codes": codes}


def of_batch(rows: list[dict], name: str, B: int) -> list[dict]:
    """Those of an op or a step. Samples of row_score and row_update are no batch: their rows are the same for each."""
    return [row for row in rows if re.match(rf"{name}\b", row["pass"]) and row["shape"][0] in (B, 110, 135)]


def check(rows: list[dict]) -> None:
    assert rows
    for row in rows:
        faults = "\n".join(row["faults"])
        assert not faults, f"{row['pass']}: {faults}"
        assert not row["waits"], f"{row['pass']} waits for the GPU: {'; '.join(row['waits'])}"


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("op", OPS)
def test_ops(found, op, B):
    rows = of_batch(found["ops"]["rows"], op, B)
    check(rows)
    assert all(row["launches"] for row in rows if row["pass"].endswith("forward") or "," not in row["pass"])
    copying = {row["pass"] for row in rows if row["copies"]}
    assert op in COPYING or copying == ({"row_update adam, gradients elsewhere"} if op == "row_update" else set())


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_launched(found, kernel):
    assert any(kernel in row["kernels"] for row in found["ops"]["rows"])


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("step", ["critic", "generator", "R1", "path length"])
def test_steps(found, step, B):
    rows = of_batch(found["step"]["rows"], f"StyleGAN2-8, {step}", B)
    check(rows)
    assert len(rows) == 1
    assert rows[0]["launches"] > rows[0]["specialisations"] > 1
    assert rows[0]["kernels"]["row_update.row_update_kernel"] == 1
    assert not rows[0]["copies"]
    assert rows[0]["aten"] > rows[0]["launches"]


@pytest.mark.parametrize("name", ["ops", "step"])
def test_the_exit_code_says_whether_anything_is_wrong(found, name):
    assert found["codes"][name] == any(row["faults"] or row["waits"] for row in found[name]["rows"])


def test_a_planted_compile_error_is_found(found):
    one, two = found["planted"]["B = 1"], found["planted"]["B = 2"]
    assert one["wrong"]
    assert "'int' object has no attribute 'to'" in one["faults"][0]
    assert "wide_kernel(B=1)" in one["faults"][0]
    assert (two["wrong"], two["launches"]) == (False, 1)


def test_launches_that_change_and_calls_that_warn_or_raise_are_found(found):
    assert "a planted warning" in found["planted"]["warns"]["faults"][0]
    assert "other kernels" in found["planted"]["another kernel each time"]["faults"][0]
    assert "none such" in found["planted"]["raises"]["faults"][0]


def test_planted_waits_are_found_and_nothing_else(found):
    planted = {name: row for name, row in found["planted"].items() if ":" in name}
    assert len(planted) > 20
    for name, row in planted.items():
        kind = name.partition(":")[0]
        assert bool(row["waits"]) == row["wrong"] == (kind == "waits"), (name, row)
        assert bool(row["copies"]) == (kind == "copies"), (name, row)
        assert all("planted_launches.py:" in note for note in row["waits"] + row["copies"])
        assert not row["faults"]


def test_operations_that_launch_are_counted_and_views_are_not(found):
    assert found["planted"]["nothing: operations"]["aten"] == 2
    assert found["planted"]["nothing: fill"]["aten"] == 2


@pytest.mark.parametrize("part", ["ops", "step"])
def test_a_first_use_is_counted_by_files_and_together(found, part):
    *files, together = found[part]["first_use"]
    assert together["kernels"] == "all"
    assert sum(row["specialisations"] for row in files) == together["specialisations"]
    launched = {kernel.partition(".")[0] for row in found[part]["rows"] for kernel in row["kernels"]}
    assert {row["kernels"] for row in files} >= launched
    assert all(row["compile_seconds"] is None for row in files)  # nothing was compiled here


def test_the_time_of_a_first_use_is_that_of_all_its_kernels():
    """In a process of its own, in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINEGAN_BACKEND")}
    code = (
        "import json, launches, torch; launches.install(); x = torch.randn(4, 8)\n"
        "row = launches.examine('', [4, 8], 'float32', lambda: lambda: launches.bias_act(x, act='lrelu'))\n"
        "(faults, seconds), (_, again) = (launches.compile_some(row['every'], 1) for _ in range(2))\n"
        "print(json.dumps([faults, *(launches.first_use(row['every'], s) for s in (seconds, again, {}))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "bench", env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    faults, (own, together), (again, _), (unknown, _) = json.loads(done.stdout)
    assert not faults
    assert (own["kernels"], own["specialisations"]) == ("bias_act", 1)
    assert own["compile_seconds"] == together["compile_seconds"] > 0.01
    assert again["compile_seconds"] > 0.01  # what is in Triton's cache is compiled too
    assert unknown["compile_seconds"] is None


@pytest.mark.skipif(not _op._INTERPRETING, reason="Triton does not interpret in this process")
def test_the_driver_refuses_a_process_that_interprets(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])  # importing the driver takes it away
    monkeypatch.syspath_prepend(ROOT / "bench")
    import launch_driver

    with pytest.raises(RuntimeError, match="interprets"):
        launch_driver.install()
