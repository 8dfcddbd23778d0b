"""Maximum mean discrepancy between two samples x [N, D] and y [M, D].

    mmd2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

The biased estimator takes the first two means over all pairs, the unbiased one over the pairs i != j.
Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, Lemma 6.

    gaussian      k(a, b) = exp(-|a - b|_2^2 / (2 sigma^2))          f(t) = sum of exp(c t),      t = |a - b|_2^2
    laplacian     k(a, b) = exp(-|a - b|_1 / sigma)                  f(t) = sum of exp(c t),      t = |a - b|_1
    energy        k(a, b) = -|a - b|_2                               f(t) = -sqrt(t),             t = |a - b|_2^2
    polynomial    k(a, b) = (a.b / D + 1)^3                          f(t) = (c t + 1)^3,          t = a.b

With z = [x; y], and w the weight of a pair, which depends on the samples that its two belong to, all of it is a sum of
w f(t) over the pairs i < j. It is made in tiles of rows p and columns q of z, whose matrices are all that is ever held:

    squared       A = 2 w f'       B = 4 w f'' <p - q, hp - hq>       gp = A (p - q),        hess = A (hp - hq) + B (p - q)
    laplacian     A = w f'         B = w f'' <sign(p - q), hp - hq>   gp = A sign(p - q),    hess = B sign(p - q)
    polynomial    A = w f'         B = w f'' (<p, hq> + <hp, q>)      gp = A q,              hess = A hq + B q

summed over the columns; gq, summed over the rows, is the same with p and q exchanged and A and B transposed. g is the
gradient, hess its derivative along a cotangent h of it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._features import check_features, check_finite, median_distance
from ._op import Op, forced_backend
from .manhattan import manhattan_distance, manhattan_signs, manhattan_slopes

__all__ = ["mmd2"]

KERNELS = ("gaussian", "laplacian", "polynomial", "energy")
_TILE = {"cpu": (512, 2048), "cuda": (2048, 8192)}  # rows, at least as many columns
_ALL = 1 << 40


class Plan(NamedTuple):
    """A kernel, the c of its f, the weights of a pair within x, within y and across."""

    kernel: str
    numbers: list[float]
    weights: tuple[float, float, float]

    @property
    def squared(self) -> bool:
        return self.kernel in ("gaussian", "energy")


def derivatives(kernel: str, numbers: Sequence[float], t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' at t."""
    if kernel == "polynomial":
        (c,) = numbers
        base = t * c + 1
        return base**3, 3 * c * base**2, 6 * c**2 * base
    if kernel == "energy":
        root = t.sqrt()
        inverse = torch.where(t > 0, 1 / root, 0.0)  # no force between points that coincide
        return -root, -inverse / 2, inverse**3 / 4
    terms = [torch.exp(c * t) for c in numbers]
    return tuple(sum(c**k * e for c, e in zip(numbers, terms, strict=True)) for k in range(3))


