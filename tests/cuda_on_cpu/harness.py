"""Runs the CUDA kernels of csrc/*.cu on the CPU under sanitizers, on the checks of bench/sanitize.py.

    python tests/cuda_on_cpu/harness.py [op ...]

The launchers of minegan_fast/ops/ call a `Native` instead of the native module. It sends each call, with all memory
that the arguments lead to, to a program made of csrc/*.cu, calls.cpp and blocks.cpp, and writes back what it computes.
Then kernels with planted faults run: none may pass. Needs g++ with C++20, ThreadSanitizer and AddressSanitizer.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from minegan_fast.ops import use_backend
from minegan_fast.ops._op import Op, _ops

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZERS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


class Fault(Exception):  # noqa: N818
    """The program has ended early: what the sanitizer or blocks.cpp wrote."""


@dataclass(frozen=True)
class Planted:
    """A fault in csrc/<op>.cu: `new` stands in the place of `old`. The program then ends with the words `found`."""

    op: str
    sanitizer: str
    old: str
    new: str
    found: str

    def text(self) -> str:
        text = (ROOT / "csrc" / f"{self.op}.cu").read_text()
        assert self.old in text, f"csrc/{self.op}.cu has no {self.old!r}"
        return text.replace(self.old, self.new)


PLANTED = {
    "no barrier between sums": Planted("bias_act", "thread", "__syncthreads();", "", "data race"),
    "no barrier after ages": Planted("row_update", "thread", "__syncthreads();", "", "data race"),
    "no fence before a ticket": Planted("row_update", "thread", "{\n    __threadfence();\n", "{\n", "data race"),
    "no fence after a ticket": Planted("row_update", "thread", "\n      __threadfence();\n", "\n", "data race"),
    "a ticket without an atomic": Planted(
        "row_update", "thread", "atomicInc(t.tickets + item.row, parts - 1)", "t.tickets[item.row]++", "data race"
    ),
    "a pack too many": Planted("bias_act", "address", "p < packs", "p <= packs", "heap-buffer-overflow"),
    "an array in shared memory too short": Planted(
        "bias_act", "address", "sums[kThreads * V];", "sums[kThreads];", "out of bounds for type"
    ),
    "a whole chunk at the end of a row": Planted(
        "row_update", "address", "min(length - first, uint32_t(kChunk))", "uint32_t(kChunk)", "heap-buffer-overflow"
    ),
    "packs at addresses of no pack": Planted(
        "row_update", "address", "t.aligned && uintptr_t(grad) % 16 == 0", "t.aligned", "misaligned address"
    ),
    "a lane that leaves its warp": Planted(
        "bias_act", "thread", "if (c >= C) return;", "if (c >= C || threadIdx.x % 32 > 7) return;", "threads wait"
    ),
}


def missing() -> str:
    """Why no kernel can run under sanitizers here, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for flags in SANITIZERS.values():
            try:
                build = ["g++", "-std=c++20", *flags, "-x", "c++", "-", "-o", f"{folder}/nothing"]
                source = "#include <atomic>\nint i; int main() { return std::atomic_ref<int>(i).load(); }"
                subprocess.run(build, input=source, text=True, capture_output=True, check=True)
                subprocess.run([f"{folder}/nothing"], capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                return f"no program runs with {flags[0]}: {getattr(error, 'stderr', None) or error}"
    return ""


def rewritten(text: str) -> str:
    """CUDA's syntax as C++: launches and shared memory. The CPU's part is left out: it takes most of the compiling."""
    text = re.sub(
        "// ---- CPU ----.*?(?=// ---- CUDA ----)", lambda m: "}" + "\n" * m[0].count("\n"), text, flags=re.DOTALL
    )
    text = text.replace("<<<", "->*cuda_on_cpu::Launch(").replace(">>>", ")")
    return re.sub(r"__shared__ (.+?) (\w+)\[(.+?)\];", r"auto& \2 = cuda_on_cpu::shared<\1[\3]>(__LINE__);", text)


def compile_program(folder: Path, sanitizer: str, planted: Planted | None = None) -> Path:
    """The program of all kernels, one of them with a fault. Objects stay in `folder` and are used again."""
    for name in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).touch()
    sources = {"blocks": HERE / "blocks.cpp", f"calls.{sanitizer}": HERE / "calls.cpp"}
    for path in (ROOT / "csrc").glob("*.cu"):
        hurt = planted is not None and planted.op == path.stem
        name = f"{path.stem}.{sanitizer}" + f".{hash(planted)}" * hurt
        sources[name] = folder / f"{name}.cpp"
        text = planted.text() if hurt else path.read_text()
        sources[name].write_text(f'#line 1 "csrc/{path.name}"\n{rewritten(text)}')

    def compile_object(name: str) -> Path:
        to = folder / f"{name}.o"
        if not to.exists():
            flags = ["-std=c++20", "-O1", "-g1", "-D__CUDACC__", "-DMINEGAN_CUDA"]
            flags += [f"-I{path}" for path in (folder, HERE, ROOT / "csrc")]
            flags += [] if name == "blocks" else SANITIZERS[sanitizer]
            subprocess.run(["g++", *flags, "-c", sources[name], "-o", to], cwd=ROOT, check=True)
        return to

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [*pool.map(compile_object, sources)]
    program = folder / f"{sanitizer}.{hash(planted)}.run"
    subprocess.run(["g++", *SANITIZERS[sanitizer], *objects, "-o", program], check=True)
    return program


