"""Crafted and damaged pickles: nothing that a file asks for is ever called, and code is refused by name."""

import builtins
import collections
import contextlib
import copyreg
import functools
import io
import os
import pickle
import random
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from crafted_pickles import CALLS, asks_for, loaded, touch

from minegan_fast.files.pickle_names import DamagedError, RefusedError, Thing
from minegan_fast.files.reading import read


@pytest.mark.parametrize("where", ["pickle", "zip", "legacy", "nested"])
@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (asks_for(os.system, "touch it"), r"(posix|nt)\.system"),
        (asks_for(os.popen, "touch it"), r"os\.popen"),
        (asks_for(eval, "1"), "eval"),
        (asks_for(exec, "1"), "exec"),
        (asks_for(getattr, "os", "system"), "getattr"),
        (asks_for(builtins.__import__, "os"), "__import__"),
        (asks_for(open, "it", "w"), "io.open"),
        (asks_for(functools.partial, "print", 1), "functools.partial"),
        (asks_for(copyreg.add_extension, "a", "b", 1), "copy_?reg.add_extension"),
        (asks_for(pickle.loads, b"."), r"(_|c)?[pP]ickle\.loads"),
        (asks_for(type, "A", (), {}), "type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_is_refused_by_name(tmp_path, evil, named, where):
    file, content = tmp_path / "file", {"weight": torch.ones(2), "args": evil}
    if where == "pickle":
        file.write_bytes(pickle.dumps(content, 4))
    elif where == "nested":
        inner = io.BytesIO()
        torch.save(evil, inner, _use_new_zipfile_serialization=False)
        load_from_bytes = torch.storage._load_from_bytes
        file.write_bytes(pickle.dumps({"storage": asks_for(load_from_bytes, inner.getvalue())}, 4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=where == "zip")
    with pytest.raises(ValueError, match=rf"its pickle asks for '((__builtin__|builtins)\.)?{named}', which is code"):
        read(file)


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "nt\nsystem",
        "subprocess\nPopen",
        "sys\nmodules",
        "builtins\ngetattr",
        "__builtin__\neval",
        "__builtins__\nexec",
        "torch.serialization\nos.system",
        "torch\nserialization.os.system",
        "numpy\n__builtins__",
        "copyreg\nadd_extension",
        "operator\nattrgetter",
        "_operator\nmethodcaller",
        "importlib\nimport_module",
        "runpy\nrun_path",
        "numpy.distutils.exec_command\nexec_command",
        "canary\nCanary.__init__",
        "canary\nCanary.__class__.__base__",
        "torch_utils.persistence\n_reconstruct_persistent_obj.__globals__",
    ],
)
@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL", "INST"])
def test_dangerous_names_are_refused_however_they_are_asked_for(name, how):
    module, attribute = name.split("\n")
    if how == "GLOBAL":
        content = b"c" + name.encode() + b"\n."
    elif how == "INST":
        content = b"(i" + name.encode() + b"\n."
    else:
        parts = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)]
        content = b"\x80\x04" + parts[0] + parts[1] + b"\x93."
    with pytest.raises(RefusedError) as caught:
        loaded(content)
    assert caught.value.wanted == f"{module}.{attribute}"


CANARY, TOUCH = b"ccanary\nCanary\n", b"ccanary\ntouch\n"


