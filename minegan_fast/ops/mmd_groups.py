"""Maximum mean discrepancy of several groups of features at once, between samples that move and targets that do not.

For every group g, with x [N, D_g], y [M, D_g] and k the mean of the gaussian kernels of its bandwidths,

    mmd2_g = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

as in mmd.py, which says what the biased and the unbiased means are. The mean of k(y_i, y_j), the target's centre and
its squared norms are computed once. All samples are centred at the target's mean: a common shift does not change a
distance, but it changes the rounding.

With f(t) = sum of exp(c t) over K bandwidths, c = -1 / (2 sigma^2), and t = |a - b|^2, what remains for a step is

    S        = sum over i != j of w f(t(x_i, x_j)) + sum over i, j of v f(t(x_i, y_j)),
               w = 1 / (K N (N - 1)), biased 1 / (K N^2),    v = -2 / (K N M)
    A_ij     = -4 w f'(t(x_i, x_j)),    B_ij = -2 v f'(t(x_i, y_j)),    A_ii = minus the sum of all others of row i
    gradient = A x + B y

and its derivative along a cotangent is that of mmd.py.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._features import check_features, check_finite
from ._op import Op, forced_backend, refuse_transforms
from .mmd import Plan, check_bandwidths, check_value, sum_and_slope
from .mmd import squarings as squarings_of

__all__ = ["MmdTarget", "mmd_groups"]


@Op
def mmd_groups_pairs(
    x: Tensor,
    y: Tensor,
    norms: Tensor,
    numbers: Tensor,
    squarings: Sequence[int],
    sizes: Sequence[int],
    counts: Sequence[int],
    unbiased: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """S of every group ([G], float64), NaN where its x is not finite; and A [G, N, N] and B [G, N, M], which are empty
    without `gradient`.

    x [N, D] and y [M, D] hold the groups side by side, of `sizes` columns each, norms [G, M] the squared norms of y's
    rows. numbers are the c of all groups, float64, widest bandwidth first, `counts` of them a group; squarings says how
    each follows from the one before it.
    """
    (N, _), M, G = x.shape, len(y), len(sizes)
    sums = []
    A, B = (x.new_empty(G, N, n) if gradient else x.new_empty(0, 0, 0) for n in (N, M))
    for g, (a, b, c) in enumerate(zip(x.split(sizes, 1), y.split(sizes, 1), numbers.split(counts), strict=True)):
        a = a.double()
        z = torch.cat([a, b.double()])
        t = torch.addmm(z.square().sum(1), a, z.T, alpha=-2) + a.square().sum(1, keepdim=True)
        within, across = _weights(N, M, counts[g], unbiased)
        w = torch.cat([torch.full_like(z[:N, 0], within), torch.full_like(z[N:, 0], across)])
        terms = [torch.exp(e * t) for e in c.unbind()]
        sums.append((w * sum(terms)).fill_diagonal_(0).sum() + 0 * a.sum())
        if gradient:
            slopes = sum(e * term for e, term in zip(c.unbind(), terms, strict=True)) * w * -2
            slopes[:, :N] *= 2
            slopes.fill_diagonal_(0)
            A[g], B[g] = slopes[:, :N] - slopes.sum(1).diag(), slopes[:, N:]
    return torch.stack(sums), A, B


@Op
def mmd_groups_slopes(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, g: Tensor, sizes: Sequence[int], wanted: Sequence[bool]
) -> Tensor:
    """g (A x + B y) of every group, side by side as x is; finite but of no meaning for groups that are not wanted."""
    groups = zip(x.split(sizes, 1), y.split(sizes, 1), A.double(), B.double(), g.unbind(), strict=True)
    return torch.cat([w * (C @ a.double() + D @ b.double()) for a, b, C, D, w in groups], 1).to(x.dtype)


def _weights(N: int, M: int, K: int, unbiased: bool) -> tuple[float, float]:
    """w and v."""
    return 1 / (K * N * ((N - 1) if unbiased else N)), -2 / (K * N * M)


class _Distances(Function):
    """The forward makes the matrices A and B too, which hold what value and gradient share."""

    @staticmethod
    def forward(ctx, target, wanted, backend, *xs):
        ctx.args = target, wanted, backend
        x = torch.cat(xs, 1).sub_(target.center)
        sums, A, B = mmd_groups_pairs(
            x, target.y, target.norms, target.numbers, target.squarings, target.sizes, target.counts, target.unbiased,
            any(wanted), backend=backend,
        )  # fmt: skip
        ctx.save_for_backward(x, A, B, *xs)
        constant = target.own if target.unbiased else target.own + 1 / len(x)  # pairs of a sample and itself
        return (sums + constant).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        refuse_transforms("mmd_groups", g)
        target, wanted, backend = ctx.args
        x, A, B, *xs = ctx.saved_tensors
        if torch.is_grad_enabled():
            slopes = _Gradient.apply(target, wanted, backend, x, A, B, *xs).split(target.sizes, 1)
            slopes = [slope * weight for slope, weight in zip(slopes, g.unbind(), strict=True)]
        else:
            slopes = mmd_groups_slopes(x, target.y, A, B, g, target.sizes, wanted, backend=backend)
            slopes = slopes.split(target.sizes, 1)
        return None, None, None, *slopes


class _Gradient(Function):
    """The gradients of all distances, side by side."""

    @staticmethod
    def forward(ctx, target, wanted, backend, x, A, B, *xs):
        ctx.args = target, wanted, backend
        ctx.save_for_backward(*xs)
        ones = torch.ones_like(x[0, :1]).expand(len(xs))
        return mmd_groups_slopes(x, target.y, A, B, ones, target.sizes, wanted, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, h):
        target, wanted, backend = ctx.args
        centers, ys, along = (t.split(target.sizes, -1) for t in (target.center, target.y, h))
        second: list[Tensor | None] = [None] * len(wanted)
        for g, x in enumerate(ctx.saved_tensors):
            if wanted[g]:
                z, hz = torch.cat([x - centers[g], ys[g]]), torch.cat([along[g], torch.zeros_like(ys[g])])
                plan = target.plan(g, len(x))
                second[g] = sum_and_slope(z, len(x), plan, hz, 2, (True, False), backend)[1][: len(x)]
        return *[None] * 6, *second


class MmdTarget:
    """The fixed samples that `mmd_groups` compares with, and what of their distances does not change.

    groups: one [M, D_g] floating-point tensor a group of features, all of the same samples, on one device; half
        precision is converted to float32, and the widest dtype holds for all.
    bandwidths: sigma > 0 in the units of the group, or several whose kernels are averaged, for every group; one number
        alone holds for all of them.
    unbiased: leave the pairs of a sample and itself out, of x too (needs 2 samples each).

    Attributes: sizes (the D_g), count (M), device, dtype, unbiased.

    Raises TypeError for what is not floating point; ValueError, with the group, for shapes, devices and bandwidths that
    do not fit, NaN or inf, and fewer than 2 samples for the unbiased distance.
    """

    def __init__(
        self,
        groups: Sequence[Tensor],
        bandwidths: float | Iterable[float | Tensor | Iterable[float]],
        unbiased: bool = True,
    ):
        groups = _check_groups(groups, "groups")
        if isinstance(bandwidths, (int, float)):
            bandwidths = [bandwidths] * len(groups)
        if not isinstance(bandwidths, Iterable) or isinstance(bandwidths, str):
            raise TypeError(
                f"bandwidths must be a number or one bandwidth, or several, for every group, not {bandwidths!r}"
            )
        bandwidths = list(bandwidths)
        if len(bandwidths) != len(groups):
            raise ValueError(f"there are {len(groups)} groups and bandwidths for {len(bandwidths)}: give one for each")
        self.sizes, self.count, self.device = [y.shape[1] for y in groups], len(groups[0]), groups[0].device
        if unbiased and self.count < 2:
            raise ValueError("the unbiased distance needs at least 2 target samples, got 1: unbiased=False takes 1")
        for g, y in enumerate(groups):
            check_finite(y, f"group {g} of groups")
        values = []
        for g, given in enumerate(bandwidths):
            # Widest first: where the next is a power of two narrower, a native kernel squares instead of taking exp.
            sigmas = sorted(check_bandwidths(given, f"bandwidth of group {g}"), reverse=True)
            values.append([-0.5 / s**2 for s in sigmas])
        self.unbiased, self.counts = bool(unbiased), [len(c) for c in values]
        self.squarings = [n for c in values for n in squarings_of(c)]
        wide = torch.float32
        for y in groups:
            wide = torch.promote_types(wide, y.dtype)
        y = torch.cat([y.detach().to(wide) for y in groups], 1)
        self.dtype, self.center = wide, y.mean(0, dtype=torch.float64).to(wide)
        self.y = y.sub_(self.center)
        self.numbers = torch.tensor([c for group in values for c in group], dtype=torch.float64, device=self.device)
        parts = self.y.split(self.sizes, 1)
        self.norms = torch.stack([torch.linalg.vecdot(y, y) for y in parts])
        within = [
            sum_and_slope(y.double(), self.count, self.plan(g, self.count), None, 0, (False, False), "reference")[0]
            for g, y in enumerate(parts)
        ]
        self.own = torch.stack(within) + (0 if unbiased else 1 / self.count)

    def plan(self, g: int, N: int) -> Plan:
        """The plan of group g for N samples that are compared with the target, or for the target's own pairs."""
        first = sum(self.counts[:g])
        own = slice(first, first + self.counts[g])
        within, across = _weights(N, self.count, self.counts[g], self.unbiased)
        center = self.center.split(self.sizes)[g]
        return Plan("gaussian", self.numbers[own], self.squarings[own], (2 * within, 0.0, across), center, "tf32x3")

    def __repr__(self) -> str:
        kind = "unbiased" if self.unbiased else "biased"
        return f"MmdTarget({self.count} samples, groups of {self.sizes}, {kind}, {self.dtype}, {self.device})"


