"""The tiled products on Triton that the linear ops share.

Every linear op here is one of two products with something done at the edges:

* ``_product_kernel``  y = x B: forward (B = W^T) and grad_x (B = W). B may be read through index
  tables (slices) or scaled by the block grid of a mixture (entangled weights).
* ``_outer_kernel``    target (+)= g^T x, scattered through index tables or scaled by the grid.

Sizes are run-time arguments, so subnets of all widths share a binary. Triton still specialises
a width on divisibility by 16 (masks stay wide loads only then), so a kernel has two variants
per weight axis at most, and one more for a size of exactly 1. The token count is never
specialised. Offsets are 64-bit; every load and store is masked by the true bounds, index tables
included, so no value in a table can lead out of a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightshare_kernels._triton import (
    Tile,
    bounds,
    interpreted,
    launch,
    multiprocessors,
    precision,
    sum_dtype,
    triton_dtype,
    tuned,
)

FEW_ROWS = 16  # a tile of the tensor core's least height: W is read once, whatever the width
# The interpreter multiplies the bit patterns of bfloat16, so there operands are widened first.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _through(i, ok, table, size):
    """Position of element i in the shared tensor, and whether it lies within."""
    if table is None:
        return i.to(tl.int64), ok
    else:
        index = tl.load(table + i, mask=ok, other=-1)
        return index, (index >= 0) & (index < size)


@triton.jit
def _tile_of(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile, in groups of rows that share columns of B."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = pid - group * (GROUP * tiles_n)
    tile_m, tile_n = group * GROUP + inside % height, inside // height
    return tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)


@triton.jit
def _dot(
    acc, a, b, m_ok, n_ok, start, stop, a_step, b_step, table, size,
    BK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr = None,
):  # fmt: skip
    """``acc + sum over k in [start, stop) of a[:, k] b[k, :]``; a, b point at their edges."""
    for first in tl.range(start, stop, BK, num_stages=STAGES):
        k = first + tl.arange(0, BK)
        k_ok = k < stop
        a_tile = tl.load(
            a[:, None] + k.to(tl.int64)[None, :] * a_step,
            mask=m_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        kb, kb_ok = _through(k, k_ok, table, size)
        b_tile = tl.load(
            b[None, :] + kb[:, None] * b_step, mask=kb_ok[:, None] & n_ok[None, :], other=0.0
        )
        if _INTERPRETED:
            a_tile, b_tile = a_tile.to(acc.dtype), b_tile.to(acc.dtype)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _long_dot(
    acc, a, b, m_ok, n_ok, start, stop, a_step, b_step, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """``_dot`` over tokens, of which there are many: in fp32 a sum of sums of 256.

    The plain cores add one product after another, and the error of a chain grows with its length:
    2400 rows were off by 1.6e-6 of the largest gradient, cuBLAS by 1.9e-7. Narrower operands are
    rounded by far more than that before they are multiplied.
    """
    if a.dtype.element_ty == tl.float32:
        for first in range(start, stop, 256):
            last = tl.minimum(first + 256, stop)
            zero = tl.zeros_like(acc)
            acc += _dot(zero, a, b, m_ok, n_ok, first, last, a_step, b_step, None, 0, BK, PRECISION)
    else:
        acc = _dot(acc, a, b, m_ok, n_ok, start, stop, a_step, b_step, None, 0, BK, PRECISION)
    return acc


@triton.jit
def _mixed_dot(
    zero, a, b, m_ok, n_ok, first, last, a_step, b_step,
    grid, bounds, k_blocks, k_stride, n_stride, n_class, n_inside,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product with B scaled by the grid: ``sum over blocks of (a B)_block * factor``.

    A column's factor is constant over a block of k, so it scales the block's sum once, outside
    the loop: B goes to the tensor core as it lies in memory, not rounded a second time.
    """
    total = zero
    # A tile beyond every choice has nothing to sum.
    for block in range(0, k_blocks * tl.max(n_inside.to(tl.int32), 0)):
        start = tl.maximum(tl.load(bounds + block), first)
        stop = tl.minimum(tl.load(bounds + block + 1), last)
        if (start % 8 == 0) & (stop % 8 == 0):  # the usual sizes keep 16-byte loads
            # Rounded again, so that the compiler sees it here. A hint (tl.multiple_of) would stick
            # to the values themselves, and the other branch would load misaligned, too.
            part = _dot(
                zero, a, b, m_ok, n_ok, start // 8 * 8, stop // 8 * 8,
                a_step, b_step, None, 0, BK, PRECISION,
            )  # fmt: skip
        else:  # correct for any size; without buffers of its own
            part = _dot(
                zero, a, b, m_ok, n_ok, start, stop, a_step, b_step, None, 0, BK, PRECISION, 1
            )
        factor = tl.load(grid + block * k_stride + n_class * n_stride, mask=n_inside, other=0.0)
        total += part * factor[None, :]
    return total


