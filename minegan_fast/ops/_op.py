"""One op, several backends: registration, choice, forcing, and the bridge to torch.compile.

An op is a reference in plain PyTorch plus any number of implementations with the same signature. A CUDA tensor takes `cuda`, else `triton`,
else `reference`; a CPU tensor takes `cpp`, else `reference`. `use_backend(name)` and the environment variable `MINEGAN_BACKEND` force one,
and an op that cannot follow raises instead of answering with another.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_AUTOMATIC = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_forced: ContextVar[str | None] = ContextVar("minegan_backend", default=os.environ.get("MINEGAN_BACKEND") or None)
_ops: dict[str, list["Op"]] = {}


class BackendUnavailable(RuntimeError):
    """A backend was asked for that is missing here or does not take these tensors."""


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces every op inside the block to one backend: "reference", "cpp", "triton" or "cuda"; None chooses automatically again.

    Holds for the current thread (or async task) only, and for the backward of what ran forward inside the block. An op that the backend
    cannot run raises `BackendUnavailable` (a RuntimeError). Raises ValueError for an unknown name.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced here and now, or None. Backward passes may run in another thread: an op takes it along from its forward."""
    return None if torch.compiler.is_compiling() else _forced.get()


@functools.cache
def native() -> ModuleType:
    """The compiled module `minegan_fast._C`. Raises BackendUnavailable with the reason where it is missing or broken."""
    try:
        return importlib.import_module("minegan_fast._C")
    except ImportError as error:
        raise BackendUnavailable(f"the native module minegan_fast._C is missing or broken ({error})") from error


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _missing(backend: str) -> str | None:
    """Why no op at all can use the backend in this process; None where it can be used."""
    if backend == "reference":
        return None
    if backend == "triton":
        try:
            importlib.import_module("triton")
        except Exception as error:
            return f"triton cannot be imported ({type(error).__name__}: {error}); pip install triton"
        if interpreting() or torch.cuda.is_available():
            return None
        return "Triton needs a CUDA GPU (or TRITON_INTERPRET=1, slow, for tests)"
    try:
        module = native()
    except BackendUnavailable as error:
        return str(error)
    if backend == "cuda" and not module.cuda_version:
        return "the native module was built without CUDA (no working nvcc was found at install time)"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


class Op:
    """The function `reference` and its faster implementations. Used as a decorator of the reference.

    All implementations take the reference's arguments, the first being the tensor whose device and dtype decide; they return new tensors
    laid out like the reference's. The op's family (the stem under which `backends()` lists it) is the module of the reference.
    """

    def __init__(self, reference: Callable):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.family = reference.__module__.rsplit(".", 1)[-1]
        self._implementations: dict[str, tuple[Callable | str, tuple[torch.dtype, ...]]] = {
            "reference": (reference, FLOATS)
        }
        self._choices: dict[tuple[str, torch.dtype], Callable] = {}
        self.library = torch.library.custom_op(
            f"minegan_fast::{self.name}", self._run, mutates_args=(), schema=_schema(reference)
        )
        self.library.register_fake(reference)
        _ops.setdefault(self.family, []).append(self)

    def register(self, backend: str, implementation: Callable | str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
        """Adds an implementation: a callable, or "module:name", imported at its first use. `dtypes` are those of the first tensor."""
        self._implementations[backend] = (implementation, dtypes)

    def __call__(self, *args, backend: str | None = None):
        if torch.compiler.is_compiling() or type(args[0]) not in (torch.Tensor, torch.nn.Parameter):
            return self.library(*args)
        return self._run(*args, backend=backend)

    def _run(self, *args, backend: str | None = None):
        x = args[0]
        name = backend or _forced.get()
        if name is not None:
            return self._get(name, x.device.type, x.dtype)(*args)
        key = (x.device.type, x.dtype)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._choose(*key)
        return choice(*args)

    def _choose(self, device: str, dtype: torch.dtype) -> Callable:
        for name in _AUTOMATIC.get(device, ("reference",)):
            if self.unavailable(name, device, dtype) is None:
                break
        return self._get(name, device, dtype)

    def _get(self, name: str, device: str, dtype: torch.dtype) -> Callable:
        reason = self.unavailable(name, device, dtype)
        if reason is None:
            return _resolve(self._implementations[name][0])
        others = {other: self.unavailable(other, device, dtype) for other in BACKENDS if other != name}
        usable = [other for other, why in others.items() if why is None]
        rest = "".join(f"; {other}: {why}" for other, why in others.items() if why is not None)
        raise BackendUnavailable(
            f"{self.name} cannot use the backend {name!r} for {dtype} on {device}: {reason}. Usable here: {', '.join(usable)}{rest}"
        )

    def unavailable(self, backend: str, device: str | None = None, dtype: torch.dtype | None = None) -> str | None:
        """Why `backend` cannot run this op (on that device and dtype, where given); None where it can."""
        if backend not in BACKENDS:
            return f"no such backend, there are {', '.join(BACKENDS)}"
        if backend not in self._implementations:
            return f"{self.name} has no {backend} implementation"
        reason = _missing(backend)
        if reason is not None:
            return reason
        implementation, dtypes = self._implementations[backend]
        try:
            _resolve(implementation)
        except Exception as error:
            return f"its code cannot be imported ({type(error).__name__}: {error})"
        if device is not None and backend in ("cpp", "cuda", "triton"):
            devices = (
                ("cpu",)
                if backend == "cpp"
                else ("cuda", "cpu")
                if backend == "triton" and interpreting()
                else ("cuda",)
            )
            if device not in devices:
                return f"it takes {' and '.join(devices)} tensors only"
        if dtype is not None and backend != "reference" and dtype not in dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)} only"
        return None


@functools.cache
def _resolve(implementation: Callable | str) -> Callable:
    if callable(implementation):
        return implementation
    module, name = implementation.split(":")
    return getattr(importlib.import_module(module), name)


def _schema(reference: Callable) -> str:
    return torch.library.infer_schema(reference, mutates_args=())


def backends() -> dict[str, list[str]]:
    """For every op the backends that can run it in this process."""
    return {
        family: [name for name in BACKENDS if not any(op.unavailable(name) for op in ops)]
        for family, ops in _ops.items()
    }


def backend_report() -> dict[str, tuple[bool, str]]:
    """For every backend: whether any op can use it in this process, and what it lacks or has (one line)."""
    report = {}
    for name in BACKENDS:
        reasons = {op.unavailable(name) for ops in _ops.values() for op in ops if name in op._implementations}
        reason = None if None in reasons else "; ".join(sorted(reasons)) or _missing(name) or "no op has it"
        report[name] = (reason is None, reason or "available")
    return report