@Op
def mmd_tile(
    p: Tensor,
    q: Tensor,
    hp: Tensor | None,
    hq: Tensor | None,
    kernel: str,
    numbers: Sequence[float],
    weight: float,
    diagonal: bool,
    order: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of w f over a tile [r, c] (0-d, float64), A and B, which are empty below order 1 and 2.

    p [r, D] and hp are rows, q [c, D] and hq columns, of one dtype; rows are contiguous. `diagonal`: p are the first
    of q, and only the pairs i < j count. Order -1 gives w f itself in the place of A.
    """
    a, b = p.double(), q.double()
    if kernel == "polynomial":
        t = a @ b.T
    elif kernel == "laplacian":
        t = torch.cdist(a, b, p=1.0)
    else:
        t = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    f, first, second = (weight * (d.triu(1) if diagonal else d) for d in derivatives(kernel, numbers, t))
    A = B = p.new_empty(0, 0)
    if order == -1:
        A = f.to(p.dtype)
    if order >= 1:
        A = (first * (2 if kernel in ("gaussian", "energy") else 1)).to(p.dtype)
    if order == 2:
        u, v = hp.double(), hq.double()
        if kernel == "laplacian":
            along = manhattan_slopes.reference(a, b, u, v)
        else:
            along = a @ v.T + u @ b.T
            if kernel != "polynomial":
                along = 4 * ((a * u).sum(1, keepdim=True) + (b * v).sum(1) - along)
        B = (second * along).to(p.dtype)
    return f.sum(), A, B


def tiles(N: int, n: int, weights: Sequence[float], rows: int, columns: int) -> Iterator[tuple]:
    """(rows i:j, columns k:l, weight, diagonal) of all tiles above the diagonal; none reaches from x into y."""
    within_x, within_y, across = weights
    for begin, end, within in ((0, N, within_x), (N, n, within_y)):
        for i in range(begin, end, rows):
            j = min(i + rows, end)
            for k in range(i, end, columns):
                yield slice(i, j), slice(k, min(k + columns, end)), within, k == i
            for k in range(N, n if begin == 0 else N, columns):
                yield slice(i, j), slice(k, min(k + columns, n)), across, False


def _sum_and_slope(
    z: Tensor, N: int, plan: Plan, h: Tensor | None, order: int, wanted: tuple[bool, bool], backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """The sum of w f over all pairs (0-d, float64) and for order 1 its gradient by z, for order 2 that along h.

    wanted: whether x's rows of it are, and y's; the others are not computed and undefined.
    """
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    slope = torch.zeros_like(z) if order else None
    rows, columns = _TILE["cuda" if z.is_cuda else "cpu"] if order or not z.is_cuda else (_ALL, _ALL)
    with torch.autocast(z.device.type, enabled=False):
        for r, c, weight, diagonal in tiles(N, len(z), plan.weights, rows, columns):
            sides = wanted[r.start >= N], wanted[c.start >= N]
            this = order if any(sides) else 0
            if order == 2 and not this:
                continue
            hr, hc = (h[r], h[c]) if this == 2 else (None, None)
            f, A, B = mmd_tile(
                z[r], z[c], hr, hc, plan.kernel, plan.numbers, weight, diagonal, this, backend=backend
            )
            total += f
            if not this:
                continue
            if sides[0]:
                _add_slopes(slope[r], plan, A, B, z[r], z[c], hr, hc, backend)
            if sides[1]:
                _add_slopes(slope[c], plan, A.T, B.T, z[c], z[r], hc, hr, backend)
    return total, slope


def _add_slopes(out: Tensor, plan: Plan, A, B, p, q, hp, hq, backend: str | None) -> None:
    """Adds to out what the columns of A, and of B where there is an h, do to the rows."""
    if plan.kernel == "laplacian":
        out += manhattan_signs(A if hp is None else B, p, q, backend=backend)
        return
    pairs = [(A, p, q)] if hp is None else [(A, hp, hq), (B, p, q)]
    for weights, near, far in pairs:
        if plan.squared:
            out.addcmul_(weights.sum(1, keepdim=True), near)
        out.addmm_(weights, far, alpha=-1.0 if plan.squared else 1.0)


class _Mmd(Function):
    """The sum over all pairs. The gradient is made with the value: of the tiles it needs their forward anyway."""

    @staticmethod
    def forward(ctx, x, y, center, plan, backend):
        ctx.args = plan, backend
        z = _pooled(x, y, center)
        wanted = tuple(ctx.needs_input_grad[:2])
        total, ctx.slope = _sum_and_slope(z, len(x), plan, None, int(any(wanted)), wanted, backend)
        ctx.save_for_backward(x, y, center)
        return total

    @staticmethod
    def backward(ctx, g):
        x, y, center = ctx.saved_tensors
        gx, gy = _Gradient.apply(x, y, center, ctx.slope, *ctx.args)
        wanted = ctx.needs_input_grad
        return g * gx if wanted[0] else None, g * gy if wanted[1] else None, None, None, None


class _Gradient(Function):
    @staticmethod
    def forward(ctx, x, y, center, slope, plan, backend):
        ctx.args = plan, backend
        ctx.save_for_backward(x, y, center)
        return slope[: len(x)].to(x.dtype), slope[len(x) :].to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, hx, hy):
        x, y, center = ctx.saved_tensors
        z, h = _pooled(x, y, center), _pooled(hx, hy, None)
        wanted = tuple(ctx.needs_input_grad[:2])
        _, slope = _sum_and_slope(z, len(x), ctx.args[0], h, 2, wanted, ctx.args[1])
        return (
            slope[: len(x)].to(x.dtype) if wanted[0] else None,
            slope[len(x) :].to(y.dtype) if wanted[1] else None,
            *[None] * 4,
        )


def _pooled(x: Tensor, y: Tensor, center: Tensor | None) -> Tensor:
    """[x; y] - center, float64 for float64 and else float32, contiguous."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = torch.empty(len(x) + len(y), x.shape[1], dtype=dtype, device=x.device)
    for part, source in ((z[: len(x)], x), (z[len(x) :], y)):
        part.copy_(source)
        if center is not None:
            part -= center
    return z


def _center(x: Tensor, y: Tensor) -> Tensor:
    """The pooled mean. Distances do not see a common shift, the rounding of |a|^2 + |b|^2 - 2 a.b does."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.detach().sum(0, dtype=dtype) + y.detach().sum(0, dtype=dtype)
    return total / (len(x) + len(y))


def _check_bandwidths(bandwidth) -> list[float]:
    values = bandwidth.tolist() if isinstance(bandwidth, Tensor) else bandwidth
    values = [values] if isinstance(values, (int, float)) else list(values)
    if not values or not all(math.isfinite(s) and s > 0 for s in values):
        raise ValueError(f"bandwidth must be a finite number > 0 or a non-empty sequence of such, got {bandwidth!r}")
    return [float(s) for s in values]


def plan_of(kernel: str, bandwidths: Sequence[float], D: int, N: int, M: int, unbiased: bool) -> Plan:
    """What is summed over the pairs i < j; bandwidths is empty for polynomial and energy."""
    if kernel == "polynomial":
        numbers = [1 / D]
    elif kernel == "energy":
        numbers = []
    else:
        # Widest first: where each is a power of two narrower, a native kernel squares instead of taking exp again.
        numbers = [-1 / s if kernel == "laplacian" else -0.5 / s**2 for s in sorted(bandwidths, reverse=True)]
    share = 1 / max(1, len(bandwidths))
    within = [2 * share / (n * max(1, n - 1) if unbiased else n * n) for n in (N, M)]
    return Plan(kernel, numbers, (*within, -2 * share / (N * M)))


def mmd2(
    x: Tensor, y: Tensor, kernel: str = "gaussian", bandwidth=None, unbiased: bool = True, validate: bool = True
) -> Tensor:
    """Squared maximum mean discrepancy of two samples; the equations are at the top of this file.

    x: [N, D] floating point; y: [M, D], same dtype and device.
    kernel: "gaussian" | "laplacian" | "polynomial" | "energy".
    bandwidth: sigma > 0, in the units of x; a sequence averages the kernels, all in one pass; None takes the median
        distance over the pairs i < j of the pooled sample (L1 distances for laplacian; `median_distance` says what
        happens beyond 4,096 rows), a constant for the gradient. polynomial and energy do not use it.
    unbiased: leave the pairs i = j within a sample out (needs N, M >= 2); such an estimate can be negative.
    validate: look for NaN and inf, for which a GPU has to be waited for; False in a loop that must not wait.

    Returns a scalar: float64 for float64 inputs, else float32. Pairs of float32 (and of bfloat16 and float16, converted)
    are computed in float32 and summed in float64: |error| <= 1e-8 + 1e-3 |value|. Differentiable twice in x and y;
    distance kernels have subgradient 0 at coincident points. The matrix of pairs is never held: memory beyond a few
    copies of x and y is that of some tiles, and the samples that need no gradient cost none.

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
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: one of {', '.join(KERNELS)}")
    N, M = len(x), len(y)
    if unbiased and min(N, M) < 2:
        raise ValueError(
            f"the unbiased estimate needs at least 2 samples each, got {N} and {M}; unbiased=False takes 1"
        )
    if validate and not torch.compiler.is_compiling():
        check_finite(x, "x")
        check_finite(y, "y")

    center = None if kernel == "polynomial" else _center(x, y)
    bandwidths = []
    if kernel in ("gaussian", "laplacian"):
        if bandwidth is None:
            p = 1.0 if kernel == "laplacian" else 2.0
            bandwidths = [median_distance(_pooled(x.detach(), y.detach(), center), p)]
        else:
            bandwidths = _check_bandwidths(bandwidth)
    plan = plan_of(kernel, bandwidths, x.shape[1], N, M, unbiased)
    value = _Mmd.apply(x, y, center, plan, forced_backend())
    if not unbiased:
        value = value + _diagonal(x, kernel) / N**2 + _diagonal(y, kernel) / M**2
    return value.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _diagonal(x: Tensor, kernel: str) -> Tensor | float:
    """The sum of k(x_i, x_i)."""
    if kernel == "polynomial":
        return (x.double().square().mean(1) + 1).pow(3).sum()
    return 0.0 if kernel == "energy" else float(len(x))


def mmd2_of_subsets(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Unbiased MMD^2 with the polynomial kernel of S subsets, [S] in float64, by whichever way has fewer pairs.

    x [N, D], y [M, D], float32 or float64; rows and columns [S, m] are int64, in each row without repetition.
    """
    S, m = rows.shape
    N, n = len(x), len(x) + len(y)
    if S * 4 * m * m <= n * n:
        return torch.stack([mmd2(x[i], y[j], "polynomial", validate=False).double() for i, j in zip(rows, columns)])
    members = x.new_zeros(n, S)
    subset = torch.arange(S, device=x.device)[:, None]
    members[rows, subset] = 1
    members[columns + N, subset] = 1
    z, sums = _pooled(x, y, None), torch.zeros(S, dtype=torch.float64, device=x.device)
    plan = plan_of("polynomial", [], x.shape[1], m, m, unbiased=True)
    # Of a pair's kernel value the share of a subset is 1 where it holds both.
    with torch.autocast(z.device.type, enabled=False):
        for r, c, weight, diagonal in tiles(N, n, plan.weights, *_TILE["cuda" if z.is_cuda else "cpu"]):
            _, K, _ = mmd_tile(z[r], z[c], None, None, plan.kernel, plan.numbers, 1.0, diagonal, -1)
            sums += weight * (K @ members[c]).mul_(members[r]).sum(0, dtype=torch.float64)
    return sums


# Launchers. Rows are contiguous, all is of one dtype.

_CODES = {"gaussian": 0, "laplacian": 1, "energy": 2, "polynomial": 3}


def squarings(numbers: Sequence[float]) -> list[int]:
    """How often exp(c t) of the number before has to be squared to be that of this one; 0: it has to be made anew."""
    found = [0] * len(numbers)
    for i in range(1, len(numbers)):
        power = math.log2(numbers[i] / numbers[i - 1])
        if 0.5 < power < 5 and abs(power - round(power)) < 1e-12:
            found[i] = round(power)
    return found


@mmd_tile.register("cpp", dtypes=(torch.float32,))
def _(native, p, q, hp, hq, kernel, numbers, weight, diagonal, order):
    s = p.new_empty(0)
    if kernel == "laplacian":
        t = manhattan_distance(p, q, backend="cpp")
        if order == 2:
            s = manhattan_slopes(p, q, hp, hq, backend="cpp")
    else:
        t = p @ q.T
        if order == 2:
            s = torch.addmm(p @ hq.T, hp, q.T)
    totals = torch.empty(len(p), dtype=torch.float64)
    tensors = [tensor.data_ptr() if tensor is not None else 0 for tensor in (p, q, hp, hq, t, s, totals)]
    sizes = len(p), len(q), p.shape[1]
    options = _CODES[kernel], list(numbers), squarings(numbers), weight, diagonal, order
    native.mmd_tile_cpu(tensors, sizes, *options, torch.get_num_threads())
    empty = p.new_empty(0, 0)
    return totals.sum(), t if order else empty, s if order == 2 else empty


@mmd_tile.register("triton", dtypes=(torch.float32,))
def _(kernels, p, q, hp, hq, kernel, numbers, weight, diagonal, order):
    t = s = None
    if kernel == "laplacian":
        t = manhattan_distance(p, q, backend="triton")
        s = manhattan_slopes(p, q, hp, hq, backend="triton") if order == 2 else None
    options = _CODES[kernel], numbers, squarings(numbers), weight, diagonal, order
    totals, A, B = kernels.mmd_tile(p, q, hp, hq, t, s, *options)
    return totals.sum(), A, B
