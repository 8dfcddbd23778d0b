"""What a list of tasks is in which every backend executes a pass of `miner`; `_miner_passes` writes the lists.

A matrix of a pass is [N miners, rows, B samples], its rows one activation each. What later passes need is kept as
[N, rows, P], P the number of samples rounded up to `LANES`: the samples lie side by side. Tasks of one `step` depend on
those of earlier steps alone. With M a weight, x and d matrices, a task is one of

    product   raw = sum of scale M x or M^T x + sum of scale adds;  out = copy = e(raw)
    outer     out = sum of d x^T over the samples;  raw = sum of the last d over the samples
    project   out = copy = z r                                        r = (mean of z^2 over its `rows` rows + 1e-8)^-1/2
    along     out = copy = J v         J = r - r^3 z z^T / rows, the derivative of z r by z, which is symmetric
    twice     out = J e + dJ           dJ = the derivative of v^T J w by z

where e(raw) is gain phi(raw), or gain phi'(a) raw, or gain phi'(a) raw + phi''(a) p q. The derivatives are those at the
a whose gain phi(a) is h.
"""

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._op import wide_dtype

LANES = 16
SLOPE, EPSILON = 0.2, 1e-8  # of the leaky ReLU, of the projection; kSlope and kEpsilon in csrc/miner.cpp
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh")
SKIPS = ("none", "identity", "affine")
KINDS = ("product", "outer", "project", "along", "twice")
EPILOGUES = ("value", "slope", "second")
TERMS, ADDS = 4, 2  # at most, of a task
SCRATCH, NOTHING = -1, -2


class Rows(NamedTuple):
    """Where an element of a matrix lies: offset + its miner, row and sample times these strides, in a tensor."""

    tensor: int  # the place of its name in Program.slots; SCRATCH; NOTHING
    offset: int = 0
    miner: int = 0
    row: int = 0
    sample: int = 0


ABSENT = Rows(NOTHING)


class Term(NamedTuple):
    matrix: Rows  # `row` and `sample` are the strides of its rows and columns; of an outer product, d
    source: Rows
    depth: int  # columns of the matrix
    scale: float = 1.0


class Task(NamedTuple):
    kind: str
    step: int
    chain: int
    miners: int
    rows: int
    columns: int  # of an outer product; else the samples
    terms: tuple[Term, ...] = ()
    adds: tuple[tuple[Rows, float], ...] = ()  # of a projection: z, v; of `twice`: z, e
    out: Rows = ABSENT
    raw: Rows = ABSENT
    copy: Rows = ABSENT
    h: Rows = ABSENT  # of `twice`: v
    p: Rows = ABSENT  # of `twice`: w
    q: Rows = ABSENT
    activation: str = "linear"
    epilogue: str = "value"
    gain: float = 1.0


