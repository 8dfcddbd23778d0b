"""The passes of `miner` as lists of tasks: the equations of its three orders are written here, for all backends."""

import functools
from array import array
from dataclasses import dataclass

from ._miner_program import ABSENT, Builder, Program, Rows, Shape, Term, packed


def _transposed(matrix: Rows) -> Rows:
    return matrix._replace(row=matrix.sample, sample=matrix.row)


def forward(shapes: tuple[Shape, ...], keep: bool) -> Program:
    """z of every chain, and with `keep` what the backward needs."""
    b = Builder(shapes)
    for c, s in enumerate(shapes):
        b.begin(c)

        def place(key, rows, keep=keep, b=b):
            return b.kept("kept", key) if keep and key is not None else b.scratch(rows)

        u = x = b.u()
        for l in range(1, s.depth + 1):
            last, ends = l == s.depth, l == s.depth and not s.projections
            terms, adds = [Term(b.weight(l), x, s.sizes[l - 1])], [b.bias(l)]
            if last and s.skip == "identity":
                adds.append(u)
            if last and s.skip == "affine":
                terms.append(Term(b.weight(l + 1), u, s.sizes[0]))
                adds.append(b.bias(l + 1))
            key = ("h", l) if not last else ("z", 0) if s.projections else None
            x = b.layer(
                s.sizes[l], place(key, s.sizes[l]), terms, adds, copy=b.z("result") if ends else ABSENT,
                activation="linear" if last else s.activation,
            )  # fmt: skip
        for i in range(s.projections):
            inner, ends = i + 1 < s.projections, i + 1 == s.projections and not s.mapped
            out, copy = place(("z", i + 1) if inner else None, s.sizes[-1]), b.z("result") if ends else ABSENT
            x = b.task("project", s.sizes[-1], adds=((x, 1.0),), out=out, copy=copy)
            b.step += 1
        inputs = s.sizes[-1]
        for k, (size, (scale, bias_scale, gain)) in enumerate(zip(s.mapped, s.scales, strict=True)):
            weight, i = b.matrix("input", s.mapping(k), size, inputs, shared=True), s.mapping(k) + 1
            x = b.task(
                "product", size, terms=(Term(weight, x, inputs, scale),),
                adds=((b.vector("input", i, size, shared=True), bias_scale),), out=place(("m", k), size),
                copy=b.z("result") if k + 1 == len(s.mapped) else ABSENT, activation="lrelu", gain=gain,
            )  # fmt: skip
            b.step += 1
            inputs = size
    return b.program()


def backward(shapes: tuple[Shape, ...], wanted: tuple[bool, ...], given: tuple[bool, ...], keep: bool) -> Program:
    """The gradients of the tensors that are wanted, by gz of the chains for which it is given; with `keep` what the
    second order needs."""
    b = Builder(shapes)
    for c, s in enumerate(shapes):
        own = wanted[s.first : s.first + s.count]
        if not given[c] or not any(own):
            continue
        b.begin(c)

        def place(key, rows, b=b):
            return b.kept("adjoint", key) if keep else b.scratch(rows)

        d = b.z("gz")
        for k in reversed(range(len(s.mapped))):
            gain = s.scales[k][2]
            if k + 1 == len(s.mapped):
                slope = {"h": b.kept("kept", ("m", k)), "activation": "lrelu", "epilogue": "slope", "gain": gain}
                d = b.layer(s.mapped[k], b.scratch(s.mapped[k]), (), (d,), **slope)
            d = _below_mapping(b, k, d, place(("g", s.projections - 1), s.sizes[-1]) if k == 0 else None)
        for i in reversed(range(s.projections)):
            out = place(("g", i - 1) if i else ("d", s.depth), s.sizes[-1])
            d = b.task("along", s.sizes[-1], adds=((b.kept("kept", ("z", i)), 1.0), (d, 1.0)), out=out)
            b.step += 1
        top = d
        for l in range(s.depth, 0, -1):
            layers = [l, l + 1] if l == s.depth and s.skip == "affine" else [l]
            for layer in layers:
                x = b.kept("kept", ("h", l - 1)) if layer == l > 1 else b.u()
                _outer(b, layer, wanted, [Term(top if layer > l else d, x, s.samples)], True)
            if not any(wanted[s.first : s.weight(l)]):
                break
            terms = [Term(_transposed(b.weight(l)), d, s.sizes[l])]
            if l > 1:
                raw = place(("q", l - 1), s.sizes[l - 1]) if keep and s.activation == "tanh" else ABSENT
                d = b.layer(s.sizes[l - 1], place(("d", l - 1), s.sizes[l - 1]), terms, raw=raw, **_slope(b, l - 1))
                continue
            if s.skip == "affine":
                terms.append(Term(_transposed(b.weight(s.depth + 1)), top, s.sizes[-1]))
            adds = (top,) if s.skip == "identity" else ()
            b.layer(s.sizes[0], b.scratch(s.sizes[0]), terms, adds, copy=b.u("gradient"))
    return b.program()


