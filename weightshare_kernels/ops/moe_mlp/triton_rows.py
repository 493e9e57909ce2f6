"""Kernels over the rows of moe_mlp: pairs of token and slot, sorted by expert.

Four products share one loop: rows, a token's or our own, times the weight of their expert.
A program walks over tiles, one row of tiles of one expert after another; which tiles there are is
read from a plan that a first small kernel makes of the routing's offsets, so that the host never
waits for the counts. The tiles of a group of rows run together, as in a plain product, so that
a weight comes from memory once and then from the L2 cache.

With TMA the weight's tiles (and those rows that lie one below the other) are fetched by the
copy engine from a descriptor made by the host: no addresses in registers, and the descriptor's
own bounds cut the weight to its width. Gathered rows have an address each and use ``cp.async``.
Descriptors made on the device would need scratch memory at every launch and time in every
program; all they would add is a width that only the device knows, and there pointers serve.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weightshare_kernels._products import _INTERPRETED


@triton.jit(do_not_specialize=["experts", "pairs", "slots", "k"])
def _plan_kernel(
    offsets, permutation,  # int64 [experts + 1], [pairs]
    plan,  # int32: number of row tiles; then expert, first row, row after the last of each
    tokens,  # int32 [pairs]: token of each row
    experts, pairs, slots, k,
    BM: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Cut each expert's rows into tiles; any offsets and permutation give rows that exist."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(permutation + at, mask=at < pairs, other=0)
    token = tl.minimum(tl.maximum(pair, 0), pairs - 1) // k
    tl.store(tokens + at, token.to(tl.int32), mask=at < pairs)
    if tl.program_id(0) * SLOTS < slots:
        e = tl.arange(0, E)
        start = tl.load(offsets + e, mask=e < experts, other=0)
        start = tl.minimum(tl.maximum(start, 0), pairs).to(tl.int32)
        stop = tl.load(offsets + e + 1, mask=e < experts, other=0)
        stop = tl.maximum(tl.minimum(stop, pairs), start.to(tl.int64)).to(tl.int32)
        tiles = (stop - start + BM - 1) // BM
        ends = tl.cumsum(tiles, 0)
        total = tl.minimum(tl.max(ends, 0), slots)
        tl.store(plan, total, mask=tl.program_id(0) == 0)
        slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
        # A slot is of the one expert whose tiles begin at or before it and end behind it.
        number = slot[:, None] - (ends - tiles)[None, :]
        here = (number >= 0) & (slot[:, None] < ends[None, :])
        expert = tl.sum(tl.where(here, e[None, :], 0), 1)
        row = tl.sum(tl.where(here, start[None, :] + number * BM, 0), 1)
        last = tl.sum(tl.where(here, stop[None, :], 0), 1)
        to = plan + 1 + slot
        ok = slot < total
        tl.store(to, expert, mask=ok)
        tl.store(to + slots, row, mask=ok)
        tl.store(to + 2 * slots, tl.minimum(row + BM, last), mask=ok)


@triton.jit
def _place(tile, plan, slots, count, tiles_n, GROUP: tl.constexpr, BN: tl.constexpr):
    """Expert, first row, row after the last and first column of a tile."""
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(count - group * GROUP, GROUP)
    inside = tile - group * (GROUP * tiles_n)
    slot, col = group * GROUP + inside % height, inside // height * BN
    expert = tl.load(plan + 1 + slot)
    row = tl.load(plan + 1 + slots + slot)
    return expert, row, tl.load(plan + 1 + 2 * slots + slot), col


@triton.jit
def _rounded(x, kind: tl.constexpr):
    """Convert to the nearest; the interpreter would cut bits off, and make something of zero."""
    if _INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _steps(
    acc, a, b, n_ok, first, last, size, a_step, b_step,
    MASKED: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc + sum over k in [first, last) of a[:, k] b[k, :]``; a, b point at their edges.

    Masked, it ends at ``size`` within the last step.
    """
    for start in tl.range(first, last, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        wide = k.to(tl.int64)
        a_at, b_at = a[:, None] + wide[None, :] * a_step, b[None, :] + wide[:, None] * b_step
        if MASKED:
            a_tile = tl.load(a_at, mask=(k < size)[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=(k < size)[:, None] & n_ok[None, :], other=0.0)
        else:
            a_tile = tl.load(a_at)
            b_tile = tl.load(b_at, mask=n_ok[None, :], other=0.0)
        if _INTERPRETED:
            a_tile, b_tile = a_tile.to(acc.dtype), b_tile.to(acc.dtype)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _rows_dot(
    a,  # [rows, blocks of k, k]: pointer; or descriptor, blocks first, unless GATHER
    w,  # [experts, blocks, ...]: pointer, or descriptor
    source,  # row of a of each row of the tile
    row, expert, col,
    n, k, k_here,  # sizes; what of k this expert uses, any part if OWN, else all or nothing
    a_m, a_b, a_k, w_e, w_nb, w_n, w_kb, w_k,  # strides
    KB: tl.constexpr, NB: tl.constexpr,  # blocks along k and along n
    K_MAJOR: tl.constexpr, GATHER: tl.constexpr, TMA: tl.constexpr, OWN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Rows times their expert's weight: ``[BM, NB * BN]``, columns of one block after another."""
    acc = tl.full((BM, NB * BN), 0.0, SUM)
    if TMA:
        per = (k + BK - 1) // BK
        for step in tl.range(0, KB * per):
            block = step // per if KB > 1 else 0
            at = (step - block * per) * BK
            if GATHER:
                j = at + tl.arange(0, BK)
                edge = a + source.to(tl.int64)[:, None] * a_m + j.to(tl.int64)[None, :] * a_k
                a_tile = tl.load(edge, mask=(j < k)[None, :], other=0.0)
            else:
                a_tile = tl.reshape(a.load([block, row, at]), (BM, BK))
            if K_MAJOR:
                b_tile = tl.reshape(w.load([expert, 0, col, at]), (NB * BN, BK)).T
            else:
                b_tile = tl.reshape(w.load([expert, block, at, col]), (BK, BN))
            if _INTERPRETED:
                a_tile, b_tile = a_tile.to(acc.dtype), b_tile.to(acc.dtype)
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        j = tl.arange(0, NB * BN)
        column = col + j % BN
        n_ok = column < n
        a_edge = a + source.to(tl.int64) * a_m
        b_edge = w + expert.to(tl.int64) * w_e + (j // BN).to(tl.int64) * w_nb
        b_edge += column.to(tl.int64) * w_n
        for block in tl.static_range(KB):
            a_at, b_at = a_edge + block * a_b, b_edge + tl.cast(block, tl.int64) * w_kb
            if OWN:  # a width of its own: nothing is known of its last bits, so it ends apart
                whole = k_here // BK * BK
                acc = _steps(
                    acc, a_at, b_at, n_ok, 0, whole, whole, a_k, w_k, False, BK, PRECISION, None
                )
                acc = _steps(
                    acc, a_at, b_at, n_ok, whole, k_here, k_here, a_k, w_k, True, BK, PRECISION, 1
                )
            else:
                acc = _steps(
                    acc, a_at, b_at, n_ok, 0, k_here, k, a_k, w_k, True, BK, PRECISION, None
                )
    return acc


@triton.jit
def _halves(x):
    """Left and right half of a tile's columns, without leaving the registers."""
    BM: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, HALF)), (0, 2, 1)))


