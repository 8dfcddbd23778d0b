# ruff: noqa: RUF001
"""Writes bench/results/*.json into README.md (five rows), docs/speed.md (goals, plots), bench/TABLES.md (all),
docs/adapt.md (the demo), docs/quality.md (what bench/quality.py found) and docs/many.md (what `minegan-fast demo
--multi` found), between markers.

python bench/report.py            run the tests of every op that has rows, then write; withhold an op whose tests fail
python bench/report.py --check    exit 1 if the documents do not show what the results hold (tests are not run)
"""

import argparse
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import report_demo
import report_density
import report_goals
import report_many
import report_quality

ROOT = Path(__file__).resolve().parent.parent
OURS = "minegan_fast"
ORDER = ("", "cuda", "triton", "cpp", "reference")  # "": the automatic choice
SECTIONS = {
    "README.md": ("summary",), "docs/speed.md": ("goals",), "docs/adapt.md": ("demo",), "bench/TABLES.md": ("bench",),
    "docs/quality.md": report_quality.NAMES, "docs/many.md": report_many.NAMES,
}  # fmt: skip
TESTS = {  # of no op
    "step": "tests/finetune/test_masked_dense.py", "stylegan2": "tests/models/test_stylegan2.py",
    "kernel_step": "tests/training/test_kernel_loss.py", "launches": "tests/bench/test_launches.py",
    "first_use": "tests/bench/test_launches.py", "instructions": "tests/bench/test_instructions.py",
}  # fmt: skip
PASSES = ("inference", "forward", "backward", "double backward")


LEGEND = """\
Median time of one call (quartiles), our backends first; behind a competitor's time, that time over the one of our
first column. All of a line were measured in turn, in one process, after a check against float64. `forward` is that of
training, which keeps what the backward needs; `of the ceiling` is the least traffic over the time, in percent of the
copy bandwidth measured in the same run, or, where that is more, the arithmetic in percent of the rate of its matrix
products; `clone` is `torch.clone` of as many bytes; `plain` is a layer in plain PyTorch, `public` as the public
projects write it, with weights of every sample's own and grouped convolutions.
"""
LAUNCHES = """\
What the host does for a GPU, without one: launches of our Triton kernels, which compute nothing here. `ATen` are the
operations of PyTorch that launch a kernel, or several. `host` is the whole call with autograd and what PyTorch's own
operations compute on the CPU, `our launchers` what of it the launchers of our kernels take, from the choice of tiles to
the launch; `waits` are the points at which the host waits for the GPU, `copies` what it copies there without waiting.

"""
FIRST_USE = """\
What a process has Triton compile where nothing is compiled yet: kernels of each file for all passes of the ops in the
table of launches, and for the four steps of StyleGAN2 on such images (critic, generator, R1, path length), with the
time that one core takes for the machine code of those.

"""
INSTRUCTIONS = """\
Instructions of a kernel's machine code, by compute capability, and its registers behind the stroke; nothing ran.

"""


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the documents with the results")
    check = parser.parse_args(arguments).check
    documents = {path: path.read_text() if path.exists() else "" for path in (root / name for name in SECTIONS)}
    for path, sections in zip(documents, SECTIONS.values(), strict=True):
        for begin, end in map(markers, sections):
            text = documents[path]
            if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
                print(
                    f"{path.name} must hold one {begin} and, after it, one {end}: a table goes between", file=sys.stderr
                )
                return 1
    results = sorted((root / "bench" / "results").glob("*.json"))
    machines = [json.loads(path.read_text()) for path in results if not path.name.startswith("quality")]
    ops = sorted({row["op"] for machine in machines for row in machine["rows"]})
    red = set() if check else {op for op in ops if not tests_pass(op, root)}
    demo = root / "bench" / "quality" / "demo.json"
    if not check:
        report_quality.plot(root)
    contents = {
        **report_quality.render(root),
        **report_many.render(root),
        "bench": render(machines, red),
        "goals": report_goals.render(machines, red),
        "summary": report_goals.summary(machines, red),
        "demo": report_demo.render(json.loads(demo.read_text()) if demo.exists() else None),
    }
    stale = []
    for path, sections in zip(documents, SECTIONS.values(), strict=True):
        new = documents[path]
        for section in sections:
            new = fill(new, section, contents[section])
        if new != documents[path]:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    if check:
        if stale:
            print(f"{', '.join(stale)} does not show what bench/results holds: run `make report`", file=sys.stderr)
        return int(bool(stale))
    report_density.plot(machines, root)
    print(f"written: {', '.join(op for op in ops if op not in red) or 'nothing'}")
    for op in sorted(red):
        print(f"the rows of {op} are withheld, its tests fail", file=sys.stderr)
    return int(bool(red))


def markers(section: str) -> tuple[str, str]:
    return f"<!-- {section}:begin -->", f"<!-- {section}:end -->"


def fill(text: str, section: str, content: str) -> str:
    begin, end = markers(section)
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"


def tests_pass(op: str, root: Path) -> bool:
    """Whether tests/ops/test_<op>.py is there and green. Its output goes to the terminal."""
    path = root / TESTS.get(op, f"tests/ops/test_{op}.py")
    return path.exists() and not subprocess.run([sys.executable, "-m", "pytest", "-q", str(path)], cwd=root).returncode


def render(machines: list[dict], red: set[str]) -> str:
    """The text between the markers: for every machine, op and run a line of facts and a table."""
    if not any(machine["rows"] for machine in machines):
        return "No measurements yet.\n"
    parts = [LEGEND]
    for machine in machines:
        rows = sorted((row for row in machine["rows"] if row["op"] != "step"), key=lambda row: (row["op"], row["run"]))
        for (op, name), group in groupby(rows, key=lambda row: (row["op"], row["run"])):
            run = machine["runs"][name]
            title = f"**`{op}`, {run['device']}** "
            written = {"launches": launches, "first_use": first_use, "instructions": instructions}.get(op, table)
            parts.append(
                title + ("\n\nWithheld: the tests of this op fail.\n" if op in red else written(run, list(group)))
            )
    return "\n".join(parts)