@triton.jit(do_not_specialize=["m", "k_blocks", "n_blocks"])
def _product_kernel(
    a,  # [m, k]
    b,  # [k, n] after tables
    c,  # [m, n], or [split, m, n] partial sums
    bias,  # [n] | None
    k_table, n_table,  # int64 | None: which rows and columns of b
    grid, k_bounds, n_classes,  # mixture factors, first k of each block, block of each n | None
    m, n, k, k_size, n_size,  # sizes of the product, and of b before tables
    a_m, a_k, b_k, b_n,  # strides
    k_blocks, n_blocks, grid_k, grid_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``c = a b (+ bias)`` with b sliced through tables or scaled by a mixture's grid."""
    rows, cols = _tile_of(m, n, BM, BN, GROUP)
    m_ok, n_ok = rows < m, cols < n
    at, n_in = _through(cols, n_ok, n_table, n_size)
    a_edge = a + rows.to(tl.int64) * a_m
    b_edge = b + at * b_n
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(k, BK), SPLIT) * BK
    first, last = split * share, tl.minimum(split * share + share, k)
    acc = tl.zeros((BM, BN), SUM)
    if grid is None:
        acc = _dot(
            acc, a_edge, b_edge, m_ok, n_in, first, last, a_k, b_k, k_table, k_size, BK, PRECISION
        )
    else:
        n_class = tl.load(n_classes + cols, mask=n_ok, other=n_blocks)
        acc = _mixed_dot(
            acc, a_edge, b_edge, m_ok, n_in, first, last, a_k, b_k,
            grid, k_bounds, k_blocks, grid_k, grid_n, n_class, n_class < n_blocks, BK, PRECISION,
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + cols, mask=n_ok, other=0.0).to(SUM)[None, :]
    line = split.to(tl.int64) * m + rows
    tl.store(
        c + line[:, None] * n + cols[None, :],
        acc.to(c.dtype.element_ty),
        mask=m_ok[:, None] & n_ok[None, :],
    )


