"""From a checkpoint's bytes to plain data. Reading never runs code from a file."""

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import hub
from .pickle_names import DamagedError, RefusedError, Storage, Thing
from .pickles import Unpickler
from .plain import plain

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a torch.save file before 1.6
# A file in a folder of BigGAN-PyTorch.
PART = re.compile(r"(?P<stem>G_ema|G|D|M|state_dict)(?P<suffix>_(copy|best)\d+)?\.pth")
OPTIMIZERS = ("G_optim", "D_optim", "M_optim")
SHARED = 4  # how often a file's bytes may be in its tensors: some programs write a weight under several names
TRIPLE = ("G", "D", "Gs")  # what NVIDIA's TensorFlow programs write: generator, discriminator, averaged generator


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        path: the file, or folder.
        data: nested containers of numbers, strings and tensors; keys are the file's own.
        metadata: the text entries of a safetensors file.
        files: of a folder, the file of every key.
    """

    path: Path
    data: dict
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def read(path: str | Path | Contents) -> Contents:
    """The contents of a safetensors file, a torch.save file (zip or legacy), a pickle of networks, or a folder.

    Contents are given back as they are: whoever needs a file several times reads it once and hands its contents on.

    A folder is one of BigGAN-PyTorch or the original MineGAN (`G_ema.pth`, `G.pth`, `D.pth`, `M.pth`,
    `state_dict.pth`): its data are {"G_ema": {...}, "G": {...}, ...}, optimizers left out (an empty dict). Of several
    suffixes the files without one are taken, else those of `_best0`, else the first. Or it is one of
    pytorch-pretrained-biggan, with `pytorch_model.bin`, or of a hub, with `model.safetensors` or one other safetensors
    file, which is then what is read.

    Of such a folder, a generator's file stands for itself and for the critic and the miner of the same suffix beside
    it, a miner's for the generator too, for which it is no use without, `state_dict.pth` for all of them. A critic's
    file stands for itself alone.

    `hf://user/name/file` is a file on the Hub, and `hf://user/name` the `generator.safetensors` there (`hub.local`).

    Raises:
        FileNotFoundError, ValueError: no such file; a file of another kind, a truncated one, a pickle that asks for
            code (named and refused).
    """
    if isinstance(path, Contents):
        return path
    path = hub.local(path, "generator.safetensors")
    if path.is_dir():
        return _read_folder(path)
    contents = _read_file(path)
    if (part := PART.fullmatch(path.name)) and not contents.metadata:
        stem, suffix = part["stem"], part["suffix"] or ""
        if stem == "state_dict":
            return _read_parts(path, path.parent, suffix)
        beside = {"G_ema": ("D", "M"), "G": ("D", "M"), "M": ("G_ema", "G", "D")}.get(stem, ())
        if any(isinstance(value, Tensor) for value in contents.data.values()):
            return _read_parts(path, path.parent, suffix, (stem, *beside))
    return contents


def _read_folder(path: Path) -> Contents:
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (file := path / name).is_file():
            return _read_file(file)
    found = [part for file in sorted(path.iterdir()) if (part := PART.fullmatch(file.name))]
    suffixes = {part["suffix"] or "" for part in found if part["stem"] in ("G_ema", "G", "D")}
    files = sorted(path.glob("*.safetensors"))
    if not suffixes and len(files) == 1:
        return _read_file(files[0])
    if not suffixes and files:
        raise ValueError(f"{path} is a folder of {', '.join(file.name for file in files)}: give one of them")
    if not suffixes:
        raise ValueError(
            f"{path} is a folder; give the checkpoint file in it (folders are read that hold G_ema.pth, G.pth or "
            "D.pth, as of BigGAN-PyTorch, or pytorch_model.bin, model.safetensors or one file of safetensors)"
        )
    suffix = next((s for s in ("", "_best0") if s in suffixes), min(suffixes))
    return _read_parts(path, path, suffix)


def _read_parts(path: Path, folder: Path, suffix: str, stems=("G_ema", "G", "D", "M", "state_dict")) -> Contents:
    """{stem: what its file in the folder holds}; optimizers' files are named, not read."""
    files = {stem: folder / f"{stem}{suffix}.pth" for stem in (*stems, *OPTIMIZERS)}
    files = {stem: file for stem, file in files.items() if file.is_file()}
    data = {stem: {} if stem in OPTIMIZERS else _read_file(file).data for stem, file in files.items()}
    return Contents(path, data, files=files)