def table(run: dict, rows: list[dict]) -> str:
    """The facts of the run and a table of one op's rows: a line a case, a column a provider."""
    backends = [name for name in ORDER if any(row["backend"] == name for row in rows if row["provider"] == OURS)]
    competitors = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    competitors.sort(key=lambda name: name == "clone")
    graphs = any(row.get("graph_us") for row in rows if row["provider"] == OURS)
    head = [
        "pass",
        "shape",
        "type",
        *(name or "automatic" for name in backends),
        *(["in a CUDA graph"] if graphs else []),
        "of the ceiling",
        *competitors,
    ]
    rival = next((name for name in ("eager", "public") if name in competitors), "eager")
    lines = [[*head, f"peak memory, ours / {rival}"], ["---"] * (len(head) + 1)]
    rows = sorted(rows, key=case_order)
    for _, case in groupby(rows, key=case_order):
        by = {(row["provider"], row["backend"]): row for row in case}
        first = next(row for row in by.values())
        ours = [by.get((OURS, backend)) for backend in backends]
        best = next(row for row in ours if row)
        line = [first["pass"], "×".join(map(str, first["shape"])), first["dtype"]]
        line += [spread(row) if row else "–" for row in ours]
        line += [duration(best["graph_us"]) if best.get("graph_us") else "–"] if graphs else []
        line.append(of_ceiling(best, run["ceilings"]))
        for name in competitors:
            row = by.get((name, ""))
            note = row["note"] if row and "note" in row else "not measured"
            timed = row and "median_us" in row
            line.append(f"{duration(row['median_us'])} ({best['ratio'][name]:.2f}×)" if timed else note)
        other = by.get((rival, ""))
        line.append(f"{size(best['peak_bytes'])} / {size(other['peak_bytes']) if other else '–'}")
        lines.append(line)
    return facts(run) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def facts(run: dict) -> str:
    ceilings = run["ceilings"]
    products = [
        f"{name.removeprefix('matmul_').removesuffix('_tflop_s')} {number(value)}"
        for name, value in ceilings.items()
        if name.startswith("matmul_")
    ]
    return (
        f"(torch {run['torch']}, triton {run['triton']}, commit {run['commit']}, {run['date']}, "
        f"threads: {run['threads']}; in the same run: copy {number(ceilings['copy_gb_s'])} GB/s, "
        f"matrix products {', '.join(products)} TFLOP/s)\n\n"
    )


def launches(run: dict, rows: list[dict]) -> str:
    """The facts of the run and a table of what the host launches, a line a call."""
    head = ["call", "shape", "type", "launches", "specialisations", "waits", "copies", "ATen", "our launchers", "host"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        counts = [str(row[name]) for name in head[3:7]] + [str(row.get("aten", "–"))]
        host = [duration(row["launchers_us"]), spread(row) if "median_us" in row else "–"]
        lines.append([row["pass"], "×".join(map(str, row["shape"])), row["dtype"], *counts, *host])
    return facts(run) + LAUNCHES + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def first_use(run: dict, rows: list[dict]) -> str:
    head = ["kernels of", "for", "shape", "specialisations", "compiling"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        spent = row["compile_seconds"]
        cells = [row["kernels"], {"ops": "the ops", "step": "the steps"}[row["part"]], "×".join(map(str, row["shape"]))]
        lines.append([*cells, str(row["specialisations"]), f"{number(spent)} s" if spent is not None else "–"])
    return facts(run) + FIRST_USE + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def instructions(run: dict, rows: list[dict]) -> str:
    """A line a kernel, a column an architecture."""
    architectures = sorted({row["architecture"] for row in rows})
    head = ["op", "backend", "kernel", *(f"{a // 10}.{a % 10}" for a in architectures)]
    lines = [head, ["---"] * len(head)]
    kernels = {}
    for row in rows:
        of = kernels.setdefault((row["of"], row["backend"], row["kernel"]), {})
        of[row["architecture"]] = f"{row['instructions']} / {row['registers']}"
    lines += [[*names, *(of.get(a, "–") for a in architectures)] for names, of in kernels.items()]
    return facts(run) + INSTRUCTIONS + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_ceiling(row: dict, ceilings: dict) -> str:
    """The share of the copy bandwidth, or that of the rate of matrix products, whichever is more."""
    copies = row.get("percent_of_copy", 0)  # None: from the cache
    kind = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"])
    rate = ceilings.get(f"matmul_{kind}_tflop_s")
    products = 100 * row["tflop_s"] / rate if rate and row.get("tflop_s") else 0
    if products > (copies or 0):
        return f"{products:.0f} % of products"
    return "in cache" if copies is None else f"{copies:.0f} % of copy" if copies else "–"


def case_order(row: dict) -> tuple:
    count = 1
    for extent in row["shape"]:
        count *= extent
    known = PASSES.index(row["pass"]) if row["pass"] in PASSES else len(PASSES)
    return row["dtype"] != "float32", row["dtype"], known, row["pass"], count, row["shape"]


def spread(row: dict) -> str:
    return f"{duration(row['median_us'])} ({duration(row['q1_us'])}–{duration(row['q3_us'])})"


def duration(microseconds: float) -> str:
    return f"{number(microseconds)} µs" if microseconds < 999.5 else f"{number(microseconds / 1000)} ms"


def size(count: int) -> str:
    return f"{number(count / 1e6)} MB" if count >= 1e5 else f"{number(count / 1e3)} kB"


def number(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
