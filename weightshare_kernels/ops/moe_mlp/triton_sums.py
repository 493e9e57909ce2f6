"""Kernels of moe_mlp that sum over pairs: the weights' gradients, a token's outputs, its gates."""

from __future__ import annotations

import triton
import triton.language as tl

from weightshare_kernels._products import _INTERPRETED
from weightshare_kernels.ops.moe_mlp.triton_rows import _own_width, _piece, _rounded


@triton.jit
def _task(
    tile, offsets, widths, pairs, m, n, width,
    blocks: tl.constexpr, GATHER_LEFT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What a tile is: expert, block, first row and column; width; rows summed over; steps.

    An expert's tiles run together, so that its rows stay in the L2 cache. There is one step at
    least, in which the tile is stored.
    """
    tiles_m, tiles_n = (m + BM - 1) // BM, (n + BN - 1) // BN
    each = blocks * tiles_m * tiles_n
    expert = tile // each
    inside = tile - expert * each
    band = inside // (GROUP * tiles_n)
    height = tl.minimum(blocks * tiles_m - band * GROUP, GROUP)
    within = inside - band * (GROUP * tiles_n)
    line = band * GROUP + within % height
    block = line // tiles_m
    i, j = (line - block * tiles_m) * BM, within // height * BN
    used = width
    if widths is not None:
        used = _own_width(expert, widths, width)
    start = tl.minimum(tl.maximum(tl.load(offsets + expert), 0), pairs).to(tl.int32)
    stop = tl.minimum(tl.maximum(tl.load(offsets + expert + 1), 0), pairs).to(tl.int32)
    beyond = j >= used if GATHER_LEFT else i >= used
    stop = tl.where(beyond, start, tl.maximum(stop, start))
    return expert, block, i, j, used, start, stop, tl.maximum((stop - start + BK - 1) // BK, 1)


@triton.jit
def _store_part(
    value, target, i, j, m, n, used, t_m, t_n, GATHER_LEFT: tl.constexpr, ADD: tl.constexpr
):
    """Write or add some columns of a finished tile, zeros beyond the width."""
    i += tl.arange(0, value.shape[0])
    j += tl.arange(0, value.shape[1])
    inside = (j < used)[None, :] if GATHER_LEFT else (i < used)[:, None]
    value = tl.where(inside, value, 0.0)
    where = target + i.to(tl.int64)[:, None] * t_m + j.to(tl.int64)[None, :] * t_n
    ok = (i < m)[:, None] & (j < n)[None, :]
    if ADD:
        value += tl.load(where, mask=ok, other=0.0).to(value.dtype)
    tl.store(where, _rounded(value, target.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _weight_grad_kernel(
    left, right,  # [pairs, blocks, m] and [tokens, n]; [tokens, m] and [pairs, n] if GATHER_LEFT
    target,  # [experts, blocks, m, n]
    offsets, tokens, widths,
    tiles, pairs, m, n,  # m, n: the part of the target that is written
    width,  # limits n if GATHER_LEFT, else m
    l_r, l_b, l_m, r_r, r_n, t_e, t_b, t_m, t_n,  # strides
    blocks: tl.constexpr, GATHER_LEFT: tl.constexpr, ADD: tl.constexpr,
    PARTS: tl.constexpr,  # in which the columns of a tile are stored, for want of registers
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``target (+)= sum over an expert's rows of left^T right``, zero beyond its width.

    One loop over the steps of all of a program's tiles, so that the loads of the next tile are
    under way while the last one is stored. The steps differ from expert to expert, which is why
    the loop is written out here and not left to the compiler.
    """
    steps = 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, _, _, _, _, _, _, more = _task(
            tile, offsets, widths, pairs, m, n, width, blocks, GATHER_LEFT, BM, BN, BK, GROUP
        )
        steps += more
    tile = tl.program_id(0) - tl.num_programs(0)
    step, last, first, stop, used = -1, -1, 0, 0, 0
    expert, block, i, j = 0, 0, 0, 0
    acc = tl.full((BM, BN), 0.0, SUM)
    for _ in range(steps):
        step = tl.where(step == last, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            expert, block, i, j, used, first, stop, last = _task(
                tile, offsets, widths, pairs, m, n, width, blocks, GATHER_LEFT, BM, BN, BK, GROUP
            )
            last -= 1
        rows = first + step * BK + tl.arange(0, BK)
        ok = rows < stop
        token = tl.load(tokens + rows, mask=ok, other=0).to(tl.int64)
        own = rows.to(tl.int64)
        l_row, r_row = (token, own) if GATHER_LEFT else (own, token)
        wide_i, wide_j = i + tl.arange(0, BM), j + tl.arange(0, BN)
        # What an expert leaves out of a common width is read, and cut off below.
        m_most, n_most = (m, width) if GATHER_LEFT else (width, n)
        # Rows lie along the slow axis of both operands, as in memory.
        l_edge = left + tl.cast(block, tl.int64) * l_b + wide_i.to(tl.int64) * l_m
        l_tile = tl.load(
            l_edge[None, :] + l_row[:, None] * l_r,
            mask=ok[:, None] & (wide_i < tl.minimum(m, m_most))[None, :],
            other=0.0,
        )
        r_edge = right + wide_j.to(tl.int64) * r_n
        r_tile = tl.load(
            r_edge[None, :] + r_row[:, None] * r_r,
            mask=ok[:, None] & (wide_j < tl.minimum(n, n_most))[None, :],
            other=0.0,
        )
        if _INTERPRETED:
            l_tile, r_tile = l_tile.to(acc.dtype), r_tile.to(acc.dtype)
        acc = tl.dot(l_tile.T, r_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if step == last:
            to = target + tl.cast(expert, tl.int64) * t_e + tl.cast(block, tl.int64) * t_b
            for part in tl.static_range(PARTS):
                _store_part(
                    _piece(acc, part, PARTS), to, i, j + part * (BN // PARTS), m, n, used,
                    t_m, t_n, GATHER_LEFT, ADD,
                )  # fmt: skip
            acc = tl.full((BM, BN), 0.0, SUM)


@triton.jit(do_not_specialize=["experts", "tokens", "pairs"])
def _combine_kernel(
    parts,  # [pairs, d]
    y,  # [tokens, d]
    inverse, offsets,
    experts, tokens, pairs, d,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``y_t = sum over its k pairs``, in their order; pairs of padded tokens hold nothing."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    known, c_ok = t < tokens, c < d
    stop = tl.load(offsets + experts)
    acc = tl.full((BT, BD), 0.0, SUM)
    for j in tl.static_range(K):
        place = tl.load(inverse + t * K + j, mask=known, other=pairs)
        at = parts + (t * K + j)[:, None] * d + c[None, :]
        acc += tl.load(at, mask=(place < stop)[:, None] & c_ok[None, :], other=0.0).to(SUM)
    tl.store(y + t[:, None] * d + c[None, :], _rounded(acc, y.dtype.element_ty),
             mask=known[:, None] & c_ok[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["experts", "pairs", "parts"])
def _gate_grad_kernel(
    sums,  # [parts, pairs] in the experts' order
    dgates,  # [pairs]
    inverse, offsets,
    experts, pairs, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the parts of the gates' gradient in their order; zero for padded tokens."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse + p, mask=p < pairs, other=-1)
    stop = tl.minimum(tl.load(offsets + experts), pairs)
    ok = (row >= 0) & (row < stop)
    acc = tl.full((BLOCK,), 0.0, sums.dtype.element_ty)
    for part in range(parts):
        acc += tl.load(sums + tl.cast(part, tl.int64) * pairs + row, mask=ok, other=0.0)
    tl.store(dgates + p, _rounded(acc, dgates.dtype.element_ty), mask=p < pairs)
