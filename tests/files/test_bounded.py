"""Small files that would take minutes or gigabytes, if reading cost more than the file is long. Most are pickles that
refer to one large thing many times; a hang here is the test's timeout."""

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from minegan_fast.files.reading import MAGIC, read
from minegan_fast.mining import load_bank, load_miner
from minegan_fast.mining.checkpoint import FORMAT
from minegan_fast.models import StyleGAN2Generator, load_generator

pytestmark = pytest.mark.timeout(60)

TUPLE = b"(" + b"N" * 300_000 + b"tq\x000"
SIZED = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1I0\nI1\ntR"


def nested_tuples(levels: int, last: bytes) -> bytes:
    """Each holds the one below three times; then `last`, which finds it in the memo. The stack is empty before that."""
    level = b"".join((b"h" + bytes([i])) * 3 + b"\x87q" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02)q\x00" + level + b"0" * (levels + 1) + last.replace(b"LAST", b"h" + bytes([levels]))


def colliding_tuples(count: int) -> bytes:
    """A dict whose keys are pairs of numbers below 2^61 and have one hash: Python's is xxHash, which can be solved."""
    one, two, five, whole = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64
    inverse, keys, first = pow(two, -1, whole), [], 0
    while len(keys) < count:
        first += 1
        lane = (five + first * two) % whole
        lane = ((lane << 31 | lane >> 33) * one) % whole
        second = (12345 - lane) * inverse % whole
        second -= whole if second >= whole // 2 else 0
        if abs(second) < 2**61 - 1 and second != -1:
            keys.append((first, second))
    assert len({hash(key) for key in keys}) == 1
    pairs = b"".join(b"J" + struct.pack("<i", a) + b"\x8a\x08" + struct.pack("<q", b) + b"\x86N" for a, b in keys)
    return b"\x80\x02}(" + pairs + b"u."


def module_of_modules() -> bytes:
    """20,000 empty modules in one, which the file names 20,000 times."""
    empty = b"cx\nM\n)\x81}X\x08\x00\x00\x00_modules}sb"
    inside = b"".join(b"X\x05\x00\x00\x00%05d" % i + empty for i in range(20_000))
    module = b"cx\nM\n)\x81q\x00}X\x08\x00\x00\x00_modules}(" + inside + b"usb0"
    return b"\x80\x02" + module + b"}X\x01\x00\x00\x00a](" + b"h\x00" * 20_000 + b"es."


def resample_kernel() -> bytes:
    """A network of TensorFlow whose filter is 2^40 numbers in 40 lists."""
    lists = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) + b"0" for i in range(40))
    state = b"}(X\x09\x00\x00\x00variables]X\x0f\x00\x00\x00build_func_nameN"
    state += b"X\x0d\x00\x00\x00static_kwargs}X\x0f\x00\x00\x00resample_kernelh\x28su"
    return b"\x80\x02]K\x01aq\x000" + lists + b"}X\x01\x00\x00\x00acx\nN\n)\x81" + state + b"bs."


def one_dict(outside: int, inside: int) -> bytes:
    inner = b"}(" + b"".join(b"X\x06\x00\x00\x00%06dN" % i for i in range(inside)) + b"uq\x000"
    return b"\x80\x02" + inner + b"}(" + b"".join(b"X\x09\x00\x00\x00ema%06dh\x00" % i for i in range(outside)) + b"u."


def arrays() -> bytes:
    data = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\x000"
    one = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\x00\x00\x10\x00\x85h\x01I00\nh\x00tb"
    return b"\x80\x03" + data + SIZED + b"q\x010}X\x01\x00\x00\x00a](" + one * 3000 + b"es."