@triton.jit
def _add_parts_kernel(parts, bias, c, size, n, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """``c = sum of parts [SPLIT, size] (+ bias [n])``, always in the same order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    acc = tl.zeros((BLOCK,), parts.dtype.element_ty)
    for split in range(SPLIT):
        acc += tl.load(parts + tl.cast(split, tl.int64) * size + i, mask=ok, other=0.0)
    if bias is not None:
        acc += tl.load(bias + i % n, mask=ok, other=0.0).to(acc.dtype)
    tl.store(c + i, acc.to(c.dtype.element_ty), mask=ok)


@triton.jit
def block_sums(values, row_class, col_class, row_blocks, col_blocks, sums):
    """Add up a tile over each block of the grid that it meets; others keep their zero."""
    for r in range(tl.min(row_class, 0), tl.minimum(tl.max(row_class, 0) + 1, row_blocks)):
        for c in range(tl.min(col_class, 0), tl.minimum(tl.max(col_class, 0) + 1, col_blocks)):
            here = (row_class == r)[:, None] & (col_class == c)[None, :]
            tl.store(sums + r * col_blocks + c, tl.sum(tl.where(here, values, 0.0)))


@triton.jit(do_not_specialize=["k", "row_blocks", "col_blocks"])
def _outer_kernel(
    g, x, target,  # [k, m], [k, n], [m, n] after tables
    rows, cols,  # int64 | None: where in target
    weight, grid, row_classes, col_classes,  # of a mixture | None
    sums,  # [tiles, blocks of the grid], zeros | None
    m, n, k, m_size, n_size,
    g_k, g_m, x_k, x_n, t_m, t_n, w_m, w_n,  # strides
    row_blocks, col_blocks,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``target (+)= g^T x`` scattered through tables or scaled by a mixture's grid."""
    i, j = _tile_of(m, n, BM, BN, GROUP)
    m_ok, n_ok = i < m, j < n
    wide_i, wide_j = i.to(tl.int64), j.to(tl.int64)
    acc = tl.zeros((BM, BN), SUM)
    acc = _long_dot(
        acc, g + wide_i * g_m, x + wide_j * x_n, m_ok, n_ok, 0, k, g_k, x_k, BK, PRECISION
    )
    if grid is not None:
        row_class = tl.load(row_classes + i, mask=m_ok, other=row_blocks)
        col_class = tl.load(col_classes + j, mask=n_ok, other=col_blocks)
        w = tl.load(
            weight + wide_i[:, None] * w_m + wide_j[None, :] * w_n,
            mask=m_ok[:, None] & n_ok[None, :],
            other=0.0,
        )
        here = sums + tl.program_id(0).to(tl.int64) * row_blocks * col_blocks
        block_sums(acc * w.to(SUM), row_class, col_class, row_blocks, col_blocks, here)
        acc *= tl.load(
            grid + row_class[:, None] * col_blocks + col_class[None, :],
            mask=(row_class < row_blocks)[:, None] & (col_class < col_blocks)[None, :],
            other=0.0,
        )
    at_i, i_in = _through(i, m_ok, rows, m_size)
    at_j, j_in = _through(j, n_ok, cols, n_size)
    where = target + at_i[:, None] * t_m + at_j[None, :] * t_n
    ok = i_in[:, None] & j_in[None, :]
    if ACCUMULATE:
        acc += tl.load(where, mask=ok, other=0.0).to(SUM)
    tl.store(where, acc.to(target.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class Mixture:
    """The factors of an entangled weight, laid out for one of its two axes to be summed over."""

    grid: Tensor  # [row blocks, column blocks]
    k_classes: Tensor  # block of each element of the axis summed over, ascending
    n_classes: Tensor  # block of each element of the other axis
    k_axis: int  # which axis of the grid k_classes indexes

    def arguments(self) -> tuple[tuple, tuple]:
        """Tensors, then block counts and strides, as the kernel takes them."""
        k, n = self.k_axis, 1 - self.k_axis
        size, stride = self.grid.shape, self.grid.stride()
        tensors = (self.grid, bounds(self.k_classes, size[k]), self.n_classes)
        return tensors, (size[k], size[n], stride[k], stride[n])


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    k_table: Tensor | None = None,
    n_table: Tensor | None = None,
    mixture: Mixture | None = None,
) -> Tensor:
    """``a [..., k] b [k, n] (+ bias [n])`` on a slice or a mixture of b, any strides."""
    lead = a.shape[:-1]
    a = matrix(a)
    m, k = a.shape
    n = b.shape[1] if n_table is None else n_table.shape[0]
    c = a.new_empty(m, n)
    if not c.numel():
        return c.view(*lead, n)
    tile = product_tile(m, n, k, a, k_table is not None)
    if mixture is not None and tile.k > 32:
        # Addresses of unaligned blocks take registers; four warps in fp32 spill on sm_100.
        warps = 2 if a.element_size() == 4 else tile.warps
        tile = replace(tile, k=tile.k // 2, warps=warps)
    sums = sum_dtype(a)
    split = tile.split
    out, inner = (c, bias) if split == 1 else (a.new_empty(split, m, n, dtype=sums), None)
    tensors, numbers = ((None,) * 3, (0,) * 4) if mixture is None else mixture.arguments()
    launch(
        _product_kernel,
        (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), split),
        (a, b, out, inner, k_table, n_table, *tensors, m, n, k, *b.shape, *a.stride(), *b.stride(),
         *numbers, tile.m, tile.n, tile.k, split, tile.group, precision(a), triton_dtype(sums)),
        tile,
    )  # fmt: skip
    if split > 1:
        add_parts(out, bias, c)
    return c.view(*lead, n)


def add_parts(parts: Tensor, bias: Tensor | None, c: Tensor) -> None:
    """``c [m, n] = sum of parts [split, m, n] (+ bias [n])``."""
    block = 1024
    launch(
        _add_parts_kernel,
        (triton.cdiv(c.numel(), block),),
        (parts, bias, c, c.numel(), c.shape[1], parts.shape[0], block),
        Tile(1, block, 1, stages=1),
    )


def outer_(
    target: Tensor,
    grad: Tensor,
    x: Tensor,
    accumulate: bool,
    tables: tuple[Tensor | None, Tensor | None] = (None, None),
    mixture: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor | None:
    """``target (+)= grad^T x`` in place.

    Args:
        target: ``[M, N]``, any strides.
        grad: ``[..., m]``.
        x: ``[..., n]``, of the same tokens.
        accumulate: add to what is there.
        tables: rows and columns of target that the result goes to.
        mixture: ``(weight [m, n], grid, row classes, column classes)``; scales the result.

    Returns:
        ``d grid``, the sums of ``weight * grad^T x`` over its blocks, if there is a mixture.
    """
    grad, x = matrix(grad), matrix(x)
    m, n, k = grad.shape[1], x.shape[1], grad.shape[0]
    tile = outer_tile(m, n, grad, mixture is not None)
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    weight, grid, row_classes, col_classes = mixture or (None,) * 4
    strides = (0, 0) if weight is None else weight.stride()
    blocks = (0, 0) if grid is None else grid.shape
    sums = None if grid is None else grid.new_zeros(tiles, grid.numel())
    grid = None if grid is None else grid.contiguous()
    launch(
        _outer_kernel,
        (tiles,),
        (grad, x, target, *tables, weight, grid, row_classes, col_classes, sums, m, n, k,
         *target.shape, *grad.stride(), *x.stride(), *target.stride(), *strides, *blocks,
         accumulate, tile.m, tile.n, tile.k, tile.group, precision(grad),
         triton_dtype(sum_dtype(grad))),
        tile,
    )  # fmt: skip
    return None if sums is None else sums.sum(0).view(blocks)


def product_tile(m: int, n: int, k: int, like: Tensor, gathered: bool) -> Tile:
    """Tile of ``_product_kernel``: tuned for this GPU if known, else by rule.

    Few rows are bound by reading b: slim tiles, split over k until every multiprocessor has two.
    Gathered along k, each element has an address of its own; half the step keeps them in registers.
    """
    if interpreted():
        return Tile(16, 64, 64, split=2) if m <= FEW_ROWS else Tile(64, 64, 64)
    if m > FEW_ROWS:
        tile = tuned("product", like) or _tile_by_rule(m, n, like)
    else:
        step = max(32, 256 // like.element_size())
        tile = tuned("few_rows", like) or Tile(16, 32, step, stages=4)
        tiles = triton.cdiv(n, tile.n)
        split = min(triton.cdiv(2 * multiprocessors(like), tiles), k // (2 * tile.k))
        tile = replace(tile, split=max(1, split))
    return replace(tile, k=tile.k // 2) if gathered and tile.k > 32 else tile


def outer_tile(m: int, n: int, like: Tensor, mixed: bool) -> Tile:
    """Tile of ``_outer_kernel``, likewise; block sums want registers, so a thread gets less."""
    if interpreted():
        return Tile(64, 64, 64)
    rule = _tile_by_rule(m, n, like)
    if mixed and rule.m == 128:
        rule = replace(rule, n=64)
    if mixed and like.element_size() == 4:  # four warps spill on sm_100
        rule = replace(rule, warps=8)
    return tuned("outer_mixed" if mixed else "outer", like) or rule


def _tile_by_rule(m: int, n: int, like: Tensor) -> Tile:
    """128 x 128, or 64 x 128 where that would leave multiprocessors idle.

    Elements of 4 bytes and more run on the plain cores ("ieee") or at half the rate (tf32) and
    take twice the room: smaller tiles.
    """
    width = like.element_size()
    if width == 8:
        return Tile(32, 32, 16, stages=2)
    if width == 4:
        return Tile(64, 64, 32)
    if triton.cdiv(m, 128) * triton.cdiv(n, 128) < multiprocessors(like):
        return Tile(64, 128, 64, warps=4)
    return Tile(128, 128, 64, warps=8)


def across(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T x`` over all tokens by PyTorch's product, its sums rounded once, to dtype."""
    grad, x = matrix(grad).t(), matrix(x)
    if grad.dtype == dtype:
        return grad @ x
    if grad.is_cuda:
        return torch.mm(grad, x, out_dtype=dtype)
    return grad.to(dtype) @ x.to(dtype)


def matrix(x: Tensor) -> Tensor:
    """View ``[..., n]`` as ``[tokens, n]``; copies only where strides do not allow a view."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
