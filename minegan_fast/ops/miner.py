"""Miners: perceptrons u -> z, N of them with weights of their own, and several kinds of them, in one call.

A chain is N miners of one shape over latents u, [B, I] for all of them or [N, B, I]. With h_0 = u, for miner n,

    a_l = W_l h_{l-1} + b_l,   h_l = phi(a_l), l = 1 .. L - 1        W_l [N, out, in], b_l [N, out]
    z = a_L + s                s = 0, u or A u + a                   A [N, O, I], a [N, O]
    z <- z (mean z^2 + 1e-8)^-1/2                                    with `sphere`: the prior of mining/prior.py

phi being relu, lrelu (slope 0.2), tanh or the identity. A frozen mapping network of StyleGAN may follow, one for all
miners: z (mean z^2 + 1e-8)^-1/2 again, which is its PixelNorm, and h <- gain lrelu(c M_k h + c' m_k).

    backward       d_L = gz,   gW_l = d_l h_{l-1}^T,   gb_l = d_l,   d_{l-1} = phi'(a_{l-1}) q,   q = W_l^T d_l
    second order   of <v, gu> + sum of <V_l, gW_l> + <c_l, gb_l>, with t_0 = v:
                   p_l = W_l t_{l-1} + V_l h_{l-1} + c_l,   t_l = phi'(a_l) p_l, whose last is the gradient by gz
                   e_{l-1} = phi'(a_{l-1}) (W_l^T e_l + V_l^T d_l) + phi''(a_{l-1}) p_{l-1} q
                   by W_l it is d_l t_{l-1}^T + e_l h_{l-1}^T, by b_l e_l, by u W_1^T e_1 + V_1^T d_1

summed over the samples, with what the skip connection adds. Each pass is one call of a backend for all chains
(`_miner_program` says what its tasks are). A third order is PyTorch's, from `plain`.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .._torch import apply_function
from ._miner_passes import Plan, planned
from ._miner_program import (
    ACTIVATIONS,
    EPSILON,
    SKIPS,
    SLOPE,
    WORDS,
    Shape,
    execute,
    kept,
    kept_by_backward,
    rows_of,
)
from ._op import DTYPE_CODES, Op, backward_wants, forced_backend, refuse_transforms, run, wide_dtype
from .checks import check_beside, check_tensor

__all__ = ["Chain", "Mapping", "mine", "miner", "plain"]

DEPTH = 8  # at most


class Mapping(NamedTuple):
    """A frozen mapping network behind a chain: PixelNorm, then layers h <- gain lrelu(scale M h + bias_scale m).

    weights: [out, in] each. biases: [out] each. scales: (scale, bias_scale, gain) of each.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    scales: Sequence[tuple[float, float, float]]


class Chain(NamedTuple):
    """N miners of one shape, or a single one.

    u: [B, I] for all miners or [N, B, I]; [B, I] for a single one.
    weights, biases: of each layer [N, out, in] and [N, out]; of a single miner [out, in] and [out]. 1 to 8 layers.
    activation: "relu" | "lrelu" | "tanh" | "linear", between the layers.
    skip: None, "identity" (z = u + ..., I == O), or (A [N, O, I], a [N, O]) of z = A u + a + ...
    sphere: project z onto the sphere of radius sqrt(O).
    mapping: what z goes through then; it gets no gradients.
    """

    u: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: str = "relu"
    skip: str | tuple[Tensor, Tensor] | None = None
    sphere: bool = False
    mapping: Mapping | None = None


