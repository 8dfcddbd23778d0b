"""From what a pickle says to plain data: arrays become tensors, a pickled network what tensors it holds, by name."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickle_names import Array, DamagedError, Thing

# Of a file, and its tensors: a module that is a part of itself many times over would make endless names.
MOST_MODULES = 100_000
NAME = 64  # letters that a name has without counting as a further module
MOST_TAPS = 64  # of a filter


def plain(value: Any) -> Any:
    """The tree with arrays as tensors, and each network as a dict of its tensors under their dotted names."""
    return _Plain().of(value)


class _Plain:
    """One file's. An object that the file refers to many times is made once."""

    def __init__(self):
        self.known: dict[int, tuple] = {}
        self.walked = 0

    def of(self, value: Any) -> Any:
        if id(value) in self.known:
            return self.known[id(value)][0]
        if isinstance(value, Array):
            return self._remember(value, None if value.value is None else _as_tensor(value.value))
        if isinstance(value, dict):
            made = self._remember(value, {})
            made.update((k, self.of(v)) for k, v in value.items())
            return made
        if isinstance(value, list):
            made = self._remember(value, [])
            made.extend(self.of(v) for v in value)
            return made
        if isinstance(value, tuple):
            return self._remember(value, tuple(self.of(v) for v in value))
        if isinstance(value, Thing):
            if tensors := self.parameters(value):
                return self._remember(value, tensors)
            self._remember(value, value)
            return self._remember(value, self.of(value.items)) if value.items and value.state is None else value
        return value

    def _remember(self, value, made):
        self.known[id(value)] = made, value  # the value is kept alive, so that no other object gets its id
        return made

    def parameters(self, thing: Thing) -> dict[str, Tensor]:
        """The tensors of a pickled network; empty for a Thing that is none.

        torch.nn.Module: `_parameters`, `_buffers`, `_modules` of its state; NVIDIA's persistent classes keep that state
        in their one argument. A TensorFlow network of NVIDIA's: `variables` and, under their names, `components`.
        """
        found = {}

        def walk(thing, prefix: str, above: tuple) -> None:
            if not isinstance(thing, Thing) or thing in above:
                return
            self._walk(prefix)
            state = thing.state
            if not isinstance(state, dict) and len(thing.arguments) == 1:
                described = _fields(thing.arguments[0])
                state = described.get("state") if "class_name" in described else None
            state = _fields(state)
            unsaved = state.get("_non_persistent_buffers_set")
            unsaved = unsaved if isinstance(unsaved, (set, frozenset)) else ()
            for group in ("_parameters", "_buffers"):
                for name, tensor in _fields(state.get(group)).items():
                    self._walk(prefix, name)
                    if isinstance(tensor, Tensor) and isinstance(name, str) and name not in unsaved:
                        found[f"{prefix}{name}"] = tensor
            for name, module in _fields(state.get("_modules")).items():
                self._walk(prefix, name)
                if isinstance(name, str):
                    walk(module, f"{prefix}{name}.", (*above, thing))
            if "variables" in state and "build_func_name" in state:
                for name, array in state["variables"]:
                    self._walk(prefix, name)
                    if isinstance(array, Array) and array.value is not None and isinstance(name, str):
                        found[f"{prefix}{name}"] = self.of(array)
                kernel = _fields(state.get("static_kwargs")).get("resample_kernel")
                taps = kernel if isinstance(kernel, (list, tuple)) and len(kernel) <= MOST_TAPS else [None]
                if all(isinstance(tap, (int, float)) for tap in taps):
                    found[f"{prefix}resample_kernel"] = torch.tensor(kernel, dtype=torch.float32)
                for name, network in _fields(state.get("components")).items():
                    self._walk(prefix, name)
                    if isinstance(name, str):
                        walk(network, f"{prefix}{name}/", (*above, thing))

        walk(thing, "", ())
        return found

    def _walk(self, prefix: str, name: object = "") -> None:
        """Counts a module or a tensor, and the length of what it will be called."""
        if not isinstance(name, str):
            name = ""
        self.walked += 1 + (len(prefix) + len(name)) // NAME
        if self.walked > MOST_MODULES:
            raise DamagedError(f"networks of more than {MOST_MODULES} modules and tensors")


def _fields(value) -> dict:
    return value if isinstance(value, dict) else value.items if isinstance(value, Thing) else {}


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
