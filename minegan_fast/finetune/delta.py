"""Deltas: the trained rows of a network as a small file, to be put onto its base, scaled, combined and taken off."""

import json
import math
import os
import re
import warnings
from collections.abc import Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import hub
from ..files.atomic import save_tensors
from ..ops import write_rows
from .distributed import unwrap
from .hashing import buffer_hashes, fingerprint
from .neurons import compact
from .rows.freezing import Held

FORMAT, VERSION = "minegan_fast.delta", "1"
DELTA = "delta.safetensors"  # its name in a folder, here and on the Hub
_REST = 64 << 20  # bytes of a delta beside its rows, of any network


class _Loaded:
    """What load_delta changed in one model: the base's fingerprint, the base values of every row it touched, and those
    that it wrote there."""

    def __init__(self, base: str):
        self.base = base
        self.rows: dict[str, tuple[int, Tensor, Tensor]] = {}  # {parameter: (axis, sorted rows, base values)}
        self.written: dict[str, Tensor] = {}  # {parameter: the present values of these rows}

    def stands(self, name: str, present: Tensor) -> bool:
        """Whether the rows hold what was written there, as far as half precision tells, in which they may have been."""
        written = self.written[name].to(present.device)
        kinds = (present.dtype, torch.float16, torch.bfloat16)
        return any(torch.equal(present.to(kind), written.to(kind)) for kind in kinds)


# In a model's __dict__, where copies and pickles of it find what is loaded.
_KEY = "_minegan_fast_deltas"


def _bare_fingerprint(model: nn.Module, loaded: _Loaded) -> str:
    """Of the model without its deltas."""
    bare = {}
    for name, parameter in model.named_parameters():
        bare[name] = parameter.detach()
        if name in loaded.rows:
            axis, rows, values = loaded.rows[name]
            bare[name] = bare[name].clone()
            write_rows(bare[name], axis, rows, values)
    return fingerprint(bare)


def save_delta(
    held: Held,
    added: set[int],
    values: nn.Module,
    path: str | os.PathLike,
    part: tuple[str, nn.Module] | None = None,
):
    """Writes every row of the held model that has trained, and its parameters whose id is in `added`; no buffers.

    The base is the model as it was at the first selection, or when parameters of it were added. A UserWarning names
    buffers that have moved since the optimizer was built, as the statistics of batch norm do in train mode.

    values: the model, or a copy of it with averages: where the values come from. part: as of
        `SparseFinetuner.save_delta`.

    safetensors. Per layer `<layer>:rows` int64 [k]; per parameter `<parameter>` [k, ...], the rows in front. Metadata:
    format, version, `base` (fingerprint of the untrained model), `family` (the name of its class), `layers` as JSON
    {layer: [[parameter, axis], ...]}.
    """
    tensors, layers = {}, {}
    values_of = dict(values.named_parameters())
    within, base = ("", held.base) if part is None else (part[0] + ".", fingerprint(part[1]))

    def store(layer, rows, members):
        if not all(name.startswith(within) for name, _ in members):
            return
        layer = layer.removeprefix(within)
        tensors[f"{layer}:rows"] = rows
        layers[layer] = [(name.removeprefix(within), axis) for name, axis in members]
        for name, axis in members:
            if name not in values_of:
                raise RuntimeError(
                    f"{name!r} is not in the model any more, which was changed since the selection: undo the change, "
                    "or release() the model and save it as a whole"
                )
            value = values_of[name]
            tensors[name.removeprefix(within)] = compact(value.detach(), axis, rows.to(value.device))

    for layer in held.layers:
        if layer.name in held.ever:
            rows = held.ever[layer.name].nonzero().flatten()
            store(layer.name, rows, [(m.name, m.axis) for m in layer.members])
    for name, parameter in held.model.named_parameters():
        if id(parameter) in added:
            store(name, torch.arange(parameter.shape[0] if parameter.ndim else 1, device="cpu"), [(name, 0)])
    if not tensors and part is None:
        raise RuntimeError("nothing has been trained yet, so there is no delta; select() first")
    metadata = {"format": FORMAT, "version": VERSION, "base": base, "layers": json.dumps(layers)}
    metadata["family"] = type(held.model if part is None else part[1]).__name__
    then = held.buffers
    now = {name: new.to(then[name].device) for name, new in buffer_hashes(held.model).items() if name in then}
    if moved := [n for n, new in now.items() if n.startswith(within) and not torch.equal(new, then[n])]:
        warnings.warn(
            f"a delta holds no buffers, and of the model's have moved {', '.join(moved[:3])}"
            f"{', ...' if len(moved) > 3 else ''}: the delta alone will not give the same results. Train in eval mode, "
            "where batch norm keeps its statistics, or save the buffers too",
            stacklevel=3,
        )
    save_tensors(path, tensors, metadata)


