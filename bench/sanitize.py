"""Runs every op's GPU kernels at small, awkward shapes and checks what they return: what compute-sanitizer is to watch.

compute-sanitizer --tool memcheck python bench/sanitize.py [--backend cuda] [op ...]

A check that raises counts as wrong, and the others go on: where it has lost the GPU's context, in a new process. Each
tensor gets an allocation of its own, else an access past its end would land in torch's pool unseen.
"""

import argparse
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import rehearsal
import torch
from checks import OPS
from clock import Call
from machine import Lines
from measure import relative_error

from minegan_fast.ops import use_backend
from minegan_fast.ops._op import _ops

PROCESSES = {"mmd": 4, "bias_act": 4}  # of an op that takes one too long: to compile, or under a sanitizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton", "cpp"), help="whose kernels run")
    parser.add_argument(
        "--slice", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every N-th check from K on"
    )
    parser.add_argument(
        "--list", action="store_true", help="only print these arguments for processes beside each other"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="append each result to FILE, as a line of JSON")
    parser.add_argument("--done", type=int, nargs=2, default=(0, 0), metavar=("N", "WRONG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [op for op in arguments.ops if op not in OPS]:
        parser.error(f"no table for {', '.join(unknown)}; there are {', '.join(OPS)}")
    ops = arguments.ops or [op for op in OPS if any(arguments.backend in one._launchers for one in _ops[op])]
    if arguments.list:
        for op in ops:
            count = PROCESSES.get(op, 1)
            print(*(f"{op} --slice {k} {count}" for k in range(count)), sep="\n")
        return 0
    device = "cpu" if arguments.backend == "cpp" else "cuda"
    start = time.process_time()
    rehearsing = rehearsal.asked() and arguments.backend == "triton"
    if rehearsing:
        rehearsal.begin()
        device = "cpu:0"  # the CPU under another name: the checks are those of a GPU
    lines = Lines(arguments.record, device) if arguments.record else None
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    before, wrong = arguments.done
    first, step = arguments.slice
    done = 0
    for op in ops:
        count = 0
        for name, dtype, make, make_expected in itertools.islice(OPS[op](device), first, None, step):
            count += 1
            done += 1
            if done <= before:
                continue
            row = {"op": op, "backend": arguments.backend, "check": name, "allowed": 8 * torch.finfo(dtype).eps}
            row |= rehearsal.result(make) if rehearsing else result(arguments.backend, make, make_expected)
            row["right"] = "fault" not in row and row["error"] <= row["allowed"]
            if lines:
                lines.add(row)
            if not row["right"]:
                wrong += 1
                says = row.get("fault") or f"wrong by {row['error']:.2e} of the largest entry"
                print(f"{op} {name}: {says}", flush=True)
                if device == "cuda" and context_is_lost():
                    progress = "--done", str(done), str(wrong)
                    os.execv(sys.executable, [sys.executable, *sys.argv, *progress])
        print(f"{op}, {arguments.backend}: {count} calls, {wrong} wrong", flush=True)
    if rehearsal.asked():
        rehearsal.note(done, time.process_time() - start)
    return int(wrong > 0)


def result(backend: str, make: Callable[[], Call], make_expected: Callable[[], Call]) -> dict:
    """The `error` of a check or, where it raises, the `fault`."""
    try:
        with use_backend(backend):
            outputs = [output.cpu() for output in make()()]
        with use_backend("reference"):
            return {"error": relative_error(outputs, make_expected()())}
    except Exception as error:
        return {"fault": "".join(traceback.format_exception_only(error)).strip()}


def context_is_lost() -> bool:
    """Whether nothing runs on the GPU any more in this process, as after an illegal address."""
    try:
        torch.zeros(1, device="cuda").cpu()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