def plain(chain: Chain) -> Tensor:
    """z of a chain by PyTorch's own operations, differentiable any number of times."""
    x = chain.u
    single = chain.weights[0].ndim == 2

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias) if single else x @ weight.mT + bias[:, None]

    functions = {"relu": F.relu, "tanh": torch.tanh, "lrelu": lambda a: F.leaky_relu(a, SLOPE), "linear": lambda a: a}
    for l, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
        x = linear(functions[chain.activation](x) if l else x, weight, bias)
    if chain.skip is not None:
        x = x + (chain.u if isinstance(chain.skip, str) else linear(chain.u, *chain.skip))
    for _ in range(chain.sphere + (chain.mapping is not None)):
        z = x.to(wide_dtype(x.dtype))
        x = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)
    if chain.mapping is not None:
        for weight, bias, (scale, bias_scale, gain) in zip(*chain.mapping, strict=True):
            x = gain * F.leaky_relu(F.linear(x, scale * weight.detach(), bias_scale * bias.detach()), SLOPE)
    return x


# The ops. `tensors` are those of all chains: u, weight and bias of each layer, those of the skip connection, those of
# the mapping network's layers. `kinds` are five numbers a chain: layers, activation, skip connection, sphere, layers of
# the mapping network; `scales` three a layer of those. `first` is the first tensor, by which the backend is chosen.
# What a pass keeps for the next is [N, rows, P], as `kept` and `kept_by_backward` say, one tensor a chain.

_PARTS = 5


def _shapes(tensors: Sequence[Tensor], kinds: Sequence[int], scales: Sequence[float]) -> tuple[Shape, ...]:
    found, first, factors = [], 0, 0
    for depth, activation, skip, sphere, mapped in zip(*[iter(kinds)] * _PARTS, strict=True):
        u, weights = tensors[first], tensors[first + 1 : first + 2 * depth : 2]
        end = first + 1 + 2 * (depth + (SKIPS[skip] == "affine"))
        maps = tensors[end : end + 2 * mapped : 2]
        many = weights[0].ndim == 3
        shared = many and u.ndim == 2
        own = scales[factors : factors + 3 * mapped]
        scaling = zip(own[::3], own[1::3], own[2::3], strict=True)
        sizes, outputs = (u.shape[-1], *(w.shape[-2] for w in weights)), tuple(m.shape[0] for m in maps)
        what = ACTIVATIONS[activation], SKIPS[skip], bool(sphere), outputs, tuple(scaling), first
        found.append(Shape(weights[0].shape[0] if many else 1, u.shape[-2], shared, sizes, *what))
        first, factors = end + 2 * mapped, factors + 3 * mapped
    return tuple(found)


def _forward(run, tensors, kinds, scales, keep) -> list[Tensor]:
    """run(plan, tensors of its slots) executes a plan: it is what backends differ in."""
    shapes = _shapes(tensors, kinds, scales)
    results, buffers = [], []
    for s in shapes:
        u, single = tensors[s.first], tensors[s.weight(1)].ndim == 2
        results.append(u.new_empty((s.samples, s.outputs) if single else (s.miners, s.samples, s.outputs)))
        if keep:
            buffers.append(_buffer(s, kept, u))
    _run(run, planned("forward", shapes, keep), input=tensors, result=results, kept=buffers)
    return results + buffers


def _backward(run, tensors, gzs, buffers, kinds, scales, wanted, given, keep) -> list[Tensor]:
    shapes = _shapes(tensors, kinds, scales)
    plan = planned("backward", shapes, tuple(wanted), tuple(given), keep)
    gradients, adjoints = _places(plan, tensors), []
    if keep:
        adjoints = [_buffer(s, kept_by_backward, tensors[s.first]) for s in shapes]
    gz = _spread(gzs, given)
    _run(run, plan, input=tensors, kept=buffers, gz=gz, gradient=gradients, adjoint=adjoints)
    return _summed(plan, gradients) + adjoints


