"""Triton kernel of miner: a whole pass, the tasks of minegan_fast/ops/_miner_program.py, in one launch.

A task is cut into units, tiles of its rows and samples (of an outer product, of rows and columns) of one miner, which
the programs share. A barrier over the grid stands between two steps, so all programs must be on the GPU at once: the
launch is cooperative, with a program a multiprocessor at most. What one step writes the next reads past the L1 cache.
The interpreter runs programs one after the other: there each step is a launch of its own, and no barrier is reached.
"""

import functools

import torch
import triton
import triton.language as tl

from ._sizes import cdiv

_OPTIONS = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}
_BM, _BN, _BK, _BI = 32, 16, 32, 64  # rows, samples, depth of a step of a product, columns of an outer product

# Of a task's words in minegan_fast/ops/_miner_program.py: how many there are, how many of them are floats at the end,
# which one says where its scratch begins, where depths and operands begin, and which operands they are.
_WORDS, _FLOATS, _START, _DEPTHS, _OPERANDS = (tl.constexpr(i) for i in (103, 7, 10, 12, 16))
_OUT, _RAW, _COPY, _H, _P, _Q, _ADDS, _MATRICES, _SOURCES = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 8, 12))
_NOTHING, _SCRATCH = tl.constexpr(-2), tl.constexpr(-1)
_SLOPE, _EPSILON = tl.constexpr(0.2), tl.constexpr(1e-8)


@triton.jit
def _operand(tensors, scratch_ptr, task_ptr, k, n):
    """The address of operand k of a task for miner n, and the strides of its rows and samples; 0 for none."""
    words = task_ptr + _OPERANDS + 5 * k
    which = tl.load(words)
    address = tl.where(which == _SCRATCH, scratch_ptr.to(tl.int64) + 4 * tl.load(task_ptr + _START), 0)
    for i in tl.static_range(len(tensors)):
        address = tl.where(which == i, tensors[i].to(tl.int64), address)
    address += tl.where(which == _NOTHING, 0, 4 * (tl.load(words + 1) + n * tl.load(words + 2)))
    return address, tl.load(words + 3), tl.load(words + 4)


