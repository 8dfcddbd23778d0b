"""Maximum mean discrepancy between two samples x [N, D] and y [M, D].

    mmd2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

The biased estimator takes the first two means over all pairs, the unbiased one over the pairs i != j.
Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, Lemma 6.

    gaussian      k(a, b) = exp(-|a - b|_2^2 / (2 sigma^2))
    laplacian     k(a, b) = exp(-|a - b|_1 / sigma)
    polynomial    k(a, b) = (a.b / D + 1)^3
    energy        k(a, b) = -|a - b|_2

Everything is computed in float64. Where x and y are close the three means cancel, and a training loss that is nearly
zero is the one whose value and gradient must be right.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pdist

__all__ = ["check_features", "check_finite", "median_distance", "mmd2"]

_TILE = 1 << 21  # elements of the largest temporary, 16 MiB in float64
_MEDIAN_ROWS = 4096  # 8.4 million pairs


def _row_chunks(rows: int, elements_per_row: int):
    step = max(1, _TILE // max(1, elements_per_row))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class _EuclideanDistance(torch.autograd.Function):
    """|a_i - b_j|_2 [n, m] from differences, exact for rows that nearly coincide; subgradient 0 where they do.

    With w_ij = g_ij / dist_ij: da_i = sum_j w_ij (a_i - b_j), db_j = sum_i w_ij (b_j - a_i). `dist` is saved as an
    output, so the backward is differentiable through it to any order.
    """

    @staticmethod
    def forward(ctx, a, b):
        dist = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(a, b, dist)
        return dist

    @staticmethod
    def backward(ctx, g):
        a, b, dist = ctx.saved_tensors
        apart = dist > 0
        w = torch.where(apart, g / torch.where(apart, dist, 1.0), 0.0)
        return w.sum(1, keepdim=True) * a - w @ b, w.sum(0).unsqueeze(1) * b - w.T @ a


class _ManhattanDistance(torch.autograd.Function):
    """|a_i - b_j|_1 [n, m] without a tensor [n, m, D]; subgradient 0 where components are equal."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.cdist(a, b, p=1.0)

    @staticmethod
    def backward(ctx, g):
        return _ManhattanDistanceBackward.apply(g, *ctx.saved_tensors)


class _ManhattanDistanceBackward(torch.autograd.Function):
    """da_i = sum_j g_ij s_ij, db_j = -sum_i g_ij s_ij with s_ij = sign(a_i - b_j) [D]; linear in g, constant in a and
    b."""

    @staticmethod
    def forward(ctx, g, a, b):
        ctx.save_for_backward(a, b)
        da, db = torch.empty_like(a), torch.zeros_like(b)
        for i, j in _row_chunks(len(a), b.numel()):
            sign = torch.sign(a[i:j, None] - b)
            da[i:j] = torch.einsum("nm,nmd->nd", g[i:j], sign)
            db -= torch.einsum("nm,nmd->md", g[i:j], sign)
        return da, db

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dda, ddb):
        a, b = ctx.saved_tensors
        dg = a.new_empty(len(a), len(b))
        for i, j in _row_chunks(len(a), b.numel()):
            dg[i:j] = (torch.sign(a[i:j, None] - b) * (dda[i:j, None] - ddb)).sum(2)
        return dg, None, None


def _average(kernel, bandwidths):
    first, *rest = (kernel(s) for s in bandwidths)
    return sum(rest, first) / len(bandwidths) if rest else first


def _gaussian(a, b, bandwidths):
    # Not clamped at 0: the Hessian of exp(-d2/2s^2) at coincident points is -I/s^2, and a clamp would drop it.
    d2 = torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1, keepdim=True)
    return _average(lambda s: torch.exp(d2 * (-0.5 / s**2)), bandwidths)


def _laplacian(a, b, bandwidths):
    distance = _ManhattanDistance.apply(a, b)
    return _average(lambda s: torch.exp(distance / -s), bandwidths)


def _polynomial(a, b, bandwidths):
    base = torch.addmm(a.new_ones(()), a, b.T, alpha=1 / a.shape[1])
    return base * base * base


def _energy(a, b, bandwidths):
    return -_EuclideanDistance.apply(a, b)


_KERNELS = {"gaussian": _gaussian, "laplacian": _laplacian, "polynomial": _polynomial, "energy": _energy}


def _sum_pairs(k, a, b):
    return sum(k(a[i:j], b).sum() for i, j in _row_chunks(len(a), len(b)))


def _sum_distinct_pairs(k, a):
    """Sum of k(a_i, a_j) over i != j: twice the upper triangle, so the diagonal is left out by its index."""
    return 2 * sum(k(a[i:j], a[i:]).triu(1).sum() for i, j in _row_chunks(len(a), len(a)))


