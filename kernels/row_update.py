"""Triton kernel of row_update: a program takes an item of the work list, several whole rows or a part of a long one."""

import torch
import triton
import triton.language as tl

CHUNK = 1024  # elements of an item: CHUNK in minegan_fast/ops/_row_table.py
FEW = tl.constexpr(32)  # rows of an item
# Words of a tensor's row in the table, and how many they are: WORDS in minegan_fast/ops/_row_table.py.
LEAF, MEAN, SQUARE, AVERAGE, WEIGHT, ROWS, STEP, TICKETS = map(tl.constexpr, range(8))
COUNT, LENGTH, ROW_STRIDE, OUTER_STRIDE, INNER, INNER_STRIDE, ALIGNED, RESERVED, WORDS = map(tl.constexpr, range(8, 17))
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# Triton's own quotient and root of float32 are approximate on a GPU; these round as C++ does.
@triton.jit
def _divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _sqrt(a):
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@triton.jit
def _number(x):
    """A number of the launch as a tensor, which it is not in Triton's interpreter."""
    return tl.full((), x, tl.float64)


@triton.jit
def _age(t, lr, log_beta1, log_beta2, T: tl.constexpr):
    """lr / (1 - beta1^t) and sqrt(1 - beta2^t), logarithms to the base 2."""
    t = t.to(tl.float64)
    return (lr / (1 - tl.exp2(t * log_beta1))).to(T), tl.sqrt(1 - tl.exp2(t * log_beta2)).to(T)


@triton.jit
def _pointer(words, i: tl.constexpr, T: tl.constexpr, PACK: tl.constexpr):
    pointer = tl.load(words + i).to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if PACK > 1 else pointer