@pytest.mark.parametrize(
    "content",
    [
        CANARY + b")R.",
        CANARY + b")\x81.",
        CANARY + b")}\x92.",
        CANARY + b")R}X\x01\x00\x00\x00aK\x01sb.",
        CANARY + b")R}(X\x01\x00\x00\x00aK\x01ub.",
        CANARY + b")RK\x01a.",
        CANARY + b")R(K\x01K\x02e.",
        CANARY + b")RX\x01\x00\x00\x00aK\x01s.",
        CANARY + b")R(X\x01\x00\x00\x00aK\x01u.",
        CANARY + b")R)R.",
        b"(icanary\nCanary\n.",
        b"(ccanary\nCanary\nK\x01o.",
        TOUCH + b"(K\x01tR.",
        b"ccopyreg\n_reconstructor\n(" + CANARY + b"c__builtin__\nobject\nNtR}b.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + TOUCH + CANARY + b"(K\x01t}tR.",
        b"ctorch._utils\n_rebuild_parameter\n(" + CANARY + b")R\x88}tR.",
    ],
)
def test_no_opcode_calls_what_a_file_names(content):
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert CALLS, "Python's own unpickler calls nothing either: the test shows nothing"
    CALLS.clear()
    loaded(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b".",
        b"N",
        b"NN.",
        b"(N.",
        b"0.",
        b"2.",
        b"t.",
        b"R.",
        b"NNR.",
        b"K\x01)R.",
        b"K\x01)\x81.",
        b"]K\x01\x81.",
        b"K\x01K\x02a.",
        b"K\x01K\x02K\x03s.",
        b"}(K\x01u.",
        b"}]K\x01s.",
        b"K\x01(K\x02\x90.",
        b"h\x00.",
        b"Pid\n.",
        b"K\x01Q.",
        b"\x82\x01.",
        b"\x97.",
        b"c\n.",
        b"K\x01K\x02\x93.",
        b"\x86.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 5000 + b"\n.",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I0\nI1\ntR}b" + b"cnumpy\ndtype\n(X\x03\x00\x00\x00f99tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89}tR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00rottR.",
        b"c__builtin__\nlist\n(K\x05tR.",
        b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.",
        b"(" * 3000 + b"t" * 2999 + b"R.",
        b"}K\x01\x85\x85K\x02s.",
        b"(K\x01\x85\x85d.",
        b"\x80\x04\x8f(K\x01\x85\x85\x90.",
        b"\x80\x04(K\x01\x85\x85\x91.",
        b"c__builtin__\nset\n(]K\x01\x85\x85atR.",
        b"ccollections\nOrderedDict\n(]K\x01\x85\x85K\x02\x86atR.",
        b"ctorch\ndevice\n]\x85R.",
    ],
)
def test_what_is_no_pickle_is_damaged(content):
    with pytest.raises(DamagedError):
        loaded(content)


def test_deep_nesting_ends_in_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(ValueError, match="nested too deeply"):
        read(tmp_path / "file")


