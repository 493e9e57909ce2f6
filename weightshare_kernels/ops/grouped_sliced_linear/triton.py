"""Grouped sliced linear on Triton: one launch for all groups, every tile bounded by its rows.

A small table on the device names the groups. A row finds its group's widths in it; a tile runs
over k as far as its widest row, skips what lies beyond all of its rows and stores zeros there.
Widths are kept in units of 16 where all of them allow it, so that the compiler knows masks to be
constant over a 16-byte load; odd widths take a second variant, element by element.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightshare_kernels import _products, _triton
from weightshare_kernels._products import _add_parts_kernel, _long_dot
from weightshare_kernels._select import lasting, temporary

_INTERPRETED = tl.constexpr(_triton.interpreted())
_CACHE_SIZE = 1024
_tables: dict[tuple, Tensor] = {}


@triton.jit
def _tile_at(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's tile, in groups of rows that share columns of B."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = pid - group * (GROUP * tiles_n)
    return (group * GROUP + inside % height) * BM, inside // height * BN


@triton.jit
def _widths(row, col, table, groups, UNIT: tl.constexpr, BM: tl.constexpr):
    """Per row of a tile its outputs and inputs, 0 for rows of no group; the most of each.

    The most inputs are those of rows with outputs in the tile. They are found group by group:
    from a reduction over the rows the compiler would not learn that they are multiples of UNIT.
    """
    rows = row + tl.arange(0, BM)
    out, in_ = tl.zeros_like(rows), tl.zeros_like(rows)
    most_out, most_in = 0, 0
    for g in range(groups):
        start, stop = tl.load(table + g), tl.load(table + groups + g)
        group_out, group_in = tl.load(table + 2 * groups + g), tl.load(table + 3 * groups + g)
        group_in = tl.where(group_out * UNIT > col, group_in, 0)
        here = (rows >= start) & (rows < stop)
        out, in_ = tl.where(here, group_out, out), tl.where(here, group_in, in_)
        if (start < row + BM) & (stop > row):
            most_out, most_in = tl.maximum(most_out, group_out), tl.maximum(most_in, group_in)
    return out * UNIT, in_ * UNIT, most_out * UNIT, most_in * UNIT


@triton.jit(do_not_specialize=["m", "groups"])
def _grouped_kernel(
    a,  # [m, k]
    b,  # [k, n], by strides
    c,  # [m, n], or [split, m, n] partial sums
    bias,  # [n] | None
    table,  # [4, groups] int32: first row, row after the last, outputs, inputs
    m, n, groups,
    a_m, a_k, b_k, b_n,  # strides
    UNIT: tl.constexpr,  # widths in the table are multiples of it
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``c[i, :out_i] = a[i, :in_i] b[:in_i, :out_i] (+ bias)``, zero beyond; widths per row."""
    row, col = _tile_at(m, n, BM, BN, GROUP)
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    out, in_, most_out, stop = _widths(row, col, table, groups, UNIT, BM)
    n_ok = cols < most_out
    split = tl.program_id(1)
    blocks = tl.cdiv(stop, BK)
    share = tl.cdiv(blocks, SPLIT)
    a_edge = a + rows.to(tl.int64) * a_m
    b_edge = b + cols.to(tl.int64) * b_n
    acc = tl.zeros((BM, BN), SUM)
    for block in tl.range(split * share, tl.minimum(split * share + share, blocks)):
        k = block * BK + tl.arange(0, BK)
        wide = k.to(tl.int64)
        # In the order of the operands' axes; a row reads no column beyond its own inputs.
        a_tile = tl.load(
            a_edge[:, None] + wide[None, :] * a_k, mask=k[None, :] < in_[:, None], other=0.0
        )
        b_tile = tl.load(
            b_edge[None, :] + wide[:, None] * b_k,
            mask=(k < stop)[:, None] & n_ok[None, :],
            other=0.0,
        )
        if _INTERPRETED:
            a_tile, b_tile = a_tile.to(acc.dtype), b_tile.to(acc.dtype)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if bias is not None:
        shift = tl.load(bias + cols, mask=n_ok, other=0.0).to(SUM)
        acc += tl.where(split == 0, shift, 0.0)[None, :]
    acc = tl.where(cols[None, :] < out[:, None], acc, 0.0)
    line = split.to(tl.int64) * m + rows
    tl.store(
        c + line[:, None] * n + cols[None, :],
        acc.to(c.dtype.element_ty),
        mask=(rows < m)[:, None] & (cols < n)[None, :],
    )


