"""Compiles every GPU kernel for several architectures without a GPU and reads the machine code.

    python tests/compile_only.py [--json] [op ...]
    python tests/compile_only.py --sizes ones [--architectures 90] [op ...]

Prints a table, or its rows as JSON, and exits with 1 if a kernel spills registers or has lost its 16-byte loads or its
tensor cores.
With --sizes the Triton kernels need only compile: with the sizes that are given in tests/kernel_launches.py, with all
of them 1, which Triton makes constants of another type, or with sizes and addresses that are odd.

Needs a process of its own (where Triton interprets, it cannot compile), and nvcc for the CUDA part, which is left out
without it. PYTHONPATH chooses another Triton. An op with a .cu file joins with one entry in CUDA.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from kernel_launches import ARCHITECTURES, TRITON, Kernel

CSRC = Path(__file__).parents[1] / "csrc"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


# <op>.cu: which of its kernels, demangled, must have 16-byte loads.
CUDA = {
    "bias_act": r"kernel<.*\b(2|4|8)(, (true|false))?>",
    "row_update": r"kernel<",
}


@dataclass
class Row:
    op: str
    backend: str
    architecture: int
    kernel: str
    instructions: int  # without those that fill up the last line
    registers: int
    stack: int
    spills: int
    wide_loads: int
    tensor_cores: int
    expects_wide: bool
    expects_tensor_cores: bool = False

    @property
    def verdict(self) -> str:
        faults = ["spills"] * (self.spills > 0 or self.stack > 0)
        faults += ["no 16-byte load"] * (self.expects_wide and not self.wide_loads)
        faults += ["no tensor cores"] * (self.expects_tensor_cores and not self.tensor_cores)
        return ", ".join(faults) or "ok"


def instructions_in(body: str) -> int:
    """How many a kernel's disassembly holds, but for the NOPs at its end."""
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP\b)\S", body, re.MULTILINE))


def machine_code(cubin: Path) -> dict[str, tuple[int, int, int, int, int, int]]:
    """Of every kernel: instructions, registers, bytes of stack, spills, loads of 16 bytes or more, those of tensor
    cores."""
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        body = code.split(f"Function : {name}\n", 1)[1].split("Function : ", 1)[0]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", body))
        wide = len(re.findall(r"\bLDG\.E\S*\.(?:128|256)\b", body))
        tensor_cores = len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|DMMA|UTC\w*MMA)\b", body))
        found[name] = (instructions_in(body), int(registers), int(stack), spills, wide, tensor_cores)
    return found


def triton_rows(kernel: Kernel):
    for architecture in kernel.architectures:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.compile(architecture))
            file.flush()
            ((found),) = machine_code(Path(file.name)).values()
        name = f"{kernel.name} [{kernel.layout}]"
        yield Row(kernel.op, "triton", architecture, name, *found, kernel.wide_loads, kernel.tensor_cores)


def cuda_rows(op: str, architecture: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{op}.cubin"
        flags = ["-std=c++17", "-O3", "-DMINEGAN_CUDA", f"-arch=sm_{architecture}", "-cubin"]
        subprocess.run(["nvcc", *flags, CSRC / f"{op}.cu", "-o", cubin], check=True)
        found = machine_code(cubin)
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    rows = []
    for name, numbers in zip(names.splitlines(), found.values(), strict=True):
        short = re.sub(
            r"minegan::|\(anonymous namespace\)::|^void |\(.*\)$", "", re.sub(r"\((int|minegan::Rule)\)", "", name)
        )
        rows.append(Row(op, "cuda", architecture, short, *numbers, bool(re.search(CUDA[op], short))))
    return sorted(rows, key=lambda row: row.kernel)


def faults(op: str, architecture: int, sizes: str) -> tuple[int, list[str]]:
    """How many different kernels of the op were compiled, and what was wrong with them."""
    seen, wrong = set(), []
    for kernel in TRITON[op]():
        text = kernel.source(sizes)[1]
        if text in seen or (architecture in ARCHITECTURES and architecture not in kernel.architectures):
            continue
        seen.add(text)
        try:
            kernel.compile(architecture, sizes)
        except Exception as error:
            last = (str(error).strip().splitlines() or [""])[-1]
            which = f"sm_{architecture}, sizes {sizes}: {kernel.op}, {kernel.name} [{kernel.layout}]"
            wrong.append(f"{which}: {type(error).__name__}: {last}")
    return len(seen), wrong


def only_compile(ops: list[str], architectures: list[int], sizes: list[str]) -> int:
    jobs = [(op, architecture, which) for which in sizes for architecture in architectures for op in ops]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        results = [*pool.map(faults, *zip(*jobs, strict=True))]
    wrong = [fault for _, found in results for fault in found]
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    print(f"Triton {triton.__version__}: {sum(count for count, _ in results)} kernels compiled, {len(wrong)} failed")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles every GPU kernel without a GPU.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"{', '.join({**TRITON, **CUDA})}; default: all")
    parser.add_argument("--json", action="store_true", help="the table's rows as JSON")
    parser.add_argument("--sizes", nargs="+", choices=("given", "ones", "odd"), help="only compile, with these sizes")
    parser.add_argument("--architectures", nargs="+", type=int, default=[90], help="with --sizes; default: 90")
    arguments = parser.parse_args()
    ops = arguments.ops
    unknown = set(ops) - {*TRITON, *CUDA}
    if unknown:
        sys.exit(f"no such op: {', '.join(unknown)}; there are {', '.join({**TRITON, **CUDA})}")
    if arguments.sizes:
        return only_compile(ops or [*TRITON], arguments.architectures, arguments.sizes)
    missing = {path.stem for path in CSRC.glob("*.cu")} ^ set(CUDA)
    if missing:
        sys.exit(f"csrc/*.cu and the table CUDA differ: {', '.join(missing)}")
    rows = [row for op in TRITON if not ops or op in ops for kernel in TRITON[op]() for row in triton_rows(kernel)]
    if shutil.which("nvcc"):
        jobs = [(op, architecture) for op in CUDA if not ops or op in ops for architecture in ARCHITECTURES]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in pool.map(lambda job: cuda_rows(*job), jobs):
                rows += part
    bad = sum(row.verdict != "ok" for row in rows)
    if arguments.json:
        json.dump([asdict(row) for row in rows], sys.stdout)
        return 1 if bad else 0
    width = max(len(row.kernel) for row in rows)
    print(f"sm   {'kernel':{width}}  instructions  registers  stack  spills  16-byte loads  tensor cores")
    for row in rows:
        numbers = f"{row.instructions:12}  {row.registers:9}  {row.stack:5}  {row.spills:6}  {row.wide_loads:13}"
        numbers += f"  {row.tensor_cores:12}"
        print(f"{row.architecture:<4} {row.kernel:{width}}  {numbers}  {row.verdict}")
    print(
        f"{len(rows)} kernels compiled, {bad} bad" + ("" if shutil.which("nvcc") else "; CUDA left out: no nvcc here")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
