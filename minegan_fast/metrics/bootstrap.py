"""Confidence interval of a metric for small samples."""

import torch

from ._inputs import as_pair


def bootstrap(metric, x, y, samples: int = 200, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of metric(x, y).

    metric: function of two sets of features [N, D], [M, D] -> number (kid's (mean, std) counts as its mean).
    Rows of x and of y are drawn N and M times with replacement, `samples` times; `seed` fixes the draws. `level` of the
    values lie inside.

    A resample holds copies, and copies make a sample less diverse: unbiased kernel distances come out higher than
    metric(x, y) by about the kernel's range / N + / M. Compare intervals with intervals, of equal sample sizes.
    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    x, y = as_pair(x, y)
    if samples < 2 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs samples >= 2 and 0 < level < 1, got {samples} and {level}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        rows = torch.randint(len(x), (len(x),), generator=generator).to(x.device)
        columns = torch.randint(len(y), (len(y),), generator=generator).to(y.device)
        value = metric(x[rows], y[columns])
        values.append(float(value[0] if isinstance(value, tuple) else value))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    return low, high
