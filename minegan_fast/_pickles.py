"""Pickles as data: an interpreter of pickle's opcodes that makes tensors, arrays, containers, numbers and strings.

Python's own unpickler calls what a file names. This one looks a name up in a fixed table; a name that is not there
becomes a `Thing`, which remembers how the file wanted to call it and is never called. Attributes are never set, no
`__setstate__`, `__init__` or `__reduce__` runs, nothing is imported. Names by which files are made to attack are not
even remembered: the whole file is refused.
"""

import codecs
import math
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

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
BUILTINS = ("builtins", "__builtin__", "__builtins__")
INERT_BUILTINS = frozenset(("int", "long", "float", "bool", "str", "unicode", "object", "slice", "range", "xrange"))


@dataclass(frozen=True)
class _Known:
    """A name of the table; `make` takes the arguments of the file."""

    name: str
    make: Callable


@dataclass(frozen=True)
class Storage:
    dtype: torch.dtype


@dataclass(eq=False)
class Array:
    """A numpy array whose contents follow in a BUILD opcode."""

    value: np.ndarray | None = None


@dataclass(eq=False)
class _DType:
    """A numpy dtype whose byte order follows in a BUILD opcode."""

    code: str
    order: str = "="

    def real(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


def _require(true: bool, message: str) -> None:
    if not true:
        raise DamagedError(message)


def _dtype(code, align=False, copy=False) -> _DType | Thing:
    if isinstance(code, (str, bytes)):
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if found := re.fullmatch(r"([<>=|]?)([biufc?]\d{0,2})", code):
            np.dtype(found[2])  # TypeError: no such width
            return _DType(found[2], {"|": "=", "": "="}.get(found[1], found[1]))
    return Thing("numpy.dtype", (code,))


def _array(data, dtype, shape, order="C") -> np.ndarray | None:
    """None for an array of objects, which no weight is."""
    if not isinstance(dtype, _DType):
        return None
    data = data.encode("latin-1") if isinstance(data, str) else data  # written by Python 2
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    _require(all(isinstance(n, int) and n >= 0 for n in shape) and order in ("C", "F"), "an array has no shape")
    _require(
        isinstance(data, (bytes, bytearray)) and len(data) == math.prod(shape) * dtype.real().itemsize,
        "an array's bytes and its shape differ",
    )
    return np.frombuffer(data, dtype.real()).reshape(shape, order=order)


def _scalar(dtype, data=b""):
    array = _array(data, dtype, ())
    return Thing("numpy.core.multiarray.scalar") if array is None else array.item()


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    _require(isinstance(storage, Tensor), "a tensor has no storage")
    # A stride of 0 would make a few bytes a tensor of any size.
    _require(math.prod(size) <= storage.numel(), "a tensor is larger than its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> Tensor:
    _require(isinstance(storage, Tensor) and isinstance(dtype, torch.dtype), "a tensor has no storage")
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(data, *_):
    return data


def _subclass(make, cls, arguments, state=None):
    return make.make(*arguments) if isinstance(make, _Known) else Thing(_name(cls), arguments, state)


def _encoded(text, encoding="latin-1") -> bytes:
    _require(isinstance(text, str) and codecs.lookup(encoding).name == "iso8859-1", "bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytes(data=b"", encoding="latin-1") -> bytes:
    _require(isinstance(data, (str, bytes, bytearray, list)), "bytes of an unknown kind")
    return _encoded(data, encoding) if isinstance(data, str) else bytes(data)


def _container(kind: type) -> Callable:
    def make(*values):
        _require(all(isinstance(v, (list, tuple, dict, set, frozenset)) for v in values), f"a {kind} of what is none")
        for value in values:
            if issubclass(kind, (set, frozenset)):
                _hashable(value)
            elif issubclass(kind, dict) and not isinstance(value, dict):
                _hashable(key for key, _ in value)
        return kind(*values)

    return make


def _complex(real=0.0, imag=0.0) -> complex:
    _require(isinstance(real, (int, float)) and isinstance(imag, (int, float)), "a complex number of what is none")
    return complex(real, imag)


def _reconstructed(cls, *_):
    return Thing(_name(cls))


def _name(cls) -> str:
    return cls.name if isinstance(cls, (Thing, _Known)) else type(cls).__name__


def _device(kind, index=None) -> str:
    _require(isinstance(kind, str) and isinstance(index, (int, type(None))), "a device without a name")
    return kind if index is None else f"{kind}:{index}"


def _hashable(values) -> None:
    """A tuple of tuples of tuples can take longer to hash than there is time, in a file of a few bytes."""
    flat = (int, float, complex, str, bytes, bool, type(None), Thing, Tensor, torch.dtype)
    for value in values:
        parts = value if isinstance(value, (tuple, frozenset)) else (value,)
        _require(all(isinstance(part, flat) for part in parts), "a key is a container of containers")


def _each(modules: str, name: str, make: Callable) -> dict:
    return {(module, name): _Known(f"{module}.{name}", make) for module in modules.split()}


NUMPY = "numpy.core.multiarray numpy._core.multiarray"
KNOWN = (
    _each("collections", "OrderedDict", _container(OrderedDict))
    | _each("builtins __builtin__", "dict", _container(dict))
    | _each("builtins __builtin__", "list", _container(list))
    | _each("builtins __builtin__", "tuple", _container(tuple))
    | _each("builtins __builtin__", "set", _container(set))
    | _each("builtins __builtin__", "frozenset", _container(frozenset))
    | _each("builtins __builtin__", "complex", _complex)
    | _each("builtins __builtin__", "bytes", _bytes)
    | _each("builtins __builtin__", "bytearray", _bytes)
    | _each("_codecs", "encode", _encoded)
    | _each("copyreg copy_reg", "_reconstructor", _reconstructed)
    | _each(NUMPY, "_reconstruct", lambda *_: Array())
    | _each(NUMPY, "scalar", _scalar)
    | _each("numpy.core.numeric numpy._core.numeric", "_frombuffer", lambda *a: Array(_array(*a)))
    | _each("numpy", "dtype", _dtype)
    | _each("torch", "Size", lambda size=(): tuple(size))
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


def lookup(module: str, name: str):
    """What a name in a file stands for: an entry of the table, a dtype, or a `Thing`. RefusedError: a dangerous one."""
    _require(isinstance(module, str) and isinstance(name, str), "a name is no text")
    if known := KNOWN.get((module, name)):
        return known
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
        return Storage(STORAGES[name])
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
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


class Unpickler:
    """Reads one pickle from a file opened for reading bytes; the file is left just behind it.

    Args:
        file: has read, readline and tell.
        persistent: what a persistent id (a torch storage) stands for; None refuses them.
        nested: what the bytes of a torch.save file inside the pickle hold; None refuses them.
    """

    def __init__(self, file, persistent: Callable | None = None, nested: Callable | None = None):
        self.file, self.persistent, self.nested = file, persistent, nested
        self.stack, self.marks, self.memo = [], [], {}

    def load(self):
        """The object. RefusedError, DamagedError."""
        try:
            for opcode, argument, _ in pickletools.genops(self.file):
                if opcode.name == "STOP":
                    _require(len(self.stack) == 1 and not self.marks, "the pickle ends in the middle of an object")
                    return self.stack[0]
                self._step(opcode.name, argument)
        except (RefusedError, DamagedError):
            raise
        except RecursionError:
            raise DamagedError("it is nested too deeply") from None
        except MemoryError:
            raise DamagedError("it asks for more memory than there is") from None
        except Exception as error:  # anything can be wrong with the arguments that a damaged file gives
            raise DamagedError((str(error) or type(error).__name__).splitlines()[0]) from None
        raise DamagedError("the pickle has no end")

    def _step(self, opcode: str, argument) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                if self.marks and self.marks[-1] == len(stack):
                    self.marks.pop()
                else:
                    stack.pop()
            case "POP_MARK":
                self._above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({"DICT": dict, "LIST": list, "TUPLE": tuple, "SET": set}[opcode[6:]]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                number = int(opcode[-1])
                _require(len(stack) >= number, "the stack is empty")
                values = tuple(stack[-number:])
                del stack[-number:]
                stack.append(values)
            case "TUPLE" | "LIST" | "FROZENSET":
                values = self._above_mark()
                if opcode == "FROZENSET":
                    _hashable(values)
                stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[opcode](values))
            case "DICT":
                stack.append(_pairs(self._above_mark()))
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if opcode == "APPEND" else self._above_mark()
                self._extend(stack[-1], values)
            case "ADDITEMS":
                values = self._above_mark()
                _require(isinstance(stack[-1], set), "items are added to what is no set")
                _hashable(values)
                stack[-1].update(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop() for _ in "kv"][::-1] if opcode == "SETITEM" else self._above_mark()
                target = stack[-1].items if isinstance(stack[-1], Thing) else stack[-1]
                _require(isinstance(target, dict), "items are set in what is no dict")
                target.update(_pairs(values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._named(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                stack.append(_made(made, arguments))
            case "NEWOBJ_EX":
                named, arguments, made = stack.pop(), stack.pop(), stack.pop()
                stack.append(_made(made, (*arguments, named) if named else arguments))
            case "INST":
                arguments = tuple(self._above_mark())
                stack.append(_made(self._named(*argument.split(" ", 1)), arguments))
            case "OBJ":
                made, *arguments = self._above_mark()
                stack.append(_made(made, tuple(arguments)))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "PERSID" | "BINPERSID":
                _require(self.persistent is not None, "it refers to objects outside the file")
                stack.append(self.persistent(argument if opcode == "PERSID" else stack.pop()))
            case "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise DamagedError(f"it refers to what only the program that wrote it has ({opcode})")
            case _:  # a number, a string or bytes
                stack.append(argument)

    def _named(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            _require(self.nested is not None, "it holds a torch file inside a torch file")
            return _Known("torch.storage._load_from_bytes", self.nested)
        return lookup(module, name)

    def _above_mark(self) -> list:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    @staticmethod
    def _extend(target, values: list) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Thing):  # a list of an unknown class
            target.items.update(enumerate(values, len(target.items)))
        else:
            raise DamagedError("items are appended to what is no list")


def _pairs(values: list) -> dict:
    _hashable(values[::2])
    return dict(zip(values[::2], values[1::2], strict=True))


def _made(made, arguments):
    _require(isinstance(arguments, tuple), "arguments are no tuple")
    if isinstance(made, _Known):
        return made.make(*arguments)
    _require(isinstance(made, Thing), "it calls what is no function")
    return Thing(made.name, arguments)


def _build(target, state) -> None:
    """What a file has to say of an object after it was made."""
    if isinstance(target, Array):
        _, shape, dtype, fortran, data = state
        target.value = _array(data, dtype, shape, "F" if fortran else "C")
    elif isinstance(target, _DType):
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        target.order = {"|": "="}.get(order, order)
        _require(target.order in ("<", ">", "="), "a dtype has no byte order")
    elif isinstance(target, Thing):
        target.state = state
    # What else there is, a state dict's `_metadata` say, is an attribute of a container or a tensor: of no use here.