def test_nothing_is_imported():
    before = set(sys.modules)
    for content in (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00cp037tR.", b"ctorch\nutils.bottleneck\n."):
        with contextlib.suppress(DamagedError):
            loaded(content)
    for name in ("torch\nonnx", "torch\n_lobpcg", "idlelib\nrpc", "this\ns"):
        assert isinstance(loaded(f"c{name}\n.".encode()), Thing)
    assert set(sys.modules) == before


def test_a_few_bytes_do_not_become_a_huge_tensor(tmp_path):
    storage = io.BytesIO()
    torch.save(torch.ones(1).untyped_storage(), storage, _use_new_zipfile_serialization=False)
    huge = asks_for(
        torch._utils._rebuild_tensor_v2,
        asks_for(torch.storage._load_from_bytes, storage.getvalue()),
        0,
        (10**6, 10**6),
        (0, 0),
        False,
        collections.OrderedDict(),
    )
    (tmp_path / "file").write_bytes(pickle.dumps({"a": huge}, 4))
    with pytest.raises(ValueError, match="a tensor is larger than its storage"):
        read(tmp_path / "file")


def check_plain(value, seen):
    """Only data and Things, and no function of anybody's."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Thing):
        for part in (value.arguments, value.state, value.items):
            check_plain(part, seen)
    elif isinstance(value, dict):
        for pair in value.items():
            check_plain(pair, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            check_plain(item, seen)
    else:
        data = (int, float, complex, str, bytes, bytearray, bool, type(None), torch.Tensor, torch.dtype)
        inert = {"Known", "Storage", "DType", "Array"}
        assert isinstance(value, data) or type(value).__name__.lstrip("_") in inert, type(value)


NAMES = [
    *(b"canary\nCanary canary\ntouch collections\nOrderedDict torch._utils\n_rebuild_tensor_v2".split(b" ")),
    *(b"torch._utils\n_rebuild_parameter torch._tensor\n_rebuild_from_type_v2 numpy\ndtype numpy\nndarray".split(b" ")),
    *(b"numpy.core.multiarray\n_reconstruct numpy.core.multiarray\nscalar copyreg\n_reconstructor".split(b" ")),
    *(b"__builtin__\nlist __builtin__\nset builtins\nbytearray _codecs\nencode torch\nFloatStorage".split(b" ")),
    *(b"os\nsystem builtins\neval torch\nfloat32 torch\nSize torch.storage\n_load_from_bytes".split(b" ")),
]
WORDS = [
    *(bytes([b]) for b in b"(.012}]N)la)dtuseboR\x81\x92\x85\x86\x87\x88\x89\x8f\x90\x91\x94\x93Q"),
    *(b"K" + bytes([b]) for b in (0, 1, 2, 255)),
    *(b"q" + bytes([b]) for b in (0, 1)),
    *(b"h" + bytes([b]) for b in (0, 1)),
    *(b"\x8c" + bytes([len(w)]) + w for w in (b"", b"f4", b"<", b"canary", b"touch", b"system", b"os")),
    *(b"C" + bytes([len(w)]) + w for w in (b"", b"1234", b"abcdefgh")),
    *(b"c" + name + b"\n" for name in NAMES),
    *(b"i" + name + b"\n" for name in NAMES[:3]),
    b"J\xff\xff\xff\x7f",
    b"G" + struct.pack(">d", 1.5),
]


def test_random_programs_of_opcodes_call_nothing():
    rng = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(6000):
        # Pushing opcodes first, so that the others have something to work on.
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 30))]
        try:
            check_plain(loaded(b"\x80\x04" + b"".join(words) + b"."), set())
            outcomes["read"] += 1
        except (RefusedError, DamagedError) as error:
            outcomes[type(error).__name__] += 1
        except ValueError as error:
            raise AssertionError(words) from error
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_damaged_files_call_nothing(tmp_path, kind):
    file = tmp_path / "file"
    content = {
        "a": torch.arange(3.0),
        "b": np.arange(3.0),
        "c": [collections.OrderedDict(d=torch.nn.Parameter(torch.ones(2)))],
    }
    if kind == "pickle":
        whole = pickle.dumps(content, 4)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
        whole = file.read_bytes()
    rng = random.Random(1)
    read_well, messages = 0, []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        file.write_bytes(damaged[: rng.choice((len(whole), len(whole), rng.randrange(1, len(whole))))])
        try:
            check_plain(read(file).data, set())
            read_well += 1
        except ValueError as error:
            messages.append(str(error))
    assert read_well > 5
    assert messages
    assert all(str(file) in message and "\n" not in message for message in messages)


def test_zip_files_that_torch_does_not_write(tmp_path):
    file = tmp_path / "file"
    evil = pickle.dumps({"a": asks_for(touch)}, 2)
    for name, compression, message in (
        ("x/data.pkl", zipfile.ZIP_DEFLATED, "it is compressed"),
        ("x/other.pkl", zipfile.ZIP_STORED, "without data.pkl"),
    ):
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr(name, evil)
        with pytest.raises(ValueError, match=message):
            read(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("x/code/__torch__.py", "def forward(self): ...")
    with pytest.raises(ValueError, match="it is a TorchScript program"):
        read(file)


def test_sharing_takes_no_longer_than_reading(tmp_path):
    """Forty lists or modules, each twice in the next: a million million paths."""
    nested, module = [], torch.nn.Module()
    for _ in range(40):
        nested = [nested, nested]
        module, inner = torch.nn.Module(), module
        module.a, module.b = inner, inner
    (tmp_path / "file").write_bytes(pickle.dumps({"a": nested}))
    data = read(tmp_path / "file").data
    assert data["a"][0] is data["a"][1]
    (tmp_path / "file").write_bytes(pickle.dumps({"a": module}))
    with pytest.raises(ValueError, match="networks of more than 100000 modules"):
        read(tmp_path / "file")
