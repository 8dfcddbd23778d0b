"""What the names in a pickle stand for: a fixed table of tensors, arrays and containers; no other is ever called."""

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


class RefusedError(ValueError):
    """The pickle asks for code that no checkpoint needs. `wanted` is its name."""

    def __init__(self, wanted: str):
        super().__init__(f"its pickle asks for {wanted!r}, which is code, and a checkpoint is data")
        self.wanted = wanted


class DamagedError(ValueError):
    """The bytes are no pickle, or not all of one."""


@dataclass(eq=False)
class Thing:
    """An object of a class or function that is not known here: what the file says of it, nothing more."""

    name: str
    arguments: tuple = ()
    state: object = None
    items: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


# Modules that reach the system, other code or the interpreter itself. Refusing them is no defence, since no name
# outside KNOWN is ever called; it is what a user wants to know of such a file.
# fmt: off
DANGEROUS = frozenset((
    "_ctypes", "_io", "_operator", "_pickle", "_posixsubprocess", "_thread", "ast", "asyncio", "bdb", "cPickle",
    "cProfile", "cloudpickle", "code", "codeop", "commands", "concurrent", "copy_reg", "copyreg", "ctypes", "dill",
    "distutils", "doctest", "ftplib", "functools", "gc", "http", "imp", "importlib", "inspect", "io", "joblib",
    "linecache", "marshal", "multiprocessing", "nt", "ntpath", "operator", "os", "pdb", "pickle", "pip",
    "pkgutil", "platform", "popen2", "posix", "posixpath", "profile", "pty", "pydoc", "requests", "runpy",
    "shelve", "shutil", "signal", "site", "smtplib", "socket", "sqlite3", "ssl", "subprocess", "sys", "telnetlib",
    "tempfile", "threading", "timeit", "trace", "traceback", "types", "unittest", "urllib", "urllib2", "venv",
    "webbrowser", "xmlrpc", "zipimport",
))
# fmt: on
ORDERS: dict[str, Literal["<", ">", "="]] = {"<": "<", ">": ">", "=": "=", "|": "="}  # | is for single bytes
BUILTINS = ("builtins", "__builtin__", "__builtins__")
LONGEST_NAME = 1000
SMALL = 1 << 16  # numbers below it lie each in a place of its own in a dict or a set as large as they need
INERT_BUILTINS = frozenset(("int", "long", "float", "bool", "str", "unicode", "object", "slice", "range", "xrange"))


@dataclass(frozen=True)
class Known:
    """A name of the table; `make` takes the arguments of the file, and `keys` gives those of them that it will hash."""

    name: str
    make: Callable
    keys: Callable[..., Iterable] | None = None


@dataclass(frozen=True)
class Storage:
    dtype: torch.dtype


@dataclass(eq=False)
class Array:
    """A numpy array whose contents follow in a BUILD opcode."""

    value: np.ndarray | None = None