def _second(run, tensors, gzs, cotangents, buffers, kinds, scales, wanted, given, along, ggz) -> list[Tensor]:
    C = len(kinds) // _PARTS
    plan = planned("second", _shapes(tensors, kinds, scales), *map(tuple, (wanted, given, along, ggz)))
    gradients, gz = _places(plan, tensors), _spread(gzs, given)
    second = {c: torch.empty_like(gz[c]) for c in plan.program.writes("ggz")}
    _run(
        run, plan, input=tensors, kept=buffers[:C], adjoint=buffers[C:], gz=gz, cotangent=_spread(cotangents, along),
        gradient=gradients, ggz=second,
    )  # fmt: skip
    return _summed(plan, gradients) + [second[c] for c in sorted(second)]


def _run(run, plan: Plan, **given) -> None:
    """given: the tensors by the names of the program's slots."""
    if plan.program.tasks:
        run(plan, [given[name][i] for name, i in plan.program.slots])


def _buffer(s: Shape, places, like: Tensor) -> Tensor:
    return like.new_empty(s.miners, rows_of(places(s)), s.lanes)


def _spread(values: Sequence, flags: Sequence[bool]) -> list:
    """Each of the values in the place of a flag that is set."""
    rest = iter(values)
    return [next(rest) if flag else None for flag in flags]