def _slope(b: Builder, layer: int) -> dict:
    """phi' of a layer of the miner that is not the last."""
    return {"h": b.kept("kept", ("h", layer)), "activation": b.shape.activation, "epilogue": "slope"}


def _below_mapping(b: Builder, k: int, d: Rows, out: Rows | None) -> Rows:
    """The gradient by what layer k of the mapping network is given, times phi' of the layer below."""
    s = b.shape
    inputs = s.mapped[k - 1] if k else s.sizes[-1]
    weight = _transposed(b.matrix("input", s.mapping(k), s.mapped[k], inputs, shared=True))
    slope = {}
    if k:
        slope = {
            "h": b.kept("kept", ("m", k - 1)),
            "activation": "lrelu",
            "epilogue": "slope",
            "gain": s.scales[k - 1][2],
        }
    term = Term(weight, d, s.mapped[k], s.scales[k][0])
    return b.layer(inputs, b.scratch(inputs) if out is None else out, (term,), **slope)


def _outer(b: Builder, layer: int, wanted: tuple[bool, ...], terms: list[Term], bias: bool) -> None:
    """The gradients of a layer's weight, from terms d x^T, and of its bias, from the last d where `bias`."""
    at, (rows, columns) = b.shape.weight(layer), b.sizes(layer)
    out = b.weight(layer, "gradient") if wanted[at] and terms else ABSENT
    raw = b.bias(layer, "gradient") if wanted[at + 1] and bias else ABSENT
    if out is not ABSENT or raw is not ABSENT:
        b.task("outer", rows, columns, terms=tuple(terms), out=out, raw=raw)


def second(
    shapes: tuple[Shape, ...], wanted: tuple[bool, ...], given: tuple[bool, ...], along: tuple[bool, ...],
    ggz: tuple[bool, ...],
) -> Program:  # fmt: skip
    """The gradients, by the tensors that are wanted and by gz where `ggz`, of the inner product of the first gradients
    with cotangents, which those of the tensors in `along` have.

    t is the tangent of what flows forward along the cotangents, e the gradient by a."""
    b = Builder(shapes)
    for c, s in enumerate(shapes):
        if not given[c] or not any(along[s.first : s.first + s.count]):
            continue
        b.begin(c)
        _second_of_chain(b, s, c, wanted, along, ggz[c])
    return b.program()


