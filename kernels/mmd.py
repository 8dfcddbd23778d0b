"""Triton kernel of mmd: a tile of pairs, of which neither products nor kernel values need to leave the registers."""

import torch
import triton
import triton.language as tl

_LAPLACIAN = 1  # of the codes in ops/mmd.py
_CLOSE = tl.constexpr(1 / 256)  # as in csrc/mmd.cu


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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program takes BM rows and BN columns. The laplacian's distances t, and s, come from memory."""
    SQUARED: tl.constexpr = (KERNEL == 0) | (KERNEL == 2)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    at = i.to(tl.int64)[:, None] * columns + j[None, :]
    counts = inside
    if DIAGONAL:
        counts &= j[None, :] > i[:, None]
    f = tl.zeros((BM, BN), tl.float32)
    f1 = tl.zeros((BM, BN), tl.float32)
    f2 = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BN), tl.float32)
    if (not DIAGONAL) | (tl.program_id(1) * BN + BN > tl.program_id(0) * BM + 1):
        p_at = p_ptr + i.to(tl.int64)[:, None] * D
        q_at = q_ptr + j.to(tl.int64)[:, None] * D
        if KERNEL == 1:
            t = tl.load(t_ptr + at, inside, other=0.0)
            if ORDER == 2:
                s = tl.load(s_ptr + at, inside, other=0.0)
        else:
            t = tl.zeros((BM, BN), tl.float32)
            for first in range(0, D, BK):
                d = first + tl.arange(0, BK)[None, :]
                in_p, in_q = (i < rows)[:, None] & (d < D), (j < columns)[:, None] & (d < D)
                p = tl.load(p_at + d, in_p, other=0.0)
                q = tl.load(q_at + d, in_q, other=0.0)
                t = tl.dot(p, tl.trans(q), t, input_precision=PRECISION)
                if ORDER == 2:
                    hp = tl.load(hp_ptr + i.to(tl.int64)[:, None] * D + d, in_p, other=0.0)
                    hq = tl.load(hq_ptr + j.to(tl.int64)[:, None] * D + d, in_q, other=0.0)
                    s = tl.dot(p, tl.trans(hq), s, input_precision=PRECISION)
                    s = tl.dot(hp, tl.trans(q), s, input_precision=PRECISION)
            offset_p, offset_q = tl.load(op_ptr + i, i < rows, other=0.0), tl.load(oq_ptr + j, j < columns, other=0.0)
            limit = offset_p[:, None] + offset_q[None, :]
            t = limit - 2 * t if SQUARED else limit + t
            if ORDER == 2:
                slope_p = tl.load(op_ptr + op_stride + i, i < rows, other=0.0)
                slope_q = tl.load(oq_ptr + oq_stride + j, j < columns, other=0.0)
                along = slope_p[:, None] + slope_q[None, :]
                s = along - s if SQUARED else along + s
            if SQUARED:
                close = counts & (t < _CLOSE * limit)
                if tl.max(close.to(tl.int32)) > 0:  # products leave too few digits: by differences
                    exact = tl.zeros((BM, BN), tl.float32)
                    exact_s = tl.zeros((BM, BN), tl.float32)
                    for k in range(D):
                        a = tl.load(p_at + k, (i < rows)[:, None], other=0.0)
                        b = tl.load(q_ptr + j.to(tl.int64)[None, :] * D + k, (j < columns)[None, :], other=0.0)
                        exact += (a - b) * (a - b)
                        if ORDER == 2:
                            u = tl.load(hp_ptr + i.to(tl.int64)[:, None] * D + k, (i < rows)[:, None], other=0.0)
                            v_at = hq_ptr + j.to(tl.int64)[None, :] * D + k
                            v = tl.load(v_at, (j < columns)[None, :], other=0.0)
                            exact_s += (a - b) * (u - v)
                    t = tl.where(close, exact, t)
                    s = tl.where(close, exact_s, s)
        if KERNEL == 3:
            c, b = tl.load(numbers_ptr).to(tl.float32), tl.load(numbers_ptr + 1).to(tl.float32)
            e = c * t
            f = e * (3 * b * b + 3 * b * e + e * e)
            f1 = 3 * c * (b + e) * (b + e)
            f2 = 6 * c * c * (b + e)
        elif KERNEL == 2:
            positive = t > 0
            root = tl.sqrt_rn(tl.where(positive, t, 1.0))
            inverse = tl.where(positive, 1 / root, 0.0)
            f = tl.where(positive, -root, 0.0)
            f1 = -0.5 * inverse
            f2 = 0.25 * inverse * inverse * inverse
        else:
            e = tl.zeros((BM, BN), tl.float32)
            for n in tl.static_range(len(SQUARINGS)):
                c = tl.load(numbers_ptr + n).to(tl.float32)
                if SQUARINGS[n] == 0:
                    e = tl.exp(c * t)
                for _ in tl.static_range(SQUARINGS[n]):
                    e = e * e
                f += e
                if ORDER >= 1:
                    f1 += c * e
                if ORDER == 2:
                    f2 += c * c * e
    total = tl.sum(tl.sum(tl.where(counts, f, 0.0).to(tl.float64), 1), 0)
    tl.store(totals_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total * weight)
    w = tl.full((1, 1), weight, tl.float32)
    if ORDER == -1:
        tl.store(A_ptr + at, tl.where(counts, w * f, 0.0), inside)
    if ORDER >= 1:
        tl.store(A_ptr + at, tl.where(counts, (2 if SQUARED else 1) * w * f1, 0.0), inside)
    if ORDER == 2:
        tl.store(B_ptr + at, tl.where(counts, (4 if SQUARED else 1) * w * f2 * s, 0.0), inside)


def blocks(kernel: int, order: int) -> dict[str, int]:
    """As wide as the registers hold: with one sum of products, with two, and with distances from memory."""
    if kernel == _LAPLACIAN:
        return {"BM": 64, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 1}
    if order == 2:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}
    return {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3}


def mmd_tile(p, q, hp, hq, op, oq, numbers, t, s, squarings, kernel: int, weight: float, diagonal: bool, order: int):
    """(a float64 for each program, A, B); A and B, where there are any, lie where t and s did."""
    options = blocks(kernel, order)
    grid = triton.cdiv(len(p), options["BM"]), triton.cdiv(len(q), options["BN"])
    totals = torch.empty(grid, dtype=torch.float64, device=p.device)
    A = B = None
    if order:
        A = p.new_empty(len(p), len(q)) if t is None else t
    if order == 2:
        B = p.new_empty(len(p), len(q)) if s is None else s
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    with torch.cuda.device_of(p):
        mmd_tile_kernel[grid](
            p, q, hp, hq, op, oq, numbers, t, s, totals, A, B, len(p), len(q), p.shape[1], op.stride(0), oq.stride(0),
            weight, KERNEL=kernel, ORDER=order, DIAGONAL=diagonal, SQUARINGS=tuple(squarings), PRECISION=precision,
            **options,
        )  # fmt: skip
    empty = p.new_empty(0, 0)
    return totals, empty if A is None else A, empty if B is None else B