def _check_groups(groups: Sequence[Tensor], name: str) -> list[Tensor]:
    """A list of [samples, D_g] tensors of one number of samples and one device."""
    if isinstance(groups, Tensor):
        raise TypeError(f"{name} must be a sequence of one tensor [samples, dimensions] a group, not a tensor")
    groups = list(groups)
    if not groups:
        raise ValueError(f"{name} is empty: give one tensor [samples, dimensions] a group")
    for g, x in enumerate(groups):
        check_features(x, f"group {g} of {name}")
        if len(x) != len(groups[0]):
            raise ValueError(
                f"all groups of {name} are of the same samples: group 0 has {len(groups[0])}, group {g} {len(x)}"
            )
        if x.device != groups[0].device:
            raise ValueError(f"group {g} of {name} is on {x.device}, group 0 on {groups[0].device}: move them together")
    return groups


def mmd_groups(xs: Sequence[Tensor], target: MmdTarget, validate: bool = True) -> Tensor:
    """The squared maximum mean discrepancy of every group of features, [G], from those of the target.

    xs: one [N, D_g] floating-point tensor a group, on the target's device; N may differ from call to call. Half
        precision is converted, float32 is to a target in float64.
    validate: check xs and the distances for NaN and inf, which has to wait for a GPU. Give False in a loop that must
        not wait. Compiled code does not check.

    Each entry is `mmd2(x_g, y_g, bandwidth=b_g, unbiased=...)` in the target's dtype, float32 or float64. Pairs of
    float32 are computed in it and summed in float64: |error| <= 1e-8 + 1e-3 |value|. Differentiable twice in xs; a
    group that needs no gradient costs none, and the call is cheaper where none needs one. The N (N + M) pairs of every
    group are held during the call; afterwards nothing of that size is.

    Raises TypeError for a target that is no MmdTarget, for features that are no tensors of floats, and for float64
    where the target is float32; ValueError,
    with the group, for numbers of groups, samples and dimensions or devices that do not fit, 1 sample where the
    distance is unbiased, NaN or inf, with the row, and values that overflow; NotImplementedError inside a transform of
    torch.func, vmap, grad or jacrev say.
    """
    if not isinstance(target, MmdTarget):
        raise TypeError(f"target must be an MmdTarget, not {type(target).__name__}")
    xs = _check_groups(xs, "xs")
    if len(xs) != len(target.sizes):
        raise ValueError(f"the target has {len(target.sizes)} groups of features, xs has {len(xs)}")
    if xs[0].device != target.device:
        raise ValueError(f"xs must be on the target's device, {target.device}, got {xs[0].device}")
    for g, (x, size) in enumerate(zip(xs, target.sizes, strict=True)):
        if x.shape[1] != size:
            raise ValueError(f"group {g} of xs has {x.shape[1]} dimensions, the target's {size}")
        if x.dtype == torch.float64 != target.dtype:
            raise TypeError(f"group {g} of xs is float64, the target float32: convert one of them")
    if target.unbiased and len(xs[0]) < 2:
        raise ValueError(
            "the unbiased distance needs at least 2 samples, got a batch of 1: "
            "use a larger batch, or a target with unbiased=False"
        )
    refuse_transforms("mmd_groups")
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in xs]
    xs = [x if x.dtype == target.dtype else x.to(target.dtype) for x in xs]
    distances = _Distances.apply(target, wanted, forced_backend(), *xs)
    if validate and not torch.compiler.is_compiling() and not math.isfinite(distances.detach().sum().item()):
        for g, (x, y) in enumerate(zip(xs, target.y.split(target.sizes, 1), strict=True)):
            check_finite(x, f"group {g} of xs")
            check_value(distances[g], x, y, f" of group {g}")
    return distances


