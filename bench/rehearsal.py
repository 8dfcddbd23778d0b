"""bench/gpu.sh without a GPU: what each of its processes does then, and how long it would take on a machine with one.

The environment variable MINEGAN_GPU_REHEARSAL names the file of a rehearsal. Kernels are then launched by Triton's own
code over a driver that launches nothing (launch_driver). They compute nothing, and convolutions neither, so no result
is compared, and what is timed means nothing. At its end each process notes in that file how many kernels it had
specialised, and what the machine code of a sample of them cost one core.

    python bench/rehearsal.py FILE [--cores 16]

prints from those notes what each step would take where nothing is compiled yet, and its limit. What cannot be measured
without a GPU is assumed, and the line says so. The build is counted in full, though in part 1 it goes on beside the
checks.

    python bench/rehearsal.py --timed COMMAND...

runs a command, a compiler of the build, and notes what it costs one core.
"""

import argparse
import functools
import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

SAMPLE = 3  # specialisations that a process compiles
START = 12.0  # seconds until a process has imported torch and has a context on the GPU
NAME = "stand-in for a GPU"


def asked() -> bool:
    return bool(os.environ.get("MINEGAN_GPU_REHEARSAL"))


def begin() -> None:
    """Puts the stand-in in the place of the GPU, for the rest of the process."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what an earlier rehearsal has compiled costs as much again
    import launch_driver
    import measure
    import torch

    import minegan_fast.kernels

    launch_driver.install()
    launch_driver.hollow_convolutions()
    for module in pkgutil.iter_modules(minegan_fast.kernels.__path__):  # before a test chooses the interpreter for them
        importlib.import_module(f"minegan_fast.kernels.{module.name}")
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, zeroed(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        setattr(torch.Tensor, name, zeroed(getattr(torch.Tensor, name)))
    measure.relative_error = lambda outputs, expected: 0.0
    torch.testing.assert_close = lambda *args, **kwargs: None


def zeroed(allocate: Callable) -> Callable:
    """What kernels that compute nothing leave behind is finite then."""
    return functools.wraps(allocate)(lambda *args, **kwargs: allocate(*args, **kwargs).zero_())


def result(make: Callable[[], Callable]) -> dict:
    """A check's error, which is none, or the first `fault` that the compiler's front end finds in its kernels."""
    import launch_driver

    import minegan_fast

    known = len(launch_driver.prepared)
    try:
        with minegan_fast.use_backend("triton"):
            make()()
    except Exception as error:
        return {"fault": "".join(traceback.format_exception_only(error)).strip()}
    faults = [f"{s}: {s.fault}" for s in launch_driver.prepared[known:] if s.fault]
    return {"fault": faults[0]} if faults else {"error": 0.0}


def note(units: int, seconds: float) -> None:
    """Compiles a sample, and writes this process's line. units: checks, cases or tests that it ran in `seconds`."""
    import launch_driver

    found = [s for s in launch_driver.prepared if not s.fault]
    sample = found[:: max(1, len(found) // SAMPLE)][:SAMPLE]
    before = sum(os.times()[:4])  # with the assembler, which is a process of its own; what else runs here adds nothing
    for specialisation in sample:
        specialisation.compile()
    line = {"units": units, "seconds": seconds, "specialisations": len(found), "sampled": len(sample)}
    write(line | {"compile_seconds": sum(os.times()[:4]) - before})


def write(line: dict) -> None:
    with open(os.environ["MINEGAN_GPU_REHEARSAL"], "a") as file:
        file.write(json.dumps({"step": os.environ.get("MINEGAN_GPU_STEP", "")} | line) + "\n")


def timed(command: list[str]) -> int:
    """Runs the command, and writes the line of a process of this step. Its exit code."""
    code = subprocess.run(command).returncode
    line = {"units": 1, "seconds": sum(os.times()[2:4]), "specialisations": 0, "sampled": 0, "compile_seconds": 0.0}
    write(line)
    return code


def estimate(lines: list[dict], cores: int) -> dict[str, dict]:
    """{step: its `seconds` on that many cores, and what is known of it}.

    A line of a process holds `units`, `seconds`, `specialisations`, `sampled` and `compile_seconds`. A line of a step,
    which has no `specialisations`, says what is given: its `limit` in seconds, of which there may be several; the
    `units` there, where they are more than those that were rehearsed; the `budget`, what a unit takes there, in the
    place of what it took here; the `factor` by which a tool slows the processes; the `serial` seconds that more cores
    do not shorten; `start`, in the place of START; `spread`, the number of processes that share its work there, however
    many have rehearsed it. A step of which nothing but its limit is known takes that.
    """
    found = {}
    for step in dict.fromkeys(line["step"] for line in lines):
        own = [line for line in lines if line["step"] == step]
        processes = [line for line in own if "specialisations" in line]
        given = {name: value for line in own if "specialisations" not in line for name, value in line.items()}
        limit = sum(line.get("limit", 0) for line in own)
        budget, rehearsed = given.get("budget"), sum(line["units"] for line in processes)
        scale = given["units"] / rehearsed if given.get("units") and rehearsed else 1.0
        work = [] if processes else [given.get("units", 0) * (budget or 0)]
        count = compiling = 0.0
        for line in processes:
            own_count = scale * line["specialisations"]
            seconds = own_count * line["compile_seconds"] / max(1, line["sampled"])
            work.append(seconds + scale * (line["seconds"] if budget is None else line["units"] * budget))
            count, compiling = count + own_count, compiling + seconds
        if given.get("spread"):
            seconds = sum(work) / min(cores, given["spread"])
        else:
            seconds = max(sum(work) / cores, *work)
        seconds = given.get("start", START) + given.get("serial", 0) + given.get("factor", 1) * seconds
        seconds = seconds if processes or budget else limit
        found[step] = {"seconds": seconds, "specialisations": round(count), "compiling": compiling, "limit": limit}
        found[step]["assumed"] = [
            *([f"{given.get('units', rehearsed):g} times {budget:g} s"] if budget else []),
            *([f"a start of {given['start']:g} s"] if given.get("start") else []),
            *([f"{given['factor']:g} times as long from then on as without the tool"] if "factor" in given else []),
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--timed", nargs=argparse.REMAINDER, help="a command")
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--limit", type=int, help="seconds of the whole part")
    arguments = parser.parse_args()
    if arguments.timed:
        return timed(arguments.timed)
    lines = [json.loads(line) for line in arguments.file.read_text().splitlines()]
    total = 0
    for step, found in estimate(lines, arguments.cores).items():
        seconds, limit = math.ceil(found["seconds"]), found["limit"]
        total += min(seconds, limit or seconds)
        print(
            f"{step:16} {found['specialisations']:5} specialisations, which take a core {found['compiling']:4.0f} s: "
            f"{seconds:4} s"
            + (f", at most {limit} s" if limit else "")
            + "".join(f"; assumed: {x}" for x in found["assumed"])
        )
    limit = f" of {arguments.limit} s" if arguments.limit else " s"
    print(f"estimated for {arguments.cores} cores, nothing compiled before: {total}{limit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
