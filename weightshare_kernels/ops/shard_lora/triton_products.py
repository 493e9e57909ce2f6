"""Kernels over the rows of shard_lora: products with matrices gathered shard by shard.

Two products: *shrink* ``x G^T`` and *expand* ``base + h G``, G being A or B. A program has a tile
of rows that share an adapter, of one target. Which rows those are it finds in the offsets itself:
the grid is sized for the most tiles that there can be, so that the host never waits for counts.

Targets come as tuples, a pointer and sizes each, and a program runs the code of its target: all
that the compiler knows of alignment holds for that one. A step of columns lies within one shard
wherever the shards' width allows it (WHOLE), and then takes one number per row from the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weightshare_kernels._products import _INTERPRETED
from weightshare_kernels.ops.moe_mlp.triton_rows import _rounded


@triton.jit
def _bound(offsets, adapter, ok, n):
    """First position of an adapter's rows, whatever the offsets hold."""
    at = tl.load(offsets + adapter, mask=ok, other=n)
    return tl.minimum(tl.maximum(at, 0), n).to(tl.int32)


@triton.jit
def _row_at(place, ok, permutation, n):
    """Row at a position of the adapters' order."""
    if permutation is None:
        return place.to(tl.int64)
    else:
        row = tl.load(permutation + place, mask=ok, other=0)
        return tl.minimum(tl.maximum(row, 0), n - 1)


