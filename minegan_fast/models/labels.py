"""The classes that a conditional network is given: labels, or points among its class embeddings."""

from collections.abc import Callable

import torch
from torch import Tensor


def checked_labels(y: Tensor, classes: int) -> Tensor:
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(f"labels must be integers of shape [B], got {y.dtype} {list(y.shape)}")
    # On a GPU the check would wait for the device, whose own kernel reports a wrong label.
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels must lie in 0..{classes - 1}, got {low}..{high}")
    return y.long()


def class_vectors(z: Tensor, y: Tensor | None, classes: int, size: int, table: Callable[[Tensor], Tensor]) -> Tensor:
    """y where it is embeddings [B, size], `table(y)` where it is labels [B]. ValueError: y is missing, of another
    shape, or of another batch than z."""
    if y is None:
        raise ValueError(f"the network is conditional: give y, labels [B] below {classes} or embeddings [B, {size}]")
    if y.is_floating_point() and (y.ndim != 2 or y.shape[1] != size):
        raise ValueError(f"class embeddings must have shape [B, {size}], got {list(y.shape)}")
    c = y if y.is_floating_point() else table(checked_labels(y, classes))
    if len(c) != len(z):
        raise ValueError(f"z and y must be of one batch, got {len(z)} and {len(c)}")
    return c