@triton.jit
def _pointer(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _read(tensors, scratch_ptr, task_ptr, k, n, r, b, inside):
    """A tile of an operand: what a step before may have written."""
    address, row, sample = _operand(tensors, scratch_ptr, task_ptr, k, n)
    at = r.to(tl.int64)[:, None] * row + b.to(tl.int64)[None, :] * sample
    return tl.load(_pointer(address) + at, inside, other=0.0, cache_modifier=".cg")


@triton.jit
def _write(tensors, scratch_ptr, task_ptr, k, n, r, b, inside, value):
    if tl.load(task_ptr + _OPERANDS + 5 * k) != _NOTHING:
        address, row, sample = _operand(tensors, scratch_ptr, task_ptr, k, n)
        at = r.to(tl.int64)[:, None] * row + b.to(tl.int64)[None, :] * sample
        tl.store(_pointer(address) + at, value, inside)


@triton.jit
def _tanh(x):
    size, square = tl.abs(x), x * x
    e = tl.exp(-2 * size)
    large = (1 - e) / (1 + e)
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    return tl.where(size < 0.625, small * square * x + x, tl.where(x < 0, -large, large))


@triton.jit
def _product(
    tensors, scratch_ptr, task_ptr, floats_ptr, n, tile, column, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, B = tl.load(task_ptr + 4), tl.load(task_ptr + 5)
    r, b = tile * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    inside = (r < rows)[:, None] & (b < B)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(tl.load(task_ptr + 7)):
        scale = tl.load(floats_ptr + 1 + i)
        acc += scale * _read(tensors, scratch_ptr, task_ptr, _ADDS + i, n, r, b, inside)
    for i in range(tl.load(task_ptr + 6)):
        scale, depth = tl.load(floats_ptr + 3 + i), tl.load(task_ptr + _DEPTHS + i)
        address, row, column_stride = _operand(tensors, scratch_ptr, task_ptr, _MATRICES + i, n)
        source, source_row, source_sample = _operand(tensors, scratch_ptr, task_ptr, _SOURCES + i, n)
        M, x = _pointer(address), _pointer(source)
        if ALIGNED:
            M = tl.multiple_of(M, 16)
        products = tl.zeros((BM, BN), tl.float32)
        if column_stride == 1:
            if ALIGNED:
                row, depth = tl.multiple_of(row, 4), tl.multiple_of(depth, 4)
            for first in range(0, depth, BK):
                k = first + tl.arange(0, BK)
                at = r.to(tl.int64)[:, None] * row + k[None, :]
                m = tl.load(M + at, (r < rows)[:, None] & (k < depth)[None, :], other=0.0)
                at = k.to(tl.int64)[:, None] * source_row + b.to(tl.int64)[None, :] * source_sample
                v = tl.load(x + at, (k < depth)[:, None] & (b < B)[None, :], other=0.0, cache_modifier=".cg")
                products = tl.dot(m, v, products, input_precision=PRECISION)
        else:
            wide = rows
            if ALIGNED:
                column_stride, wide = tl.multiple_of(column_stride, 4), tl.multiple_of(rows, 4)
            for first in range(0, depth, BK):
                k = first + tl.arange(0, BK)
                at = k.to(tl.int64)[:, None] * column_stride + r[None, :]
                m = tl.load(M + at, (k < depth)[:, None] & (r < wide)[None, :], other=0.0)
                at = k.to(tl.int64)[:, None] * source_row + b.to(tl.int64)[None, :] * source_sample
                v = tl.load(x + at, (k < depth)[:, None] & (b < B)[None, :], other=0.0, cache_modifier=".cg")
                products = tl.dot(tl.trans(m), v, products, input_precision=PRECISION)
        acc += scale * products
    _write(tensors, scratch_ptr, task_ptr, _RAW, n, r, b, inside, acc)
    activation, epilogue, gain = tl.load(task_ptr + 8), tl.load(task_ptr + 9), tl.load(floats_ptr)
    low = tl.where(activation == 0, 1.0, tl.where(activation == 1, 0.0, _SLOPE))
    if epilogue == 0:
        if activation == 3:
            acc = _tanh(acc)
        else:
            acc = tl.where(acc > 0, acc, low * acc)
        acc = gain * acc
    else:
        h = _read(tensors, scratch_ptr, task_ptr, _H, n, r, b, inside)
        if activation == 3:
            slope = 1 - h * h
            acc = gain * slope * acc
            if epilogue == 2:
                p = _read(tensors, scratch_ptr, task_ptr, _P, n, r, b, inside)
                q = _read(tensors, scratch_ptr, task_ptr, _Q, n, r, b, inside)
                acc -= 2 * h * slope * p * q
        else:
            acc = acc * (gain * tl.where(h > 0, 1.0, low))
    _write(tensors, scratch_ptr, task_ptr, _OUT, n, r, b, inside, acc)
    _write(tensors, scratch_ptr, task_ptr, _COPY, n, r, b, inside, acc)


@triton.jit
def _outer(
    tensors, scratch_ptr, task_ptr, n, tile, column, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.load(task_ptr + 4), tl.load(task_ptr + 5)
    r, i = tile * BM + tl.arange(0, BM), column * BI + tl.arange(0, BI)
    acc = tl.zeros((BM, BI), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    matrix = tl.load(task_ptr + _OPERANDS + 5 * _OUT) != _NOTHING
    for t in range(tl.load(task_ptr + 6)):
        B = tl.load(task_ptr + _DEPTHS + t)
        sums = tl.zeros((BM,), tl.float32)  # of the last term
        for first in range(0, B, BN):
            b = first + tl.arange(0, BN)
            there = (r < rows)[:, None] & (b < B)[None, :]
            d = _read(tensors, scratch_ptr, task_ptr, _MATRICES + t, n, r, b, there)
            sums += tl.sum(d, 1)
            if matrix:
                source, source_row, source_sample = _operand(tensors, scratch_ptr, task_ptr, _SOURCES + t, n)
                at = b.to(tl.int64)[:, None] * source_sample + i.to(tl.int64)[None, :] * source_row
                within = (b < B)[:, None] & (i < columns)[None, :]
                x = tl.load(_pointer(source) + at, within, other=0.0, cache_modifier=".cg")
                acc = tl.dot(d, x, acc, input_precision=PRECISION)
    inside = (r < rows)[:, None] & (i < columns)[None, :]
    _write(tensors, scratch_ptr, task_ptr, _OUT, n, r, i, inside, acc)
    one = tl.arange(0, 1)
    once = (r < tl.where(column == 0, rows, 0))[:, None]
    _write(tensors, scratch_ptr, task_ptr, _RAW, n, r, one, once, sums[:, None])


@triton.jit
def _project(tensors, scratch_ptr, task_ptr, n, column, BM: tl.constexpr, BN: tl.constexpr):
    """All rows of BN samples: the means over the rows first."""
    kind, rows, B = tl.load(task_ptr), tl.load(task_ptr + 4), tl.load(task_ptr + 5)
    adds = tl.load(task_ptr + 7)
    b = column * BN + tl.arange(0, BN)
    zz = tl.zeros((BN,), tl.float32)
    ze = tl.zeros((BN,), tl.float32)
    zv = tl.zeros((BN,), tl.float32)
    zw = tl.zeros((BN,), tl.float32)
    vw = tl.zeros((BN,), tl.float32)
    for first in range(0, rows, BM):
        r = first + tl.arange(0, BM)
        inside = (r < rows)[:, None] & (b < B)[None, :]
        z = _read(tensors, scratch_ptr, task_ptr, _ADDS, n, r, b, inside)
        zz += tl.sum(z * z, 0)
        if adds > 1:
            ze += tl.sum(z * _read(tensors, scratch_ptr, task_ptr, _ADDS + 1, n, r, b, inside), 0)
        if kind == 4:
            v = _read(tensors, scratch_ptr, task_ptr, _H, n, r, b, inside)
            w = _read(tensors, scratch_ptr, task_ptr, _P, n, r, b, inside)
            zv += tl.sum(z * v, 0)
            zw += tl.sum(z * w, 0)
            vw += tl.sum(v * w, 0)
    one = 1 / tl.sqrt(zz / rows + _EPSILON)
    three = one * one * one
    ze, zv, zw, vw = ze / rows, zv / rows, zw / rows, vw / rows
    for first in range(0, rows, BM):
        r = first + tl.arange(0, BM)
        inside = (r < rows)[:, None] & (b < B)[None, :]
        z = _read(tensors, scratch_ptr, task_ptr, _ADDS, n, r, b, inside)
        value = tl.where(kind == 2, z * one[None, :], 0.0)
        if adds > 1:
            e = _read(tensors, scratch_ptr, task_ptr, _ADDS + 1, n, r, b, inside)
            value += one[None, :] * e - three[None, :] * z * ze[None, :]
        if kind == 4:
            v = _read(tensors, scratch_ptr, task_ptr, _H, n, r, b, inside)
            w = _read(tensors, scratch_ptr, task_ptr, _P, n, r, b, inside)
            value += (3 * three * one * one * zv * zw)[None, :] * z
            value -= three[None, :] * (z * vw[None, :] + v * zw[None, :] + w * zv[None, :])
        _write(tensors, scratch_ptr, task_ptr, _OUT, n, r, b, inside, value)
        _write(tensors, scratch_ptr, task_ptr, _COPY, n, r, b, inside, value)


@triton.jit
def _wait_for_all(counter_ptr):
    """A barrier over the grid. All but the first program add 1, the first what is left to 2^31: each barrier turns the
    counter's sign when the last one comes, and leaves the rest of it as it was."""
    tl.debug_barrier()
    programs = tl.num_programs(0)
    share = tl.where(tl.program_id(0) == 0, -2147483648 - (programs - 1), 1)
    before = tl.atomic_add(counter_ptr, share.to(tl.int32), sem="acq_rel", scope="gpu")
    now = before
    while (now ^ before) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "last"])
def miner_kernel(
    tensors, scratch_ptr, words_ptr, floats_ptr, units_ptr, steps_ptr, counter_ptr, first, last,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """steps_ptr: where the tasks of each step begin, and the last ones end. units_ptr: for each task its units, how
    many there are before it in its step, its tiles of rows and those of samples or columns."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for step in range(first, last):
        for t in range(tl.load(steps_ptr + step), tl.load(steps_ptr + step + 1)):
            task_ptr, task_floats_ptr = words_ptr + t * _WORDS, floats_ptr + t * _FLOATS
            units, before = tl.load(units_ptr + 4 * t), tl.load(units_ptr + 4 * t + 1)
            tiles, columns = tl.load(units_ptr + 4 * t + 2), tl.load(units_ptr + 4 * t + 3)
            kind = tl.load(task_ptr)
            # Programs that an earlier task of the step has left without a unit come first.
            for unit in range((program + programs - before % programs) % programs, units, programs):
                column, tile = unit % columns, unit // columns % tiles
                n = (unit // (columns * tiles)).to(tl.int64)
                if kind == 0:
                    _product(
                        tensors, scratch_ptr, task_ptr, task_floats_ptr, n, tile, column, PRECISION, ALIGNED, BM, BN,
                        BK,
                    )  # fmt: skip
                elif kind == 1:
                    _outer(tensors, scratch_ptr, task_ptr, n, tile, column, PRECISION, BM, BN, BI)
                else:
                    _project(tensors, scratch_ptr, task_ptr, n, column, BM, BN)
        if step + 1 < last:
            _wait_for_all(counter_ptr)


_INTERPRETED = not isinstance(miner_kernel, triton.runtime.JITFunction)


def tables(plan) -> tuple[list[int], list[float], list[int], list[int]]:
    """words, floats, units and steps of the kernel for a plan, its tasks in the order of their steps."""
    tasks = plan.program.tasks
    words, floats, units, steps, before = [], [], [], [], 0
    for place, i in enumerate(sorted(range(len(tasks)), key=lambda i: tasks[i].step)):
        task, row = tasks[i], plan.words[i * _WORDS.value : (i + 1) * _WORDS.value]
        words += row
        floats += memoryview(row).cast("B").cast("d")[_WORDS.value - _FLOATS.value :].tolist()
        if task.step == len(steps):
            steps.append(place)
            before = 0
        tiles, columns = cdiv(task.rows, _BM), cdiv(task.columns, _BN)
        if task.kind == "outer":
            columns = 1 if task.out.tensor == _NOTHING.value else cdiv(task.columns, _BI)
        elif task.kind != "product":
            tiles = 1
        units += [task.miners * tiles * columns, before, tiles, columns]
        before += task.miners * tiles * columns
    return words, floats, units, [*steps, len(tasks)]


# Without a limit: a CUDA graph reads the tables of its plans for as long as it lives.
@functools.cache
def _on_device(plan, device: torch.device) -> tuple[list[torch.Tensor], int, int, int]:
    """The tables, elements of scratch, the most units of a step, steps."""
    words, floats, units, steps = tables(plan)
    dtypes = torch.int64, torch.float32, torch.int32, torch.int32
    tensors = [
        torch.tensor(v, dtype=t, device=device) for v, t in zip((words, floats, units, steps), dtypes, strict=True)
    ]
    sizes = zip(plan.program.shapes, plan.program.scratch, strict=True)
    most = max(a + b for a, b in zip(units[::4], units[1::4], strict=True))
    return tensors, sum(s.miners * rows * s.lanes for s, rows in sizes), most, len(steps) - 1


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    """Of the barriers of one stream, whose launches run one after the other."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def execute(plan, tensors) -> None:
    """Runs a plan's tasks on the tensors of its slots."""
    device = tensors[0].device
    (words, floats, units, ends), size, most, steps = _on_device(plan, device)
    scratch = tensors[0].new_empty(size)
    aligned = plan.program.aligned and all(t.data_ptr() % 16 == 0 for t in tensors)
    counter = _counter(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    grid = (min(most, _processors(device)),)
    with torch.cuda.device_of(scratch):
        for first, last in [(s, s + 1) for s in range(steps)] if _INTERPRETED else [(0, steps)]:
            miner_kernel[grid](
                tuple(tensors), scratch, words, floats, units, ends, counter, first, last, PRECISION="tf32x3",
                ALIGNED=aligned, BM=_BM, BN=_BN, BK=_BK, BI=_BI, launch_cooperative_grid=True, **_OPTIONS,
            )  # fmt: skip