@triton.jit
def _rows(slot, offsets, permutation, n, adapters, BM: tl.constexpr, E: tl.constexpr):
    """Adapter of a tile, its rows, and which of them exist; rows of none are those of the last."""
    if offsets is None:
        place = slot * BM + tl.arange(0, BM)
        return 0, place.to(tl.int64), place < n
    else:
        e = tl.arange(0, E)
        start = _bound(offsets, e, e <= adapters, n)
        stop = tl.maximum(_bound(offsets, e + 1, e < adapters, n), start)
        tiles = tl.where(e <= adapters, (stop - start + BM - 1) // BM, 0)
        ends = tl.cumsum(tiles, 0)
        number = slot - (ends - tiles)
        here = (number >= 0) & (slot < ends)
        adapter = tl.sum(tl.where(here, e, 0), 0)
        place = tl.sum(tl.where(here, start + number * BM, 0), 0) + tl.arange(0, BM)
        ok = place < tl.sum(tl.where(here, stop, 0), 0)
        return adapter, _row_at(place, ok, permutation, n), ok


@triton.jit
def _gathered(
    pool, table, ok, first, size, width, count, pitch, step,
    kind: tl.constexpr, WHOLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Columns ``first..`` of gathered rows, ``[rows, B]``; table points at each row's shards."""
    inner = tl.arange(0, B)
    if WHOLE:
        name = tl.load(table + first // width, mask=ok, other=-1)
        inside = (name >= 0) & (name < count)
        # Not a remainder, of which Triton 3.6 does not know that 16 divides it.
        within = (first - first // width * width).to(tl.int64) * step
        edge = pool + name.to(tl.int64) * pitch + within
        tile = tl.load(edge[:, None] + inner[None, :] * step, mask=inside[:, None], other=0.0)
    else:
        column = first + inner
        shard = column // width
        given = ok[:, None] & (column < size)[None, :]
        name = tl.load(table[:, None] + shard[None, :], mask=given, other=-1)
        at = name.to(tl.int64) * pitch + (column - shard * width).to(tl.int64)[None, :] * step
        tile = tl.load(pool + at, mask=(name >= 0) & (name < count), other=0.0)
    return _rounded(tile, kind)


@triton.jit
def _factor(scales, adapter, scale, SUM: tl.constexpr):
    """Scale of an adapter that exists."""
    factor = tl.full((), scale, SUM)
    if scales is not None:
        factor *= tl.load(scales + adapter).to(SUM)
    return factor


@triton.jit
def _shrink_tile(
    x, x_m, x_k, h, pool, table, rank, length, width, count, pitch, step, stride,
    scales, scale, adapter, adapters, row, ok, tile, column, n, total,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    ranks = tile * BN + tl.arange(0, BN)
    size = length * width
    share = ((size + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    start = split * share
    stop = tl.minimum(start + share, size)
    if adapter >= adapters:  # rows of none: nothing to multiply, nothing to read
        stop = start
    table += tl.cast(adapter, tl.int64) * stride + ranks * length
    edge = x + row * x_m
    acc = tl.zeros((BM, BN), SUM)
    for k in range(start, stop, BK):
        inner = k + tl.arange(0, BK)
        given = ok[:, None]
        if not WHOLE:
            given = given & (inner < size)[None, :]
        a = tl.load(edge[:, None] + inner.to(tl.int64)[None, :] * x_k, mask=given, other=0.0)
        b = _gathered(
            pool, table, ranks < rank, k, size, width, count, pitch, step, a.dtype, WHOLE, BK
        )
        if _INTERPRETED:
            a, b = a.to(SUM), b.to(SUM)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION, out_dtype=SUM)
    if adapter < adapters:
        acc *= _factor(scales, adapter, scale, SUM)
    line = tl.cast(split, tl.int64) * n + row
    to = h + line[:, None] * total + (column + ranks)[None, :]
    tl.store(to, acc, mask=ok[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["n", "adapters"])
def _shrink_kernel(
    xs,  # [n, size] of each target
    h,  # [SPLIT, n, total]: partial sums
    pools, tables,  # [count, width], int32 [adapters, rank, length]
    ranks, lengths, widths, counts, pitches, steps, strides,
    x_ms, x_ks, columns,  # strides of xs; first column of each target in h
    offsets, permutation, scales, n, adapters, total,
    G: tl.constexpr, scale: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``h = factor * x G^T`` of all targets; those of a tile of rows run together."""
    tiles = 0
    for t in tl.static_range(G):
        tiles += (ranks[t] + BN - 1) // BN
    slot = tl.program_id(0) // tiles
    tile = tl.program_id(0) - slot * tiles
    adapter, row, ok = _rows(slot, offsets, permutation, n, adapters, BM, E)
    first = 0
    for t in tl.static_range(G):
        last = first + (ranks[t] + BN - 1) // BN
        if (tile >= first) & (tile < last):
            _shrink_tile(
                xs[t], x_ms[t], x_ks[t], h, pools[t], tables[t], ranks[t], lengths[t], widths[t],
                counts[t], pitches[t], steps[t], strides[t], scales, scale, adapter, adapters,
                row, ok, tile - first, columns[t], n, total,
                SPLIT, WHOLE, BM, BN, BK, PRECISION, SUM,
            )  # fmt: skip
        first = last


@triton.jit
def _h_tile(
    h, h_sum, row, ok, column, start, rank, first, n, total,
    kind: tl.constexpr, SPLIT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Some of a target's columns of h, the sum of its parts in their order; and where it goes."""
    k = start + tl.arange(0, BK)
    given = ok[:, None] & (k < rank)[None, :]
    within = row[:, None] * total + (column + k)[None, :]
    a = tl.load(h + within, mask=given, other=0.0)
    for split in tl.static_range(1, SPLIT):
        a += tl.load(h + tl.cast(split, tl.int64) * n * total + within, mask=given, other=0.0)
    if h_sum is not None:  # noqa: SIM102 (one is of the compiler, one of the program)
        if first == 0:
            tl.store(h_sum + within, a, mask=given)
    return _rounded(a, kind)


@triton.jit
def _expand_step(
    acc, a, pool, table, known, start, first, length, width, count, pitch, step,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + h G``: some columns of h with as many rows of G, from G's column ``first`` on."""
    k = start + tl.arange(0, a.shape[1])
    b = _gathered(
        pool, table + k * length, k < known, first, length * width, width, count, pitch, step,
        a.dtype, WHOLE, acc.shape[1],
    )  # fmt: skip
    if _INTERPRETED:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _expand_deep(
    acc, h, h_sum, pool, table, rank, known, length, width, count, pitch, step, row, ok,
    first, column, n, total, kind: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + h G`` for the columns from ``first`` on, in as many steps as the rank takes."""
    for start in range(0, rank, BK):
        a = _h_tile(h, h_sum, row, ok, column, start, rank, first, n, total, kind, SPLIT, BK)
        acc = _expand_step(
            acc, a, pool, table, known, start, first, length, width, count, pitch, step,
            WHOLE, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _expand_columns(
    h, h_sum, base, b_m, b_n, y,
    pools, tables, ranks, lengths, widths, counts, pitches, steps, strides, columns,
    scales, scale, adapter, adapters, row, ok, begin, n, total,
    G: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    DEEP: tl.constexpr,  # whether a rank takes more than one step
    TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Some tiles of an output, side by side: h is read once, the next tile is under way."""
    kind: tl.constexpr = y.dtype.element_ty
    size = lengths[0] * widths[0]
    factor = tl.full((), 0.0, SUM)  # rows of none: nothing to add
    if adapter < adapters:
        factor = _factor(scales, adapter, scale, SUM)
    hs = ()
    for t in tl.static_range(G):
        if not DEEP:
            tile = _h_tile(
                h, h_sum, row, ok, columns[t], 0, ranks[t], begin, n, total, kind, SPLIT, BK
            )
            hs = hs + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (of the compiler)
    last = tl.minimum(begin + TILES * BN, size)
    for first in tl.range(begin, last, BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        mask = ok[:, None] & (cols < size)[None, :]
        if base is not None:
            at = base + row[:, None] * b_m + cols.to(tl.int64)[None, :] * b_n
            before = tl.load(at, mask=mask, other=0.0)
        acc = tl.zeros((BM, BN), SUM)
        for t in tl.static_range(G):
            table = tables[t] + tl.cast(adapter, tl.int64) * strides[t]
            known = tl.where(adapter < adapters, ranks[t], 0)
            if DEEP:
                acc = _expand_deep(
                    acc, h, h_sum, pools[t], table, ranks[t], known, lengths[t], widths[t],
                    counts[t], pitches[t], steps[t], row, ok, first, columns[t], n, total,
                    kind, SPLIT, WHOLE, BK, PRECISION,
                )  # fmt: skip
            else:
                acc = _expand_step(
                    acc, hs[t], pools[t], table, known, 0, first, lengths[t], widths[t],
                    counts[t], pitches[t], steps[t], WHOLE, PRECISION,
                )  # fmt: skip
        acc *= factor
        if base is not None:
            acc += before.to(SUM)
        tl.store(y + row[:, None] * size + cols[None, :], _rounded(acc, kind), mask=mask)


@triton.jit(do_not_specialize=["n", "adapters"])
def _expand_kernel(
    h,  # [SPLIT, n, total]
    h_sum,  # [n, total] | None: where the sum of the parts goes
    bases, ys,  # [n, size] of each output; | None
    pools, tables, ranks, lengths, widths, counts, pitches, steps, strides,
    b_ms, b_ns, columns,
    offsets, permutation, scales, n, adapters, total,
    G: tl.constexpr,  # targets
    ONE: tl.constexpr,  # whether they add up to one output, or have one each
    scale: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, DEEP: tl.constexpr,
    TILES: tl.constexpr,  # of a program
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``y = base + factor * h G`` of each target, or with the sum over all targets."""
    outputs: tl.constexpr = 1 if ONE else G
    tiles = 0
    for t in tl.static_range(outputs):
        tiles += (lengths[t] * widths[t] + TILES * BN - 1) // (TILES * BN)
    slot = tl.program_id(0) // tiles
    tile = tl.program_id(0) - slot * tiles
    adapter, row, ok = _rows(slot, offsets, permutation, n, adapters, BM, E)
    if ONE:
        _expand_columns(
            h, h_sum, bases[0], b_ms[0], b_ns[0], ys[0], pools, tables, ranks, lengths, widths,
            counts, pitches, steps, strides, columns, scales, scale, adapter, adapters, row, ok,
            tile * (TILES * BN), n, total, G, SPLIT, WHOLE, DEEP, TILES, BM, BN, BK, STAGES,
            PRECISION, SUM,
        )  # fmt: skip
    else:
        first = 0
        for t in tl.static_range(G):
            last = first + (lengths[t] * widths[t] + TILES * BN - 1) // (TILES * BN)
            if (tile >= first) & (tile < last):
                _expand_columns(
                    h, h_sum, bases[t], b_ms[t], b_ns[t], ys[t], (pools[t],), (tables[t],),
                    (ranks[t],), (lengths[t],), (widths[t],), (counts[t],), (pitches[t],),
                    (steps[t],), (strides[t],), (columns[t],), scales, scale, adapter, adapters,
                    row, ok, (tile - first) * (TILES * BN), n, total, 1, SPLIT, WHOLE, DEEP,
                    TILES, BM, BN, BK, STAGES, PRECISION, SUM,
                )  # fmt: skip
            first = last
