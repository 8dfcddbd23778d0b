"""Confidence interval of a metric for small samples."""

import contextlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ._inputs import Array, as_features, as_pair
from .kernel import kid
from .manifold import precision_recall


def bootstrap(
    metric: Callable[..., Any],
    x: Array,
    y: Array | None = None,
    samples: int = 200,
    seed: int = 0,
    level: float = 0.95,
    method: str = "percentile",
) -> tuple[float, float]:
    """Confidence interval (low, high) of metric(x, y), or of metric(x) where y is None.

    metric: function of features [N, D], and [M, D], -> number; of a tuple the first counts, as of kid the mean, of
        precision_recall the precision. It gets the features in the dtype that they have. What it warns of all samples
        it warns once.
    method: "percentile": rows of x and of y are drawn N and M times with replacement, `samples` times; `seed` fixes the
        draws; `level` of the values lie inside. "jackknife": metric(x, y) and, around it, as many standard errors to
        either side as hold `level` of a normal distribution; the variance is (n - 1) / n times the sum of squared
        deviations of the metrics with one row left out, for x and for y, added. N + M evaluations; samples and seed
        are not used.

    A resample holds copies, and copies make a sample less diverse. Unbiased kernel distances come out higher than
    metric(x, y) by about the kernel's range / N + / M, and the interval lies too high: compare such intervals with each
    other only, of equal sample sizes. FID rises and variance falls in the same way, and the radii of precision and
    recall shrink. The jackknife has no copies and is the better one for kmmd and mmd2, which are U-statistics, and for
    mean_variance and diversity. It refuses precision_recall, which is not smooth, and kid, whose random subsets it
    would take for the sample's error: mmd2 with the polynomial kernel is the KID of all rows. Where x and y have one
    distribution kernel distances are not normal, and it is a rough guide.
    Sources: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979; Efron and Stein, "The Jackknife Estimate
    of Variance", 1981.
    """
    parts = (as_features(x, "x"),) if y is None else as_pair(x, y)
    if method not in ("percentile", "jackknife"):
        raise ValueError(f"unknown method {method!r}: one of percentile, jackknife")
    if samples < 2 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs samples >= 2 and 0 < level < 1, got {samples} and {level}")
    if method == "jackknife" and metric in (kid, precision_recall):
        raise ValueError(f"the jackknife says nothing of {metric.__name__}: use percentile, or mmd2 instead of kid")
    value = _number(metric(*parts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # every resample would repeat what the sample has just warned of
        if method == "percentile":
            return _percentile(metric, parts, samples, seed, level)
        variance = sum(_variance(metric, parts, side) for side in range(len(parts)))
    width = statistics.NormalDist().inv_cdf((1 + level) / 2) * variance**0.5
    return value - width, value + width


@contextlib.contextmanager
def _of(part: str):
    """Adds to an error that it is about a part of the given samples, or about others that were drawn from them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (said of {part})") from error


def _number(value) -> float:
    return float(value[0] if isinstance(value, tuple) else value)


def _percentile(metric, parts, samples: int, seed: int, level: float) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(samples):
        rows = [torch.randint(len(z), (len(z),), generator=generator).to(z.device) for z in parts]
        with _of("a resample with replacement; method='jackknife' takes none"):
            values.append(_number(metric(*(z[i] for z, i in zip(parts, rows, strict=True)))))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    return low, high


def _variance(metric, parts, side: int) -> float:
    """The jackknife's share of the metric's variance that comes from the sample of one side."""
    z = parts[side]
    n = len(z)
    with _of("the samples with one left out"):
        values = [_number(metric(*parts[:side], torch.cat([z[:i], z[i + 1 :]]), *parts[side + 1 :])) for i in range(n)]
    return (n - 1) * statistics.pvariance(values)
