"""Arguments of a call of torch, which may stand in lists, tuples and dicts."""

from typing import Any

from torch import Tensor


def map_tensors(f, x, kinds: type | tuple[type, ...] = Tensor, *arguments) -> Any:
    """f(tensor, *arguments) in the place of every tensor of `kinds`, a class or a tuple of classes."""
    if isinstance(x, kinds):
        return f(x, *arguments)
    if isinstance(x, dict):
        return {k: map_tensors(f, v, kinds, *arguments) for k, v in x.items()}
    if isinstance(x, (list, tuple)):  # no union: Dynamo of torch 2.8 traces this
        # What is no container takes no call of its own: a layer's arguments are seldom nested.
        items = [
            f(v, *arguments)
            if isinstance(v, kinds)
            else map_tensors(f, v, kinds, *arguments)
            if isinstance(v, (dict, list, tuple))
            else v
            for v in x
        ]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def tensors_in(x):
    """All tensors, in their order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for item in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(item)
