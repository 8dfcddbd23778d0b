"""Pickles as data: what is read equals what Python reads; an unknown class is remembered, not made."""

import collections
import copyreg
import pickle
import sys

import numpy as np
import pytest
import torch
from crafted_pickles import Canary, loaded, touch

from minegan_fast.files.pickle_names import Thing
from minegan_fast.files.reading import read

TREE = {
    "numbers": [
        0,
        1,
        -1,
        255,
        256,
        65536,
        -(2**31),
        2**31,
        2**70,
        -(2**2100),
        1.5,
        -0.0,
        float("inf"),
        True,
        False,
        None,
    ],
    "text": ["", "a", "ä€😀", "x" * 300, "y" * 70000],
    "bytes": [b"", b"\0\xff", b"z" * 300, bytearray(b"abc")],
    "containers": [
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        [],
        [[]],
        {},
        {"a": {"b": (1, [2])}},
        {1, 2},
        frozenset({3}),
    ],
    "ordered": collections.OrderedDict(b=1, a=2),
    "complex": 1 + 2j,
    (1, "key"): "tuple as key",
}

SHARED_TENSOR = torch.zeros(1 << 18)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_numbers_and_strings(protocol):
    assert loaded(pickle.dumps(TREE, protocol)) == TREE
    shared = [1]
    a, b = loaded(pickle.dumps([shared, shared], protocol))
    assert a is b
    circle = []
    circle.append(circle)
    again = loaded(pickle.dumps(circle, protocol))
    assert again[0] is again


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2", "u1", "<i8", ">i2", "?"])
def test_arrays_become_tensors(protocol, kind):
    arrays = [
        np.arange(24).reshape(2, 3, 4).astype(kind),
        np.asfortranarray(np.arange(6).reshape(2, 3)).astype(kind, order="F"),
        np.array(3).astype(kind),
        np.zeros((0, 5), kind),
        np.arange(12).astype(kind)[::2],
    ]
    for array, tensor in zip(arrays, loaded(pickle.dumps(arrays, protocol)), strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert tuple(tensor.shape) == array.shape
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert loaded(pickle.dumps(np.float64(1.5), protocol)) == 1.5


def test_arrays_of_objects_are_left_out():
    assert loaded(pickle.dumps({"a": np.array([{}, 1], object), "b": 2}, 4)) == {"a": None, "b": 2}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_tensors_pickled_without_torch_save(tmp_path, protocol):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "part": base[1:3, ::2],
        "turned": base.T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    (tmp_path / "file").write_bytes(pickle.dumps(tensors, protocol))
    for name, tensor in read(tmp_path / "file").data.items():
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_unknown_classes_are_remembered_not_made(tmp_path):
    class Config(dict):
        pass

    Config.__module__, Config.__qualname__ = "canary", "Config"
    sys.modules["canary"].Config = Config
    content = {"config": Config(depth=3), "canary": object.__new__(Canary), "weight": torch.ones(2)}
    copyreg.pickle(Canary, lambda c: (touch, (1, 2)))  # pickled as a call of a function
    touch.__module__ = "canary"
    try:
        torch.save(content, tmp_path / "file")
    finally:
        del copyreg.dispatch_table[Canary]
        touch.__module__ = __name__
    data = read(tmp_path / "file").data
    assert data["config"] == {"depth": 3}
    assert isinstance(data["canary"], Thing)
    assert (data["canary"].name, data["canary"].arguments) == ("canary.touch", (1, 2))
    assert torch.equal(data["weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({str(i): SHARED_TENSOR for i in range(400)}, "the same memory over and over"),
        ({"giant": torch.zeros(1).expand(10**9)}, "a tensor is larger than its storage"),
        ({i * (2**61 - 1): 0 for i in range(1, 9)}, "a key is a huge number"),
    ],
    ids=["shared", "stride 0", "colliding keys"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_reading_grows_no_faster_than_the_file(tmp_path, content, message, zipped):
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file")


def test_weights_under_several_names_are_read(tmp_path):
    torch.save(dict.fromkeys("abc", SHARED_TENSOR), tmp_path / "file")
    data = read(tmp_path / "file").data
    assert data["a"].data_ptr() == data["c"].data_ptr()


@pytest.mark.parametrize("levels", [14, 40])
def test_tuples_of_tuples_are_no_keys(tmp_path, levels):
    """Each level holds the one below three times: its hash takes 3^levels steps."""
    level = b"".join((b"h" + bytes([i])) * 3 + b"\x87q" + bytes([i + 1]) for i in range(levels))
    (tmp_path / "file").write_bytes(b"\x80\x02)q\x00" + level + b"}h" + bytes([levels]) + b"Ns.")
    with pytest.raises(ValueError, match="a key is a container of containers"):
        read(tmp_path / "file")