@triton.jit
def _item(
    words, grad, row, rows, part, lr, unscale, log_beta1, log_beta2, mean_weight, low, beta2, square_weight, keep, eps,
    decay, momentum, average, T: tl.constexpr, D: tl.constexpr, RULE: tl.constexpr, HAS_AVERAGE: tl.constexpr,
    CHUNK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Steps the elements of an item and moves their averages; grad is the gradient's address, or 0."""
    HAS_AGE: tl.constexpr = (RULE == "adam") | (RULE == "adamw")
    length = tl.load(words + LENGTH).to(tl.int32)
    first = part * CHUNK
    # Several rows are one run of memory in the leaf. A row longer than an item comes in parts, which begin at first.
    count = rows * length if rows > 1 else tl.minimum(length - first, CHUNK)
    base = row.to(tl.int64) * length + first
    # The compiler moves 16 bytes at a time only where it is told that addresses and masks change once a pack.
    if PACK > 1:
        count, base, length = tl.multiple_of(count, PACK), tl.multiple_of(base, PACK), tl.multiple_of(length, PACK)
    offsets = tl.arange(0, CHUNK)
    mask = offsets < count
    leaf = _pointer(words, LEAF, T, PACK) + base + offsets
    w = tl.load(leaf, mask, other=0.0)
    if rows > 1:
        local = offsets // length
        column = offsets - local * length
    else:
        local = tl.zeros_like(offsets)
        column = offsets + first
    if grad != 0:
        gradient = grad.to(tl.pointer_type(T))
        if PACK > 1:
            gradient = tl.multiple_of(gradient, 16)
        g = tl.load(gradient + base + offsets, mask, other=0.0) * unscale
        if RULE == "adamw":
            w = w * keep
        elif decay != 0:
            g = g + decay * w
        if HAS_AGE:
            step = tl.load(words + STEP).to(tl.pointer_type(tl.float32)) + row
            # The corrections are in float64, which is slow on many GPUs: few rows have them computed once each,
            # not once for every element.
            if (rows > 1) & (rows <= FEW):
                few = tl.arange(0, FEW)
                size, root = _age(tl.load(step + few, few < rows, other=0.0) + 1, lr, log_beta1, log_beta2, T)
                own_row = tl.minimum(local, FEW - 1)
                size, root = tl.gather(size, own_row, 0), tl.gather(root, own_row, 0)
            elif rows > 1:
                size, root = _age(tl.load(step + local, mask, other=0.0) + 1, lr, log_beta1, log_beta2, T)
            else:
                size, root = _age(tl.load(step) + 1, lr, log_beta1, log_beta2, T)
                size, root = tl.full((CHUNK,), size, T), tl.full((CHUNK,), root, T)
            mean = _pointer(words, MEAN, T, PACK) + base + offsets
            square = _pointer(words, SQUARE, T, PACK) + base + offsets
            m, v = tl.load(mean, mask, other=0.0), tl.load(square, mask, other=0.0)
            # torch.lerp, which starts from the side that is nearer to the result; mean_weight is that side's.
            m = tl.where(low, m, g) + mean_weight * (g - m)
            v = beta2 * v + square_weight * g * g
            tl.store(mean, m, mask)
            tl.store(square, v, mask)
            w = w - _divide(size * m, _divide(_sqrt(v), root) + eps)
        elif RULE == "momentum":
            mean = _pointer(words, MEAN, T, PACK) + base + offsets
            m = momentum * tl.load(mean, mask, other=0.0) + g
            tl.store(mean, m, mask)
            w = w - lr.to(T) * m
        else:
            w = w - lr.to(T) * g
        tl.store(leaf, w, mask)
        # Element `column` of a row lies at the place in the weight that csrc/ops.h gives for it.
        weight = tl.load(words + WEIGHT)
        if weight != 0:
            inner, inner_stride = tl.load(words + INNER).to(tl.int32), tl.load(words + INNER_STRIDE)
            selected = tl.load(words + ROWS).to(tl.pointer_type(tl.int64)) + row
            if rows > 1:
                target = tl.load(selected + local, mask, other=0) * tl.load(words + ROW_STRIDE)
            else:
                target = tl.zeros((CHUNK,), tl.int64) + tl.load(selected) * tl.load(words + ROW_STRIDE)
            target += (column // inner) * tl.load(words + OUTER_STRIDE) + (column % inner) * inner_stride
            if PACK > 1:
                target = tl.max_contiguous(tl.multiple_of(target, PACK), PACK)
            to = weight.to(tl.pointer_type(D))
            if PACK > 1:
                to = tl.multiple_of(to, PACK * D.primitive_bitwidth // 8)
            tl.store(to + target, w.to(D), mask)
        if HAS_AGE:
            # Every thread must have read the ages before one of them is advanced.
            tl.debug_barrier()
            parts = tl.cdiv(length, CHUNK)
            if parts == 1:
                own = offsets < rows
                tl.store(step + offsets, tl.load(step + offsets, own, other=0.0) + 1, own)
            else:  # the last of the programs that share the row advances its age
                ticket = tl.load(words + TICKETS).to(tl.pointer_type(tl.int32)) + row
                if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
                    tl.store(ticket, 0)
                    tl.store(step, tl.load(step) + 1)
    if HAS_AVERAGE:
        averages = _pointer(words, AVERAGE, T, PACK) + base + offsets
        e = tl.load(averages, mask, other=0.0)
        e = tl.where(average < 0.5, e + average * (w - e), w - (w - e) * (1 - average))
        tl.store(averages, e, mask)


@triton.jit
def row_update_kernel(
    words_ptr,
    grads_ptr,
    items_ptr,
    lr_ptr,
    scale_ptr,
    found_ptr,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    decay: tl.float64,
    momentum: tl.float64,
    average: tl.float64,
    T: tl.constexpr,
    D: tl.constexpr,
    RULE: tl.constexpr,
    HAS_LR: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    PACK: tl.constexpr,
):
    if tl.load(found_ptr) == 0:
        item = items_ptr + tl.program_id(0).to(tl.int64) * 4
        tensor, row, rows, part = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
        words = words_ptr + tensor.to(tl.int64) * WORDS
        grad = tl.load(grads_ptr + tensor)
        if HAS_LR:
            rate = tl.load(lr_ptr).to(tl.float64)
        else:
            rate = _number(lr)
        # Factors are computed in float64 and then rounded, as PyTorch does with Python's numbers.
        unscale = (1 / tl.load(scale_ptr).to(tl.float64)).to(tl.float32).to(T)
        mean_weight = (1 - _number(beta1)).to(T)
        low = mean_weight < 0.5
        mean_weight = tl.where(low, mean_weight, mean_weight - 1)
        square_keep, square_weight = _number(beta2).to(T), (1 - _number(beta2)).to(T)
        keep = (1 - rate * _number(decay)).to(T)
        logs = _number(log_beta1), _number(log_beta2)
        others = _number(eps).to(T), _number(decay).to(T), _number(momentum).to(T), _number(average).to(T)
        if (tl.load(words + ALIGNED) != 0) & (grad % 16 == 0):
            _item(
                words, grad, row, rows, part, rate, unscale, *logs, mean_weight, low, square_keep, square_weight, keep,
                *others, T, D, RULE, HAS_AVERAGE, CHUNK, PACK,
            )  # fmt: skip
        else:
            _item(
                words, grad, row, rows, part, rate, unscale, *logs, mean_weight, low, square_keep, square_weight, keep,
                *others, T, D, RULE, HAS_AVERAGE, CHUNK, 1,
            )  # fmt: skip


def row_update(rule: str, dtype, weight_dtype, table: dict[str, torch.Tensor], numbers, lr, grad_scale, found_inf):
    constants = {
        "T": _TYPES[dtype],
        "D": _TYPES[weight_dtype],
        "RULE": rule,
        "CHUNK": CHUNK,
        "PACK": 16 // dtype.itemsize,
    }
    with torch.cuda.device_of(table["items"]):
        row_update_kernel[(len(table["items"]),)](
            table["words"],
            table["grads"],
            table["items"],
            table["one"] if lr is None else lr,
            table["one"] if grad_scale is None else grad_scale,
            table["zero"] if found_inf is None else found_inf,
            *numbers,
            HAS_LR=lr is not None,
            HAS_AVERAGE=numbers[-1] != 0,
            **constants,
            **_OPTIONS,
        )
