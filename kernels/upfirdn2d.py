"""Triton kernel of upfirdn2d. A tensor is read as it lies in memory: [outer, H, W, inner], a row being W * inner
elements, so that contiguous tensors (inner = 1) and channels-last ones (outer = B, inner = C) are the same to it."""

import functools

import torch
import triton
import triton.language as tl

from ._sizes import cdiv, power_of_2
from ._types import wide_dtype

_TILE = 1024  # elements of a row, and of rows beside it in `outer`, that a program takes: 8 a thread
_ROWS = 16  # about so many that it writes, one below the other: an input row is read once for all of them
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _weight(f_ptr, tap, K: tl.constexpr, FLIP: tl.constexpr):
    return tl.load(f_ptr + (tap if FLIP else K - 1 - tap), tap < K, other=0.0)


@triton.jit
def _taps(x_ptr, f_ptr, offsets, pixel, tap, width, inner, inside, K, UX, SEPARABLE, FLIP, WIDE):
    """What the filter's row meets in one row of x, `width` pixels: the values, or their weighted sum if separable."""
    values = ()
    total = tl.zeros(inside.shape, WIDE)
    for s in tl.static_range((K + UX - 1) // UX):
        mask = inside & (pixel + s >= 0) & (pixel + s < width)
        v = tl.load(x_ptr + offsets + s * inner, mask, other=0.0).to(WIDE)
        if SEPARABLE:
            total += v * _weight(f_ptr, tap + s * UX, K, FLIP)
        else:
            values = values + (v,)  # noqa: RUF005
    if SEPARABLE:
        values = (total,)
    return values


# What depends on these alone is as fast where they are no constants: a kernel is compiled once for all of them. Where
# before_x is one, or FLIP or STEPS is no constant, a program takes up to half as many registers again.
@triton.jit(do_not_specialize=["outer", "H", "W", "OH", "before_y"])
def upfirdn2d_kernel(
    x_ptr,
    f_ptr,
    y_ptr,
    outer,
    inner,
    H,
    W,
    OH,
    row_length,
    before_y,
    before_x,
    gain: tl.float64,
    UY: tl.constexpr,
    UX: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PHASE: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr,
    BO: tl.constexpr,
    BE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A program writes STEPS times UY rows, below each other, of y's rows of row_length elements. With PHASE =
    -before_y mod UY every step is alike: row r of the UY begins at input row ceil((r DY + PHASE) / UY) of a window,
    which then moves down by DY."""
    pid = tl.program_id(0)
    tiles_e, tiles_r = tl.cdiv(row_length, BE), tl.cdiv(OH, STEPS * UY)
    e = pid % tiles_e * BE + tl.arange(0, BE)[None, :]
    row = pid // tiles_e % tiles_r * (STEPS * UY)
    o0 = (pid // tiles_e // tiles_r).to(tl.int64) * BO
    o = tl.arange(0, BO)[:, None]
    inside = (o0 + o < outer) & (e < row_length)

    # Of each element the first tap of the filter's row, and the input pixel that this tap meets.
    m = e // inner * DX - before_x
    if UX == 1:
        tap = 0
    else:
        tap = (UX - m % UX) % UX
    pixel = (m + tap) // UX
    top = (row * DY - before_y - PHASE) // UY
    x_ptr += (o0 * H + top) * W * inner
    y_ptr += (o0 * OH + row) * row_length
    offsets = o * (H * W * inner) + pixel * inner + e % inner
    out_offsets = o * (OH * row_length) + e
    scale = tl.full((1, 1), gain, WIDE)

    NX: tl.constexpr = 1 if SEPARABLE else (KW + UX - 1) // UX
    NY: tl.constexpr = (KH + UY - 1) // UY
    ROWS: tl.constexpr = ((UY - 1) * DY + PHASE + UY - 1) // UY + NY
    KEPT: tl.constexpr = ROWS - DY if ROWS > DY else 0
    window = ()
    for n in tl.static_range(KEPT):
        width = tl.where((top + n >= 0) & (top + n < H), W, 0)
        line_ptr = x_ptr + n * W * inner
        window = window + _taps(
            line_ptr, f_ptr, offsets, pixel, tap, width, inner, inside, KW, UX, SEPARABLE, FLIP, WIDE
        )
    for _ in range(STEPS):
        for n in tl.static_range(KEPT, ROWS):
            width = tl.where((top + n >= 0) & (top + n < H), W, 0)
            line_ptr = x_ptr + n * W * inner
            window = window + _taps(
                line_ptr, f_ptr, offsets, pixel, tap, width, inner, inside, KW, UX, SEPARABLE, FLIP, WIDE
            )
        for r in tl.static_range(UY):
            total = tl.zeros((BO, BE), WIDE)
            for s in tl.static_range(NY):
                if ((r * DY + PHASE + UY - 1) // UY + s) * UY - r * DY - PHASE < KH:
                    t = ((r * DY + PHASE + UY - 1) // UY + s) * UY - r * DY - PHASE
                    if SEPARABLE:
                        total += window[(r * DY + PHASE + UY - 1) // UY + s] * _weight(f_ptr, t, KH, FLIP)
                    else:
                        t = t if FLIP else KH - 1 - t
                        for i in tl.static_range(NX):
                            v = window[((r * DY + PHASE + UY - 1) // UY + s) * NX + i]
                            total += v * _weight(f_ptr + t * KW, tap + i * UX, KW, FLIP)
            out = (total * scale).to(y_ptr.dtype.element_ty)
            elements = tl.where(row + r < OH, row_length, 0)
            tl.store(y_ptr + out_offsets, out, inside & (e < elements))
            y_ptr += row_length
        if KEPT > 0:
            window = window[DY * NX :]
        else:
            window = ()
        row += UY
        top += DY
        x_ptr += DY * W * inner


def heavy(down: int, inner: int, double: bool) -> bool:
    """Whether a whole tile spills: a step reads `down` rows of it."""
    return down > 1 and (inner == 1 or double)


def blocks(outer: int, rows: int, row: int, plane: int, up: int, half: bool) -> dict[str, int]:
    """The tile for `rows` of `row` elements in planes of at most `plane`: the widest that leaves the least empty.

    The choice is small, because each is a kernel to compile."""
    tile = _TILE // 2 if half else _TILE
    BE = min((tile, 128, 32), key=lambda size: (cdiv(row, size) * size, -size))
    BO = min(tile // BE, power_of_2(outer))
    while BO > 1 and BO * plane >= 2**31:
        BO //= 2
    return {"BO": BO, "BE": BE, "STEPS": max(1, (_ROWS if rows > _ROWS // 4 else _ROWS // 4) // up)}


@functools.cache
def _plan(outer, inner, size, out, up, half) -> tuple[int, dict[str, int]]:
    """Programs, and the tile of each."""
    plane = max(size[0] * size[1], out[0] * out[1]) * inner
    tile = blocks(outer, out[0], out[1] * inner, plane, up[0], half)
    tiles_e, tiles_r = cdiv(out[1] * inner, tile["BE"]), cdiv(out[0], tile["STEPS"] * up[0])
    return cdiv(outer, tile["BO"]) * tiles_r * tiles_e, tile


def upfirdn2d(x, f, y, counts, size, out, taps, up, down, before, flip: bool, gain: float) -> None:
    """Writes y. counts = (outer, inner); the pairs of sizes are (vertical, horizontal); taps = (k,) for separable f."""
    if y.numel() == 0:
        return
    (outer, inner), (UY, UX), (DY, DX) = counts, up, down
    wide = wide_dtype(x.dtype)
    half = heavy(DY, inner, wide == tl.float64)
    programs, tile = _plan(outer, inner, tuple(size), tuple(out), (UY, UX), half)
    geometry = {"UY": UY, "UX": UX, "DY": DY, "DX": DX, "KH": taps[0], "KW": taps[-1], "PHASE": -before[0] % UY}
    with torch.cuda.device_of(x):
        upfirdn2d_kernel[(programs,)](
            x, f, y, outer, inner, *size, out[0], out[1] * inner, *before, gain, **geometry,
            SEPARABLE=len(taps) == 1, FLIP=flip, WIDE=wide, **tile, **_OPTIONS,
        )  # fmt: skip
