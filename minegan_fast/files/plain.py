"""From what a pickle says to plain data: arrays become tensors, a pickled network what tensors it holds, by name."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickle_names import Array, DamagedError, Thing

MOST_MODULES = 100_000  # a module that is a part of itself many times over would make endless names


def plain(value: Any, known: dict | None = None) -> Any:
    """The tree with arrays as tensors, and each network as a dict of its tensors under their dotted names."""
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][0]

    def remember(made):
        known[id(value)] = made, value  # the value is kept alive, so that no other object gets its id
        return made

    if isinstance(value, Array):
        return remember(None if value.value is None else _as_tensor(value.value))
    if isinstance(value, dict):
        made = remember({})
        made.update((k, plain(v, known)) for k, v in value.items())
        return made
    if isinstance(value, list):
        made = remember([])
        made.extend(plain(v, known) for v in value)
        return made
    if isinstance(value, tuple):
        return remember(tuple(plain(v, known) for v in value))
    if isinstance(value, Thing):
        if tensors := parameters(value):
            return remember(tensors)
        return plain(value.items, known) if value.items and value.state is None else value
    return value


def parameters(thing: Thing) -> dict[str, Tensor]:
    """The tensors of a pickled network; empty for a Thing that is none.

    torch.nn.Module: `_parameters`, `_buffers`, `_modules` of its state; NVIDIA's persistent classes keep that state in
    their one argument. A TensorFlow network of NVIDIA's: `variables` and, under their names, `components`.
    """
    found, walked = {}, 0

    def walk(thing, prefix: str, above: tuple) -> None:
        nonlocal walked
        if not isinstance(thing, Thing) or thing in above:
            return
        walked += 1
        if walked > MOST_MODULES:
            raise DamagedError(f"a network of more than {MOST_MODULES} modules")
        state = thing.state
        if not isinstance(state, dict) and len(thing.arguments) == 1:
            described = _fields(thing.arguments[0])
            state = described.get("state") if "class_name" in described else None
        state = _fields(state)
        unsaved = state.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, tensor in _fields(state.get(group)).items():
                if isinstance(tensor, Tensor) and isinstance(name, str) and name not in unsaved:
                    found[f"{prefix}{name}"] = tensor
        for name, module in _fields(state.get("_modules")).items():
            walk(module, f"{prefix}{name}.", (*above, thing))
        if "variables" in state and "build_func_name" in state:
            for name, array in state["variables"]:
                if isinstance(array, Array) and array.value is not None and isinstance(name, str):
                    found[f"{prefix}{name}"] = _as_tensor(array.value)
            if (kernel := _fields(state.get("static_kwargs")).get("resample_kernel")) is not None:
                found[f"{prefix}resample_kernel"] = torch.tensor(kernel, dtype=torch.float32)
            for name, network in _fields(state.get("components")).items():
                walk(network, f"{prefix}{name}/", (*above, thing))

    walk(thing, "", ())
    return found


def _fields(value) -> dict:
    return value if isinstance(value, dict) else value.items if isinstance(value, Thing) else {}


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
