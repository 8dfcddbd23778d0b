"""Triton kernel of row_score: the gradients of a whole list by way of a table of their addresses."""

import torch
import triton
import triton.language as tl

from ._sizes import cdiv

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Words of an entry in the table, FIRST that of its first program, and how many they are.
G, W, OUTER, CHANNELS, INNER, START, FIRST, WORDS = map(tl.constexpr, range(8))
_LONG = 256  # elements from which a program takes one row at a time
_TILES = {True: (1, 1024), False: (32, 32)}  # rows and elements of a row that are read together


@triton.jit
def row_score_kernel(
    table_ptr,
    out_ptr,
    entries,
    factor: tl.float64,
    ELEMENT: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """A program adds up BR rows of one entry, which it finds by bisection in STEPS steps.

    WIDTH elements that follow each other do so in memory as well, from addresses that are a multiple of theirs.
    """
    pid = tl.program_id(0).to(tl.int64)
    low, high = 0, entries
    for _ in range(STEPS):
        middle = (low + high) // 2
        right = (tl.load(table_ptr + middle * WORDS + FIRST) <= pid) & (middle < high)
        low, high = tl.where(right, middle, low), tl.where(right, high, middle)
    entry = table_ptr + low * WORDS
    g_ptr = tl.load(entry + G).to(tl.pointer_type(ELEMENT))
    w_ptr = tl.load(entry + W).to(tl.pointer_type(ELEMENT))
    outer, C, inner = tl.load(entry + OUTER), tl.load(entry + CHANNELS), tl.load(entry + INNER)
    start, first = tl.load(entry + START), tl.load(entry + FIRST)
    if WIDTH > 1:
        g_ptr = tl.multiple_of(g_ptr, 16)
        w_ptr = tl.multiple_of(w_ptr, 16)
        inner = tl.multiple_of(inner, WIDTH)
    rows = (pid - first) * BR + tl.arange(0, BR)[:, None].to(tl.int64)
    total = tl.zeros((BR, BK), tl.float64)
    # Runs of a row: one if it is contiguous; short ones of a row that is not are told apart element by element.
    if (outer == 1) | (WIDTH > 1):
        for o in range(outer):
            base = (o * C + rows) * inner
            for k0 in range(0, inner, BK):
                k = k0 + tl.arange(0, BK)[None, :]
                mask = (rows < C) & (k < inner)
                g = tl.load(g_ptr + base + k, mask, other=0.0).to(tl.float64)
                if KIND == "square":
                    total += g * g
                elif KIND == "abs":
                    total += tl.abs(g)
                else:
                    total += g * tl.load(w_ptr + base + k, mask, other=0.0).to(tl.float64)
    else:
        for k0 in range(0, outer * inner, BK):
            k = k0 + tl.arange(0, BK)[None, :]
            mask = (rows < C) & (k < outer * inner)
            at = (k // inner * C + rows) * inner + k % inner
            g = tl.load(g_ptr + at, mask, other=0.0).to(tl.float64)
            if KIND == "square":
                total += g * g
            elif KIND == "abs":
                total += tl.abs(g)
            else:
                total += g * tl.load(w_ptr + at, mask, other=0.0).to(tl.float64)
    at = start + rows
    sums = tl.load(out_ptr + at, rows < C, other=0.0) + factor * tl.sum(total, 1)[:, None]
    tl.store(out_ptr + at, sums, rows < C)


ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def groups(rows: list[tuple], width: int) -> dict[tuple[bool, int], list[tuple]]:
    """The entries by the launch that suits them: (rows are long, elements a 16-byte access may take)."""
    found: dict[tuple[bool, int], list[tuple]] = {}
    for g, w, outer, C, inner, start in rows:
        aligned = inner % width == 0 and g % 16 == 0 and w % 16 == 0
        long = outer * inner >= _LONG and (outer == 1 or inner >= _LONG or not aligned)
        # A row of many short aligned runs is read run by run, in tiles as wide as those.
        found.setdefault((long, width if aligned and (outer == 1 or inner >= 32) else 1), []).append(
            (g, w, outer, C, inner, start)
        )
    return found


def row_score(rows, kept, dtype, out, kind: str, factor: float) -> None:
    """Adds to out. rows: (g, w, outer, C, inner, start) each; kept: their tensors, alive until the launch."""
    for (long, width), entries in groups(rows, 16 // dtype.itemsize).items():
        BR, BK = _TILES[long]
        table, programs = [], 0
        for row in entries:
            table.append((*row, programs))
            programs += cdiv(row[3], BR)
        table = torch.tensor(table, dtype=torch.int64)
        if out.is_cuda:
            table = table.pin_memory().to(out.device, non_blocking=True)
        steps = max(len(entries) - 1, 1).bit_length()
        with torch.cuda.device_of(out):
            row_score_kernel[(programs,)](
                table, out, len(entries), factor, ELEMENT=ELEMENTS[dtype], KIND=kind, WIDTH=width, STEPS=steps,
                BR=BR, BK=BK, **_OPTIONS,
            )  # fmt: skip