@dataclass(eq=False)
class DType:
    """A numpy dtype whose byte order follows in a BUILD opcode."""

    code: str
    order: Literal["<", ">", "="] = "="

    def real(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


def require(true: bool, message: str) -> None:
    if not true:
        raise DamagedError(message)


def _dtype(code, align=False, copy=False) -> DType | Thing:
    if isinstance(code, (str, bytes)):
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if found := re.fullmatch(r"([<>=|]?)([biufc?]\d{0,2})", code):
            np.dtype(found[2])  # TypeError: no such width
            return DType(found[2], ORDERS[found[1] or "="])
    return Thing("numpy.dtype", (code,))


EXPANDED = 1 << 24  # elements
MOST_DIMENSIONS = 64


def array_of(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"] = "C") -> np.ndarray | None:
    """The array of that data; None where it holds objects, which no weight does."""
    if not isinstance(dtype, DType):
        return None
    data = data.encode("latin-1") if isinstance(data, str) else data  # written by Python 2
    shape = (shape,) if isinstance(shape, int) else shape
    require(isinstance(shape, (tuple, list)) and len(shape) <= MOST_DIMENSIONS, "an array has no shape")
    require(all(isinstance(n, int) and 0 <= n < 2**63 for n in shape) and order in ("C", "F"), "an array has no shape")
    require(
        isinstance(data, (bytes, bytearray)) and len(data) == math.prod(shape) * dtype.real().itemsize,
        "an array's bytes and its shape differ",
    )
    return np.frombuffer(data, dtype.real()).reshape(shape, order=order)


def _scalar(dtype, data=b""):
    array = array_of(data, dtype, ())
    return Thing("numpy.core.multiarray.scalar") if array is None else array.item()


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    require(isinstance(storage, Tensor), "a tensor has no storage")
    require(len(size) <= MOST_DIMENSIONS and len(stride) <= MOST_DIMENSIONS, "a tensor has no size")
    require(all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)), "a tensor has no size")
    # A stride of 0 makes a few bytes a tensor of any size; of some size that is what a program may have meant.
    require(math.prod(size) <= max(storage.numel(), EXPANDED), "a tensor is larger than its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> Tensor:
    require(isinstance(storage, Tensor) and isinstance(dtype, torch.dtype), "a tensor has no storage")
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(data, *_):
    return data


def _subclass(make, cls, arguments, state=None):
    return make.make(*arguments) if isinstance(make, Known) else Thing(_name(cls), arguments, state)


def _encoded(text, encoding="latin-1") -> bytes:
    # codecs.lookup would import a module of the file's choice.
    require(isinstance(text, str) and encoding in ("latin1", "latin-1", "iso-8859-1"), "bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytes(data=b"", encoding="latin-1") -> bytes:
    require(isinstance(data, (str, bytes, bytearray, list)), "bytes of an unknown kind")
    return _encoded(data, encoding) if isinstance(data, str) else bytes(data)


def _container(kind: type) -> Callable:
    def make(*values):
        require(all(isinstance(v, (list, tuple, dict, set, frozenset)) for v in values), f"a {kind} of what is none")
        return kind(*values)

    return make


def _elements(*values) -> Iterator:
    return itertools.chain.from_iterable(values)


def _firsts(*values) -> Iterator:
    return (key for value in values for key in (value if isinstance(value, dict) else (pair[0] for pair in value)))


def _complex(real=0.0, imag=0.0) -> complex:
    require(isinstance(real, (int, float)) and isinstance(imag, (int, float)), "a complex number of what is none")
    return complex(real, imag)


def _reconstructed(cls, *_):
    return Thing(_name(cls))


def _name(cls) -> str:
    return cls.name if isinstance(cls, (Thing, Known)) else type(cls).__name__


def _device(kind, index=None) -> str:
    require(isinstance(kind, str) and isinstance(index, (int, type(None))), "a device without a name")
    return kind if index is None else f"{kind}:{index}"


def check_keys(values: Iterable) -> int:
    """How many of the keys have a hash that a file can choose: those that are neither text nor small numbers.

    DamagedError for keys that may take forever: a few bytes make a tuple of tuples that is hashed over and over, and
    of integers from 2^61 - 1 on any number have one hash.
    """
    flat = (int, float, str, bytes, bool, type(None), Thing, Tensor, torch.dtype)
    chosen = 0
    for value in values:
        parts = value if isinstance(value, (tuple, frozenset)) else (value,)
        require(len(parts) <= MOST_DIMENSIONS, "a key is a long container")
        require(all(isinstance(part, flat) for part in parts), "a key is a container of containers")
        require(all(abs(part) < 2**61 - 1 for part in parts if isinstance(part, int)), "a key is a huge number")
        small = isinstance(value, int) and abs(value) < SMALL
        chosen += isinstance(value, (int, float, tuple, frozenset)) and not small
    return chosen


def _each(modules: str, name: str, make: Callable, keys: Callable[..., Iterable] | None = None) -> dict:
    return {(module, name): Known(f"{module}.{name}", make, keys) for module in modules.split()}


NUMPY = "numpy.core.multiarray numpy._core.multiarray"
KNOWN = (
    _each("collections", "OrderedDict", _container(OrderedDict), _firsts)
    | _each("builtins __builtin__", "dict", _container(dict), _firsts)
    | _each("builtins __builtin__", "list", _container(list))
    | _each("builtins __builtin__", "tuple", _container(tuple))
    | _each("builtins __builtin__", "set", _container(set), _elements)
    | _each("builtins __builtin__", "frozenset", _container(frozenset), _elements)
    | _each("builtins __builtin__", "complex", _complex)
    | _each("builtins __builtin__", "bytes", _bytes)
    | _each("builtins __builtin__", "bytearray", _bytes)
    | _each("_codecs", "encode", _encoded)
    | _each("copyreg copy_reg", "_reconstructor", _reconstructed)
    | _each(NUMPY, "_reconstruct", lambda *_: Array())
    | _each(NUMPY, "scalar", _scalar)
    | _each("numpy.core.numeric numpy._core.numeric", "_frombuffer", lambda *a: Array(array_of(*a)))
    | _each("numpy", "dtype", _dtype)
    | _each("torch", "Size", _container(tuple))
    | _each("torch", "device", _device)
    | _each("torch._utils", "_rebuild_tensor", _tensor)
    | _each("torch._utils", "_rebuild_tensor_v2", _tensor)
    | _each("torch._utils", "_rebuild_tensor_v3", _tensor_of_dtype)
    | _each("torch._utils", "_rebuild_parameter", _parameter)
    | _each("torch._utils", "_rebuild_parameter_with_state", _parameter)
    | _each("torch._tensor", "_rebuild_from_type_v2", _subclass)
)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# Not getattr(torch, name), which would import submodules of the file's choice.
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def lookup(module: str, name: str) -> Known | Storage | torch.dtype | Thing:
    """What a name in a file stands for: an entry of the table, a dtype, or a `Thing`. RefusedError: a dangerous one."""
    require(isinstance(module, str) and isinstance(name, str), "a name is no text")
    require(len(module) + len(name) <= LONGEST_NAME, "a name is no name")
    if known := KNOWN.get((module, name)):
        return known
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
        return Storage(STORAGES[name])
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    root, on_the_way = module.split(".")[0], {*module.split("."), *name.split(".")[:-1]}
    if (
        (root in DANGEROUS and (module, name) != ("types", "SimpleNamespace"))
        or (root in BUILTINS and name not in INERT_BUILTINS)
        or on_the_way & {"os", "sys", "subprocess", "builtins", "shutil", "distutils"}
        or "__" in name
        or (root not in BUILTINS and "__" in module.replace("__main__", ""))
    ):
        raise RefusedError(f"{module}.{name}")
    return Thing(f"{module}.{name}")
