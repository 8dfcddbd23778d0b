"""Pickles of classes that are not here: what Python's own unpickler makes of them, and that other data are refused."""

import io
import pickle
import pickletools

import numpy as np
import pytest

from minegan_fast.files.pickle_writing import Named, write_pickle


class Box:
    pass


class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        return Box if (module, name) == ("far.away", "Box") else super().find_class(module, name)


def written(value) -> bytes:
    file = io.BytesIO()
    write_pickle(file, value)
    return file.getvalue()


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -7, 2**40, 0.1, "", "ä" * 300, b"\x00\xff", [], (), {}, [1, [2, (3,)]], {"a": {1: (None, False)}}],
)  # fmt: skip
def test_plain_data(value):
    read = pickle.loads(written(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "|b1"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_arrays(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    read = pickle.loads(written([array]))[0]
    assert read.dtype == array.dtype.newbyteorder("=")  # as numpy reads its own
    np.testing.assert_array_equal(read, array)
    np.testing.assert_array_equal(pickle.loads(written(array.T)), array.T)


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")
def test_objects_are_a_name_and_a_state():
    box = Named("far.away", "Box", {"inner": Named("far.away", "Box", {"n": 3}), "w": np.ones(2, np.float32)})
    content = written((box, [box]))
    first, (second,) = Reader(io.BytesIO(content)).load()
    assert type(first) is type(second) is type(first.inner) is Box
    assert first.inner.n == 3
    assert first.w.tolist() == [1, 1]
    protocols = {opcode.proto for opcode, _, _ in pickletools.genops(content)}
    assert max(protocols) == 3, "an older Python cannot read it"
    assert b"numpy._core" not in content, "an older numpy cannot read it"


def test_what_is_no_plain_data_is_named():
    with pytest.raises(TypeError, match="a Box is no plain data"):
        written({"a": [Box()]})
