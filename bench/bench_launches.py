"""Launches, specialisations and the host's time of a pass of each op, and of StyleGAN2-256's steps (config f, batch 4);
and what a first use compiles: of the ops how many kernels, of the steps their time too.

Without a GPU: the launches are real, and what they launch computes nothing (launch_driver). So the times are the host's
alone. Of a step they are those of our launchers, because PyTorch's own operations do compute.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measure import OURS

SCRIPT = Path(__file__).with_name("launches.py")
PARTS = {  # what to run: arguments, and those of --quick
    "ops": (["--batch", "4", "--time", "0.3"], ["--batch", "2", "--time", "0.01"]),
    "step": (
        ["--batch", "4", "--size", "256", "--time", "6", "--compile", "1"],
        ["--batch", "2", "--size", "8", "--time", "0.01"],
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_launches(benchmark, device, recorder, pytestconfig, part):
    if device != "cpu":
        pytest.skip("the host's time of launches that launch nothing; needs no GPU")
    arguments = PARTS[part][pytestconfig.getoption("--quick")]
    command = [sys.executable, str(SCRIPT), part, "--json", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "MINEGAN_BACKEND"}
    environment["OMP_NUM_THREADS"] = "1"  # a launch is one thread's work
    found = benchmark.pedantic(
        subprocess.run, (command,), {"env": environment, "stdout": subprocess.PIPE, "text": True}
    )
    found = json.loads(found.stdout)
    rows = found["rows"]
    assert rows
    assert not found["faults"]
    assert not [row for row in rows if row["faults"]]
    for i, row in enumerate(rows):
        row = {name: value for name, value in row.items() if name not in ("faults", "kernels")}
        row |= {"op": "launches", "provider": OURS, "backend": "triton"}
        row |= {"waits": len(row["waits"]), "copies": len(row["copies"])}
        if part == "step":
            for name in ("median_us", "q1_us", "q3_us"):
                del row[name]
        rows[i] = row
    shape = next(row["shape"] for row in rows if len(row["shape"]) == 4)
    for row in found["first_use"]:
        key = {"op": "first_use", "pass": f"{part}: {row['kernels']}", "shape": shape, "dtype": "float32", "part": part}
        rows.append(key | {"provider": OURS, "backend": "triton"} | row)
    recorder.add(rows)