def _sum_diagonal(kernel, a):
    if kernel == "polynomial":
        return (a.square().mean(1) + 1).pow(3).sum()
    return 0.0 if kernel == "energy" else float(len(a))


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
    finite = x.isfinite().all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(f"{name} holds NaN or inf in {len(bad)} of {len(x)} rows, the first is row {int(bad[0])}")


def median_distance(x: Tensor, p: float = 2.0) -> float:
    """Median of |x_i - x_j|_p over the pairs i < j of x [N >= 2, D]; of an even count, the mean of the middle two.

    Of more than 4,096 rows, 4,096 are drawn without replacement with a fixed seed, which bounds memory and time.
    Raises ValueError where the median is 0, that is where half of the pairs coincide.
    """
    x = x.detach().double()
    if len(x) > _MEDIAN_ROWS:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_MEDIAN_ROWS]
        x = x[rows.to(x.device)]
    pairs = pdist(x, p)
    # Tensor.median is the lower of two middle values; the upper one is the lower one of the negatives.
    median = float((pairs.median() - (-pairs).median()) / 2)
    if median <= 0:
        raise ValueError("the median distance is 0: half of the pairs of samples coincide; give a bandwidth > 0")
    return median


def _check_bandwidths(bandwidth) -> list[float]:
    values = bandwidth.tolist() if isinstance(bandwidth, Tensor) else bandwidth
    values = [values] if isinstance(values, (int, float)) else list(values)
    if not values or not all(math.isfinite(s) and s > 0 for s in values):
        raise ValueError(f"bandwidth must be a finite number > 0 or a non-empty sequence of such, got {bandwidth!r}")
    return [float(s) for s in values]


def mmd2(x: Tensor, y: Tensor, kernel: str = "gaussian", bandwidth=None, unbiased: bool = True) -> Tensor:
    """Squared maximum mean discrepancy of two samples; the equations are at the top of this file.

    x: [N, D] floating point; y: [M, D], same dtype and device.
    kernel: "gaussian" | "laplacian" | "polynomial" | "energy".
    bandwidth: sigma > 0, in the units of x; a sequence averages the kernels; None takes the median distance over the
        pairs i < j of the pooled sample (L1 distances for laplacian; `median_distance` says what happens beyond 4,096
        rows), a constant for the gradient. polynomial and energy have no bandwidth and do not use it.
    unbiased: leave the pairs i = j within a sample out (needs N, M >= 2); such an estimate can be negative.

    Returns a scalar: float64 for float64 inputs, else float32. Computed in float64, so that for float32 inputs
    |error| <= 1e-8 + 1e-3 |value|. Differentiable twice in x and y; distance kernels have subgradient 0 at coincident
    points. Without gradients no more than 16 MiB a temporary is held beside float64 copies of x and y; with gradients
    autograd keeps N x M matrices.

    Raises TypeError for features that are not floating point or of two dtypes; ValueError for shapes, devices, kernel
    or bandwidth that do not fit, too few samples, and NaN or inf, with the row.
    """
    check_features(x, "x")
    check_features(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same number of dimensions, got {x.shape[1]} and {y.shape[1]}")
    if x.dtype != y.dtype:
        raise TypeError(f"x and y must have the same dtype, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on the same device, got {x.device} and {y.device}")
    if kernel not in _KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: one of {', '.join(_KERNELS)}")
    N, M = len(x), len(y)
    if unbiased and min(N, M) < 2:
        raise ValueError(
            f"the unbiased estimate needs at least 2 samples each, got {N} and {M}; unbiased=False takes 1"
        )
    check_finite(x, "x")
    check_finite(y, "y")

    a, b = x.double(), y.double()
    if kernel != "polynomial":
        # Distances do not see a common shift, the rounding of |a|^2 + |b|^2 - 2ab does.
        center = ((a.sum(0) + b.sum(0)) / (N + M)).detach()
        a, b = a - center, b - center
    if bandwidth is not None:
        bandwidths = _check_bandwidths(bandwidth)
    elif kernel in ("gaussian", "laplacian"):
        bandwidths = [median_distance(torch.cat([a, b]), p=1.0 if kernel == "laplacian" else 2.0)]
    else:
        bandwidths = []

    def k(rows, columns):
        return _KERNELS[kernel](rows, columns, bandwidths)

    def mean_within(z):
        n, total = len(z), _sum_distinct_pairs(k, z)
        return total / (n * (n - 1)) if unbiased else (total + _sum_diagonal(kernel, z)) / n**2

    value = mean_within(a) + mean_within(b) - 2 * _sum_pairs(k, a, b) / (N * M)
    return value.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
