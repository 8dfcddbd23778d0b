# ruff: noqa: RUF001
"""bench/report.py: the README shows what the results hold, and nothing of an op whose tests are red."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import report

BEGIN, END = report.markers("bench")
DEMO = report.markers("demo")

RUN = {
    "device": "A GPU", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "today", "threads": 2,
    "ceilings": {"copy_gb_s": 4301.4, "matmul_tf32_tflop_s": 395.2},
}  # fmt: skip


def row(provider, backend, median, **more):
    case = {"op": "twice", "pass": "forward", "shape": [4, 8], "dtype": "float32", "run": "r"}
    timing = {
        "median_us": median,
        "q1_us": median - 1,
        "q3_us": median + 1,
        "percent_of_copy": 91.6,
        "peak_bytes": 2_000_000,
    }
    memory = {"peak_bytes": 2_000_000}
    return case | {"provider": provider, "backend": backend} | timing | memory | more


ROWS = [
    row("minegan_fast", "triton", 30.0, ratio={"eager": 4.0, "clone": 0.9}),
    row("minegan_fast", "cuda", 20.0, ratio={"eager": 6.0, "clone": 1.35}, graph_us=12.0),
    row("clone", "", 27.0),
    row("eager", "", 1234.0),
    {k: v for k, v in row("torch.compile", "", 1).items() if not k.endswith("_us")} | {"note": "cannot"},
]


@pytest.fixture
def root(tmp_path):
    for folder in ("bench/results", "tests/ops"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bench/results/gpu.json").write_text(json.dumps({"runs": {"r": RUN}, "rows": ROWS}))
    (tmp_path / "tests/ops/test_twice.py").write_text("def test():\n    pass\n")
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n{DEMO[0]}\n{DEMO[1]}\n")
    return tmp_path


def test_the_table(root):
    assert report.main([], root) == 0
    text = (root / "README.md").read_text()
    head, line = [line for line in text.splitlines() if line.startswith("|")][::2]
    assert head.split(" | ")[3:9] == ["cuda", "triton", "in a CUDA graph", "of copy", "eager", "torch.compile"]
    cells = ["forward", "4×8", "float32", "20 µs (19 µs–21 µs)", "30 µs (29 µs–31 µs)", "12 µs", "92 %"]
    cells += ["1.23 ms (6.00×)", "cannot", "27 µs (1.35×)", "2 MB / 2 MB"]
    assert line == f"| {' | '.join(cells)} |"
    assert "**`twice`, A GPU** (torch 2.11, triton 3.6, commit abc, today, threads: 2" in text
    assert "copy 4301 GB/s, matrix products tf32 395 TFLOP/s" in text
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n{DEMO[0]}\nNo demo recorded yet.\n{DEMO[1]}\n")


def test_check_tells_whether_the_readme_is_current(root, capsys):
    assert report.main(["--check"], root) == 1
    assert "make report" in capsys.readouterr().err
    report.main([], root)
    assert report.main(["--check"], root) == 0
    before = (root / "README.md").read_text()
    (root / "README.md").write_text(before.replace("20 µs", "10 µs"))
    assert report.main(["--check"], root) == 1


@pytest.mark.parametrize("tests", ["def test():\n    assert False\n", None], ids=["red", "missing"])
def test_no_number_of_an_op_without_green_tests(root, tests):
    path = root / "tests/ops/test_twice.py"
    path.write_text(tests) if tests else path.unlink()
    assert report.main([], root) == 1
    text = (root / "README.md").read_text()
    assert "Withheld: the tests of this op fail." in text
    assert "20 µs" not in text


def test_no_results_and_no_markers_are_said(root, capsys):
    (root / "bench/results/gpu.json").unlink()
    assert report.main([], root) == 0
    assert "No measurements yet." in (root / "README.md").read_text()
    (root / "README.md").write_text("nothing")
    assert report.main(["--check"], root) == 1
    assert BEGIN in capsys.readouterr().err


def test_the_demos_table(root):
    values = {"fid": 1.234, "kid": 0.5678, "kmmd": 0.04, "kmmd_95%": [0.03, 0.05], "mv": 0.4, "diversity": 0.9}
    recorded = {
        "generated": 1000, "real": 1009, "seed": 0, "minutes": 3.2, "device": "cpu", "threads": 2, "torch": "2.13.0",
        "trained_parameters": 0.11, "rows": {"mined": values | {"nearest": 3.0, "nines": 0.91}},
    }  # fmt: skip
    (root / "bench/quality").mkdir()
    (root / "bench/quality/demo.json").write_text(json.dumps(recorded))
    assert report.main([], root) == 0
    text = (root / "README.md").read_text()
    assert "| mined | 1.23 | 0.568 | 0.040 (0.030 to 0.050) | 0.400 | 0.90 | 3.00 | 91% |" in text
    assert "3.2 minutes on cpu with 2 threads" in text
    assert report.main(["--check"], root) == 0
