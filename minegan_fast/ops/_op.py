"""One op, several backends: registration, choice, forcing, and the bridge to torch.compile.

An op is a reference in plain PyTorch plus any number of implementations of the same function. A CUDA tensor takes
`cuda`, else `triton`, else `reference`; a CPU tensor takes `cpp`, else `reference`. `use_backend(name)` and the
environment variable MINEGAN_BACKEND force one, and an op that cannot follow raises instead of answering with another.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch

from .._torch import is_batched, is_tracing, pass_reaches, transforms_active

BACKENDS = ("reference", "cpp", "triton", "cuda")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/common.h

# Triton, too, reads this when it is imported: its kernels then run in Python, on CPU tensors as well.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_AUTOMATIC = {"cpu": ("cpp",), "cuda": ("cuda",) if _INTERPRETING else ("cuda", "triton")}  # and then the reference
_DEVICES = {"cpp": ("cpu",), "triton": ("cpu", "cuda") if _INTERPRETING else ("cuda",), "cuda": ("cuda",)}

P = ParamSpec("P")  # the arguments of an op
R = TypeVar("R")  # its result

_forced: ContextVar[str | None] = ContextVar("minegan_backend", default=os.environ.get("MINEGAN_BACKEND") or None)
_ops: dict[str, list["Op"]] = {}  # all ops of the process by family, in the order in which they are defined


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of this one are summed and computed with: float32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class BackendUnavailable(RuntimeError):  # noqa: N818
    """A backend was asked for that is missing here or does not take these tensors."""


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces every op inside the block to "reference", "cpp", "triton" or "cuda"; None chooses automatically again.

    Holds in the current thread (or async task), and for the backward of whatever ran forward inside the block. An op
    that the backend cannot run raises a RuntimeError that says which can and why the rest cannot. An unknown name is a
    ValueError.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that is forced here and now. A forward keeps it for its backward, which autograd may run in a thread
    of its own."""
    return None if torch.compiler.is_compiling() else _forced.get()


