"""The tensors of a `row_update` as its kernels read them: checked, a table of addresses and strides, a work list."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard, cast

import torch
from torch import Tensor

from .._torch import overlaps_itself

CHUNK = 1024  # elements of a work item of the GPU kernels: kChunk in csrc/row_update.cu
WORDS = (  # of a tensor's row in the table, int64 each: RowTensor in csrc/ops.h
    "leaf", "mean", "square", "average", "weight", "rows", "step", "tickets", "count", "length", "row_stride",
    "outer_stride", "inner", "inner_stride", "aligned", "reserved",
)  # fmt: skip


@dataclass(eq=False)
class RowTensor:
    """One parameter of a `RowUpdate`.

    leaf: the values that train, [k, ...].
    state: holds "step" (float32 [k]), "exp_avg", "exp_avg_sq", "momentum_buffer" and "ema", as far as the optimizer has
        them; those that are missing are put there.
    weight: the weight whose rows the leaf holds; None for a parameter that trains as a whole.
    rows: which rows of the weight they are, int64 [k], distinct; None where weight is.
    axis: the axis of the weight along which its rows lie.
    """

    leaf: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    rows: Tensor | None = None
    axis: int = 0

    def write(self) -> None:
        """Writes the leaf through to the weight."""
        if self.weight is not None and self.rows is not None:
            write_rows(self.weight, self.axis, self.rows, self.leaf)


def write_rows(weight: Tensor, axis: int, rows: Tensor, values: Tensor) -> None:
    """Writes values [k, ...] into the slices `rows` of weight along `axis`, rounded to the weight's dtype.

    A 0-d weight is one slice, and rows are not looked at."""
    values = values.to(weight.device, weight.dtype)
    if weight.ndim == 0:
        weight.copy_(values.reshape(()))
    else:
        weight.index_copy_(axis, rows.to(weight.device), values.movedim(0, axis))


class Table:
    """Tensors of one device and pair of dtypes as the kernels read them, and the gradients of the present step.

    words: int64 [n, 16], WORDS of every tensor. indirect: whose weight PyTorch writes. flat: whether the kernels can
    read the leaves at all.
    """

    def __init__(self, rule: str, tensors: list[RowTensor], flat: bool):
        self.rule, self.tensors, self.flat = rule, tensors, flat
        self.grads: Sequence[Tensor | None] = ()
        self.device, self.dtype = tensors[0].leaf.device, tensors[0].leaf.dtype
        if not flat:
            return
        self.weight_dtype = self.dtype if tensors[0].weight is None else tensors[0].weight.dtype
        self.leaves = [t.leaf for t in tensors]
        self.contiguous = all(map(Tensor.is_contiguous, self.leaves))
        self.addresses, self.indirect, self.on_device = None, [], None
        self.rows = [None if t.rows is None else t.rows.to(self.device).contiguous() for t in tensors]
        words = []
        for t, rows in zip(tensors, self.rows, strict=True):
            place = None if t.weight is None else _place(t.leaf, t.weight, t.axis)
            if place is None and t.weight is not None:
                self.indirect.append(t)
            k, length = _matrix(t.leaf)
            mean = t.state.get("momentum_buffer") if rule == "momentum" else t.state.get("exp_avg")
            parts = {"leaf": t.leaf, "mean": mean, "square": t.state.get("exp_avg_sq"), "average": t.state.get("ema")}
            if place:
                parts |= {"weight": t.weight, "rows": rows}
            if rule in ("adam", "adamw"):
                parts["step"] = t.state["step"]
            row = dict.fromkeys(WORDS, 0) | {name: p.data_ptr() for name, p in parts.items() if p is not None}
            row |= {"count": k, "length": length}
            strides = "row_stride", "outer_stride", "inner", "inner_stride"
            row |= zip(strides, place or (0, 0, max(length, 1), 1), strict=True)
            # A kernel moves packs of 16 bytes where each is aligned and, in the weight, in one piece.
            pack = 16 // self.dtype.itemsize
            aligned = length % pack == 0 and not any(row[name] % 16 for name in ("leaf", "mean", "square", "average"))
            if place:
                aligned &= row["inner_stride"] == 1 and row["weight"] % (pack * self.weight_dtype.itemsize) == 0
                aligned &= not any(row[name] % pack for name in ("row_stride", "outer_stride", "inner"))
            words.append([*(row | {"aligned": int(aligned)}).values()])
        self.words = torch.tensor(words, dtype=torch.int64, device="cpu").reshape(-1, len(WORDS))

    def take(self, grads: Sequence[Tensor | None]) -> None:
        """Makes `grads` the gradients of this step. One whose layout in memory is not its leaf's is copied."""
        self.grads = grads
        if not self.flat:
            check_grads(self.tensors, grads)
            return
        try:
            # Most steps find their gradients where those of the step before were, and have nothing to check or copy;
            # or elsewhere, as backward() makes them anew. Whole lists are compared: a call a tensor would take longer.
            present = grads if none_missing(grads) else [g for g in grads if g is not None]
            addresses = _addresses(grads, present is grads)
            known = self.contiguous and all(map(Tensor.is_contiguous, present))
            if known and (addresses == self.addresses or self._fits(grads, present)):
                self._move(addresses)
                return
        except (RuntimeError, TypeError, AttributeError):  # sparse, or no tensor at all: check_grads names it
            pass
        check_grads(self.tensors, grads)
        self.grads = [g if g is None else _alike(t.leaf, g) for t, g in zip(self.tensors, grads, strict=True)]
        self._move(_addresses(self.grads))

    def _fits(self, grads: Sequence[Tensor | None], present: Sequence[Tensor]) -> bool:
        """Whether contiguous gradients have their leaves' shape, dtype and device."""
        leaves = self.leaves
        if len(present) < len(grads):
            leaves = [leaf for leaf, g in zip(leaves, grads, strict=True) if g is not None]
        kinds = {(g.dtype, g.device) for g in present}
        return kinds <= {(self.dtype, self.device)} and [*map(Tensor.size, present)] == [*map(Tensor.size, leaves)]

    def _move(self, addresses: list[int]) -> None:
        if addresses != self.addresses:
            if self.on_device is not None:
                refuse_capture([self.tensors[0].leaf])
                words = torch.frombuffer(array("q", addresses), dtype=torch.int64)
                self.on_device["grads"].copy_(_pinned(words), non_blocking=True)
            self.addresses = addresses

    def write_indirect(self) -> None:
        for t in self.indirect:
            t.write()

    def to_device(self) -> dict[str, Tensor]:
        """The table where GPU kernels read it: words, grads int64 [n], and the work list `items` int32 [., 4].

        An item is (tensor, first row, rows, part): several whole rows, or the part-th CHUNK elements of a longer row.
        """
        if self.on_device is None:
            refuse_capture([self.tensors[0].leaf])
            items, lengths = [], [_matrix(t.leaf) for t in self.tensors]
            tickets = torch.zeros(sum(k for k, _ in lengths), dtype=torch.int32, device=self.device)
            offset = 0
            for i, (k, length) in enumerate(lengths):
                if not length:
                    continue
                together, parts = max(1, CHUNK // length), math.ceil(length / CHUNK)
                first = torch.arange(0, k, together, device="cpu").repeat_interleave(parts)
                part = torch.arange(parts, device="cpu").repeat(len(first) // parts)
                items.append(torch.stack([torch.full_like(first, i), first, (k - first).clamp_max(together), part], 1))
                self.words[i, WORDS.index("tickets")] = tickets.data_ptr() + tickets.itemsize * offset
                offset += k
            grads = torch.tensor(self.addresses, device="cpu")
            parts = {"words": self.words, "grads": grads, "items": torch.cat(items).int()}
            self.on_device = {name: _pinned(t).to(self.device, non_blocking=True) for name, t in parts.items()}
            self.on_device |= {"tickets": tickets, "one": torch.ones(1, dtype=torch.float32, device=self.device)}
            self.on_device["zero"] = torch.zeros(1, dtype=torch.float32, device=self.device)
        return self.on_device


def none_missing(tensors: Sequence[Tensor | None]) -> TypeGuard[Sequence[Tensor]]:
    return type(None) not in {*map(type, tensors)}


def _addresses(tensors: Sequence[Tensor | None], all_there: bool = False) -> list[int]:
    """0 for None. all_there: that none of them is None is known."""
    if all_there or none_missing(tensors):
        return [*map(Tensor.data_ptr, cast("Sequence[Tensor]", tensors))]
    return [0 if t is None else t.data_ptr() for t in tensors]


def check_row_tensor(t: RowTensor) -> None:
    """TypeError or ValueError where leaf, weight, rows and axis do not fit each other."""
    leaf, weight, rows = t.leaf, t.weight, t.rows
    if not leaf.is_floating_point() or leaf.layout != torch.strided:
        raise TypeError(f"a leaf must be a dense floating-point tensor, got {leaf.dtype}, {leaf.layout}")
    if overlaps_itself(leaf):
        raise ValueError("elements of a leaf share memory (an expanded tensor?); give it memory of its own: clone() it")
    if weight is None or rows is None:
        if weight is not rows:
            raise ValueError("weight and rows belong together: give both or neither")
        return
    if weight.dtype != leaf.dtype and (leaf.dtype, weight.dtype) not in _MASTERS:
        raise TypeError(
            f"a weight must have its leaf's dtype, or be float16 or bfloat16 with a float32 leaf; "
            f"got {weight.dtype} and {leaf.dtype}"
        )
    if weight.device != leaf.device:
        raise ValueError(f"leaf and weight must be on one device, got {leaf.device} and {weight.device}")
    if weight.ndim and not 0 <= t.axis < weight.ndim:
        raise ValueError(f"axis must be one of the weight's {weight.ndim}, got {t.axis}")
    n = weight.shape[t.axis] if weight.ndim else 1
    shape = [len(rows), *weight.shape[: t.axis], *weight.shape[t.axis + 1 :]] if weight.ndim else [1]
    if rows.dtype != torch.int64 or rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be a non-empty int64 vector, got {rows.dtype} {list(rows.shape)}")
    if list(leaf.shape) != shape:
        raise ValueError(f"the leaf of these rows must have shape {shape}, got {list(leaf.shape)}")
    if int(rows.min()) < 0 or int(rows.max()) >= n or len(rows.unique()) != len(rows):
        raise ValueError(f"rows must be distinct and between 0 and {n - 1}")


_MASTERS = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


def check_grads(tensors: list[RowTensor], grads: Sequence[Tensor | None]) -> None:
    for t, g in zip(tensors, grads, strict=True):
        if g is None:
            continue
        if not isinstance(g, Tensor) or g.layout != torch.strided or not g.is_floating_point():
            what = f"{g.dtype}, {g.layout}" if isinstance(g, Tensor) else type(g).__name__
            raise TypeError(f"a gradient must be a dense floating-point tensor, got {what}; sparse ones: to_dense()")
        if g.shape != t.leaf.shape or g.device != t.leaf.device:
            raise ValueError(
                f"a gradient must have its leaf's shape and device, {list(t.leaf.shape)} on {t.leaf.device}, got "
                f"{list(g.shape)} on {g.device}"
            )


def refuse_capture(tensors: list[Tensor]) -> None:
    if any(t.is_cuda for t in tensors[:1]) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "memory that row_update works on has moved, which a CUDA graph under capture cannot follow; take one step "
            "before the capture and keep the gradients: zero_grad(set_to_none=False)"
        )


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _alike(leaf: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the leaf's dtype, device and memory layout: itself where it has them."""
    same = tensor.dtype == leaf.dtype and tensor.device == leaf.device
    if same and (tensor.stride() == leaf.stride() or (tensor.is_contiguous() and leaf.is_contiguous())):
        return tensor
    return torch.empty_like(leaf).copy_(tensor)


def fill_state(t: RowTensor, rule: str, ema: bool) -> None:
    names = {"sgd": (), "momentum": ("momentum_buffer",)}.get(rule, ("exp_avg", "exp_avg_sq"))
    leaf, state = t.leaf.detach(), t.state
    for name in (*names, *(("ema",) if ema else ())):
        old = state.get(name)
        if old is None:
            state[name] = leaf.clone() if name == "ema" else torch.zeros_like(leaf)
        elif old.shape != leaf.shape:
            raise ValueError(f"{name} must have its leaf's shape {list(leaf.shape)}, got {list(old.shape)}")
        else:
            state[name] = _alike(leaf, old)
    if "exp_avg" in names:
        k, old = _matrix(leaf)[0], state.get("step")
        if old is None:
            state["step"] = torch.zeros(k, dtype=torch.float32, device=leaf.device)
        elif old.numel() == 1 or old.shape == (k,):  # one number: torch.optim's count of the whole parameter
            state["step"] = old.to(leaf.device, torch.float32).reshape(-1).expand(k).contiguous()
        else:
            raise ValueError(f"step must be one number for each of {k} rows, got shape {list(old.shape)}")


def _matrix(leaf: Tensor) -> tuple[int, int]:
    """(rows, elements of a row)"""
    k = leaf.shape[0] if leaf.ndim else 1
    return k, leaf.numel() // max(k, 1)


def _order(leaf: Tensor) -> list[int]:
    """The axes of a row that are longer than 1, from the outermost in memory to the innermost."""
    return sorted((d for d in range(1, leaf.ndim) if leaf.shape[d] > 1), key=leaf.stride, reverse=True)


def rows_are_flat(leaf: Tensor) -> bool:
    """Whether the rows lie one after the other, each a run of memory."""
    expected = 1
    for d in reversed(_order(leaf)):
        if leaf.stride(d) != expected:
            return False
        expected *= leaf.shape[d]
    return leaf.ndim == 0 or leaf.shape[0] == 1 or leaf.stride(0) == expected


def _place(leaf: Tensor, weight: Tensor, axis: int) -> tuple[int, int, int, int] | None:
    """(row_stride, outer_stride, inner, inner_stride), by which a kernel finds an element of the leaf in `weight`.

    Element j of a row, counted in the leaf's memory, is at row * row_stride + j // inner * outer_stride + j % inner *
    inner_stride. None where four numbers cannot say it.
    """
    if weight.ndim == 0:
        return 1, 0, 1, 1
    moved, blocks = weight.movedim(axis, 0), []
    for d in _order(leaf):
        size, stride = leaf.shape[d], moved.stride(d)
        if blocks and blocks[-1][1] == size * stride:
            blocks[-1] = blocks[-1][0] * size, stride
        else:
            blocks.append((size, stride))
    if len(blocks) > 2:
        return None
    inner, inner_stride = blocks[-1] if blocks else (1, 1)
    outer_stride = blocks[0][1] if len(blocks) == 2 else 0
    return moved.stride(0), outer_stride, inner, inner_stride
