"""Features as every metric takes them: a tensor or NumPy array [samples, dimensions]; metrics compute in float64."""

import torch
from torch import Tensor

from ..ops.mmd import check_features, check_finite


def as_features(x, name: str, least: int = 1) -> Tensor:
    """x [N, D] as float64 without gradient, on the device where it lies; ValueError for fewer than `least` rows."""
    x = torch.as_tensor(x)
    check_features(x, name)
    check_finite(x, name)
    if len(x) < least:
        raise ValueError(f"{name} has {len(x)} sample(s), this metric needs at least {least}")
    return x.detach().double()


def as_pair(x, y, least: int = 1) -> tuple[Tensor, Tensor]:
    """Two samples of the same dimensions on the same device."""
    x, y = as_features(x, "x", least), as_features(y, "y", least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same number of dimensions, got {x.shape[1]} and {y.shape[1]}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on the same device, got {x.device} and {y.device}")
    return x, y
