"""Machine code of some kernels, as the compilers make it without a GPU: registers and instructions of each.

What a kernel does for an element costs as many instructions as it has, as long as memory does not wait longer.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from machine import ROOT
from measure import OURS

SCRIPT = ROOT / "tests" / "compile_only.py"
KERNELS = {  # op: which of its kernels
    "bias_act": "",
    "noise_bias_act": "bf16",
    "row_update": "",
    "manhattan": "",
}


def test_instructions(benchmark, device, recorder, pytestconfig):
    if device != "cpu":
        pytest.skip("what compilers make; needs no GPU")
    ops = ["manhattan"] if pytestconfig.getoption("--quick") else [*KERNELS]
    command = [sys.executable, str(SCRIPT), "--json", *ops]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = benchmark.pedantic(
        subprocess.run, (command,), {"env": environment, "stdout": subprocess.PIPE, "text": True}
    )
    assert found.returncode == 0, "a kernel spills, or has lost what it must have: see tests/compile_only.py"
    rows = [row for row in json.loads(found.stdout) if re.search(KERNELS[row["op"]], row["kernel"])]
    assert {row["op"] for row in rows} == {*ops}
    recorder.add([row_of(row) for row in rows])


def row_of(found: dict) -> dict:
    case = {"op": "instructions", "pass": f"{found['op']}: {found['kernel']}, {found['architecture']}"}
    case |= {"shape": [], "dtype": "", "provider": OURS, "backend": found["backend"], "kernel": found["kernel"]}
    return case | {"of": found["op"]} | {name: found[name] for name in ("architecture", "registers", "instructions")}