class Shape(NamedTuple):
    """What a chain is without its tensors. sizes: of u and of what each layer gives; mapped: of the mapping network's
    layers, whose scales are (of the weight, of the bias, gain). first: the place of u among all the tensors."""

    miners: int
    samples: int
    shared: bool  # u is the same for all miners
    sizes: tuple[int, ...]
    activation: str
    skip: str
    sphere: bool
    mapped: tuple[int, ...]
    scales: tuple[tuple[float, float, float], ...]
    first: int

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    @property
    def lanes(self) -> int:
        return -(-self.samples // LANES) * LANES

    @property
    def projections(self) -> int:
        return self.sphere + bool(self.mapped)

    @property
    def outputs(self) -> int:
        return (self.mapped or self.sizes)[-1]

    @property
    def count(self) -> int:
        """Its tensors: u, the layers' weights and biases, those of the skip connection, the mapping network's."""
        return 1 + 2 * (self.depth + (self.skip == "affine") + len(self.mapped))

    def weight(self, layer: int) -> int:
        """The place of the weight of layer 1 .. depth; its bias is next."""
        return self.first + 2 * layer - 1

    @property
    def affine(self) -> int:
        return self.weight(self.depth + 1)

    def mapping(self, layer: int) -> int:
        return self.first + self.count + 2 * (layer - len(self.mapped))


def kept(shape: Shape) -> dict[tuple[str, int], tuple[int, int]]:
    """The first row and the number of rows of what the forward keeps: h of the miner's layers but the last, the input
    of each projection, and what the mapping network's layers give."""
    parts = [(("h", l), shape.sizes[l]) for l in range(1, shape.depth)]
    parts += [(("z", i), shape.sizes[-1]) for i in range(shape.projections)]
    return _places(parts + [(("m", k), size) for k, size in enumerate(shape.mapped)])


def kept_by_backward(shape: Shape) -> dict[tuple[str, int], tuple[int, int]]:
    """Likewise of what the backward keeps for a second order: the gradients d by a, and q by h where phi'' is not 0;
    those by the result of each projection, g."""
    parts = [(("d", l), shape.sizes[l]) for l in range(1, shape.depth + bool(shape.projections))]
    parts += [(("q", l), shape.sizes[l]) for l in range(1, shape.depth) if shape.activation == "tanh"]
    inner = shape.projections if shape.mapped else shape.projections - 1
    return _places(parts + [(("g", i), shape.sizes[-1]) for i in range(inner)])


def _places(parts: list[tuple[tuple[str, int], int]]) -> dict[tuple[str, int], tuple[int, int]]:
    found, row = {}, 0
    for key, rows in parts:
        found[key] = row, rows
        row += rows
    return found


def rows_of(places: dict[tuple[str, int], tuple[int, int]]) -> int:
    return sum(rows for _, rows in places.values())


class Program(NamedTuple):
    """tasks: in an order in which one after the other can run. slots: what the tensors of the tasks are, as
    ("input", i), ("gradient", i) or ("cotangent", i) of tensor i, or ("result" | "kept" | "gz" | "adjoint" | "ggz",
    chain). scratch: of each chain, rows."""

    tasks: tuple[Task, ...]
    slots: tuple[tuple[str, int], ...]
    scratch: tuple[int, ...]
    shapes: tuple[Shape, ...]

    @property
    def aligned(self) -> bool:
        """Whether the rows of all weights begin at 16 bytes if the weights do."""
        matrices = [term.matrix for task in self.tasks if task.kind == "product" for term in task.terms]
        return all(max(m.row, m.sample) % 4 == 0 and m.miner % 4 == 0 for m in matrices)

    def writes(self, name: str) -> list[int]:
        return [i for kind, i in self.slots if kind == name]


class Builder:
    def __init__(self, shapes: tuple[Shape, ...]):
        self.shapes, self.tasks, self.slots, self.rows = shapes, [], {}, [0] * len(shapes)

    def begin(self, chain: int) -> None:
        self.chain, self.shape, self.step = chain, self.shapes[chain], 0

    def slot(self, name: str, index: int) -> int:
        return self.slots.setdefault((name, index), len(self.slots))

    def natural(self, name: str, index: int, size: int, shared: bool = False) -> Rows:
        """A tensor [N, B, size], or [B, size] for all miners."""
        return Rows(self.slot(name, index), 0, 0 if shared else self.shape.samples * size, 1, size)

    def u(self, name: str = "input") -> Rows:
        return self.natural(name, self.shape.first, self.shape.sizes[0], self.shape.shared and name != "gradient")

    def z(self, name: str) -> Rows:
        return self.natural(name, self.chain, self.shape.outputs)

    def matrix(self, name: str, index: int, rows: int, columns: int, shared: bool = False) -> Rows:
        return Rows(self.slot(name, index), 0, 0 if shared else rows * columns, columns, 1)

    def vector(self, name: str, index: int, size: int, shared: bool = False) -> Rows:
        return Rows(self.slot(name, index), 0, 0 if shared else size, 1, 0)

    def weight(self, layer: int, name: str = "input") -> Rows:
        """Of a layer of the miner; of layer depth + 1, of the skip connection."""
        return self.matrix(name, self.shape.weight(layer), *self.sizes(layer))

    def bias(self, layer: int, name: str = "input") -> Rows:
        return self.vector(name, self.shape.weight(layer) + 1, self.sizes(layer)[0])

    def sizes(self, layer: int) -> tuple[int, int]:
        s = self.shape
        return (s.sizes[-1], s.sizes[0]) if layer > s.depth else (s.sizes[layer], s.sizes[layer - 1])

    def kept(self, name: str, key: tuple[str, int]) -> Rows:
        """A part of what the forward ("kept") or the backward ("adjoint") keeps."""
        places = (kept if name == "kept" else kept_by_backward)(self.shape)
        row, lanes = places[key][0], self.shape.lanes
        return Rows(self.slot(name, self.chain), row * lanes, rows_of(places) * lanes, lanes, 1)

    def scratch(self, rows: int) -> Rows:
        first = self.rows[self.chain]
        self.rows[self.chain] += rows
        return Rows(SCRATCH, first * self.shape.lanes, 0, self.shape.lanes, 1)

    def task(self, kind: str, rows: int, columns: int | None = None, **fields) -> Rows:
        columns = self.shape.samples if columns is None else columns
        task = Task(kind, self.step, self.chain, self.shape.miners, rows, columns, **fields)
        self.tasks.append(task)
        return task.out

    def layer(self, rows: int, out: Rows, terms, adds=(), **fields) -> Rows:
        """A product on which the next step depends."""
        made = self.task("product", rows, terms=tuple(terms), adds=tuple((a, 1.0) for a in adds), out=out, **fields)
        self.step += 1
        return made

    def program(self) -> Program:
        scratch = tuple(self.rows)

        def placed(task: Task) -> Task:
            stride = scratch[task.chain] * self.shapes[task.chain].lanes

            def fix(rows: Rows) -> Rows:
                return rows._replace(miner=stride) if rows.tensor == SCRATCH else rows

            fields = {name: fix(getattr(task, name)) for name in ("out", "raw", "copy", "h", "p", "q")}
            terms = tuple(t._replace(matrix=fix(t.matrix), source=fix(t.source)) for t in task.terms)
            return task._replace(terms=terms, adds=tuple((fix(a), scale) for a, scale in task.adds), **fields)

        return Program(tuple(map(placed, self.tasks)), tuple(self.slots), scratch, self.shapes)


# Programs as numbers, and as PyTorch.

HEADER = (
    "kind", "step", "chain", "miners", "rows", "columns", "terms", "adds", "activation", "epilogue", "scratch",
    "scratch_rows",
)  # fmt: skip
OPERANDS = 6 + ADDS + 2 * TERMS
WORDS = len(HEADER) + TERMS + 5 * OPERANDS + 1 + ADDS + TERMS  # of a task: MinerTask in csrc/ops.h


def packed(program: Program) -> array:
    """int64, WORDS a task: HEADER, the depths of the terms, the operands out, raw, copy, h, p, q, adds, matrices and
    sources, 5 words each as in Rows, and as float64 the gain, the scales of the adds and of the terms.

    A scratch operand lies in a block of its chain, those of all chains one after the other."""
    words, starts, start = array("q"), [], 0
    for s, rows in zip(program.shapes, program.scratch, strict=True):
        starts.append(start)
        start += s.miners * rows * s.lanes
    for t in program.tasks:
        codes = ACTIVATIONS.index(t.activation), EPILOGUES.index(t.epilogue)
        counts = len(t.terms), len(t.adds)
        words.extend((KINDS.index(t.kind), t.step, t.chain, t.miners, t.rows, t.columns, *counts, *codes))
        words.extend((starts[t.chain], program.scratch[t.chain]))
        adds, no_add, no_term = [*t.adds], (ABSENT, 0.0), Term(ABSENT, ABSENT, 0, 0.0)
        adds += [no_add] * (ADDS - len(adds))
        terms = [*t.terms, *[no_term] * (TERMS - len(t.terms))]
        words.extend(term.depth for term in terms)
        operands = [t.out, t.raw, t.copy, t.h, t.p, t.q, *(rows for rows, _ in adds)]
        operands += [term.matrix for term in terms] + [term.source for term in terms]
        for rows in operands:
            words.extend(rows)
        floats = array("d", (t.gain, *(scale for _, scale in adds), *(term.scale for term in terms)))
        words.frombytes(floats.tobytes())
    return words


def execute(program: Program, tensors: Sequence[Tensor]) -> None:
    """Runs the tasks in PyTorch on the tensors of the slots, of which those that a task writes must be there."""
    like = tensors[0]
    scratch = [
        like.new_zeros(s.miners * rows * s.lanes) for s, rows in zip(program.shapes, program.scratch, strict=True)
    ]
    for task in program.tasks:
        _run_task(task, [*tensors, scratch[task.chain]])


def _run_task(task: Task, tensors: Sequence[Tensor]) -> None:
    samples = task.columns

    def at(rows: Rows, count: int = task.rows, columns: int = samples) -> Tensor:
        size, stride = (task.miners, count, columns), (rows.miner, rows.row, rows.sample)
        return tensors[rows.tensor].as_strided(size, stride, rows.offset)

    def write(rows: Rows, value: Tensor) -> None:
        if rows.tensor != NOTHING:
            at(rows).copy_(value)

    if task.kind == "outer":
        if task.out.tensor != NOTHING:
            parts = [at(t.matrix, columns=t.depth) @ at(t.source, task.columns, t.depth).mT for t in task.terms]
            at(task.out).copy_(functools.reduce(torch.add, parts))
        if task.raw.tensor != NOTHING:
            at(task.raw, columns=1).copy_(at(task.terms[-1].matrix, columns=task.terms[-1].depth).sum(2, keepdim=True))
        return
    adds = [at(rows) for rows, _ in task.adds]
    if task.kind == "product":
        value = at(task.out).new_zeros(())
        for a, (_, scale) in zip(adds, task.adds, strict=True):
            value = value + scale * a
        for t in task.terms:
            value = value + t.scale * (at(t.matrix, columns=t.depth) @ at(t.source, t.depth))
        write(task.raw, value)
        value = _epilogue(task, value, at)
    else:
        value = _projected(task, adds, at)
    write(task.out, value)
    write(task.copy, value)


def _epilogue(task: Task, value, at) -> Tensor:
    name = task.activation
    if task.epilogue == "value":
        if name == "relu":
            value = value.clamp(min=0)
        elif name == "lrelu":
            value = torch.where(value > 0, value, SLOPE * value)
        elif name == "tanh":
            value = value.tanh()
        return task.gain * value
    h = at(task.h)
    if name == "tanh":
        slope = 1 - h * h
    elif name == "linear":
        slope = torch.ones_like(h)
    else:
        slope = torch.where(h > 0, torch.ones_like(h), SLOPE if name == "lrelu" else 0.0)
    value = task.gain * slope * value
    return value if task.epilogue == "slope" else value - 2 * h * slope * at(task.p) * at(task.q)


def _projected(task: Task, adds: list[Tensor], at) -> Tensor:
    wide = wide_dtype(adds[0].dtype)
    adds = [a.to(wide) for a in adds]
    z = adds[0]
    r = torch.rsqrt(z.square().mean(1, keepdim=True) + EPSILON)

    def along(v: Tensor) -> Tensor:
        return r * v - r**3 * z * (z * v).mean(1, keepdim=True)

    if task.kind == "project":
        return z * r
    if task.kind == "along":
        return along(adds[1])
    v, w = at(task.h).to(wide), at(task.p).to(wide)
    zv, zw, vw = ((a * b).mean(1, keepdim=True) for a, b in ((z, v), (z, w), (v, w)))
    value = 3 * r**5 * z * zv * zw - r**3 * (z * vw + v * zw + w * zv)
    return value + along(adds[1]) if len(adds) > 1 else value
