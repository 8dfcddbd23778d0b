"""Real launches of Triton's kernels without a GPU, and what in them would wait for one.

`install()` gives Triton a driver that launches nothing and sends the ops of CPU tensors to their Triton kernels. From
then on each launch runs the op's launcher and Triton's own `JITFunction.run`, which specialises the kernel for its
arguments as on a GPU of compute capability 9.0. The front end of the compiler sees each specialisation, so the errors
that a launch raises on a GPU are found; `Specialisation.compile` goes on to machine code. The kernels compute nothing:
what they return is memory as it was.

`HostWatch` finds what would make the host wait for the GPU, or copy to it.

What asks whether a tensor is on a GPU (`is_cuda`) gets the CPU's answer. Needs a process of its own, in which Triton
does not interpret, because nothing here is undone.
"""

import functools
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver

from minegan_fast.ops import _op
from minegan_fast.ops.transposed_conv2d import _SPLIT_ON

TARGET = GPUTarget("cuda", 90, 32)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(eq=False)
class Specialisation:
    """A kernel as one kind of launch has it compiled. `fault` is what the compiler's front end says against it."""

    source: ASTSource
    options: dict
    fault: str = ""

    @property
    def kernel(self) -> str:
        """As in "noise_bias_act.noise_bias_act_kernel"."""
        return f"{self.source.fn.module.rpartition('.')[2]}.{self.source.fn.fn.__name__}"

    def __str__(self) -> str:
        """The kernel and its constants, among them the integers that are 1."""
        names = self.source.fn.arg_names
        constants = {names[path[0]]: value for path, value in self.source.constants.items() if len(path) == 1}
        return f"{self.kernel}({', '.join(f'{name}={value}' for name, value in constants.items())})"

    def lower(self) -> None:
        """Runs the compiler's front end: types, and all that is known before the machine. Raises what it raises."""
        backend = make_backend(TARGET)
        options, context = backend.parse_options(dict(self.options)), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        known = {
            "target": TARGET,
            "options": options,
            "codegen_fns": backend.get_codegen_implementation(options),
            "module_map": backend.get_module_map(),
            "context": context,
        }
        self.source.make_ir(*(known[name] for name in inspect.signature(self.source.make_ir).parameters))

    def compile(self) -> bytes:
        """The machine code. Raises what the compiler raises."""
        return triton.compile(self.source, target=TARGET, options=self.options).asm["cubin"]


@dataclass(eq=False)
class Launch:
    specialisation: Specialisation
    grid: tuple[int, ...]


class _Driver:
    """What JITFunction.run asks of a driver, answered for a GPU that is not there."""

    utils = launcher_cls = None

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(TARGET.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


_launches: list[Launch] = []
prepared: list[Specialisation] = []  # of the whole process, in their order


class _Kernel:
    """A compiled kernel, as JITFunction.run uses one: to launch it is to note it."""

    function, packed_metadata = 0, ()

    def __init__(self, specialisation: Specialisation):
        self.specialisation = specialisation

    def launch_metadata(self, *args) -> None:
        return None

    def run(self, *args) -> None:
        _launches.append(Launch(self.specialisation, args[:3]))


def _prepare(source: ASTSource, target=None, options=None, **_) -> _Kernel:
    """In the place of triton.compile."""
    specialisation = Specialisation(source, options)
    try:
        specialisation.lower()
    except Exception as error:
        specialisation.fault = "".join(traceback.format_exception_only(error)).strip()
    prepared.append(specialisation)
    return _Kernel(specialisation)


def install() -> None:
    """From now on, and for the rest of the process."""
    if _op._INTERPRETING:
        raise RuntimeError("Triton interprets in this process, and launches nothing: take one without TRITON_INTERPRET")
    triton.compiler.compile = _prepare  # where a JITFunction gets its compiler; triton.compile is still the real one
    driver.set_active(_Driver())
    missing = _op._missing
    _op._missing = lambda backend, *gpu: None if backend == "triton" else missing(backend, *gpu)
    _op._DEVICES["triton"] = ("cpu", "cuda")
    _op._AUTOMATIC["cpu"] = ("triton",)
    _SPLIT_ON.clear()
    _choose_anew()


def _choose_anew() -> None:
    """Ops forget which backend they have taken so far."""
    for ops in _op._ops.values():
        for op in ops:
            op._chosen.clear()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches inside the block."""
    start, found = len(_launches), []
    try:
        yield found
    finally:
        found += _launches[start:]
        del _launches[start:]


class _Timed:
    """A module of kernels whose functions' calls are timed."""

    def __init__(self, module: ModuleType, seconds: list[float]):
        self.module, self.seconds = module, seconds

    def __getattr__(self, name: str) -> Callable:
        function = getattr(self.module, name)

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - start)

        return call


@contextmanager
def launcher_times() -> Iterator[list[float]]:
    """The seconds that each call of a function of minegan_fast.kernels takes inside the block: the host's work from the
    choice of tiles to the launch, without what autograd and, where an op falls back on them, PyTorch's kernels take."""
    seconds: list[float] = []
    code = _op.Op._code
    _choose_anew()
    _op.Op._code = lambda op, backend: _Timed(code(op, backend), seconds)
    try:
        yield seconds
    finally:
        _op.Op._code = code
        _choose_anew()


