"""Triton kernel of upfirdn2d. A tensor is read as it lies in memory: [outer, H, W, inner], a row being W * inner
elements, so that contiguous tensors (inner = 1) and channels-last ones (outer = B, inner = C) are the same to it."""

import torch
import triton
import triton.language as tl

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


@triton.jit
def upfirdn2d_kernel(
    x_ptr,
    f_ptr,
    y_ptr,
    outer,
    inner,
    H,
    W,
    OH,
    OW,
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
    """A program writes STEPS times UY rows, below each other. With PHASE = -before_y mod UY every step is alike: row r
    of the UY begins at input row ceil((r DY + PHASE) / UY) of a window, which then moves down by DY."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_e, tiles_r = tl.cdiv(OW * inner, BE), tl.cdiv(OH, STEPS * UY)
    e = (pid % tiles_e * BE).to(tl.int32) + tl.arange(0, BE)[None, :]
    row = (pid // tiles_e % tiles_r * (STEPS * UY)).to(tl.int32)
    o0 = pid // tiles_e // tiles_r * BO
    o = tl.arange(0, BO)[:, None]
    inside = (o0 + o < outer) & (e < OW * inner)

    # Of each element the first tap of the filter's row, and the input pixel that this tap meets.
    m = e // inner * DX - before_x
    if UX == 1:
        tap = 0
    else:
        tap = (UX - m % UX) % UX
    pixel = (m + tap) // UX
    top = (row * DY - before_y - PHASE) // UY
    x_ptr += (o0 * H + top) * W * inner
    y_ptr += (o0 * OH + row) * OW * inner
    offsets = o * (H * W * inner) + pixel * inner + e % inner
    out_offsets = o * (OH * OW * inner) + e
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
            elements = tl.where(row + r < OH, OW * inner, 0)
            tl.store(y_ptr + out_offsets, out, inside & (e < elements))
            y_ptr += OW * inner
        if KEPT > 0:
            window = window[DY * NX :]
        else:
            window = ()
        row += UY
        top += DY
        x_ptr += DY * W * inner


def blocks(outer: int, rows: int, row: int, plane: int, up: int, down: int) -> dict[str, int]:
    """The tile for `rows` of `row` elements in planes of at most `plane`: the widest that leaves the least empty."""
    tile = _TILE if down == 1 else _TILE // 2  # a step reads `down` rows: of a whole contiguous tile they spill
    BE = min((tile, 512, 256, 128, 64, 32), key=lambda size: (triton.cdiv(row, size) * size, -size))
    BO = min(tile // BE, triton.next_power_of_2(outer))
    while BO > 1 and BO * plane >= 2**31:
        BO //= 2
    return {"BO": BO, "BE": BE, "STEPS": min(max(1, _ROWS // up), triton.next_power_of_2(triton.cdiv(rows, up)))}


def upfirdn2d(x, f, y, counts, size, out, taps, up, down, before, flip: bool, gain: float) -> None:
    """Writes y. counts = (outer, inner); the pairs of sizes are (vertical, horizontal); taps = (k,) for separable f."""
    if y.numel() == 0:
        return
    outer, inner = counts
    tile = blocks(
        outer,
        out[0],
        out[1] * inner,
        max(size[0] * size[1], out[0] * out[1]) * inner,
        up[0],
        down[0] if inner == 1 else 1,
    )
    tiles = (
        triton.cdiv(outer, tile["BO"])
        * triton.cdiv(out[0], tile["STEPS"] * up[0])
        * triton.cdiv(out[1] * inner, tile["BE"])
    )
    geometry = dict(zip(("UY", "UX", "DY", "DX", "KH", "KW"), (*up, *down, taps[0], taps[-1]), strict=True))
    flags = {"PHASE": -before[0] % up[0], "SEPARABLE": len(taps) == 1, "FLIP": flip}
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        upfirdn2d_kernel[(tiles,)](
            x, f, y, outer, inner, *size, *out, *before, gain, **geometry, **flags, WIDE=wide, **tile, **_OPTIONS
        )
