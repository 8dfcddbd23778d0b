"""Means of the kernels of `mmd_groups` between several samples, and between each of them and the target.

For N samples (the branches), x_i [n_i, D_g] in the group g, the target y [M, D_g], and k_g the mean of the gaussian
kernels of the group's bandwidths,

    K_ij = sum over g of mean k_g(x_ia, x_jb)      over all pairs, of i = j those with a != b;  biased: all
    b_i  = sum over g of mean k_g(x_ia, y_m)       over all pairs

Then p^T K p - 2 p^T b + c, with c the target's own mean, is the squared maximum mean discrepancy between the mixture of
the branches with shares p and the target: mmd_groups', summed over the groups, for the p that is 1 at one branch.

Of all samples, those of the branches one after the other and then the target's, the pairs a < b are made in strips of
rows, which are all that is ever held. With w_ab the derivative of the result by k_g(a, b), the gradient at a is that of
mmd.py: the sum over b of A_ab (a - b), A = 2 w f'.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ._features import check_finite
from ._op import forced_backend, refuse_transforms
from .mmd import Plan, _add_slopes, _offsets, mmd_tile
from .mmd_groups import MmdTarget, _check_groups

__all__ = ["kernel_means"]

_ROWS = 512


def kernel_means(
    branches: Sequence[Sequence[Tensor]], target: MmdTarget, validate: bool = True
) -> tuple[Tensor, Tensor]:
    """K [N, N] and b [N] of N branches, float64, on the target's device; the equations are at the top of this file.

    branches: for each its groups of features, as `mmd_groups` takes them: [n_i, D_g] on the target's device. The n_i
        may differ.
    target: also says whether K_ii leaves out the pairs of a sample and itself.
    validate: look for NaN and inf in the features, which has to wait for a GPU.

    Pairs of float32 are computed in it and summed in float64. Differentiable once in the features; branches that need
    no gradient cost none.

    Raises TypeError and ValueError, with the branch and the group, for what does not fit the target, NaN or inf, and
    fewer than 2 samples of a branch where the target is unbiased; NotImplementedError inside a transform of torch.func,
    and for create_graph=True.
    """
    if not isinstance(target, MmdTarget):
        raise TypeError(f"target must be an MmdTarget, not {type(target).__name__}")
    if not len(branches):
        raise ValueError("branches is empty: give the features of at least one")
    flat = []
    for i, branch in enumerate(branches):
        groups = _check_groups(branch, f"branches[{i}]")
        sizes = [x.shape[1] for x in groups]
        if sizes != target.sizes:
            raise ValueError(f"branches[{i}] has groups of {sizes} dimensions, the target's have {target.sizes}")
        if groups[0].device != target.device:
            raise ValueError(f"branches[{i}] must be on the target's device, {target.device}, not {groups[0].device}")
        if target.unbiased and len(groups[0]) < 2:
            raise ValueError(f"the unbiased means need at least 2 samples of each branch, branches[{i}] has 1")
        for g, x in enumerate(groups):
            if x.dtype == torch.float64 != target.dtype:
                raise TypeError(f"group {g} of branches[{i}] is float64, the target float32: convert one of them")
            if validate:
                check_finite(x, f"group {g} of branches[{i}]")
        flat += [x.to(target.dtype) for x in groups]
    refuse_transforms("kernel_means")
    return _Means.apply(target, len(branches), forced_backend(), *flat)


class _Means(Function):
    @staticmethod
    def forward(ctx, target, N, backend, *xs):
        ctx.args = target, N, backend
        ctx.save_for_backward(*xs)
        counts, order = _counts(xs, target), tuple(range(N))
        member = (
            _whose(order, counts, target.count, target.device)[:, None] == torch.arange(N + 1, device=target.device)
        ).double()
        total = torch.zeros(N, N + 1, dtype=torch.float64, device=target.device)
        for g in range(len(target.sizes)):
            z, plan = _pooled(xs, target, g, order)
            sums = torch.zeros_like(total)
            for r, c, F in _strips(z, plan, len(z) - target.count, -1, backend):
                sums += member[r, :N].T @ (F.double() @ member[c])
            total += sums / target.counts[g]
        # A pair within a branch was met once, as one of two branches was: on one side of the diagonal.
        K = total[:, :N] + total[:, :N].T
        if not target.unbiased:
            K.diagonal().add_(member[:, :N].sum(0), alpha=len(target.sizes))
        shares = _shares(counts, target.count, target.unbiased, target.device)
        return K * shares[:, :N], total[:, N] * shares[:, N]

    @staticmethod
    def backward(ctx, gK, gb):
        refuse_transforms("kernel_means", gK, gb)
        if torch.is_grad_enabled():  # else the gradient would be taken for a constant
            raise NotImplementedError("kernel_means has no second derivative: leave create_graph=True out")
        target, N, backend = ctx.args
        xs, G = ctx.saved_tensors, len(target.sizes)
        counts = _counts(xs, target)
        slopes: list[Tensor | None] = [None] * len(xs)
        weights = torch.cat([gK + gK.T, gb[:, None]], 1)
        weights *= _shares(counts, target.count, target.unbiased, target.device)
        for g in range(G):
            wanted = [i for i in range(N) if ctx.needs_input_grad[3 + i * G + g]]
            if not wanted:
                continue
            order = wanted + [i for i in range(N) if i not in wanted]
            z, plan = _pooled(xs, target, g, order)
            whose = _whose(tuple(order), counts, target.count, target.device)
            w = (weights / target.counts[g]).to(z.dtype)
            rows = sum(counts[i] for i in wanted)
            slope = torch.zeros_like(z[:rows])
            for r, c, A in _strips(z, plan, rows, 1, backend):
                A = A * w[whose[r]][:, whose[c]]
                _add_slopes(slope[r], plan, A, None, z[r], z[c], None, None, backend)
                inner = slice(c.start, rows)
                A = A[:, : rows - c.start]
                _add_slopes(slope[inner], plan, A.T, None, z[inner], z[r], None, None, backend)
            for i, part in zip(wanted, slope.split([counts[i] for i in wanted]), strict=True):
                slopes[i * G + g] = part
        return None, None, None, *slopes


def _pooled(xs: Sequence[Tensor], target: MmdTarget, g: int, order: Sequence[int]) -> tuple[Tensor, Plan]:
    """The samples of the branches, in that order, and of the target, centred, in group g; and its plan."""
    G = len(target.sizes)
    x = torch.cat([xs[i * G + g] for i in order]).sub_(target.center.split(target.sizes)[g])
    return torch.cat([x, target.y.split(target.sizes, 1)[g]]), target.plan(g, 2)  # whose weights are not used


def _strips(z: Tensor, plan: Plan, rows: int, order: int, backend: str | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, f or 2 f') of all pairs a < b of z whose first is one of the first `rows`; 0 elsewhere."""
    with torch.autocast(z.device.type, enabled=False):
        offsets = _offsets(z, None, plan)
        for begin in range(0, rows, _ROWS):
            r, c = slice(begin, min(begin + _ROWS, rows)), slice(begin, len(z))
            _, values, _ = mmd_tile(
                z[r], z[c], None, None, offsets[:, r], offsets[:, c], plan.numbers, plan.squarings, plan.kernel,
                plan.precision, 1.0, True, order, backend=backend,
            )  # fmt: skip
            yield r, c, values


# What follows from the numbers of samples alone is on the device once: a copy from the host would be one a step.


def _counts(xs: Sequence[Tensor], target: MmdTarget) -> tuple[int, ...]:
    return tuple(len(x) for x in xs[:: len(target.sizes)])


@functools.lru_cache(maxsize=64)
def _whose(order: tuple[int, ...], counts: tuple[int, ...], M: int, device: torch.device) -> Tensor:
    """Of all samples the branch, in that order of the branches; N of the target's."""
    times = torch.tensor([*(counts[i] for i in order), M])
    return torch.repeat_interleave(torch.tensor([*order, len(counts)]), times).to(device)


@functools.lru_cache(maxsize=64)
def _shares(counts: tuple[int, ...], M: int, unbiased: bool, device: torch.device) -> Tensor:
    """[N, N + 1]: 1 over the number of pairs of two branches, and of a branch and the target."""
    n = torch.tensor(counts, dtype=torch.float64)
    pairs = n[:, None] * n
    if unbiased:
        pairs.diagonal().sub_(n)
    return (1 / torch.cat([pairs, n[:, None] * M], 1)).to(device)