# Operations whose result the host must have before it can go on: a number, or the size of what comes out.
_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_READING_METHODS = {"tolist", "numpy", "__array__", "cpu"}  # which on a CPU need no operation
# What makes a tensor without numbers of its own: on the host, unless it names a device.
_FACTORIES = {
    "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "randperm", "eye", "linspace",
    "scalar_tensor",
}  # fmt: skip
_OF_THE_HOST = ("from_numpy", "frombuffer")  # of its memory, which no mode sees
# What launches no kernel, beside views: memory as it was, and what is about types or the profiler.
_LAUNCH_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach_", "resize_",
    "set_", "is_same_size", "promote_types", "result_type",
}  # fmt: skip
_MAKERS = {"tensor", "as_tensor", "asarray"}  # of Python's numbers, on the host unless a device is named


class HostWatch:
    """A context that notes what inside it concerns the host, as "what at file:line".

    `waits`: the host waits for the GPU. It reads numbers (`item`, `bool`, `float`, `tolist`, `numpy`, `cpu()`), asks
        for a result whose size depends on values (`nonzero`, an index by a mask, `unique`), or copies Python's numbers
        to the GPU as they are (`torch.tensor(..., device=x.device)`, an index by a list).
    `copies`: the host makes a tensor for itself, of Python's numbers or of none (`device="cpu"`, or no device), which
        it can only need for a copy to the GPU, or from it. From pinned memory that waits for nothing, but a CUDA graph
        cannot hold it.

    `operations`: how many of ATen's operations launch a kernel, or several, that is not ours.

    What autograd does in a backward is seen too. On CPU tensors a copy between devices is none; the device's name tells
    which one the code means: "cpu" is the host, and a tensor's own, a torch.device, is the GPU.
    """

    def __init__(self):
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.operations = 0

    def __enter__(self):
        self._functions = _Functions(self)
        self._operations = _Operations(self)
        self._unseen = {name: getattr(torch, name) for name in _OF_THE_HOST}
        for name, function in self._unseen.items():
            setattr(torch, name, functools.partial(self._of_the_host, name, function))
        self._functions.__enter__()
        self._operations.__enter__()
        return self

    def __exit__(self, *error):
        self._operations.__exit__(*error)
        self._functions.__exit__(*error)
        for name, function in self._unseen.items():
            setattr(torch, name, function)

    def _of_the_host(self, name: str, function: Callable, *args, **kwargs) -> torch.Tensor:
        self.note(self.copies, f"torch.{name} on the host")
        return function(*args, **kwargs)

    def made_of_numbers(self) -> None:
        """A tensor was made of Python's numbers."""
        name, args, kwargs = self._functions.call
        if name == "__setitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not any(isinstance(i, list) for i in index):
                return  # `x[i] = 0` fills
        if name in _MAKERS and not isinstance(kwargs.get("device"), torch.device):
            self.note(self.copies, "a tensor of Python's numbers")
        else:
            self.note(self.waits, "Python's numbers go to the GPU")

    def note(self, to: list[str], what: str) -> None:
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename == __file__ or "site-packages" in frame.f_code.co_filename):
            frame = frame.f_back
        if frame:
            path = Path(frame.f_code.co_filename).resolve()
            what += f" at {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{frame.f_lineno}"
        to.append(what)


class _Functions(TorchFunctionMode):
    """Calls of torch in Python; `call` is the one that runs."""

    def __init__(self, watch: HostWatch):
        super().__init__()
        self.watch, self.call = watch, ("", (), {})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        to_host = name == "to" and any(isinstance(a, str) and a == "cpu" for a in (*args[1:], kwargs.get("device")))
        if name in _READING_METHODS or to_host:
            self.watch.note(self.watch.waits, f"Tensor.{name}")
        if name in _FACTORIES and not isinstance(kwargs.get("device"), torch.device):
            self.watch.note(self.watch.copies, f"torch.{name} on the host")
        before, self.call = self.call, (name, args, kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            self.call = before


class _Operations(TorchDispatchMode):
    """Operations of ATen, autograd's among them."""

    def __init__(self, watch: HostWatch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation._schema.name.removeprefix("aten::")
        launches = not operation.is_view and name not in _LAUNCH_NOTHING and "::" not in name
        self.watch.operations += launches
        indices = args[1] if name in _INDEXING else ()
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        of_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or by_mask or of_unknown_size:
            self.watch.note(self.watch.waits, name)
        elif name == "lift_fresh":
            self.watch.made_of_numbers()
        return operation(*args, **kwargs)


def hollow_convolutions() -> None:
    """From now on a CPU's convolutions, and their gradients, compute nothing: a network of full size then runs as fast
    as the host prepares it. What they return is memory as it was."""
    library = torch.library.Library("aten", "IMPL")

    def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        plain = x.detach(), weight.detach()  # of others the mode would ask for gradients
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in plain]
            y = torch.ops.aten.convolution(*fakes, None, stride, padding, dilation, transposed, output_padding, groups)
        return x.new_empty_strided(y.shape, y.stride())

    def convolution_backward(gy, x, weight, bias_sizes, *rest):
        wanted = rest[-1]
        like = (torch.empty_like(x), torch.empty_like(weight), gy.new_empty(bias_sizes or 0))
        return tuple(t if want else None for t, want in zip(like, wanted, strict=True))

    library.impl("convolution", convolution, "CPU")
    library.impl("convolution_backward", convolution_backward, "CPU")
    _libraries.append(library)  # one that is collected gives back what it has overridden


_libraries: list[torch.library.Library] = []