def is_delta(path: str | os.PathLike) -> bool:
    """Whether the file is one that `save_delta` wrote."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        return False


def base_of(path: str | os.PathLike) -> tuple[str, str]:
    """(fingerprint, class) of the network that a delta was trained from. ValueError: the file is no delta."""
    metadata, _ = _read(path)
    return metadata["base"], metadata.get("family", "model")


def _read(path, most: int = hub.MOST) -> tuple[dict, dict[str, Tensor]]:
    place = hub.local(path, DELTA, most) if hub.is_named(path) else path
    try:
        with safe_open(place, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a delta: {error}; write one with save_delta()") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} holds no delta; write one with save_delta()")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has delta version {metadata.get('version')!r}, this library reads {VERSION}; update "
            "it"
        )
    try:
        layers = json.loads(metadata["layers"])
        wanted = {f"{layer}:rows" for layer in layers} | {str(n) for members in layers.values() for n, _ in members}
        whole = "base" in metadata and all(members and isinstance(axis, int) and axis >= 0
                                           for members in layers.values() for _, axis in members)  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        whole = False
    if not whole or not wanted <= tensors.keys():
        raise ValueError(f"{os.fspath(path)!r} is a damaged delta: what it lists and what it holds differ")
    return metadata, tensors


@torch.no_grad()
def load_delta(
    model: nn.Module | Sequence[nn.Module], path: str | os.PathLike, scale: float = 1.0, strict: bool = True
) -> None:
    """Adds scale·(trained - base) to the rows of a delta, in place; with scale 1 on bare rows it copies the bits.

    path: the file; or on the Hub `hf://user/name`, with `@revision` and `/path/to/delta.safetensors` where needed,
        which takes huggingface_hub. A file that is larger than a delta of this model can be is not downloaded.

    Several deltas may be loaded; rows that are in more than one add up. One that was trained on a model with deltas is
    loaded on top of these. A delta of several networks takes the list that its optimizer was given. Buffers, such as
    batch-norm statistics, are in no delta. ValueError, with the model unchanged, where the file is no delta, its base
    is another model (unless strict=False: then the present rows count as the base), a tensor does not fit or scale is
    not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    model = unwrap(model) if isinstance(model, nn.Module) else nn.ModuleList(model)
    parameters = dict(model.named_parameters())
    # every row in float64, and its number
    metadata, tensors = _read(path, 16 * sum(p.numel() for p in parameters.values()) + _REST)
    wants = (
        f"it was trained from a {_word(metadata.get('family', 'model'))} of fingerprint {_word(metadata['base'])[:12]}"
    )
    layers = json.loads(metadata["layers"])
    loaded = model.__dict__.get(_KEY)
    if strict and loaded is not None and _bare_fingerprint(model, loaded) != loaded.base:
        loaded = None  # other weights are in the model since
    base = loaded.base if loaded is not None else fingerprint(model)
    for layer, members in layers.items():
        rows = tensors[f"{layer}:rows"]
        if rows.ndim != 1 or rows.dtype != torch.int64 or len(rows.unique()) < len(rows):
            raise ValueError(f"{os.fspath(path)!r} is a damaged delta: the rows of {layer!r} are no list of rows")
        for name, axis in members:
            if name not in parameters:
                raise ValueError(
                    f"{os.fspath(path)!r} changes {name!r}, which the model does not have; it is of another model: "
                    f"{wants}"
                )
            shape = parameters[name].shape
            one = (
                list(compact(torch.empty(shape, device="meta"), axis).shape[1:]) if axis < max(len(shape), 1) else None
            )
            if list(tensors[name].shape[1:]) != one:
                raise ValueError(
                    f"{name!r} has rows of shape {list(tensors[name].shape[1:])} in the delta, {one} in the model; "
                    f"{wants}"
                )
            if len(tensors[name]) != len(rows):
                raise ValueError(
                    f"{os.fspath(path)!r} is a damaged delta: {len(rows)} rows of {name!r}, and values of "
                    f"{len(tensors[name])}"
                )
            n = shape[axis] if shape else 1
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n:
                raise ValueError(f"the delta changes rows of {layer!r} beyond its {n}; it is of another model: {wants}")
    # trained on the model as it is now, with the deltas that are loaded: its base are the present rows
    on_top = loaded is not None and base != metadata["base"] and fingerprint(model) == metadata["base"]
    if strict and base != metadata["base"] and not on_top:
        raise ValueError(
            f"{os.fspath(path)!r} was trained on another base: {wants}, and the model's fingerprint is {base[:12]}; "
            "load the one that it was trained from, or pass strict=False"
        )
    if loaded is None:
        loaded = model.__dict__[_KEY] = _Loaded(base)
    for layer, members in layers.items():
        for name, axis in members:
            _add(parameters[name], loaded, name, axis, tensors[f"{layer}:rows"], tensors[name], scale, on_top)


