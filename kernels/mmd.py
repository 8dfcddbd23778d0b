"""Triton kernel of mmd: a tile of pairs, of which neither products nor kernel values need to leave the registers."""

import torch
import triton
import triton.language as tl

from ._sizes import cdiv

SQUARED_KERNELS = ("gaussian", "energy")  # those of a squared distance
# kClose in csrc/mmd_rows.h. It stands behind tensors: in front of one, the interpreter of Triton 3.8 takes no product.
_CLOSE = tl.constexpr(1 / 256)
_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def mmd_tile_kernel(
    p_ptr,
    q_ptr,
    hp_ptr,
    hq_ptr,
    op_ptr,
    oq_ptr,
    numbers_ptr,
    t_ptr,
    s_ptr,
    close_ptr,
    totals_ptr,
    A_ptr,
    B_ptr,
    rows,
    columns,
    D,
    op_stride,
    oq_stride,
    weight: tl.float64,
    KERNEL: tl.constexpr,
    ORDER: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SQUARINGS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program takes BM rows and BN columns. The laplacian's distances t, and s, come from memory.

    Of a squared distance far below the squares products leave too few digits. A program that meets one marks its tile
    in `close` and adds nothing; four programs of half its sides then do the tile EXACT, by differences.
    """
    SQUARED: tl.constexpr = (KERNEL == "gaussian") | (KERNEL == "energy")
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    at = i.to(tl.int64)[:, None] * columns + j[None, :]
    counts = inside
    if DIAGONAL:
        counts &= j[None, :] > i[:, None]
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    close = 0
    f = tl.zeros((BM, BN), tl.float32)
    f1 = tl.zeros((BM, BN), tl.float32)
    f2 = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BN), tl.float32)
    if EXACT:
        tl.store(totals_ptr + program, 0.0)
        if tl.load(close_ptr + (tl.program_id(0) // 2) * tl.cdiv(columns, 2 * BN) + tl.program_id(1) // 2) == 0:
            return
    if (not DIAGONAL) | (tl.program_id(1) * BN + BN > tl.program_id(0) * BM + 1):
        if KERNEL == "laplacian":
            t = tl.load(t_ptr + at, inside, other=0.0)
            if ORDER == 2:
                s = tl.load(s_ptr + at, inside, other=0.0)
        else:
            rows_at, columns_at = i.to(tl.int64)[:, None] * D, j.to(tl.int64)[:, None] * D
            t = tl.zeros((BM, BN), tl.float32)
            if EXACT:
                columns_at = j.to(tl.int64)[None, :] * D
                products = tl.zeros((BM, BN), tl.float32)
                for d in range(D):
                    p = tl.load(p_ptr + rows_at + d, (i < rows)[:, None], other=0.0)
                    q = tl.load(q_ptr + columns_at + d, (j < columns)[None, :], other=0.0)
                    t += (p - q) * (p - q)
                    if (KERNEL == "energy") & (ORDER < 2):
                        products += p * q
                    if ORDER == 2:
                        hp = tl.load(hp_ptr + rows_at + d, (i < rows)[:, None], other=0.0)
                        hq = tl.load(hq_ptr + columns_at + d, (j < columns)[None, :], other=0.0)
                        s += (p - q) * (hp - hq)
            else:
                for first in range(0, D, BK):
                    d = first + tl.arange(0, BK)[None, :]
                    in_p, in_q = (i < rows)[:, None] & (d < D), (j < columns)[:, None] & (d < D)
                    p = tl.load(p_ptr + rows_at + d, in_p, other=0.0)
                    q = tl.load(q_ptr + columns_at + d, in_q, other=0.0)
                    t = tl.dot(p, tl.trans(q), t, input_precision=PRECISION)
                    if ORDER == 2:
                        hp = tl.load(hp_ptr + rows_at + d, in_p, other=0.0)
                        hq = tl.load(hq_ptr + columns_at + d, in_q, other=0.0)
                        s = tl.dot(p, tl.trans(hq), s, input_precision=PRECISION)
                        s = tl.dot(hp, tl.trans(q), s, input_precision=PRECISION)
            if (KERNEL == "energy") | (not EXACT):
                offset_p, offset_q = (
                    tl.load(op_ptr + i, i < rows, other=0.0),
                    tl.load(oq_ptr + j, j < columns, other=0.0),
                )
                limit = offset_p[:, None] + offset_q[None, :]
            if not EXACT:
                products = t
                t = limit - 2 * t if SQUARED else limit + t
                if ORDER == 2:
                    slope_p = tl.load(op_ptr + op_stride + i, i < rows, other=0.0)
                    slope_q = tl.load(oq_ptr + oq_stride + j, j < columns, other=0.0)
                    along = slope_p[:, None] + slope_q[None, :]
                    s = along - s if SQUARED else along + s
                if SQUARED:
                    close = tl.max((counts & (t < limit * _CLOSE)).to(tl.int32))
        if KERNEL == "polynomial":
            c, b = tl.load(numbers_ptr).to(tl.float32), tl.load(numbers_ptr + 1).to(tl.float32)
            e = c * t
            f = e * (3 * b * b + 3 * b * e + e * e)
            f1 = 3 * c * (b + e) * (b + e)
            f2 = 6 * c * c * (b + e)
        elif KERNEL == "energy":
            inverse = tl.where(t > 0, tl.rsqrt(t), 0.0)
            if ORDER < 2:
                norm_p, norm_q = tl.sqrt(offset_p)[:, None], tl.sqrt(offset_q)[None, :]
                norms, root = norm_p + norm_q, t * inverse
                f = tl.where(norms + root > 0, 2 * (norm_p * norm_q + products) / (norms + root), norms)
                if EXACT:
                    f = tl.where(t < limit * _CLOSE, norms - root, f)
            f1 = -0.5 * inverse
            f2 = 0.25 * inverse * inverse * inverse
        else:
            e = tl.zeros((BM, BN), tl.float32)
            for n in tl.static_range(len(SQUARINGS)):
                c = tl.load(numbers_ptr + n).to(tl.float32)
                if SQUARINGS[n] == 0:
                    e = tl.exp(c * t)
                # In Triton 3.4 an element of a constexpr tuple is no constexpr.
                for _ in tl.static_range(tl.constexpr(SQUARINGS[n])):
                    e = e * e
                f += e
                if ORDER >= 1:
                    f1 += c * e
                if ORDER == 2:
                    f2 += c * c * e
    if SQUARED & (not EXACT):
        tl.store(close_ptr + program, close)
    total = tl.sum(tl.sum(tl.where(counts, f, 0.0), 1).to(tl.float64))
    tl.store(totals_ptr + program, tl.where(close > 0, 0.0, total * weight))
    w = tl.full((1, 1), weight, tl.float32)
    if ORDER == -1:
        tl.store(A_ptr + at, tl.where(counts, w * f, 0.0), inside)
    if ORDER >= 1:
        tl.store(A_ptr + at, tl.where(counts, (2 if SQUARED else 1) * w * f1, 0.0), inside)
    if ORDER == 2:
        tl.store(B_ptr + at, tl.where(counts, (4 if SQUARED else 1) * w * f2 * s, 0.0), inside)


def blocks(kernel: str, order: int, exact: bool, capability: int) -> dict[str, int]:
    """As wide as the registers hold: with one sum of products, with two, and with distances from memory."""
    if kernel == "laplacian":
        return {"BM": 64, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 1}
    BM, BN = (64, 64) if order == 2 else (128, 128)
    # Products take registers that later GPUs do not need for them; so do energy's sum and slope together.
    if capability < 9 or (kernel == "energy" and order == 1):
        BN //= 2
    if exact:
        return {"BM": BM // 2, "BN": BN // 2, "BK": 1, "num_warps": 4, "num_stages": 1, "maxnreg": 255}
    BK = 16 if kernel == "energy" and order == 1 else 32
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": 8, "num_stages": 2 if order == 2 else 3}


def mmd_tile(
    p, q, hp, hq, op, oq, numbers, t, s, squarings, kernel: str, precision, weight, diagonal: bool, order: int
):
    """(float64 whose sum is the tile's, A, B); A and B, where there are any, lie where t and s did."""
    capability = torch.cuda.get_device_capability(p.device)[0] if p.is_cuda else 9
    options = [blocks(kernel, order, exact, capability) for exact in (False, True)[: 1 + (kernel in SQUARED_KERNELS)]]
    grids = [(cdiv(len(p), o["BM"]), cdiv(len(q), o["BN"])) for o in options]
    counts = [rows * columns for rows, columns in grids]
    totals = torch.empty(sum(counts), dtype=torch.float64, device=p.device)
    close = torch.empty(counts[0], dtype=torch.int32, device=p.device)
    A = B = None
    if order:
        A = p.new_empty(len(p), len(q)) if t is None else t
    if order == 2:
        B = p.new_empty(len(p), len(q)) if s is None else s
    with torch.cuda.device_of(p):
        for exact, (grid, option, part) in enumerate(zip(grids, options, totals.split(counts), strict=True)):
            mmd_tile_kernel[grid](
                p, q, hp, hq, op, oq, numbers, t, s, close, part, A, B, len(p), len(q), p.shape[1], op.stride(0),
                oq.stride(0), weight, KERNEL=kernel, ORDER=order, DIAGONAL=diagonal, SQUARINGS=tuple(squarings),
                PRECISION=precision, EXACT=bool(exact), **option, **_OPTIONS,
            )  # fmt: skip
    empty = p.new_empty(0, 0)
    return totals, empty if A is None else A, empty if B is None else B
