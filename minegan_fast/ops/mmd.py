"""Maximum mean discrepancy between two samples x [N, D] and y [M, D].

    mmd2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

The biased estimator takes the first two means over all pairs, the unbiased one over the pairs i != j.
Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, Lemma 6.

    gaussian      k(a, b) = exp(-|a - b|_2^2 / (2 sigma^2))        f(t) = sum of exp(c t),       t = |a - b|_2^2
    laplacian     k(a, b) = exp(-|a - b|_1 / sigma)                f(t) = sum of exp(c t),       t = |a - b|_1
    energy        k(a, b) = -|a - b|_2                             f(t) = |a'| + |b'| - sqrt(t), t = |a - b|_2^2
    polynomial    k(a, b) = (a.b / D + 1)^3                        f(t) = (b + c t)^3 - b^3,     t = a.b - |m|^2

Samples are centred at m, which lies amid them also where some points are far: distances do not see a common shift,
rounding does. A product with m added back is t = <a - m, b - m> + <a - m, m> + <b - m, m>, with b = 1 + |m|^2 / D; the
constant b^3 cancels in the end.

With a' = a - m, the norms in the energy kernel's f (Sejdinovic et al., "Equivalence of distance-based and RKHS-based
statistics in hypothesis testing", 2013) cancel in the end too. They leave of a pair what its nearer point accounts for,

    |a'| + |b'| - |a - b| = 2 (|a'| |b'| + <a', b'>) / (|a'| + |b'| + |a - b|) <= 2 min(|a'|, |b'|),

so that the roundings of a far point's large distances do not outweigh what is between the others. The biased sum lacks
the pairs i = j, whose share of the norms is added.

With z = [x; y], and w the weight of a pair, which depends on the samples that its two belong to, all of it is a sum of
w f(t) over the pairs i < j. It is made in tiles of rows p and columns q of z, whose matrices are all that is ever held:

    squared       A = 2 w f'    B = 4 w f'' <p - q, hp - hq>        gp = A (p - q),      hess = A (hp - hq) + B (p - q)
    laplacian     A = w f'      B = w f'' <sign(p - q), hp - hq>    gp = A sign(p - q),  hess = B sign(p - q)
    polynomial    A = w f'      B = w f'' (<p, hq> + <hp, q>)       gp = A q,            hess = A hq + B q

summed over the columns; gq, summed over the rows, is the same with p and q exchanged and A and B transposed. g is the
gradient, hess its derivative along a cotangent h of it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._features import check_features, check_finite, median_distance
from ._op import Op, forced_backend, refuse_transforms, wide_dtype
from .manhattan import manhattan_distance, manhattan_signs, manhattan_slopes

__all__ = ["mmd2"]

KERNELS = ("gaussian", "laplacian", "polynomial", "energy")  # Kernel in csrc/ops.h
_TILE = {"cpu": (512, 2048), "cuda": (2048, 8192)}  # rows, at least as many columns
_ALL = 1 << 40
_PARTS = 15


class Plan(NamedTuple):
    """What is summed over the pairs, and how."""

    kernel: str  # one of KERNELS
    numbers: Tensor  # of f, float64: a c for each bandwidth, widest first; for polynomial c and b; for energy unused
    squarings: list[int]  # of every c, see `squarings`
    weights: tuple[float, float, float]  # w of a pair within x, of one within y, and of one across
    center: Tensor  # m, [D]
    precision: str  # how a GPU multiplies float32: "tf32x3" or "tf32"

    @property
    def squared(self) -> bool:
        return self.kernel in ("gaussian", "energy")


def derivatives(kernel: str, numbers: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' at t; energy's f without the norms."""
    if kernel == "polynomial":
        c, b = numbers
        e = c * t
        return e * (3 * b * b + 3 * b * e + e * e), 3 * c * (b + e) ** 2, 6 * c * c * (b + e)
    if kernel == "energy":
        root = t.sqrt()
        inverse = torch.where(t > 0, 1 / root, 0.0)  # no force between points that coincide
        return -root, -inverse / 2, inverse**3 / 4
    terms = [torch.exp(c * t) for c in numbers]
    zero = t.new_zeros(())
    f, first, second = (sum((c**k * e for c, e in zip(numbers, terms, strict=True)), zero) for k in range(3))
    return f, first, second


