"""Checks of arguments that several ops share. Each message names the argument, what it must be and what it is."""

import math

from torch import Tensor

from ._op import DTYPE_CODES


def check_tensor(x: Tensor | None, name: str, optional: bool = False) -> None:
    """TypeError unless x is a tensor of a dtype that the ops take."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPE_CODES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a float32, float64, bfloat16 or float16 tensor{' or None' * optional}, got {kind}"
        )


def check_beside(x: Tensor, name: str, other: Tensor, others: str, optional: bool = False) -> None:
    """As `check_tensor`, and ValueError unless x is on the device of `other`, an argument that is named `others`."""
    check_tensor(x, name, optional)
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {others}, {other.device}, got {x.device}; "
            f"move it with {name}.to({others}.device)"
        )


def check_factor(value: float, name: str, zero: bool = False) -> None:
    """ValueError unless the number is finite and above 0, or 0 where `zero` allows it."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{name} must be finite and {'>=' if zero else '>'} 0, got {value}")