# Launchers.


@mmd_groups_pairs.register("cpp", dtypes=(torch.float32,))
def _(native, x, y, norms, numbers, squarings, sizes, counts, unbiased, gradient):
    N, M, G = len(x), len(y), len(sizes)
    A, B, sums = x.new_empty(G, N, N), x.new_empty(G, N, M), torch.empty(G, dtype=torch.float64)
    for a, b, within, across in zip(x.split(sizes, 1), y.split(sizes, 1), A.unbind(), B.unbind(), strict=True):
        torch.mm(a, a.T, out=within)
        torch.mm(a, b.T, out=across)
    addresses = [t.data_ptr() for t in (x, y, norms, numbers, A, B, sums)]
    options = *_weights(N, M, 1, unbiased), gradient, torch.get_num_threads()
    native.mmd_groups_cpu(addresses, squarings, sizes, counts, (N, M), *options)
    return (sums, A, B) if gradient else (sums, x.new_empty(0, 0, 0), x.new_empty(0, 0, 0))


@mmd_groups_slopes.register("cpp", dtypes=(torch.float32,))
def _(native, x, y, A, B, g, sizes, wanted):
    out = torch.empty_like(x) if all(wanted) else torch.zeros_like(x)
    parts = (*(t.split(sizes, 1) for t in (x, y, out)), A.unbind(), B.unbind(), g.tolist(), wanted)
    for a, b, slope, within, across, weight, want in zip(*parts, strict=True):
        if want:
            torch.addmm(slope, within, a, beta=0, alpha=weight, out=slope)
            slope.addmm_(across, b, alpha=weight)
    return out


@mmd_groups_pairs.register("triton", dtypes=(torch.float32,))
def _(kernels, x, y, norms, numbers, squarings, sizes, counts, unbiased, gradient):
    totals, A, B = kernels.pairs(x, y, numbers, sizes, counts, unbiased, gradient)
    return totals.sum(1), A, B


@mmd_groups_slopes.register("triton", dtypes=(torch.float32,))
def _(kernels, x, y, A, B, g, sizes, wanted):
    return kernels.slopes(x, y, A, B, g.contiguous(), sizes)