@triton.jit
def _piece(x, part: tl.constexpr, PARTS: tl.constexpr):
    """One of 1, 2 or 4 parts of a tile's columns."""
    if PARTS == 1:
        return x
    elif PARTS == 2:
        return _halves(x)[part]
    else:
        return _halves(_halves(x)[part // 2])[part % 2]


@triton.jit
def _positive(x):
    """ReLU; of itself the hardware's maximum would make zero of NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """Hidden units of pre-activations; ``up`` counts only where gated."""
    if ACTIVATION == "swiglu":
        return gate / (1 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        positive = _positive(gate)
        return positive * positive


@triton.jit
def _backward(gate, up, grad, ACTIVATION: tl.constexpr):
    """Gradients of gate and up from that of the hidden units."""
    if ACTIVATION == "swiglu":
        s = 1 / (1 + tl.exp(-gate))
        return grad * up * s * (1 + gate * (1 - s)), grad * gate * s
    elif ACTIVATION == "gelu":
        normal = tl.exp(-0.5 * gate * gate) * 0.3989422804014327  # density; 1 / sqrt(2 pi)
        slope = 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) + gate * normal
        return grad * slope, grad
    else:
        return grad * 2 * _positive(gate), grad


@triton.jit
def _own_width(expert, widths, width):
    """Hidden units of an expert that has a width of its own."""
    return tl.minimum(tl.maximum(tl.load(widths + expert), 0), width).to(tl.int32)


@triton.jit
def _after_up(
    gate, up, h, hidden, row, stop, col, width, ACTIVATION: tl.constexpr, NB: tl.constexpr
):
    """Store some columns of h, and the hidden units of them."""
    SUM: tl.constexpr = gate.dtype
    kind: tl.constexpr = hidden.dtype.element_ty
    below, cols = tl.arange(0, gate.shape[0]), col + tl.arange(0, gate.shape[1])
    ok = (row + below < stop)[:, None] & (cols < width)[None, :]
    # The tile's first row in 64 bits, once; 32 within the tile spare registers.
    line, within = tl.cast(row, tl.int64) * width, below[:, None] * width
    gate, up = _rounded(gate, kind), _rounded(up, kind)
    if h is not None:
        h += line * NB
        wide = within * NB + cols[None, :]  # two blocks lie side by side in a row of h
        tl.store(h + wide, gate, mask=ok)
        if NB == 2:
            tl.store(h + wide + width, up, mask=ok)
    # From the rounded h, as backward computes it again.
    active = _activate(gate.to(SUM), up.to(SUM), ACTIVATION)
    tl.store(hidden + line + (within + cols[None, :]), _rounded(active, kind), mask=ok)


@triton.jit(do_not_specialize=["slots"])
def _up_kernel(
    x, w,  # [tokens, d], gathered; [experts, blocks, width, d]
    h, hidden,  # [pairs, blocks, width] | None, [pairs, width]
    plan, tokens, widths,  # int32, int32, int64 [experts] | None
    slots, width, d,
    x_m, x_k, w_e, w_b, w_n, w_k,  # strides
    ACTIVATION: tl.constexpr, NB: tl.constexpr,
    PARTS: tl.constexpr,  # in which the columns of a tile end, for want of registers
    TMA: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``h = x W_up^T`` of each pair's token and expert, and its hidden units."""
    count, tiles_n = tl.load(plan), (width + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), count * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, stop, col = _place(tile, plan, slots, count, tiles_n, GROUP, BN)
        rows = row + tl.arange(0, BM)
        token = tl.load(tokens + tl.minimum(rows, stop - 1))
        d_here = d
        if widths is not None:  # nothing to multiply where the expert is narrower
            d_here = tl.where(col < _own_width(expert, widths, width), d, 0)
        acc = _rows_dot(
            x, w, token, row, expert, col, width, d, d_here,
            x_m, 0, x_k, w_e, w_b, w_n, 0, w_k, 1, NB, True, True, TMA, False,
            BM, BN, BK, PRECISION, SUM,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            # A gate and its up lie in the same part, so a gated tile is halved first.
            if NB == 2:
                gate, up = _halves(acc)
                gate, up = _piece(gate, part, PARTS), _piece(up, part, PARTS)
            else:
                gate = _piece(acc, part, PARTS)
                up = gate
            _after_up(gate, up, h, hidden, row, stop, col + part * (BN // PARTS), width,
                      ACTIVATION, NB)  # fmt: skip


@triton.jit(do_not_specialize=["slots", "pairs"])
def _spread_kernel(
    a, w,  # [pairs, blocks, width], own rows; [experts, blocks, d, width] or [.., width, d]
    out,  # [pairs, d]: each row at its pair
    gates,  # [pairs] | None: factor of each pair
    plan, permutation, widths,
    slots, pairs, width, d,
    a_m, a_b, w_e, w_n, w_kb, w_k,  # strides; a's last is 1
    KB: tl.constexpr, K_MAJOR: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``out = a W (times the gate)``, from the experts' order back to the tokens'."""
    count, tiles_n = tl.load(plan), (d + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), count * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, stop, col = _place(tile, plan, slots, count, tiles_n, GROUP, BN)
        rows = row + tl.arange(0, BM)
        inside = tl.minimum(rows, stop - 1)
        used = width
        if widths is not None:
            used = _own_width(expert, widths, width)
        acc = _rows_dot(
            a, w, inside, row, expert, col, d, width, used,
            a_m, a_b, 1, w_e, 0, w_n, w_kb, w_k, KB, 1, K_MAJOR, False, TMA, widths is not None,
            BM, BN, BK, PRECISION, SUM,
        )  # fmt: skip
        pair = tl.load(permutation + inside)
        pair = tl.minimum(tl.maximum(pair, 0), pairs - 1)
        if gates is not None:
            acc *= tl.load(gates + pair).to(SUM)[:, None]
        cols = col + tl.arange(0, BN)
        tl.store(
            out + pair[:, None] * d + cols[None, :],
            _rounded(acc, out.dtype.element_ty),
            mask=(rows < stop)[:, None] & (cols < d)[None, :],
        )


@triton.jit
def _after_hidden(
    acc, h, dh, weighted, factor, row, stop, col, used, width,
    ACTIVATION: tl.constexpr, NB: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Store what follows from ``dy W_down`` in some columns; their share of the gates' gradient."""
    SUM: tl.constexpr = acc.dtype
    cols = col + tl.arange(0, acc.shape[1])
    below = tl.arange(0, acc.shape[0])
    ok = (row + below < stop)[:, None] & (cols < width)[None, :]
    line, within = tl.cast(row, tl.int64) * width, below[:, None] * width
    h += line * NB
    wide = within * NB + cols[None, :]
    gate = tl.load(h + wide, mask=ok, other=0.0).to(SUM)
    up = gate
    if NB == 2:
        up = tl.load(h + wide + width, mask=ok, other=0.0).to(SUM)
    active = _activate(gate, up, ACTIVATION)
    share = acc * active
    if OWN:  # beyond its width no one reads an expert's rows, but a sum must not hold them
        share = tl.where((cols < used)[None, :], share, 0.0)
    share = tl.sum(share, 1)
    kind: tl.constexpr = h.dtype.element_ty
    if weighted is not None:
        to = weighted + line + (within + cols[None, :])
        tl.store(to, _rounded(active * factor[:, None], kind), mask=ok)
    if dh is not None:
        dh += line * NB
        d_gate, d_up = _backward(gate, up, acc * factor[:, None], ACTIVATION)
        tl.store(dh + wide, _rounded(d_gate, kind), mask=ok)
        if NB == 2:
            tl.store(dh + wide + width, _rounded(d_up, kind), mask=ok)
    return share


@triton.jit(do_not_specialize=["slots", "pairs"])
def _hidden_grad_kernel(
    grad, w,  # [tokens, d], gathered; [experts, 1, d, width]
    h, dh,  # [pairs, blocks, width], | None
    weighted,  # [pairs, width] | None: hidden units times their pair's gate
    sums,  # [tiles of width, pairs]: shares of the gates' gradient
    gates, plan, tokens, permutation, widths,
    slots, pairs, width, d,
    g_m, g_k, w_e, w_n, w_k,  # strides
    ACTIVATION: tl.constexpr, NB: tl.constexpr,
    PARTS: tl.constexpr,  # in which the columns of a tile end, for want of registers
    TMA: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``dy W_down`` of each pair, and all that follows from it and h alone."""
    count, tiles_n = tl.load(plan), (width + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), count * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, stop, col = _place(tile, plan, slots, count, tiles_n, GROUP, BN)
        rows = row + tl.arange(0, BM)
        inside = tl.minimum(rows, stop - 1)
        used, d_here = width, d
        if widths is not None:  # nothing to multiply where the expert is narrower
            used = _own_width(expert, widths, width)
            d_here = tl.where(col < used, d, 0)
        acc = _rows_dot(
            grad, w, tl.load(tokens + inside), row, expert, col, width, d, d_here,
            g_m, 0, g_k, w_e, 0, w_n, 0, w_k, 1, 1, False, True, TMA, False,
            BM, BN, BK, PRECISION, SUM,
        )  # fmt: skip
        pair = tl.load(permutation + inside)
        factor = tl.load(gates + tl.minimum(tl.maximum(pair, 0), pairs - 1)).to(SUM)
        share = tl.full((BM,), 0.0, SUM)
        for part in tl.static_range(PARTS):
            share += _after_hidden(
                _piece(acc, part, PARTS), h, dh, weighted, factor, row, stop,
                col + part * (BN // PARTS), used, width, ACTIVATION, NB, widths is not None,
            )  # fmt: skip
        to = sums + (col // BN).to(tl.int64) * pairs + rows
        tl.store(to, share, mask=rows < stop)