def _places(plan: Plan, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Where a program writes gradients: that of a u which all miners share for each of them."""
    miners = {s.first: s.miners for s in plan.program.shapes if s.shared}
    return {
        i: tensors[i].new_empty(miners[i], *tensors[i].shape) if i in miners else torch.empty_like(tensors[i])
        for i in plan.program.writes("gradient")
    }


def _summed(plan: Plan, gradients: dict[int, Tensor]) -> list[Tensor]:
    """In the order of the tensors."""
    shared = {s.first for s in plan.program.shapes if s.shared}
    return [gradients[i].sum(0) if i in shared else gradients[i] for i in sorted(gradients)]


@Op
def miner_forward(
    first: Tensor, tensors: Sequence[Tensor], kinds: Sequence[int], scales: Sequence[float], keep: bool
) -> list[Tensor]:
    """z of each chain, and with `keep` what the backward needs of each."""
    return _forward(_reference, tensors, kinds, scales, keep)


@Op
def miner_backward(
    first: Tensor, tensors: Sequence[Tensor], gzs: Sequence[Tensor], buffers: Sequence[Tensor], kinds: Sequence[int],
    scales: Sequence[float], wanted: Sequence[bool], given: Sequence[bool], keep: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the wanted tensors of the chains whose gz is given; with `keep` what the second order needs."""
    return _backward(_reference, tensors, gzs, buffers, kinds, scales, wanted, given, keep)


@Op
def miner_second_order(
    first: Tensor, tensors: Sequence[Tensor], gzs: Sequence[Tensor], cotangents: Sequence[Tensor],
    buffers: Sequence[Tensor], kinds: Sequence[int], scales: Sequence[float], wanted: Sequence[bool],
    given: Sequence[bool], along: Sequence[bool], ggz: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients by the wanted tensors, and by gz where `ggz`: of those that the plan writes."""
    return _second(_reference, tensors, gzs, cotangents, buffers, kinds, scales, wanted, given, along, ggz)


def _reference(plan: Plan, tensors: Sequence[Tensor]) -> None:
    execute(plan.program, tensors)


class _Miner(Function):
    """kinds, scales and the backend; the tensors."""

    @staticmethod
    def forward(ctx, kinds, scales, backend, *tensors):
        ctx.args = kinds, scales, backend
        ctx.set_materialize_grads(False)
        found = miner_forward(tensors[0], tensors, kinds, scales, any(ctx.needs_input_grad), backend=backend)
        chains = len(kinds) // _PARTS
        ctx.save_for_backward(*tensors, *found[chains:])
        return tuple(found[:chains])

    @staticmethod
    def backward(ctx, *gzs):
        refuse_transforms("miner", *gzs)
        count, saved = len(ctx.needs_input_grad) - 3, ctx.saved_tensors
        given = tuple(g is not None for g in gzs)
        owners = _owners(ctx.args[0])
        wanted = tuple(given[owners[i]] and backward_wants(ctx, i + 3, i) for i in range(count))
        args, gzs = (*ctx.args, wanted, given), [g.contiguous() for g in gzs if g is not None]
        if not any(wanted):
            found = ()
        elif torch.is_grad_enabled():
            found = apply_function(_Gradients, args, *gzs, *saved)
        else:
            found = _first_order(args, gzs, saved, False)
        return None, None, None, *_spread(found, wanted)


def _owners(kinds: Sequence[int]) -> list[int]:
    """The chain of each tensor."""
    found = []
    for c, (depth, _, skip, _, mapped) in enumerate(zip(*[iter(kinds)] * _PARTS, strict=True)):
        found += [c] * (1 + 2 * (depth + (SKIPS[skip] == "affine") + mapped))
    return found


def _first_order(args, gzs, saved, keep: bool) -> list[Tensor]:
    """saved: the tensors, and what the forward kept of each chain."""
    kinds, scales, backend, wanted, given = args
    tensors, buffers = saved[: len(wanted)], saved[len(wanted) :]
    return miner_backward(
        tensors[0], tensors, gzs, buffers, kinds, scales, wanted, given, keep, backend=backend
    )  # fmt: skip


class _Gradients(Function):
    """The first gradients of the wanted tensors: of what args say, each gz that is given, and what _Miner has saved."""

    @staticmethod
    def forward(ctx, args, *rest):
        ctx.args = args
        ctx.set_materialize_grads(False)
        wanted, given = args[3:]
        found = _first_order(args, rest[: sum(given)], rest[sum(given) :], True)
        ctx.save_for_backward(*rest, *found[sum(wanted) :])
        return tuple(found[: sum(wanted)])

    @staticmethod
    def backward(ctx, *cotangents):
        refuse_transforms("miner", *cotangents)
        kinds, scales, backend, wanted, given = ctx.args
        first = sum(given)
        asked = [backward_wants(ctx, i + 1, i) for i in range(first + len(wanted))]
        gzs, saved = ctx.saved_tensors[:first], ctx.saved_tensors[first:]
        tensors, buffers = saved[: len(wanted)], saved[len(wanted) :]
        ggz, inner = tuple(_spread_flags(asked[:first], given)), tuple(asked[first:])
        along = tuple(c is not None for c in _spread(cotangents, wanted))
        cotangents = [c.contiguous() for c in cotangents if c is not None]
        nothing = [None] * (1 + first + len(saved))
        if not cotangents or not any(asked):
            return tuple(nothing)
        if torch.is_grad_enabled():
            found = _differentiable(kinds, scales, tensors, gzs, given, along, cotangents)
            found = [g if ask else None for g, ask in zip(found, asked, strict=True)]
        else:
            args = kinds, scales, inner, given, along, ggz
            values = miner_second_order(tensors[0], tensors, gzs, cotangents, buffers, *args, backend=backend)
            program = planned("second", _shapes(tensors, kinds, scales), inner, given, along, ggz).program
            places = [first + i for i in sorted(program.writes("gradient"))]
            places += [sum(given[:c]) for c in sorted(program.writes("ggz"))]
            found: list[Tensor | None] = [None] * len(asked)
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return None, *found, *[None] * (len(saved) - len(wanted))


def _spread_flags(flags: Sequence[bool], given: Sequence[bool]) -> list[bool]:
    return [bool(flag) for flag in _spread(flags, given)]


def _differentiable(kinds, scales, tensors, gzs, given, along, cotangents) -> list[Tensor | None]:
    """The second gradients, by each gz and each tensor, with a graph."""
    # Of one alias each: where one of them depends on another, that is no business of this op.
    gzs, tensors = [[t.view_as(t) for t in group] for group in (gzs, tensors)]
    zs = [z for z, there in zip(map(plain, _chains(kinds, scales, tensors)), given, strict=True) if there]
    first = torch.autograd.grad(zs, [t for t, a in zip(tensors, along, strict=True) if a], gzs, create_graph=True)
    inputs = [*gzs, *tensors]
    reached = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(first, reached, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def _chains(kinds: Sequence[int], scales: Sequence[float], tensors: Sequence[Tensor]) -> list[Chain]:
    """The chains that `_flat` took apart."""
    found, rest, factors = [], iter(tensors), iter(zip(*[iter(scales)] * 3, strict=True))
    for depth, activation, skip, sphere, mapped in zip(*[iter(kinds)] * _PARTS, strict=True):
        u, layers = next(rest), [(next(rest), next(rest)) for _ in range(depth)]
        name = SKIPS[skip]
        around = (next(rest), next(rest)) if name == "affine" else "identity" if name == "identity" else None
        maps = [(next(rest), next(rest)) for _ in range(mapped)]
        mapping = None
        if maps:
            mapping = Mapping([w for w, _ in maps], [b for _, b in maps], [next(factors) for _ in maps])
        weights, biases = [w for w, _ in layers], [b for _, b in layers]
        found.append(Chain(u, weights, biases, ACTIVATIONS[activation], around, bool(sphere), mapping))
    return found


def _flat(chains: Sequence[Chain]) -> tuple[list[int], list[float], list[Tensor]]:
    """kinds, scales and tensors."""
    kinds, scales, tensors = [], [], []
    for chain in chains:
        affine = isinstance(chain.skip, tuple)
        skip = SKIPS.index("affine" if affine else chain.skip or "none")
        mapping = chain.mapping or Mapping((), (), ())
        kinds += [
            len(chain.weights),
            ACTIVATIONS.index(chain.activation),
            skip,
            int(chain.sphere),
            len(mapping.weights),
        ]
        scales += [float(value) for layer in mapping.scales for value in layer]
        tensors += [chain.u, *itertools.chain.from_iterable(zip(chain.weights, chain.biases, strict=True))]
        tensors += chain.skip if isinstance(chain.skip, tuple) else ()
        for weight, bias in zip(mapping.weights, mapping.biases, strict=True):
            tensors += [weight.detach(), bias.detach()]
    return kinds, scales, tensors


def miner(chains: Sequence[Chain]) -> list[Tensor]:
    """z of every chain, [N, B, O], of a single miner [B, O]; behind a mapping network w.

    All tensors are of one floating-point dtype and on one device; chains may differ in N, B, sizes and all else.
    Differentiable any number of times in all but the mapping network. Sums have one order: the same call gives the same
    bits on one machine with one number of threads.

    Raises TypeError for what is no tensor of a floating-point dtype, or of another dtype than u; ValueError, with chain
    and layer, for no chain, no layer or more than 8, shapes that do not fit, and another device; NotImplementedError
    inside a transform of torch.func.
    """
    if not isinstance(chains, (list, tuple)) or isinstance(chains, Chain):
        raise TypeError(f"chains must be a sequence of Chain, not {type(chains).__name__}")
    if not chains:
        raise ValueError("chains is empty: give one Chain at least")
    for c, chain in enumerate(chains):
        name = "the chain" if len(chains) == 1 else f"chain {c}"
        if not isinstance(chain, Chain):
            raise TypeError(f"chains must hold Chain, {name} is {type(chain).__name__}")
        _check(chain, name, chains[0].u)
    refuse_transforms("miner")
    return mine(chains)


def mine(chains: Sequence[Chain]) -> list[Tensor]:
    """`miner` for chains that are known to be right."""
    kinds, scales, tensors = _flat(chains)
    # Before the Function: what it saves must be its inputs, or a second order would end there.
    return list(run(_Miner, kinds, scales, forced_backend(), *(t.contiguous() for t in tensors)))


def _check(chain: Chain, name: str, like: Tensor) -> None:
    weights, biases = chain.weights, chain.biases
    if not 1 <= len(weights) <= DEPTH or len(biases) != len(weights):
        raise ValueError(
            f"{name} must have 1 to {DEPTH} weights and as many biases, got {len(weights)} and {len(biases)}"
        )
    if chain.activation not in ACTIVATIONS:
        raise ValueError(f"the activation of {name} must be one of {', '.join(ACTIVATIONS)}, got {chain.activation!r}")
    check_beside(chain.u, f"u of {name}", like, "the first chain")
    check_tensor(weights[0], f"weight 1 of {name}")
    many = weights[0].ndim == 3
    lead, before = ([len(weights[0])] if many else []), [chain.u.shape[-1]] if chain.u.ndim else [0]
    u_shape = list(chain.u.shape)
    if len(u_shape) not in ((2, 3) if many else (2,)) or u_shape[:-2] not in ([], lead) or 0 in u_shape:
        expected = f"[B, I] or [{lead[0]}, B, I]" if many else "[B, I]"
        raise ValueError(f"u of {name} must have the shape {expected}, without a 0, got {u_shape}")
    layers = [*zip(weights, biases, strict=True)]
    for l, (weight, bias) in enumerate(layers, 1):
        out = list(weight.shape[-2:-1])
        _check_layer(weight, bias, f"layer {l} of {name}", chain.u, [*lead, *out, *before], [*lead, *out])
        before = out
    if isinstance(chain.skip, tuple):
        A, a = chain.skip
        _check_layer(
            A, a, f"the skip connection of {name}", chain.u, [*lead, *before, chain.u.shape[-1]], [*lead, *before]
        )  # fmt: skip
    elif chain.skip not in (None, "identity"):
        raise ValueError(f'skip of {name} must be None, "identity" or a pair (A, a), got {chain.skip!r}')
    elif chain.skip and before != [chain.u.shape[-1]]:
        raise ValueError(
            f"{name} gives {before[0]} numbers for {chain.u.shape[-1]}: skip must be None or a pair (A, a)"
        )
    for k, (weight, bias, scales) in enumerate(zip(*(chain.mapping or ((), (), ())), strict=True), 1):
        out = list(weight.shape[:1])
        _check_layer(weight, bias, f"layer {k} of the mapping network of {name}", chain.u, [*out, *before], out)
        if len(scales) != 3:
            raise ValueError(f"layer {k} of the mapping network of {name} has {len(scales)} scales, not 3")
        before = out


def _check_layer(weight, bias, name: str, u: Tensor, shape: list[int], bias_shape: list[int]) -> None:
    for what, tensor, wanted in (("weight", weight, shape), ("bias", bias, bias_shape)):
        check_beside(tensor, f"the {what} of {name}", u, "u")
        if tensor.dtype != u.dtype:
            raise TypeError(f"the {what} of {name} is {tensor.dtype}, u {u.dtype}: convert one of them")
        if list(tensor.shape) != wanted or 0 in wanted:
            raise ValueError(
                f"the {what} of {name} must have the shape {wanted}, without a 0, got {list(tensor.shape)}"
            )


# Launchers: what runs a plan, in the three ops. Tensors are contiguous.


def _native(native, plan: Plan, tensors: Sequence[Tensor]) -> None:
    address, count = plan.words.buffer_info()
    addresses = [t.data_ptr() for t in tensors]
    code = DTYPE_CODES[tensors[0].dtype]
    native.miner_cpu(code, address, count // WORDS, addresses, torch.get_num_threads())


for _op, _pass in ((miner_forward, _forward), (miner_backward, _backward), (miner_second_order, _second)):

    @_op.register("cpp", dtypes=(torch.float32, torch.float64))
    def _(native, first, *args, _pass=_pass):
        return _pass(functools.partial(_native, native), *args)

    @_op.register("triton", dtypes=(torch.float32,))
    def _(kernels, first, *args, _pass=_pass):
        return _pass(kernels.execute, *args)