class Native:
    """What launchers see in the place of the native module. Tensors are on the CPU, kernels in `program`."""

    def __init__(self, program: subprocess.Popen, errors: BinaryIO):
        self.program, self.errors = program, errors
        # By address: the storages that launchers have asked for theirs, and whether they may hold addresses of others.
        self.storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}

    def __getattr__(self, name):
        return functools.partial(self.call, name)

    def row_update_cuda(self, *arguments):
        """The numbers of a step lie in no tensor: they go by value."""
        numbers = (ctypes.c_double * 9).from_address(arguments[7])
        self.call("row_update_cuda", *arguments[:7], *numbers, *arguments[8:])

    def note(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            assert storage.data_ptr() % 16 == 0, "the program's buffers would be aligned otherwise"
            self.storages[storage.data_ptr()] = storage, tensor.dtype == torch.int64

    def call(self, name: str, *arguments: float) -> int:
        reached = self.reached(arguments)
        message = [f"{len(reached)}\n".encode()]
        for address in reached:
            storage, table = self.storages[address]
            message.append(f"{address} {storage.nbytes()} {table:d}\n".encode())
            message.append(ctypes.string_at(address, storage.nbytes()))
        message.append(f"\n{name} {' '.join(repr(+argument) for argument in arguments)}\n".encode())
        try:
            self.program.stdin.write(b"".join(message))
            self.program.stdin.flush()
            result = int(self.program.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.end()  # which has failed
            raise
        for address in reached:
            storage, table = self.storages[address]
            if not table:
                self.program.stdout.readinto((ctypes.c_char * storage.nbytes()).from_address(address))
        return result

    def reached(self, arguments: tuple) -> list[int]:
        """Addresses, in order, of the storages that arguments lead to, themselves or by what is written there."""
        bases, found = sorted(self.storages), set()
        words = [word for word in arguments if isinstance(word, int)]
        while words:
            word = words.pop()
            place = bisect_right(bases, word) - 1
            if place < 0 or bases[place] in found:
                continue
            storage, table = self.storages[bases[place]]
            if word < bases[place] + storage.nbytes():
                found.add(bases[place])
                words += (ctypes.c_int64 * (storage.nbytes() // 8 * table)).from_address(bases[place])
        return sorted(found)

    def end(self):
        """Waits for the program's end; Fault unless it is a good one."""
        with contextlib.suppress(BrokenPipeError):
            self.program.stdin.close()
        if self.program.wait():
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").splitlines()
            raise Fault("\n".join(line for line in lines if "std::" not in line and "cuda_on_cpu::" not in line))


@contextlib.contextmanager
def cuda_on_cpu(program: Path) -> Iterator[Native]:
    """Inside, tensors on the CPU take the backend "cuda", whose kernels `program` runs."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as running,
        pytest.MonkeyPatch.context() as patch,
        use_backend("cuda"),
    ):
        native, data_ptr = Native(running, errors), torch.Tensor.data_ptr

        def noted(tensor):
            native.note(tensor)
            return data_ptr(tensor)

        try:
            patch.setattr(torch.Tensor, "data_ptr", noted)
            for op in cuda_ops():
                launcher, dtypes = op._launchers["cuda"]
                patch.setitem(launcher.__globals__, "device_and_stream", lambda x: (0, 0))
                for dtype in dtypes:
                    patch.setitem(op._chosen, ("cuda", torch.device("cpu"), dtype), functools.partial(launcher, native))
            yield native
            native.end()
        finally:
            running.kill()


def cuda_ops() -> list[Op]:
    return [op for ops in _ops.values() for op in ops if "cuda" in op._launchers]


@functools.cache
def sanitize():
    """bench/sanitize.py, without what its import does to the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
        patch.syspath_prepend(ROOT / "bench")
        return importlib.import_module("sanitize")


def check(native: Native, op: str, every: int = 1) -> list[str]:
    """Runs every n-th check of the op, and says of each whether it is right or how wrong."""
    lines = []
    torch.manual_seed(0)
    for name, dtype, make, make_expected in list(sanitize().OPS[op]("cpu"))[::every]:
        outputs = make()()
        with use_backend("reference"):
            error = sanitize().relative_error(outputs, make_expected()())
        native.storages.clear()
        right = error <= 8 * torch.finfo(dtype).eps
        lines.append(f"{name}: {'right' if right else f'wrong by {error:.2e} of the largest entry'}")
    return lines


def main(ops: list[str]) -> int:
    if reason := missing():
        sys.exit(reason)
    ops = ops or sorted({op.family for op in cuda_ops()})
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for sanitizer in SANITIZERS:
            program = compile_program(Path(folder), sanitizer)
            for op in ops:
                start = time.monotonic()
                with cuda_on_cpu(program) as native:
                    lines = check(native, op)
                wrong = [line for line in lines if not line.endswith(": right")]
                print(f"{op}, {sanitizer}: {len(lines)} checks, {len(wrong)} wrong, {time.monotonic() - start:.0f} s")
                print("\n".join(wrong), end="\n" * bool(wrong))
                bad += len(wrong)
        for name, planted in PLANTED.items():
            if planted.op in ops:
                found = finds(Path(folder), planted)
                print(f"{planted.op}, {planted.sanitizer}, {name}: {'found' if found else 'OVERLOOKED'}")
                bad += not found
    return int(bad > 0)


def finds(folder: Path, planted: Planted) -> bool:
    """Whether the program with this fault ends as it must."""
    try:
        with cuda_on_cpu(compile_program(folder, planted.sanitizer, planted)) as native:
            check(native, planted.op)
    except Fault as fault:
        return planted.found in str(fault)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
