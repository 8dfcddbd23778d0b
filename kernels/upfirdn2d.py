"""Triton kernel of upfirdn2d. A tensor is read as it lies in memory: [outer, H, W, inner], a row being W * inner
elements, so that contiguous tensors (inner = 1) and channels-last ones (outer = B, inner = C) are the same to it."""

import torch
import triton
import triton.language as tl

_TILE = 1024  # elements of a row, and of rows beside it in `outer`, that a program takes: 8 a thread
_ROWS = 8  # about so many that it writes, one below the other: an input row is read once for all of them
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _weight(f_ptr, tap, K: tl.constexpr, FLIP: tl.constexpr):
    return tl.load(f_ptr + (tap if FLIP else K - 1 - tap), tap < K, other=0.0)


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
    ROWS: tl.constexpr,
):
    """UY divides ROWS and PHASE is -before_y mod UY: so it is known here which tap of the column meets which row."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_e, tiles_r = tl.cdiv(OW * inner, BE), tl.cdiv(OH, ROWS)
    e = (pid % tiles_e * BE).to(tl.int32) + tl.arange(0, BE)[None, :]
    row = (pid // tiles_e % tiles_r * ROWS).to(tl.int32)
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

    NX: tl.constexpr = (KW + UX - 1) // UX
    NY: tl.constexpr = (KH + UY - 1) // UY
    window = ()
    for n in tl.static_range(((ROWS - 1) * DY + PHASE + UY - 1) // UY + NY):
        columns = tl.where((top + n >= 0) & (top + n < H), W, 0)
        total = tl.zeros((BO, BE), WIDE)
        for s in tl.static_range(NX):
            mask = inside & (pixel + s >= 0) & (pixel + s < columns)
            v = tl.load(x_ptr + offsets + s * inner, mask, other=0.0).to(WIDE)
            if SEPARABLE:
                total += v * _weight(f_ptr, tap + s * UX, KW, FLIP)
            else:
                window = window + (v,)  # noqa: RUF005
        if SEPARABLE:
            window = window + (total,)  # noqa: RUF005
        x_ptr += W * inner

    scale = tl.full((1, 1), gain, WIDE)
    for r in tl.static_range(ROWS):
        total = tl.zeros((BO, BE), WIDE)
        for s in tl.static_range(NY):
            # position = ceil((r DY + PHASE) / UY) is the first row that meets a tap, position UY - r DY - PHASE the tap
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
        tl.store(y_ptr + o * (OH * OW * inner) + e, out, inside & (e < elements))
        y_ptr += OW * inner


def blocks(outer: int, row: int, plane: int, up: int) -> dict[str, int]:
    """The tile for rows of `row` elements in planes of at most `plane`: the widest that leaves the least empty."""
    BE = min((1024, 512, 256, 128, 64, 32), key=lambda size: (triton.cdiv(row, size) * size, -size))
    BO = min(_TILE // BE, triton.next_power_of_2(outer))
    while BO > 1 and BO * plane >= 2**31:
        BO //= 2
    return {"BO": BO, "BE": BE, "ROWS": up * max(1, _ROWS // up)}


def upfirdn2d(x, f, y, counts, size, out, taps, up, down, before, flip: bool, gain: float) -> None:
    """Writes y. counts = (outer, inner); the pairs of sizes are (vertical, horizontal); taps = (k,) for separable f."""
    if y.numel() == 0:
        return
    outer, inner = counts
    tile = blocks(outer, out[1] * inner, max(size[0] * size[1], out[0] * out[1]) * inner, up[0])
    tiles = triton.cdiv(outer, tile["BO"]) * triton.cdiv(out[0], tile["ROWS"]) * triton.cdiv(out[1] * inner, tile["BE"])
    geometry = dict(zip(("UY", "UX", "DY", "DX", "KH", "KW"), (*up, *down, taps[0], taps[-1]), strict=True))
    flags = {"PHASE": -before[0] % up[0], "SEPARABLE": len(taps) == 1, "FLIP": flip}
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        upfirdn2d_kernel[(tiles,)](
            x, f, y, outer, inner, *size, *out, *before, gain, **geometry, **flags, WIDE=wide, **tile, **_OPTIONS
        )