HARD = "neither text nor small numbers"
COPIES = "the same data over and over"
UNKNOWN = "holds no generator"
PICKLES = {
    "byte order": (
        nested_tuples(40, b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4I0\nI1\ntR(K\x03LASTtb."),
        "a dtype has no byte order",
    ),
    "keys of tensor data": (
        b"".join(pickle.dumps(one, 2) for one in (MAGIC, 1001, {"little_endian": True}, {}))
        + nested_tuples(40, b"]LASTa."),
        "lists tensor data without a name",
    ),
    "memo": (
        b"\x80\x02N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(1, 60_000)) + b".",
        "holds a NoneType",
    ),
    "tuples of one hash": (colliding_tuples(20_000), HARD),
    "set of numbers": (
        b"\x80\x02c__builtin__\nset\n]("
        + b"".join(b"J" + struct.pack("<i", 2**20 + i) for i in range(5000))
        + b"e\x85R.",
        HARD,
    ),
    "long keys": (b"\x80\x02" + TUPLE + b"}" + b"h\x00Ns" * 60_000 + b".", "a key is a long container"),
    "copies of a list": (
        b"\x80\x02]("
        + b"N" * 200_000
        + b"eq\x00\x85q\x010c__builtin__\nlist\nq\x020]"
        + b"h\x02h\x01R0" * 50_000
        + b".",
        COPIES,
    ),
    "copies of arguments": (
        b"\x80\x02" + TUPLE + b"cnumpy.core.multiarray\n_reconstruct\nq\x010]" + b"h\x01h\x00R0" * 60_000 + b".",
        COPIES,
    ),
    "copies of arguments with names": (
        b"\x80\x04" + TUPLE + b"cx\nY\nq\x010}X\x01\x00\x00\x00aNsq\x020]" + b"h\x01h\x00h\x02\x920" * 60_000 + b".",
        COPIES,
    ),
    "long names": (
        b"\x80\x04X" + struct.pack("<I", 600_000) + b"a." * 300_000 + b"q\x000]" + b"h\x00h\x00\x930" * 60_000 + b".",
        "a name is no name",
    ),
    "arrays of the same bytes": (arrays(), COPIES),
    "modules": (module_of_modules(), UNKNOWN),
    "filter": (resample_kernel(), UNKNOWN),
    "containers": (one_dict(20_000, 20_000), UNKNOWN),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles(tmp_path, kind, zipped):
    content, message = PICKLES[kind]
    if zipped and kind == "keys of tensor data":
        pytest.skip("a zip has no such list")
    if zipped:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", content)
        content = file.getvalue()
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_generator(tmp_path / "file")
    assert len(str(caught.value)) < 3000


def test_keys_that_checkpoints_have(tmp_path):
    """Numbers of parameters, of classes, and ids, by which optimizers of before 2018 name parameters."""
    ids = {140_000_000_000_000 + 8 * i: i for i in range(900)}
    content = {"classes": dict.fromkeys(range(22_000), "x"), "ids": ids}
    torch.save(content, tmp_path / "file")
    assert read(tmp_path / "file").data == content


def test_many_networks_under_prefixes(tmp_path):
    like = StyleGAN2Generator(8, 4, mapping_layers=1, channel_base=4, channel_max=4).state_dict()
    save_file({f"{i}.{name}": torch.zeros(0) for i in range(300) for name in like}, tmp_path / "file")
    with pytest.raises(ValueError, match="looks like"):
        load_generator(tmp_path / "file")


def test_maps_of_noise_that_a_file_leaves_out(tmp_path):
    with torch.device("meta"):
        like = StyleGAN2Generator(2**15, 1, mapping_layers=1, channel_base=1, channel_max=1).state_dict()
    save_file({k: torch.zeros(t.shape) for k, t in like.items() if "noises" not in k}, tmp_path / "file")
    with pytest.raises(ValueError, match="leaves out 2863311504 numbers"):
        load_generator(tmp_path / "file")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_dim": 60_000}, "there are 1 tensors"),
        ({"latent_dim": 60_000, "depth": 1}, "not those of a miner of the sizes"),
        ({"latent_dim": 8, "depth": 10**9}, "1000000000 layers"),
        ({"latent_dim": 10**40, "depth": 1}, "the miner in it is damaged"),
        ([], "the miner in it is damaged"),
        ({"latent_dim": "8"}, "the miner in it is damaged"),
    ],
)
@pytest.mark.parametrize("miners", [None, 10**9])
def test_sizes_in_a_miners_metadata(tmp_path, config, message, miners):
    metadata = {"format": FORMAT, "config": json.dumps(config)} | ({"miners": str(miners)} if miners else {})
    save_file({"layers.0.weight": torch.zeros(1, 8, 8)}, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match=message):
        (load_bank if miners else load_miner)(tmp_path / "file")


def test_a_bank_of_more_miners_than_its_tensors_have(tmp_path):
    metadata = {"format": FORMAT, "config": '{"latent_dim": 2, "depth": 1}', "miners": str(10**9)}
    tensors = {"layers.0.weight": torch.zeros(3, 2, 2), "layers.0.bias": torch.zeros(3, 2)}
    save_file(tensors, tmp_path / "file", metadata)
    with pytest.raises(ValueError, match="said to hold 1000000000 miners"):
        load_bank(tmp_path / "file")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"transform.0.weight": torch.zeros(60_000, 1), "transform.0.bias": torch.zeros(60_000)}, None),
        ({"transform.0.weight": torch.zeros(2, 2), "transform.0.bias": torch.tensor(1.0)}, "not whole"),
        ({"transform.0.weight": torch.zeros(2), "transform.0.bias": torch.zeros(2)}, "not whole"),
    ],
)
def test_sizes_of_an_original_miner(tmp_path, state, message):
    if message is None:  # whose hidden layer of 60,000 x 60,000 the file does not hold
        state |= {"transform.2.weight": torch.zeros(1, 1), "transform.2.bias": torch.zeros(1)}
        state |= {"transform.4.weight": torch.zeros(1, 1), "transform.4.bias": torch.zeros(1)}
        message = "do not follow each other"
    torch.save({"miner": state}, tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        load_miner(tmp_path / "file")


def test_the_constant_of_an_original_miner(tmp_path):
    """A million pixels through a million filters."""
    linear = {"transform.0.weight": torch.zeros(2, 2), "transform.0.bias": torch.zeros(2)}
    semantic = {"input.input": torch.zeros(1, 1, 1000, 1000), "conv1.weight": torch.zeros(10**6, 1, 1, 1)}
    torch.save({"miner": linear, "miner_semantic": semantic}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"its constant is \[1, 1, 1000, 1000\]"):
        load_miner(tmp_path / "file")
