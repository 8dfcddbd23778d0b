"""What a sample of features [N, D] must be, and how far its points lie apart."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pdist

from ._op import wide_dtype

MEDIAN_ROWS = 4096  # 8.4 million pairs


def check_features(x: Tensor, name: str) -> None:
    """Raise unless x is a floating-point tensor [samples >= 1, dimensions >= 1]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of features, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} holds {x.dtype}: features are floating point; images go through a feature extractor first"
        )
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{name} must be [samples, dimensions] with at least one of each, got {list(x.shape)}")


def check_finite(x: Tensor, name: str) -> None:
    """Raise if x [samples, dimensions] holds NaN or inf, with the first row that does."""
    if x.detach().sum(dtype=wide_dtype(x.dtype)).isfinite():
        return
    finite = x.isfinite().all(1)
    if not finite.all():  # else it was the sum that overflowed
        bad = (~finite).nonzero().flatten()
        raise ValueError(f"{name} holds NaN or inf in {len(bad)} of {len(x)} rows, the first is row {int(bad[0])}")


def median_distance(x: Tensor, p: float = 2.0, remedy: str = "give a bandwidth > 0") -> float:
    """Median of |x_i - x_j|_p over the pairs i < j of x [N >= 2, D]; of an even count, the mean of the middle two.

    Of more than 4,096 rows, 4,096 are drawn without replacement with a fixed seed, which bounds memory and time.
    Raises ValueError where the median is 0, that is where half of the pairs coincide, with the caller's remedy.
    """
    x = x.detach()
    if len(x) > MEDIAN_ROWS:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MEDIAN_ROWS]
        x = x[rows.to(x.device)]
    x = x.double()
    if p == 2.0 and x.shape[1] > 16:
        # Products are ten times as fast as differences, and their rounding is far below a median.
        x = x - x.mean(0)
        norms = x.square().sum(1)
        i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
        squares = torch.addmm(norms, x, x.T, alpha=-2).add_(norms[:, None])[i, j].clamp_(min=0)
        pairs = squares.sqrt_()
    else:
        pairs = pdist(x, p)
    if pairs.is_cuda:  # Tensor.median is the lower of two middle values; the upper is the lower of the negatives.
        median = float((pairs.median() - (-pairs).median()) / 2)
    else:
        middle = (len(pairs) - 1) // 2, len(pairs) // 2
        median = float(np.partition(pairs.numpy(), middle)[list(middle)].mean())
    if median <= 0:
        raise ValueError(f"the median distance is 0: half of the pairs of samples coincide; {remedy}")
    return median
