"""Pickles of objects whose classes are not here: plain data, numpy arrays, and objects that are a name and a state.

Python's own pickler writes only classes that it can import, and arrays under a name that numpy changed with its second
version. This one writes the opcodes of protocol 3, which every Python 3 reads, and numpy's old names, which all
versions know.
"""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np


@dataclass
class Named:
    """An object as a pickle describes it: of which class, and with which `__dict__`."""

    module: str
    name: str
    state: dict


def write_pickle(file: BinaryIO, value: Any) -> None:
    """Writes a tree of dicts, lists, tuples, `Named`, arrays, strings, numbers, booleans and None.

    TypeError: something else is in it.
    """
    file.write(pickle.PROTO + b"\x03")
    for piece in _pieces(value):
        file.write(piece)
    file.write(pickle.STOP)


def _pieces(value: Any) -> Iterable[bytes]:
    if isinstance(value, Named):
        yield _global(value.module, value.name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        yield from _pieces(value.state)
        yield pickle.BUILD
    elif isinstance(value, np.ndarray):
        yield from _array(value)
    elif isinstance(value, dict):
        yield pickle.EMPTY_DICT + pickle.MARK
        for pair in value.items():
            for part in pair:
                yield from _pieces(part)
        yield pickle.SETITEMS
    elif isinstance(value, (list, tuple)):
        yield (pickle.EMPTY_LIST if isinstance(value, list) else b"") + pickle.MARK
        for part in value:
            yield from _pieces(part)
        yield pickle.APPENDS if isinstance(value, list) else pickle.TUPLE
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield pickle.dumps(value, 3)[2:-1]  # without the protocol and the end
    else:
        raise TypeError(f"a {type(value).__name__} is no plain data: {value!r}")


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _array(array: np.ndarray) -> Iterable[bytes]:
    code = array.dtype.str  # "<f4"
    yield _global("numpy.core.multiarray", "_reconstruct") + pickle.MARK + _global("numpy", "ndarray")
    yield from _pieces((0,))
    yield from _pieces(b"b")
    yield pickle.TUPLE + pickle.REDUCE + pickle.MARK
    yield from _pieces(1)
    yield from _pieces(array.shape)
    yield _global("numpy", "dtype")
    yield from _pieces((code[1:], False, True))
    yield pickle.REDUCE
    yield from _pieces((3, code[0], None, None, None, -1, -1, 0))
    yield pickle.BUILD
    yield from _pieces(False)
    yield from _pieces(array.tobytes())
    yield pickle.TUPLE + pickle.BUILD
