"""bench/bench_instructions.py: what tests/compile_only.py reads from machine code, and which rows are kept of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_instructions_of_a_kernel(monkeypatch):
    """Read from a disassembly: padding is none, and the hexadecimal code of an instruction is no line of its own."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # importing it takes it away
    import compile_only

    body = """
        .headerflags    @"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000800 */
        /*0010*/              @!P0 DFMA R2, R4, R6, R8 ;                           /* 0x000000060402722b */
        /*0020*/                   EXIT ;                                          /* 0x000000000000794d */
        /*0030*/                   BRA 0x30;                                       /* 0xfffffffc00fc7947 */
        /*0040*/                   NOP;                                            /* 0x0000000000007918 */
        /*0050*/                   NOP;                                            /* 0x0000000000007918 */
"""
    assert compile_only.instructions_in(body) == 4


def test_the_rows_of_an_op(tmp_path):
    """`--quick` records one op, through the compiler and the results file."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    options = ["--benchmark-only", "--quick", "--device", "cpu", "--record", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/bench_instructions.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {
        "pairs_kernel [slopes]",
        "pairs_kernel [distances]",
        "signs_kernel [signs]",
    }
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    assert all(row["instructions"] > 100 and 16 < row["registers"] <= 255 for row in rows)
    assert len({row["pass"] for row in rows}) == len(rows)
