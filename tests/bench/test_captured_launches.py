"""A steady step of a training that is captured neither waits for the GPU nor copies from the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CRITICS = ("critic", "critic in bf16", "critic in fp16", "wgan", "both losses", "sparse critic")
KERNELS = ("kernel", "kernel of another range")
CASES = [f"{name}, {stage}" for name in (*CRITICS, *KERNELS) for stage in ("mining", "finetuning")]
CASES.append("elastic weights, finetuning")


@pytest.fixture(scope="module")
def found():
    """What the process prints. One of Triton's interpreter launches nothing, so it has its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINEGAN_BACKEND")}
    command = [sys.executable, "tests/bench/captured_launches.py"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed)


@pytest.mark.parametrize("case", CASES)
def test_a_steady_step_neither_waits_nor_copies(found, case):
    for name, row in found[case].items():
        assert row["calls"] == ["replay"], f"{name}: {row['why_eager']}"
        assert not row["faults"]
        assert not row["waits"], f"{name}: {'; '.join(row['waits'])}"
        assert not row["copies"], f"{name}: {'; '.join(row['copies'])}"
    assert min(row["launches"] for row in found[case].values()) > 30, "the kernels were not launched"


@pytest.mark.parametrize("case", CASES)
def test_the_lazy_penalties_are_among_the_watched_steps(found, case):
    lazy, plain = (found[case][name]["launches"] for name in ("lazy penalties", "plain"))
    assert lazy == plain if case.startswith("kernel") else lazy > plain


@pytest.mark.parametrize(("fault", "kind"), [("item", "waits"), ("tensor", "copies"), ("zeros", "copies")])
def test_a_planted_fault_is_found(found, fault, kind):
    for row in found["planted"][fault].values():
        assert [name for name in ("waits", "copies") if row[name]] == [kind]
        assert all("captured_launches.py:" in note for note in row[kind])