def device_and_stream(x: torch.Tensor) -> tuple[int, int]:
    """The index of x's device and the handle of its current stream, by which a native launch joins PyTorch's work."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def backward_wants(ctx, i: int, place: int | None = None) -> bool:
    """Whether the backward that runs now asks for the gradient of input i of a Function.

    ctx.needs_input_grad[i] does not say so: it is True for every input that requires a gradient, and the inner pass of
    a penalty asks for that of the images alone.

    place: the index of input i among the inputs that are tensors, where some input before it is not a tensor."""
    if not ctx.needs_input_grad[i]:
        return False
    if torch.compiler.is_compiling():
        return True
    return pass_reaches(ctx.next_functions[i if place is None else place][0], unknown=True)


def refuse_transforms(name: str, *gradients: torch.Tensor | None) -> None:
    """Raises NotImplementedError inside a transform, which would need a rule of its own for every op and backend; of
    these gradients, too, one may stand for several."""
    if torch.compiler.is_compiling():
        return
    if transforms_active() or any(g is not None and is_batched(g) for g in gradients):
        raise NotImplementedError(
            f"{name} cannot run inside a transform, such as torch.func's vmap, grad and jacrev, forward-mode "
            "differentiation, vectorize=True or is_grads_batched=True: take torch.autograd.grad, "
            "torch.autograd.functional.jacobian without vectorize, "
            "and a loop in the place of vmap"
        )


class _Unrecorded:
    """What a Function's forward gets in the place of its ctx where autograd records nothing."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def run(function: type[torch.autograd.Function], *args) -> Any:
    """function.apply(*args), without what it costs on the host where autograd would record nothing."""
    # A trace knows the Function, and would take what a kernel writes for a constant.
    if torch.compiler.is_compiling() or is_tracing():
        return function.apply(*args)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return function.apply(*args)
    return function.forward(_Unrecorded(), *args)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last where x [B, C, H, W] has the strides of that format, else contiguous_format.

    Sizes of 1 can make both formats the same memory: the strides decide then too."""
    C, H, W = x.shape[1:]
    last = C * H * W > 1 and x.stride()[1:] == (1, C * W, C)
    return torch.channels_last if last else torch.contiguous_format


class Op(Generic[P, R]):
    """A decorator: makes of a reference function an op that faster implementations can be registered for.

    The first argument is the tensor whose device and dtype decide. All implementations return new tensors, laid out in
    memory as the reference's are. The module that defines an op names its family: `backends()` lists it under that
    name, and its Triton kernels are in `minegan_fast.kernels.<family>`.

    mutates: the op writes into its arguments, as an optimizer's step does. Such an op is always called directly and has
        no bridge to the compiler. Its first argument is anything with a device and a dtype.
    """

    def __init__(self, reference: Callable[P, R], mutates: bool = False):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.family = reference.__module__.rpartition(".")[2]
        self._launchers: dict[str, tuple[Callable[..., R], tuple[torch.dtype, ...]]] = {}
        self._chosen: dict[tuple[str | None, torch.device, torch.dtype], Callable[..., R]] = {}
        self.reference = reference
        self.library = None
        if not mutates:
            # A call of a custom op costs several times the kernel of a small tensor. So only the compiler and fake
            # tensors take that way.
            schema = torch.library.infer_schema(reference, mutates_args=())
            name = f"minegan_fast::{self.name}"
            self.library = torch.library.custom_op(name, self._run, mutates_args=(), schema=schema)
            self.library.register_fake(reference)
        _ops.setdefault(self.family, []).append(self)

    def register(
        self, backend: str, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES)
    ) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Decorator of a launcher, which gets the module with the backend's code and then the reference's arguments.

        dtypes: those of the first argument that the launcher takes."""

        def add(launcher: Callable[..., R]) -> Callable[..., R]:
            self._launchers[backend] = (launcher, dtypes)
            return launcher

        return add

    # A signature cannot add a keyword to those of a ParamSpec: so there are two.
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, *args: Any, backend: str | None) -> R: ...
    def __call__(self, *args, backend: str | None = None) -> R:
        """The op of the reference's arguments, all given by position. `backend` forces one; None leaves the choice."""
        if self.library is not None and (
            torch.compiler.is_compiling() or type(args[0]) not in (torch.Tensor, torch.nn.Parameter)
        ):
            return self.library(*args)
        return self._run(*args, backend=backend)

    def _run(self, *args, backend: str | None = None) -> R:
        key = (backend or _forced.get(), args[0].device, args[0].dtype)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._choose(*key)
        return chosen(*args)

    def _choose(self, forced: str | None, device: torch.device, dtype: torch.dtype) -> Callable[..., R]:
        reason = None
        for name in (forced,) if forced else (*_AUTOMATIC.get(device.type, ()), "reference"):
            if name == "reference":
                return self.reference
            reason = self.lacks(name, device, dtype)
            if reason is None:
                return functools.partial(self._launchers[name][0], self._code(name))
        reasons = {name: self.lacks(name, device, dtype) for name in BACKENDS}
        raise BackendUnavailable(
            f"{self.name} cannot use the backend {forced!r} for a {device} tensor: {reason}. "
            f"Usable: {', '.join(name for name, reason in reasons.items() if reason is None)}. Not usable: "
            + "; ".join(f"{name} ({reason})" for name, reason in reasons.items() if reason is not None)
        )

    def lacks(self, backend: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """Why `backend` cannot run this op (on that device and that dtype, where given); None where it can."""
        if backend == "reference":
            return None
        if backend not in BACKENDS:
            return f"there is no such backend, only {', '.join(BACKENDS)}"
        if backend not in self._launchers:
            return f"{self.name} has no {backend} implementation"
        gpu = device.index if device is not None and device.type == "cuda" else None
        reason = _missing(backend) if gpu is None else _missing(backend, gpu)
        if reason is not None:
            return reason
        if device is not None and device.type not in _DEVICES[backend]:
            return f"it takes {' and '.join(_DEVICES[backend])} tensors"
        dtypes = self._launchers[backend][1]
        if dtype is not None and dtype not in dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {dtype}"
        try:
            self._code(backend)
        except Exception as error:
            return f"its code cannot be imported: {type(error).__name__}: {error}"
        return None

    def _code(self, backend: str) -> ModuleType:
        return importlib.import_module(
            f"minegan_fast.kernels.{self.family}" if backend == "triton" else "minegan_fast._C"
        )


@functools.cache
def _missing(backend: str, gpu: int | None = None) -> str | None:
    """Why no op at all can use the backend in this process: on the GPU of that index or, with None, anywhere."""
    if backend == "triton":
        try:
            importlib.import_module("triton")
        except Exception as error:
            return f"triton cannot be imported: {type(error).__name__}: {error}"
        if _INTERPRETING:
            return None
    else:
        try:
            native = importlib.import_module("minegan_fast._C")
        except Exception as error:
            return f"the native module cannot be imported: {type(error).__name__}: {error}{_build_notes()}"
        if backend == "cpp":
            return None
        if not native.cuda_version:
            return f"the native module has no CUDA kernels{_build_notes()}"
    if gpu is not None:
        return _unfit(backend, gpu)
    if not (torch.cuda.is_available() and torch.cuda.device_count()):
        needed = "it needs a CUDA GPU, or TRITON_INTERPRET=1 (slow: for tests)"
        return needed if backend == "triton" else "torch sees no CUDA GPU"
    reasons = []
    # The current GPU is asked first: asking takes memory on a GPU, and one that can do is enough.
    for index in (torch.cuda.current_device(), *range(torch.cuda.device_count())):
        reason = _unfit(backend, index)
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


@functools.cache
def _unfit(backend: str, gpu: int) -> str | None:
    """Why that GPU cannot run kernels of "triton" or "cuda"."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(gpu)
    here = f"the GPU's compute capability is {major}.{minor}"
    if backend == "triton":
        return None if (major, minor) >= (7, 0) else f"{here}, and the kernels need 7.0"
    native = importlib.import_module("minegan_fast._C")
    problem = native.cuda_problem(gpu)
    return f"{problem}; {here}, and the kernels are for {native.cuda_architectures}" if problem else None


def gpu_report(gpu: int) -> dict[str, str]:
    """For "triton" and "cuda" "available" on the GPU of that index, or the reason why not."""
    return {backend: _missing(backend, gpu) or "available" for backend in ("triton", "cuda")}


def _build_notes() -> str:
    path = Path(__file__).parents[1] / "_build.txt"
    notes = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return f" (the installation noted: {'; '.join(notes)})" if notes else ""


def mutating(reference: Callable[P, R]) -> Op[P, R]:
    """The decorator `Op` for a reference that writes into its arguments."""
    return Op(reference, mutates=True)


def backends() -> dict[str, list[str]]:
    """For every op the backends that can run it in this process, `reference` always among them."""
    return {family: [b for b in BACKENDS if not any(op.lacks(b) for op in ops)] for family, ops in _ops.items()}


def backend_report() -> dict[str, tuple[bool, str]]:
    """For every backend whether any op can use it in this process, and "available" or the reason why none can."""
    report = {}
    for backend in BACKENDS:
        lacks = [op.lacks(backend) for ops in _ops.values() for op in ops if backend in (*op._launchers, "reference")]
        reasons = dict.fromkeys(reason for reason in lacks if reason is not None)
        available = None in lacks
        report[backend] = (available, "available" if available else _missing(backend) or "; ".join(reasons))
    return report