def _second_of_chain(b: Builder, s: Shape, c: int, wanted, along, ggz: bool) -> None:
    has = lambda i: along[i]  # noqa: E731
    own = wanted[s.first : s.first + s.count]
    v = b.u("cotangent") if has(s.first) else None
    xs = [b.u(), *(b.kept("kept", ("h", l)) for l in range(1, s.depth))]
    ts: list[Rows | None] = [v]
    ps: dict[int, Rows] = {}
    top = s.depth + 1
    for l in range(1, s.depth + 1):
        last, terms, adds = l == s.depth, [], []
        for layer in [l, top] if last and s.skip == "affine" else [l]:
            t, x = (ts[-1], xs[l - 1]) if layer == l else (v, xs[0])
            inputs = b.sizes(layer)[1]
            terms += [Term(b.weight(layer), t, inputs)] if t is not None else []
            terms += [Term(b.weight(layer, "cotangent"), x, inputs)] if has(s.weight(layer)) else []
            adds += [b.bias(layer, "cotangent")] if has(s.weight(layer) + 1) else []
        adds += [v] if last and s.skip == "identity" and v is not None else []
        if not (terms or adds) or (last and not (ggz or s.projections)):
            ts.append(None)
            continue
        fields = {} if last else _slope(b, l)
        if s.activation == "tanh" and not last:
            fields["raw"] = ps[l] = b.scratch(s.sizes[l])
        ends = last and not s.projections
        copy = b.z("ggz") if ends else ABSENT
        ts.append(b.layer(s.sizes[l], b.scratch(s.sizes[l]), terms, adds, copy=copy, **fields))
    t, tops = ts[-1], []
    for i in range(s.projections if t is not None else 0):
        tops.append(t)
        ends = i + 1 == s.projections and not s.mapped
        if ends and not ggz:
            break
        out, z = b.scratch(s.sizes[-1]), b.kept("kept", ("z", i))
        t = b.task(
            "along", s.sizes[-1], adds=((z, 1.0), (t, 1.0)), out=out, copy=b.z("ggz") if ends else ABSENT
        )  # fmt: skip
        b.step += 1
    inputs = s.sizes[-1]
    for k, (size, (scale, _, gain)) in enumerate(zip(s.mapped, s.scales, strict=True)):
        if t is None or not ggz:
            break
        weight = b.matrix("input", s.mapping(k), size, inputs, shared=True)
        fields = {"h": b.kept("kept", ("m", k)), "activation": "lrelu", "epilogue": "slope", "gain": gain}
        fields["copy"] = b.z("ggz") if k + 1 == len(s.mapped) else ABSENT
        t = b.layer(size, b.scratch(size), (Term(weight, t, inputs, scale),), **fields)
        inputs = size
    if not any(own):
        return
    e, ds = None, {l: b.kept("adjoint", ("d", l)) for l in range(1, s.depth)}
    ds[s.depth] = b.kept("adjoint", ("d", s.depth)) if s.projections else b.z("gz")
    for i in reversed(range(len(tops))):
        g = b.kept("adjoint", ("g", i)) if s.mapped or i + 1 < s.projections else b.z("gz")
        adds = ((b.kept("kept", ("z", i)), 1.0), *(((e, 1.0),) if e is not None else ()))
        e = b.task("twice", s.sizes[-1], adds=adds, h=tops[i], p=g, out=b.scratch(s.sizes[-1]))
        b.step += 1
    e_top, d_top = e, ds[s.depth]
    for l in range(s.depth, 0, -1):
        for layer in [l, top] if l == s.depth and s.skip == "affine" else [l]:
            t, x = (ts[l - 1], xs[l - 1]) if layer == l else (v, xs[0])
            terms = [Term(ds[l], t, s.samples)] if t is not None else []
            terms += [Term(e, x, s.samples)] if e is not None else []
            _outer(b, layer, wanted, terms, e is not None)
        if not any(wanted[s.first : s.weight(l)]):
            return
        terms = [Term(_transposed(b.weight(l)), e, s.sizes[l])] if e is not None else []
        if has(s.weight(l)):
            terms.append(Term(_transposed(b.weight(l, "cotangent")), ds[l], s.sizes[l]))
        if l > 1:
            fields = _slope(b, l - 1)
            if l - 1 in ps:
                fields |= {"epilogue": "second", "p": ps[l - 1], "q": b.kept("adjoint", ("q", l - 1))}
            something = terms or l - 1 in ps
            e = b.layer(s.sizes[l - 1], b.scratch(s.sizes[l - 1]), terms, **fields) if something else None
            continue
        adds = (e_top,) if s.skip == "identity" and e_top is not None else ()
        if s.skip == "affine":
            terms += [Term(_transposed(b.weight(top)), e_top, s.sizes[-1])] if e_top is not None else []
            if has(s.affine):
                terms.append(Term(_transposed(b.weight(top, "cotangent")), d_top, s.sizes[-1]))
        if terms or adds:
            b.layer(s.sizes[0], b.scratch(s.sizes[0]), terms, adds, copy=b.u("gradient"))


@dataclass(eq=False)
class Plan:
    program: Program
    words: array


# Without a limit, as are the tables that the Triton kernel makes of it.
@functools.cache
def planned(which: str, *args) -> Plan:
    """A pass, "forward", "backward" or "second", and its numbers."""
    program = {"forward": forward, "backward": backward, "second": second}[which](*args)
    return Plan(program, packed(program))