@triton.jit(do_not_specialize=["groups"])
def _grouped_outer_kernel(
    g, x, target,  # [k, m], [k, n], [m, n]
    table, groups,  # as above
    m, n,
    g_k, g_m, x_k, x_n, t_m, t_n,  # strides
    UNIT: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``target (+)= sum over groups of g^T x``, each on its own outputs and inputs."""
    row, col = _tile_at(m, n, BM, BN, GROUP)
    i, j = row + tl.arange(0, BM), col + tl.arange(0, BN)
    m_ok, n_ok = i < m, j < n
    wide_i, wide_j = i.to(tl.int64), j.to(tl.int64)
    acc = tl.zeros((BM, BN), SUM)
    for group in range(groups):
        start, stop = tl.load(table + group), tl.load(table + groups + group)
        out = tl.load(table + 2 * groups + group) * UNIT
        in_ = tl.load(table + 3 * groups + group) * UNIT
        used = (out > row) & (in_ > col)
        acc = _long_dot(
            acc, g + wide_i * g_m, x + wide_j * x_n, i < out, j < in_,
            start, tl.where(used, stop, start), g_k, x_k, BK, PRECISION,
        )  # fmt: skip
    where = target + wide_i[:, None] * t_m + wide_j[None, :] * t_n
    ok = m_ok[:, None] & n_ok[None, :]
    if ACCUMULATE:
        acc += tl.load(where, mask=ok, other=0.0).to(SUM)
    tl.store(where, acc.to(target.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["groups"])
def _grouped_sums_kernel(
    g, sums, table, groups, n, g_k, g_n,  # [k, .], [n]; strides
    UNIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``sums = column sums of g`` over the rows that use a column; zero where none does."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BK, BN), SUM)
    for group in range(groups):
        start, stop = tl.load(table + group), tl.load(table + groups + group)
        used = cols < tl.load(table + 2 * groups + group) * UNIT
        for first in range(start, stop, BK):
            k = first + tl.arange(0, BK)
            at = g + k.to(tl.int64)[:, None] * g_k + cols.to(tl.int64)[None, :] * g_n
            acc += tl.load(at, mask=(k < stop)[:, None] & used[None, :], other=0.0).to(SUM)
    tl.store(sums + cols, tl.sum(acc, 0).to(sums.dtype.element_ty), mask=cols < n)


def _groups(
    sizes: Sequence[int], outs: Sequence[int], ins: Sequence[int], device: torch.device
) -> tuple[Tensor, int]:
    """The kernels' table of groups and its unit; cached, so that a captured graph makes none."""
    unit = 16 if all(width % 16 == 0 for width in (*outs, *ins)) else 1
    key = (tuple(sizes), tuple(outs), tuple(ins), device)
    table = None if temporary() else _tables.get(key)
    if table is None:
        edges = [0, *itertools.accumulate(sizes)]
        rows = list(zip(edges, edges[1:], outs, ins, strict=False))
        rows = [(a, b, out // unit, in_ // unit) for a, b, out, in_ in rows if b > a]
        with lasting():
            table = torch.tensor(list(zip(*rows, strict=True)), dtype=torch.int32, device=device)
        if not temporary():
            if len(_tables) >= _CACHE_SIZE:
                _tables.clear()
            _tables[key] = table
    return table, unit


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    outs: Sequence[int],
    ins: Sequence[int],
    width: int,
) -> Tensor:
    """``y = x W[:out, :in]^T + bias[:out]`` group by group; x ``[N, I]`` -> ``[N, width]``."""
    m = x.shape[0]
    y = x.new_empty(m, width)
    if not y.numel():
        return y
    table, unit = _groups(sizes, outs, ins, x.device)
    k = max(ins)
    tile = _products.product_tile(m, width, max(k, 1), x, False)
    sums, split = _triton.sum_dtype(x), tile.split
    out = y if split == 1 else x.new_empty(split, m, width, dtype=sums)
    bias = None if bias is None else bias.contiguous()
    _triton.launch(
        _grouped_kernel,
        (triton.cdiv(m, tile.m) * triton.cdiv(width, tile.n), split),
        (x, weight, out, bias, table, m, width, table.shape[1], *x.stride(), weight.stride(1),
         weight.stride(0), unit, tile.m, tile.n, tile.k, split, tile.group, _triton.precision(x),
         _triton.triton_dtype(sums)),
        tile,
    )  # fmt: skip
    if split > 1:
        block = 1024
        _triton.launch(
            _add_parts_kernel,
            (triton.cdiv(y.numel(), block),),
            (out, None, y, y.numel(), width, split, block),
            _triton.Tile(1, block, 1, stages=1),
        )
    return y


def grad_weight_(
    buffer: Tensor,
    grad: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    outs: Sequence[int],
    ins: Sequence[int],
    accumulate: bool,
    bias_size: int,
) -> Tensor:
    """``buffer (+)= sum over groups of dy^T x`` in place; returns ``db [bias_size]``."""
    if not x.shape[0]:
        if not accumulate:
            buffer.zero_()
        return grad.new_zeros(bias_size)
    table, unit = _groups(sizes, outs, ins, x.device)
    m, n = buffer.shape if not accumulate else (max(outs), max(ins))
    tile = _products.outer_tile(m, n, grad, False)
    _triton.launch(
        _grouped_outer_kernel,
        (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),),
        (grad, x, buffer, table, table.shape[1], m, n, *grad.stride(), *x.stride(),
         *buffer.stride(), unit, accumulate, tile.m, tile.n, tile.k, tile.group,
         _triton.precision(grad), _triton.triton_dtype(_triton.sum_dtype(grad))),
        tile,
    )  # fmt: skip
    if not bias_size:
        return grad.new_empty(0)
    db = grad.new_empty(bias_size)
    block = 32
    _triton.launch(
        _grouped_sums_kernel,
        (triton.cdiv(bias_size, block),),
        (grad, db, table, table.shape[1], bias_size, *grad.stride(), unit, block, 128,
         _triton.triton_dtype(_triton.sum_dtype(grad))),
        _triton.Tile(128, block, 1, stages=1),
    )  # fmt: skip
    return db


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: four widths of 2048 x 16384 (MatFormer), 512 and 4 tokens each."""
    size, columns, e = 16384, 2048, dtype.itemsize
    outs = [size // part for part in (1, 2, 4, 8)]
    ins = [columns] * len(outs)
    weight = torch.empty(size, columns, dtype=dtype, device="meta")
    found = []
    for tokens in (512, 4):
        sizes = [tokens] * len(outs)
        total = sum(sizes)
        x, g = (torch.empty(total, n, dtype=dtype, device="meta") for n in (columns, size))
        flops = 2 * tokens * sum(outs) * columns
        moved = e * (size * columns + total * columns + tokens * sum(outs))
        bound = "memory" if total <= _products.FEW_ROWS else "matrix"
        calls = {
            "forward": lambda x=x, s=sizes: forward(x, weight, None, s, outs, ins, size),
            "grad_x": lambda g=g, s=sizes: forward(g, weight.t(), None, s, ins, outs, columns),
            "grad_weight": lambda g=g, x=x, s=sizes: grad_weight_(
                weight, g, x, s, outs, ins, True, 0
            ),
        }
        for name, call in calls.items():
            label = f"grouped_sliced_linear {name}, 4 x {tokens} tokens, 2048 -> 16384 / 1, 2, 4, 8"
            extra = e * size * columns * ("weight" in name)
            found.append(_triton.Example(label, call, flops, moved + extra, bound))
    return found
