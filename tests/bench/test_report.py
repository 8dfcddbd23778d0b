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
GOALS = report.markers("goals")

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
    (tmp_path / "bench/TABLES.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    (tmp_path / "docs").mkdir()
    for name, section in (("README", "summary"), ("docs/speed", "goals"), ("docs/adapt", "demo")):
        begin, end = report.markers(section)
        (tmp_path / f"{name}.md").write_text(f"{begin}\n{end}\nend\n")
    for name, sections in (("quality", report.report_quality.NAMES), ("many", report.report_many.NAMES)):
        lines = [line for section in sections for line in report.markers(section)]
        (tmp_path / f"docs/{name}.md").write_text("\n".join(lines))
    return tmp_path


def test_the_table(root):
    assert report.main([], root) == 0
    text = (root / "bench/TABLES.md").read_text()
    head, line = [line for line in text.splitlines() if line.startswith("|")][::2]
    assert head.split(" | ")[3:9] == ["cuda", "triton", "in a CUDA graph", "of the ceiling", "eager", "torch.compile"]
    cells = ["forward", "4×8", "float32", "20 µs (19 µs–21 µs)", "30 µs (29 µs–31 µs)", "12 µs", "92 % of copy"]
    cells += ["1.23 ms (6.00×)", "cannot", "27 µs (1.35×)", "2 MB / 2 MB"]
    assert line == f"| {' | '.join(cells)} |"
    assert "**`twice`, A GPU** (torch 2.11, triton 3.6, commit abc, today, threads: 2" in text
    assert "copy 4301 GB/s, matrix products tf32 395 TFLOP/s" in text
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    readme = (root / "docs/adapt.md").read_text()
    assert readme.endswith(f"{DEMO[0]}\nNo demo recorded yet.\n{DEMO[1]}\nend\n")


def test_the_table_of_launches(root):
    counts = {"launches": 3, "specialisations": 2, "waits": 1, "copies": 0, "launchers_us": 81.23}
    times = {"median_us": 200.0, "q1_us": 190.0, "q3_us": 210.0}
    case = {"op": "launches", "shape": [4, 8], "dtype": "float32", "run": "r", "provider": "minegan_fast"} | counts
    rows = [
        case | {"pass": "twice, forward", "backend": "triton"} | times,
        case | {"pass": "a step", "backend": "triton", "aten": 617},
    ]
    (root / "bench/results/gpu.json").write_text(json.dumps({"runs": {"r": RUN}, "rows": rows}))
    (root / "tests/bench").mkdir()
    (root / "tests/bench/test_launches.py").write_text("def test():\n    pass\n")
    assert report.main([], root) == 0
    head, _, one, two = [line for line in (root / "bench/TABLES.md").read_text().splitlines() if line.startswith("|")]
    assert head.startswith("| call | shape | type | launches | specialisations | waits | copies | ATen |")
    assert one == "| twice, forward | 4×8 | float32 | 3 | 2 | 1 | 0 | – | 81.2 µs | 200 µs (190 µs–210 µs) |"
    assert two == "| a step | 4×8 | float32 | 3 | 2 | 1 | 0 | 617 | 81.2 µs | – |"


def test_the_tables_of_what_is_compiled(root):
    """Of a kernel that is not compiled for an architecture, or a part whose time is not known, there is a dash."""
    use = {"op": "first_use", "dtype": "float32", "run": "r", "provider": "minegan_fast", "backend": "triton"}
    rows = [
        use | {"pass": "ops: all", "part": "ops", "shape": [4, 8], "kernels": "all", "specialisations": 90}
        | {"compile_seconds": None},
        use | {"pass": "step: all", "part": "step", "shape": [4, 3], "kernels": "all", "specialisations": 56}
        | {"compile_seconds": 17.25},
    ]  # fmt: skip
    code = {"op": "instructions", "dtype": "", "run": "r", "provider": "minegan_fast", "backend": "cuda", "shape": []}
    for kernel, architecture, instructions in (("a<1>", 90, 1893), ("a<1>", 80, 1848), ("b", 80, 120)):
        row = {"pass": f"x: {kernel}, {architecture}", "of": "x", "kernel": kernel, "architecture": architecture}
        rows.append(code | row | {"instructions": instructions, "registers": 48})
    (root / "bench/results/gpu.json").write_text(json.dumps({"runs": {"r": RUN}, "rows": rows}))
    (root / "tests/bench").mkdir()
    for name in ("launches", "instructions"):
        (root / f"tests/bench/test_{name}.py").write_text("def test():\n    pass\n")
    assert report.main([], root) == 0
    text = (root / "bench/TABLES.md").read_text()
    assert "| all | the ops | 4×8 | 90 | – |\n| all | the steps | 4×3 | 56 | 17.2 s |\n" in text
    assert "| op | backend | kernel | 8.0 | 9.0 |\n" in text
    assert "| x | cuda | a<1> | 1848 / 48 | 1893 / 48 |\n| x | cuda | b | 120 / 48 | – |\n" in text


def test_goals_of_the_host():
    """Each op's forward and backward together, the slowest op judged; what was measured on other shapes is left out."""
    case = {"op": "launches", "dtype": "float32", "run": "r", "provider": "minegan_fast", "backend": "triton"}
    times = {"inference": 20.0, "forward": 25.0, "backward": 60.0}
    rows = [
        case | {"pass": f"{op}, {step}", "shape": shape, "median_us": scale * time}
        for op, shape, scale in (("bias_act", [4, 32, 16, 16], 1), ("upfirdn2d", [4, 32, 16, 16], 1.2))
        for step, time in times.items()
    ]
    rows += [case | {"pass": "bias_act, inference", "shape": [2, 32, 16, 16], "median_us": 1e6}]
    rows += [case | {"pass": "row_update adam, gradients elsewhere", "shape": [110], "median_us": 99.0}]
    rows += [case | {"pass": "StyleGAN2-256, generator", "shape": [4, 3, 256, 256], "aten": 700}]
    use = {"op": "first_use", "pass": "step: all", "shape": [4, 3, 256, 256], "part": "step", "kernels": "all"}
    rows += [case | use | {"specialisations": 56, "compile_seconds": 18.0}]
    text = report.report_goals.render([{"runs": {"r": RUN}, "rows": rows}], set())
    assert "`demodulation`, 4×32×16×16, float32, without gradient | ≤ 30 µs | 20–24 µs | yes |" in text
    assert "| the same, forward and backward | ≤ 90 µs | 85–102 µs | no |" in text
    assert "| the same, gradients elsewhere | ≤ 120 µs | 99 µs | yes |" in text
    assert "generator's step of StyleGAN2-256, batch 4 | ≤ 685 | 700 | no |" in text
    assert "four steps of StyleGAN2-256, batch 4 | ≤ 60 | 56 | yes |" in text
    assert "| their compilation on one core | ≤ 20 s | 18 s | yes |" in text


def test_the_ceiling_is_the_one_that_is_nearer():
    ceilings = {"matmul_fp32_tflop_s": 2.0}
    assert report.of_ceiling(row("minegan_fast", "", 1.0, tflop_s=1.9), ceilings) == "95 % of products"
    assert report.of_ceiling(row("minegan_fast", "", 1.0, tflop_s=1.0), ceilings) == "92 % of copy"
    assert report.of_ceiling(row("minegan_fast", "", 1.0, tflop_s=1.0), {}) == "92 % of copy"
    assert report.of_ceiling(row("minegan_fast", "", 1.0, percent_of_copy=None), ceilings) == "in cache"
    steps = {name: value for name, value in row("minegan_fast", "", 1.0).items() if name != "percent_of_copy"}
    assert report.of_ceiling(steps, ceilings) == "–"


def test_check_tells_whether_the_readme_is_current(root, capsys):
    assert report.main(["--check"], root) == 1
    assert "make report" in capsys.readouterr().err
    report.main([], root)
    assert report.main(["--check"], root) == 0
    path = root / "bench/TABLES.md"
    path.write_text(path.read_text().replace("20 µs", "10 µs"))
    assert report.main(["--check"], root) == 1


@pytest.mark.parametrize("tests", ["def test():\n    assert False\n", None], ids=["red", "missing"])
def test_no_number_of_an_op_without_green_tests(root, tests):
    path = root / "tests/ops/test_twice.py"
    path.write_text(tests) if tests else path.unlink()
    assert report.main([], root) == 1
    text = (root / "bench/TABLES.md").read_text()
    assert "Withheld: the tests of this op fail." in text
    assert "20 µs" not in text


def test_no_results_and_no_markers_are_said(root, capsys):
    (root / "bench/results/gpu.json").unlink()
    assert report.main([], root) == 0
    assert "No measurements yet." in (root / "bench/TABLES.md").read_text()
    assert "No measurements yet." in (root / "README.md").read_text()
    (root / "docs/speed.md").write_text("nothing")
    assert report.main(["--check"], root) == 1
    assert GOALS[0] in capsys.readouterr().err


def test_the_demos_table(root):
    values = {"fid": 1.234, "kid": 0.5678, "kmmd": 0.04, "kmmd_95%": [0.03, 0.05], "mv": 0.4, "diversity": 0.9}
    recorded = {
        "generated": 1000, "real": 1009, "seed": 0, "minutes": 3.2, "device": "cpu", "threads": 2, "torch": "2.13.0",
        "trained_parameters": 0.11, "rows": {"mined": values | {"nearest": 3.0, "nines": 0.91}},
    }  # fmt: skip
    (root / "bench/quality").mkdir()
    (root / "bench/quality/demo.json").write_text(json.dumps(recorded))
    assert report.main([], root) == 0
    text = (root / "docs/adapt.md").read_text()
    assert "| mined | 1.23 | 0.568 | 0.040 (0.030 to 0.050) | 0.400 | 0.90 | 3.00 | 91% |" in text
    assert "3.2 minutes on cpu with 2 threads" in text
    assert report.main(["--check"], root) == 0


def test_the_table_of_several_sources(root):
    (root / "bench/quality").mkdir()
    for seed, (p, error, steps) in enumerate([([0.0, 0.2, 0.8], 0.05, 40), ([0.1, 0.3, 0.6], 0.15, None)]):
        rows = [
            {"fours": 0.25, "selector": which, "p": p, "error": error, "steps": steps}
            for which in ("winner", "mixture")
        ]
        recorded = {"seed": seed, "rows": rows, "minutes": 3.0 + seed, "device": "cpu", "torch": "2.13.0"}
        (root / f"bench/quality/demo-multi-{seed}.json").write_text(json.dumps(recorded))
    public = {"rows": [{"selector": "mixture", "faces": {"1": 0.36, "100": 0.489}}], "torch": "2.13.0"}
    (root / "bench/quality/faces-and-eyes.json").write_text(json.dumps(public))
    assert report.main([], root) == 0
    text = (root / "docs/many.md").read_text()
    assert "| shares by | step 1 | step 100 |\n| --- | ---: | ---: |\n| mixture | 36 % | 49 % |\n" in text
    line = "5 % (0 to 10) | 25 % (20 to 30) | 70 % (60 to 80) | 0.100 | 40, - |"
    assert text.index(f"| 25% | mixture | {line}") < text.index(f"| 25% | winner | {line}")
    assert "2 seeds, at most 4.0 minutes each on cpu, torch 2.13.0." in text
    assert report.main(["--check"], root) == 0


def test_goals_of_a_whole_network():
    """Under bfloat16 the rival is the faster of the public formulation's two."""
    case = {"op": "stylegan2", "pass": "forward + backward", "shape": [4, 3, 256, 256], "run": "r", "backend": ""}
    times = {("minegan_fast", "float32"): 10, ("public", "float32"): 25, ("minegan_fast", "bfloat16"): 5}
    times |= {("public", "bfloat16"): 12, ("torch.compile", "bfloat16"): 1}
    rows = []
    for (name, dtype), time in times.items():
        row = {"provider": name, "dtype": dtype, "median_us": time, "q1_us": time, "q3_us": time}
        ratio = {"ratio": {"public": 2.5, "torch.compile": 0.2}} if name == "minegan_fast" else {}
        rows.append(case | row | {"peak_bytes": 1e6 * time} | ratio)
    text = report.report_goals.render([{"runs": {"r": RUN}, "rows": rows}], set())
    assert "against the public formulation, float32 | ≥ 1.3× | 2.5× | yes |" in text
    assert "the faster of the public one's float32 and bfloat16 | ≥ 2× | 2.4× | yes |" in text
    assert "| its peak memory, of the public formulation's | ≤ 0.6× | 0.4–0.417× | yes |" in text
    assert "| 10 MB / 25 MB |" in report.render([{"runs": {"r": RUN}, "rows": rows}], set())


def test_goals_are_judged_by_their_worst_case(root):
    """On a CPU by the medians, of the automatic backend; a goal without rows is not shown."""
    rows = []
    for network, ours, mask in (("A", 10.0, 200.0), ("B", 10.0, 120.0)):
        case = {"op": "row_update", "pass": network, "network": network, "density": 0.05, "average": False}
        case |= {"shape": [1], "dtype": "float32", "run": "r", "fraction": 0.05, "bytes": 40_000_000}
        rows += [
            case | {"provider": "minegan_fast", "backend": "cpp", "median_us": ours},
            case | {"provider": "minegan_fast", "backend": "reference", "median_us": 50 * ours},
            case | {"provider": "mask", "backend": "", "median_us": mask},
        ]
    memory = {"op": "step", "pass": "memory, 5%", "density": 0.05, "shape": [1], "dtype": "float32", "run": "r"}
    rows.append(
        memory | {"provider": "minegan_fast", "backend": "", "held_bytes": 1, "ratio": {"dense fused Adam": 20}}
    )
    text = report.report_goals.render([{"runs": {"r": RUN}, "rows": rows}], set())
    assert "| `row_update` at 5 %, against mask + fused Adam | ≥ 15× | 12–20× | no |" in text
    assert "| `row_update` at 5 %, over the byte floor | ≤ 1.25× | 1.08× | yes |" in text
    assert "| all but the dense weights at 5 %, of dense training's | ≤ 7 % | 5 % | yes |" in text
    assert "compact" not in text
    assert "density-a-gpu.png" in text
    assert report.report_goals.render([{"runs": {"r": RUN}, "rows": rows}], {"row_update", "step"}) == (
        "No measurements yet.\n"
    )


def test_plots_are_written(root):
    rows = []
    for density in (0.05, 0.5):
        case = {"op": "row_update", "pass": str(density), "network": "A", "density": density, "average": False}
        case |= {"shape": [1], "dtype": "float32", "run": "r", "fraction": density}
        for provider in ("minegan_fast", "mask", "compact leaves"):
            rows.append(case | {"provider": provider, "backend": "", "median_us": 9.0 * density})
    machine = {"runs": {"r": RUN}, "rows": rows}
    report.report_density.plot([machine], root)
    assert (root / "docs/images/density-a-gpu.png").read_bytes().startswith(b"\x89PNG")