def _read_file(path: Path) -> Contents:
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}: check the path") from None
    if not head:
        raise ValueError(f"{path} is empty; copy or download it again")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":  # also behind a byte order mark
        raise ValueError(f"{path} is a web page, not a checkpoint: the download gave HTML; fetch the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: fetch that with git lfs pull")
    zipped = head[:2] == b"PK"
    if not zipped and head[:1] != b"\x80":
        raise ValueError(f"{path} is neither a safetensors nor a PyTorch file (it begins with {head[:16]})")
    return Contents(path, _read_pickles(path, zipped))


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Contents(path, tensors, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None


def _read_pickles(path: Path, zipped: bool) -> dict:
    content = _read_restricted(path, zipped)
    if isinstance(content, tuple) and len(content) == len(TRIPLE):
        content = dict(zip(TRIPLE, content, strict=True))
    if not isinstance(content, dict):
        kind = content.name if isinstance(content, Thing) else type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected a dict of tensors (a state_dict)")
    return content


def _read_restricted(path: Path, zipped: bool):
    try:
        if zipped:
            content = plain(_read_zip(path))
        else:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                content = plain(_read_stream(view, path.stat().st_size, _read_bytes))
        _check_shared(content, path.stat().st_size)
        return content
    except RefusedError as error:
        raise ValueError(
            f"{path} was refused: {error}; nothing of it was run. "
            "Save the state_dict() of the network on the machine that made the file, and load that"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated, damaged or no file of torch.save ({reason}); nothing of it was run. "
            "Copy or download it again, or save the network's state_dict() with torch.save"
        ) from None


def _read_zip(path: Path):
    """A file of torch.save since 1.6: a zip of one pickle, `data.pkl`, and the bytes of each storage."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
        if len(pickles) != 1:
            raise DamagedError("it is a zip file without data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{root}code/") for name in names):
            raise DamagedError("it is a TorchScript program")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise DamagedError("it is compressed, which torch.save never does")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise DamagedError("it was written on a big-endian machine")
        whole = np.memmap(path, np.uint8, "c")  # what is written into it stays in memory
        storages = {}

        def storage(saved):
            dtype, key, numel = _described(saved)
            if key not in storages:
                entry = archive.getinfo(f"{root}data/{key}")
                if entry.file_size != numel * dtype.itemsize:
                    raise DamagedError(
                        f"the tensor data {key} has {entry.file_size} bytes, not {numel * dtype.itemsize}"
                    )
                head = whole[entry.header_offset : entry.header_offset + 30].tobytes()
                start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
                content = torch.from_numpy(whole[start : start + entry.file_size])
                if len(content) != entry.file_size:
                    raise DamagedError(f"the tensor data {key} ends early")
                aligned = content.data_ptr() % dtype.itemsize == 0
                storages[key] = (content if aligned else content.clone()).view(dtype)
            return storages[key]

        return Unpickler(io.BytesIO(archive.read(pickles[0])), storage, _read_bytes).load()


def _read_stream(file, size: int, nested: Callable | None):
    """A plain pickle, or a file of torch.save before 1.6: pickles one after the other, then the storages' bytes."""
    first = Unpickler(file, None, nested).load()
    if first != MAGIC:
        return first
    Unpickler(file).load()
    system = Unpickler(file).load()
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise DamagedError("it was written on a big-endian machine")
    storages, left = {}, size

    def storage(saved):
        nonlocal left
        if isinstance(saved, tuple) and saved[:1] == ("module",):
            return saved[1]  # a pickled module's class, beside its source
        dtype, key, numel = _described(saved)
        if key not in storages:
            left -= numel * dtype.itemsize
            if left < 0:
                raise DamagedError(f"the tensor data {key} is larger than the file")
            storages[key] = torch.zeros(numel, dtype=dtype)
        whole = storages[key]
        if len(saved) > 5 and saved[5] is not None:
            _, offset, length = saved[5]
            return whole[offset : offset + length]
        return whole

    content = Unpickler(file, storage, nested).load()
    for key in Unpickler(file).load():
        if not isinstance(key, str):
            raise DamagedError("it lists tensor data without a name")
        numel, whole = int.from_bytes(file.read(8), "little"), storages[key]
        data = file.read(whole.numel() * whole.dtype.itemsize)
        if numel != whole.numel() or len(data) != whole.numel() * whole.dtype.itemsize:
            raise DamagedError(f"the tensor data {key} ends early")
        if numel:
            whole.copy_(torch.frombuffer(bytearray(data), dtype=whole.dtype))
    return content


def _check_shared(content, size: int) -> None:
    """DamagedError: the tensors share memory so often that copies of them would be many times the file's `size`."""
    left, waiting, seen = SHARED * size + (1 << 28), [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            left -= value.numel() * value.itemsize
            if left < 0:
                raise DamagedError("its tensors are the same memory over and over")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _read_bytes(data):
    """A file of torch.save inside a pickle: how a tensor is pickled without torch.save."""
    if not isinstance(data, bytes):
        raise DamagedError("it holds a torch file that is no bytes")
    return _read_stream(io.BytesIO(data), len(data), None)


def _described(saved) -> tuple[torch.dtype, str, int]:
    """(dtype, key, length) of a storage that a pickle refers to."""
    if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage" or not isinstance(saved[1], Storage):
        raise DamagedError("it refers to what is no tensor data")
    _, kind, key, _, numel = saved[:5]
    if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
        raise DamagedError("it refers to tensor data without a name or a length")
    return kind.dtype, key, numel