def _word(text: str) -> str:
    """A name in a file of whoever, fit for a message."""
    return re.sub(r"[^\w.]", "?", text)[:64]


def _add(parameter, loaded, name, axis, rows, trained, scale, on_top):
    """Adds one tensor's rows and remembers the base values of those that were bare until now."""
    rows, trained = rows.to(parameter.device), trained.to(parameter.device, parameter.dtype)
    current = compact(parameter.detach(), axis, rows).clone()
    _, known, values = loaded.rows.get(name, (axis, rows[:0], current[:0]))
    known, values = known.to(rows.device), values.to(rows.device)
    bare = ~torch.isin(rows, known)
    known, order = torch.cat([known, rows[bare]]).sort()
    values = torch.cat([values, current[bare]])[order]
    loaded.rows[name] = axis, known, values
    base = current if on_top else values[torch.searchsorted(known, rows)]
    new = current + scale * (trained - base)
    if scale == 1:
        new = trained if on_top else torch.where(bare.view(-1, *[1] * (new.ndim - 1)), trained, new)
    write_rows(parameter, axis, rows, new)
    loaded.written[name] = compact(parameter.detach(), axis, known).clone()


@torch.no_grad()
def unload_delta(model: nn.Module) -> None:
    """Takes all deltas off: every row that one changed has its base's bits again.

    RuntimeError, with the model unchanged, where none is loaded, or where these rows have changed since: by other
    weights, or by training.
    """
    model = unwrap(model)
    loaded = model.__dict__.get(_KEY)
    if loaded is None:
        raise RuntimeError("no delta is loaded into this model")
    parameters = dict(model.named_parameters())
    for name, (axis, rows, _) in loaded.rows.items():
        if not loaded.stands(name, compact(parameters[name].detach(), axis, rows.to(parameters[name].device))):
            raise RuntimeError(
                f"rows of {name!r} that a delta changed have changed since, by other weights or by training, so what "
                "is below it is not known: load the source again"
            )
    del model.__dict__[_KEY]
    for name, (axis, rows, values) in loaded.rows.items():
        parameter = parameters[name]
        write_rows(parameter, axis, rows, values)