@Op
def mmd_tile(
    p: Tensor,
    q: Tensor,
    hp: Tensor | None,
    hq: Tensor | None,
    op: Tensor,
    oq: Tensor,
    numbers: Tensor,
    squarings: Sequence[int],
    kernel: str,
    precision: str,
    weight: float,
    diagonal: bool,
    order: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of w f over a tile [r, c] (0-d, float64), and the tile's matrices A and B. At order 2 the sum has no
    meaning.

    p [r, D] and q [c, D]: the points of its rows and of its columns. hp and hq: their parts of a cotangent h, for order
        2. op [2, r] and oq [2, c]: their `_offsets`. All are of one dtype and have contiguous rows.
    numbers, squarings, kernel, precision: as in `Plan`. weight: w.
    diagonal: the points of the rows are the first of the columns, and only the pairs i < j count.
    order: 0 for the sum alone; 1 for A too; 2 for A and B; -1 for w f itself in the place of A. A matrix that the order
        does not ask for is empty.
    """
    a, b = p.double(), q.double()
    if kernel == "polynomial":
        t = a @ b.T + op[0].double()[:, None] + oq[0].double()
    elif kernel == "laplacian":
        t = torch.cdist(a, b, p=1.0)
    elif kernel == "gaussian":
        t = torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1, keepdim=True)
    else:  # the derivatives of energy divide by the distance, so products, which round it, will not do
        t = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    f, first, second = derivatives(kernel, numbers, t)
    if kernel == "energy":
        f = op[0].sqrt().double()[:, None] + oq[0].sqrt().double() + f
    f, first, second = (weight * (d.triu(1) if diagonal else d) for d in (f, first, second))
    A = B = p.new_empty(0, 0)
    if order == -1:
        A = f.to(p.dtype)
    if order >= 1:
        A = (first * (2 if kernel in ("gaussian", "energy") else 1)).to(p.dtype)
    if order == 2 and hp is not None and hq is not None:
        u, v = hp.double(), hq.double()
        if kernel == "laplacian":
            along = manhattan_slopes.reference(a, b, u, v)
        else:
            along = a @ v.T + u @ b.T
            if kernel == "polynomial":
                along += op[1].double()[:, None] + oq[1].double()
            else:
                along = 4 * ((a * u).sum(1, keepdim=True) + (b * v).sum(1) - along)
        B = (second * along).to(p.dtype)
    return f.sum(), A, B


def _offsets(z: Tensor, h: Tensor | None, plan: Plan) -> Tensor:
    """[2, n]: what a point adds to t beside the products, and what it adds to the derivative of t along h."""
    out = z.new_zeros(2, len(z))
    if plan.kernel == "polynomial":
        out[0] = z @ plan.center
        if h is not None:
            out[1] = h @ plan.center
    elif plan.squared:
        out[0] = torch.linalg.vecdot(z, z)
        if h is not None:
            out[1] = torch.linalg.vecdot(z, h)
    return out


def tiles(N: int, n: int, weights: Sequence[float], rows: int, columns: int) -> Iterator[tuple]:
    """(rows, columns, weight, whether on the diagonal) of all tiles on and above the diagonal of the pairs of z.

    The rows of a tile are all of x or all of y, and so are its columns: so one weight holds for the tile.
    """
    within_x, within_y, across = weights
    for begin, end, within in ((0, N, within_x), (N, n, within_y)):
        for i in range(begin, end, rows):
            j = min(i + rows, end)
            for k in range(i, end, columns):
                yield slice(i, j), slice(k, min(k + columns, end)), within, k == i
            for k in range(N, n if begin == 0 else N, columns):
                yield slice(i, j), slice(k, min(k + columns, n)), across, False


def sum_and_slope(
    z: Tensor, N: int, plan: Plan, h: Tensor | None, order: int, wanted: tuple[bool, bool], backend: str | None
) -> tuple[Tensor, Tensor]:
    """The sum of w f over all pairs (0-d, float64), and a slope shaped as z, which is empty for order 0.

    order: 0 for no slope; 1 for the gradient of the sum by z; 2 for the derivative of that gradient along h.
    wanted: whether the slope's rows of x are wanted, and those of y; rows that are not wanted are 0.
    """
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    slope = torch.zeros_like(z) if order else z.new_empty(0, 0)
    sizes = _TILE["cuda" if z.is_cuda else "cpu"]
    fused = z.is_cuda and backend in (None, "triton") and mmd_tile.lacks("triton", z.device, z.dtype) is None
    if fused and order == 0 and plan.kernel != "laplacian":
        sizes = _ALL, _ALL  # one launch, which holds no tile
    with torch.autocast(z.device.type, enabled=False):
        offsets = _offsets(z, h, plan)
        if plan.kernel == "energy":
            total -= _norms_of_pairs(offsets[0], N, plan.weights)
        for r, c, weight, diagonal in tiles(N, len(z), plan.weights, *sizes):
            sides = wanted[r.start >= N], wanted[c.start >= N]
            this = order if any(sides) else 0
            if order == 2 and not this:
                continue
            hr, hc = (None, None) if h is None else (h[r], h[c])
            f, A, B = mmd_tile(
                z[r], z[c], hr, hc, offsets[:, r], offsets[:, c], plan.numbers, plan.squarings, plan.kernel,
                plan.precision, weight, diagonal, this, backend=backend,
            )  # fmt: skip
            total += f
            if this and sides[0]:
                _add_slopes(slope[r], plan, A, B, z[r], z[c], hr, hc, backend)
            if this and sides[1]:
                _add_slopes(slope[c], plan, A.T, B.T, z[c], z[r], hc, hr, backend)
    return total, slope


def _norms_of_pairs(squares: Tensor, N: int, weights: Sequence[float]) -> Tensor:
    """The sum of w (|p| + |q|) over all pairs, for the squared norms [n] of all points: of the unbiased, 0."""
    within_x, within_y, across = weights
    x, y = squares.sqrt().double().split((N, M := len(squares) - N))
    return (within_x * (N - 1) + across * M) * x.sum() + (within_y * (M - 1) + across * N) * y.sum()


def _add_slopes(out: Tensor, plan: Plan, A, B, p, q, hp, hq, backend: str | None) -> None:
    """Adds to out, the slope at the points p, what their pairs with the points q contribute: gp or hess above."""
    if plan.kernel == "laplacian":
        out += manhattan_signs(A if hp is None else B, p, q, backend=backend)
        return
    pairs = [(A, p, q, plan.center)] if hp is None else [(A, hp, hq, None), (B, p, q, plan.center)]
    for weights, near, far, center in pairs:
        if plan.squared:
            out.addcmul_(weights.sum(1, keepdim=True), near)
        elif center is not None:
            out.addcmul_(weights.sum(1, keepdim=True), center)
        out.addmm_(weights, far, alpha=-1.0 if plan.squared else 1.0)


class _Mmd(Function):
    """The sum over all pairs. The forward makes the gradient too, because it would need the same tiles again."""

    @staticmethod
    def forward(ctx, x, y, plan, backend):
        ctx.args = plan, backend
        wanted = tuple(ctx.needs_input_grad[:2])
        z = _pooled(x, y, plan.center)
        total, ctx.slope = sum_and_slope(z, len(x), plan, None, int(any(wanted)), wanted, backend)
        ctx.save_for_backward(x, y)
        return total

    @staticmethod
    def backward(ctx, g):
        refuse_transforms("mmd2")
        gx, gy = _Gradient.apply(*ctx.saved_tensors, ctx.slope, *ctx.args)
        wanted = ctx.needs_input_grad
        return g * gx if wanted[0] else None, g * gy if wanted[1] else None, None, None


class _Gradient(Function):
    @staticmethod
    def forward(ctx, x, y, slope, plan, backend):
        ctx.args = plan, backend
        ctx.save_for_backward(x, y)
        return slope[: len(x)], slope[len(x) :]

    @staticmethod
    @once_differentiable
    def backward(ctx, hx, hy):
        (x, y), (plan, backend) = ctx.saved_tensors, ctx.args
        wanted = tuple(ctx.needs_input_grad[:2])
        z, h = _pooled(x, y, plan.center), _pooled(hx, hy, None)
        _, slope = sum_and_slope(z, len(x), plan, h, 2, wanted, backend)
        parts = slope[: len(x)], slope[len(x) :]
        return *(part if want else None for part, want in zip(parts, wanted, strict=True)), None, None, None


def _pooled(x: Tensor, y: Tensor, center: Tensor | None) -> Tensor:
    """[x; y] - center, contiguous."""
    z = torch.cat([x, y])
    return z if center is None else z.sub_(center)


def _center(x: Tensor, y: Tensor) -> Tensor:
    """A point amid both samples: along each axis the median of means over every _PARTS-th row, of which a few far
    points move only some."""
    z = torch.cat([x.detach(), y.detach()])
    parts = min(len(z), _PARTS)
    means = z[: len(z) // parts * parts].unflatten(0, (-1, parts)).mean(0)
    # On a GPU the median with its indices is not deterministic.
    return means.sort(0).values[parts // 2] if z.is_cuda else means.median(0).values


def check_bandwidths(bandwidth: float | Tensor | Iterable[float], name: str = "bandwidth") -> list[float]:
    if isinstance(bandwidth, Tensor) and bandwidth.requires_grad:
        raise ValueError(f"{name} gets no gradient: give bandwidth.detach()")
    tolist = getattr(bandwidth, "tolist", None)  # of a tensor or an array
    values: Any = bandwidth if tolist is None else tolist()
    values = [] if isinstance(values, str) else values
    try:
        values = [float(s) for s in (values if isinstance(values, Iterable) else [values])]
    except (TypeError, ValueError):
        values = []
    if not values or not all(s > 0 and 0 < s * s < math.inf for s in values):
        raise ValueError(
            f"{name} must be a finite number > 0, its square too, or a non-empty sequence of such, got {bandwidth!r}"
        )
    return values


def plan_of(
    kernel: str,
    bandwidths: Sequence[float],
    x: Tensor,
    y: Tensor,
    N: int,
    M: int,
    unbiased: bool,
    precision: str = "tf32x3",
) -> Plan:
    """The plan for N rows of x and M of y, or for as many in each of several subsets.

    bandwidths: empty for polynomial and energy.
    """
    center = _center(x, y)
    # Widest first: where the next is a power of two narrower, a native kernel squares instead of taking exp again.
    widest_first = sorted(bandwidths, reverse=True)
    if kernel == "gaussian":
        values = [-0.5 / s**2 for s in widest_first]
    elif kernel == "laplacian":
        values = [-1 / s for s in widest_first]
    else:
        values = [1 / x.shape[1]]
    # Filled on the device: a copy from the host would wait for a GPU, and a captured graph could not repeat it.
    numbers = torch.stack([x.new_full((), value, dtype=torch.float64) for value in values])
    if kernel == "polynomial":
        m = center.double()
        numbers = torch.cat([numbers, 1 + (m @ m)[None] / x.shape[1]])
    share = 1 / max(1, len(bandwidths))
    within_x, within_y = (2 * share / (n * max(1, n - 1) if unbiased else n * n) for n in (N, M))
    weights = within_x, within_y, -2 * share / (N * M)
    return Plan(kernel, numbers, squarings(values), weights, center, precision)


def squarings(numbers: Sequence[float]) -> list[int]:
    """For each number c, how many squarings turn exp(c' t) of the number before into exp(c t); 0: take exp anew."""
    found = [0] * len(numbers)
    for i in range(1, len(numbers)):
        power = math.log2(numbers[i] / numbers[i - 1])
        if 0.5 < power < 5 and abs(power - round(power)) < 1e-12:
            found[i] = round(power)
    return found


def mmd2(
    x: Tensor,
    y: Tensor,
    kernel: str = "gaussian",
    bandwidth: float | Tensor | Iterable[float] | None = None,
    unbiased: bool = True,
    validate: bool = True,
    input_precision: str = "tf32x3",
) -> Tensor:
    """Squared maximum mean discrepancy of two samples; the equations are at the top of this file.

    x: [N, D] floating point; y: [M, D], on the same device; the wider of their dtypes holds for both.
    kernel: "gaussian" | "laplacian" | "polynomial" | "energy".
    bandwidth: sigma > 0, in the units of x; a sequence averages the kernels, all in one pass; None takes the median
        distance over the pairs i < j of the pooled sample (L1 distances for laplacian; `median_distance` says what
        happens beyond 4,096 rows), a constant for the gradient, at which torch.compile breaks its graph. polynomial and
        energy do not use it.
    unbiased: leave out the pairs i = j within a sample (needs N, M >= 2). Such an estimate can be negative. With the
        polynomial kernel it has no lower bound: minimised over samples that may go anywhere, it sends one away.
    validate: check the inputs and the value for NaN and inf, which has to wait for a GPU. Give False in a loop that
        must not wait. Compiled code does not check.
    input_precision: how a GPU multiplies float32. "tf32x3" has float32's accuracy; "tf32" is several times as fast and
        has 10 bits of mantissa. The gradient's products follow PyTorch's own setting.

    Returns a scalar: float64 for float64 inputs, else float32. Pairs of float32, and of bfloat16 and float16 converted
    to it, are computed in float32 and summed in float64: |error| <= 1e-8 + 1e-3 |value|. Of the energy distance this
    holds beside one point that is 1e7 times as far away as the others lie apart, and beside several 1e4 times as far.
    Differentiable twice in x and y; distance kernels have subgradient 0 at coincident points. The matrix of pairs is
    never held: memory beyond a few copies of x and y is that of some tiles, and a sample that needs no gradient costs
    none.

    Raises TypeError for features that are not floating point; ValueError for shapes, devices, kernel
    or bandwidth that do not fit, too few samples, NaN or inf, with the row, and values that overflow;
    NotImplementedError inside a transform of torch.func, vmap, grad or jacrev say.
    """
    check_features(x, "x")
    check_features(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same number of dimensions, got {x.shape[1]} and {y.shape[1]}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on the same device, got {x.device} and {y.device}")
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: one of {', '.join(KERNELS)}")
    if input_precision not in ("tf32x3", "tf32"):
        raise ValueError(f'input_precision must be "tf32x3" or "tf32", got {input_precision!r}')
    N, M = len(x), len(y)
    if unbiased and min(N, M) < 2:
        raise ValueError(
            f"the unbiased estimate needs at least 2 samples each, got {N} and {M}; unbiased=False takes 1"
        )
    refuse_transforms("mmd2")
    if validate and not torch.compiler.is_compiling():
        check_finite(x, "x")
        check_finite(y, "y")

    bandwidths = []
    if kernel in ("gaussian", "laplacian"):
        if bandwidth is None:
            bandwidths = [median_distance(torch.cat([x.detach(), y.detach()]), 1.0 if kernel == "laplacian" else 2.0)]
        else:
            bandwidths = check_bandwidths(bandwidth)
    # The conversion is outside of the Function, so that gradients are scaled and added up before they are rounded.
    wide = wide_dtype(torch.promote_types(x.dtype, y.dtype))
    x, y = x.to(wide), y.to(wide)
    plan = plan_of(kernel, bandwidths, x, y, N, M, unbiased, input_precision)
    value = _Mmd.apply(x, y, plan, forced_backend())
    if not unbiased:
        value = value + _diagonal(x, plan) / N**2 + _diagonal(y, plan) / M**2
    value = value.to(x.dtype)
    if validate and not torch.compiler.is_compiling():
        check_value(value, x, y)
    return value


def check_value(value: Tensor, x: Tensor, y: Tensor, whose: str = "") -> None:
    """ValueError where a distance is not finite although the samples are."""
    if not value.isfinite().all():
        low, high = torch.stack([*x.detach().aminmax(), *y.detach().aminmax()]).aminmax()
        raise ValueError(
            f"the kernel of features{whose} from {low:.4g} to {high:.4g} leaves the range of {x.dtype}: scale them"
        )


def _diagonal(x: Tensor, plan: Plan) -> Tensor | float:
    """The sum of f over the pairs of a point and itself."""
    if plan.kernel == "polynomial":
        c, b = plan.numbers
        return ((c * torch.linalg.vecdot(x.double(), x.double()) + 1) ** 3 - b**3).sum()
    return 0.0 if plan.kernel == "energy" else float(len(x))


def mmd2_of_subsets(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Unbiased MMD^2 with the polynomial kernel of S subsets, [S] in float64, by whichever way has fewer pairs.

    x [N, D], y [M, D], float32 or float64; rows and columns [S, m] are int64, in each row without repetition.
    """
    S, m = rows.shape
    N, n = len(x), len(x) + len(y)
    if S * 4 * m * m <= n * n:
        pairs = zip(rows, columns, strict=True)
        return torch.stack([mmd2(x[i], y[j], "polynomial", validate=False).double() for i, j in pairs])
    members = x.new_zeros(n, S)
    subset = torch.arange(S, device=x.device)[:, None]
    members[rows, subset] = 1
    members[columns + N, subset] = 1
    sums = torch.zeros(S, dtype=torch.float64, device=x.device)
    plan = plan_of("polynomial", [], x, y, m, m, unbiased=True)
    z = _pooled(x, y, plan.center)
    with torch.autocast(z.device.type, enabled=False):
        offsets = _offsets(z, None, plan)
        for r, c, weight, diagonal in tiles(N, n, plan.weights, *_TILE["cuda" if z.is_cuda else "cpu"]):
            _, K, _ = mmd_tile(
                z[r], z[c], None, None, offsets[:, r], offsets[:, c], plan.numbers, plan.squarings, plan.kernel,
                plan.precision, 1.0, diagonal, -1,
            )  # fmt: skip
            # A pair counts in each subset that holds both of its points.
            sums += weight * (K @ members[c]).mul_(members[r]).sum(0, dtype=torch.float64)
    return sums


# Launchers. Rows are contiguous, all is of one dtype.


@mmd_tile.register("cpp", dtypes=(torch.float32,))
def _(native, p, q, hp, hq, op, oq, numbers, squarings, kernel, precision, weight, diagonal, order):
    s = p.new_empty(0, 0)
    if kernel == "laplacian":
        t = manhattan_distance(p, q, backend="cpp")
        if order == 2:
            s = manhattan_slopes(p, q, hp, hq, backend="cpp")
    else:
        t = p @ q.T
        if order == 2:
            s = torch.addmm(p @ hq.T, hp, q.T)
    totals = torch.empty(len(p), dtype=torch.float64)
    tensors = p, q, hp, hq, *op, *oq, numbers, t, s, totals
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes, options = (len(p), len(q), p.shape[1]), (KERNELS.index(kernel), weight, diagonal, order)
    native.mmd_tile_cpu(addresses, sizes, list(squarings), *options, torch.get_num_threads())
    return totals.sum(), t if order else p.new_empty(0, 0), s


@mmd_tile.register("triton", dtypes=(torch.float32,))
def _(kernels, p, q, hp, hq, op, oq, numbers, squarings, kernel, precision, weight, diagonal, order):
    t = s = None
    if kernel == "laplacian":
        t = manhattan_distance(p, q, backend="triton")
        s = manhattan_slopes(p, q, hp, hq, backend="triton") if order == 2 else None
    options = squarings, kernel, precision, weight, diagonal, order
    totals, A, B = kernels.mmd_tile(p, q, hp, hq, op, oq, numbers, t, s, *options)
    return totals.sum(), A, B
