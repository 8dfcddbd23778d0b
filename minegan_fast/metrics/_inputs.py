"""What metrics take: a tensor or NumPy array, of features [samples, dimensions]."""

import warnings
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..ops._features import check_features, check_finite

Array: TypeAlias = Tensor | np.ndarray  # what every metric takes


def as_tensor(x: Array, name: str) -> Tensor:
    """A tensor unchanged, an array as a tensor; TypeError for all else."""
    if isinstance(x, np.ndarray) and (min(x.strides, default=0) < 0 or not (x.flags.writeable and x.dtype.isnative)):
        # Reversed, read-only or of foreign byte order: torch would refuse it, or warn of it.
        x = np.array(x, x.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        got = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{name} must be a tensor or array of numbers, not {got}") from None


def as_features(x: Array, name: str, least: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """x [N, D] without gradient, on the device where it lies, as `dtype`; None: float64 as float64, all else as
    float32. ValueError for fewer than `least` rows."""
    x = as_tensor(x, name)
    check_features(x, name)
    check_finite(x, name)
    if len(x) < least:
        raise ValueError(f"{name} has {len(x)} sample(s), this metric needs at least {least}")
    return x.detach().to(dtype or torch.promote_types(x.dtype, torch.float32))


def as_pair(x: Array, y: Array, least: int = 1, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Two samples of the same dimensions on the same device, as `dtype`; None: the wider of their dtypes."""
    x, y = as_features(x, "x", least, dtype), as_features(y, "y", least, dtype)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same number of dimensions, got {x.shape[1]} and {y.shape[1]}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on the same device, got {x.device} and {y.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def warn_of_few(counts: dict[str, int], least: int, metric: str, consequence: str, stacklevel: int = 3) -> None:
    """One UserWarning that names every sample of fewer than `least`, on behalf of the caller's caller."""
    few = " and ".join(f"{name} has {count}" for name, count in counts.items() if count < least)
    if few:
        warnings.warn(f"{few} samples: with fewer than {least} {metric} {consequence}", stacklevel=stacklevel)
