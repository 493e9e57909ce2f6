"""Kernels of moe_mlp that sum over pairs: the weights' gradients, a token's outputs, its gates."""

from __future__ import annotations

import triton
import triton.language as tl

from weightshare_kernels._products import _INTERPRETED
from weightshare_kernels.ops.moe_mlp.triton_rows import _own_width, _rounded


@triton.jit
def _steps(
    acc, left, right, tokens, m_ok, n_ok, start, stop, l_r, r_r,
    GATHER_LEFT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + sum over rows in [start, stop) of left[row]^T right[row]``; one side by token."""
    for first in range(start, stop, BK):
        row = first + tl.arange(0, BK)
        ok = row < stop
        token = tl.load(tokens + row, mask=ok, other=0).to(tl.int64)
        own = row.to(tl.int64)
        l_row, r_row = (token, own) if GATHER_LEFT else (own, token)
        # Rows lie along the slow axis of both operands, as in memory.
        l_tile = tl.load(
            left[None, :] + l_row[:, None] * l_r, mask=ok[:, None] & m_ok[None, :], other=0.0
        )
        r_tile = tl.load(
            right[None, :] + r_row[:, None] * r_r, mask=ok[:, None] & n_ok[None, :], other=0.0
        )
        if _INTERPRETED:
            l_tile, r_tile = l_tile.to(acc.dtype), r_tile.to(acc.dtype)
        acc = tl.dot(l_tile.T, r_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit(do_not_specialize=["pairs", "experts"])
def _weight_grad_kernel(
    left, right,  # [pairs, blocks, m] and [tokens, n]; [tokens, m] and [pairs, n] if GATHER_LEFT
    target,  # [experts, blocks, m, n]
    offsets, tokens, widths,
    experts, pairs, m, n,  # the part of the target that is written
    width,  # limits n if GATHER_LEFT, else m
    l_r, l_b, l_m, r_r, r_n, t_e, t_b, t_m, t_n,  # strides
    blocks: tl.constexpr, GATHER_LEFT: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``target (+)= sum over an expert's rows of left^T right``, zero beyond its width."""
    tiles_m, tiles_n = (m + BM - 1) // BM, (n + BN - 1) // BN
    each = blocks * tiles_m * tiles_n
    expert = tl.program_id(0) // each
    inside = tl.program_id(0) - expert * each
    # One expert's tiles run together: its rows stay in the L2 cache.
    band = inside // (GROUP * tiles_n)
    height = tl.minimum(blocks * tiles_m - band * GROUP, GROUP)
    within = inside - band * (GROUP * tiles_n)
    line, column = band * GROUP + within % height, within // height
    block = line // tiles_m
    i = (line - block * tiles_m) * BM + tl.arange(0, BM)
    j = column * BN + tl.arange(0, BN)
    start = tl.minimum(tl.maximum(tl.load(offsets + expert), 0), pairs).to(tl.int32)
    stop = tl.minimum(tl.maximum(tl.load(offsets + expert + 1), 0), pairs).to(tl.int32)
    used = width
    if widths is not None:
        used = _own_width(expert, widths, width)
    if GATHER_LEFT:
        m_ok, n_ok, beyond = i < m, j < tl.minimum(n, width), column * BN >= used
    else:
        m_ok, n_ok = i < tl.minimum(m, width), j < n
        beyond = (line - block * tiles_m) * BM >= used
    wide_i, wide_j = i.to(tl.int64), j.to(tl.int64)
    acc = tl.full((BM, BN), 0.0, SUM)
    acc = _steps(
        acc, left + block.to(tl.int64) * l_b + wide_i * l_m, right + wide_j * r_n, tokens,
        m_ok, n_ok, start, tl.where(beyond, start, stop), l_r, r_r, GATHER_LEFT, BK, PRECISION,
    )  # fmt: skip
    if GATHER_LEFT:
        acc = tl.where((j < used)[None, :], acc, 0.0)
    else:
        acc = tl.where((i < used)[:, None], acc, 0.0)
    where = target + expert.to(tl.int64) * t_e + block.to(tl.int64) * t_b
    where = where + wide_i[:, None] * t_m + wide_j[None, :] * t_n
    ok = (i < m)[:, None] & (j < n)[None, :]
    if ADD:
        acc += tl.load(where, mask=ok, other=0.0).to(SUM)
    tl.store(where, _rounded(acc, target.dtype.element_ty), mask=ok)


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
