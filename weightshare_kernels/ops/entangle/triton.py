"""Entangled weights on Triton: one memory-bound pass forward, one backward.

A program owns a strip of columns (axes 1 and up, folded) over some rows. Rows of one block share
their factors, which are looked up once per block and strip, not per element; gradients of the
grid are summed down the strip first and over the strip's few blocks at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightshare_kernels import _triton


@triton.jit(do_not_specialize=["height", "row_blocks", "col_blocks", "depth_blocks", "span"])
def _entangle_kernel(
    values,  # [height, width * depth]: what is scaled: weight forward, its gradient backward
    weight,  # the same | None: the other factor of d grid
    out,  # the same
    sums,  # [programs, row_blocks * col_blocks * depth_blocks], zeros | None
    grid, bounds, cols, inner,  # factors, first row of each block, block of each column and depth
    height, columns, depth, row_blocks, col_blocks, depth_blocks,
    span, BR: tl.constexpr, BC: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``out = values * grid[rows, cols, inner]``; with weight, block sums of values * weight."""
    j = tl.program_id(0) * BC + tl.arange(0, BC)
    top = tl.program_id(1) * span
    end = tl.minimum(top + span, height)
    j_ok = j < columns
    col_class = tl.load(cols + j // depth, mask=j_ok, other=col_blocks)
    deep_class = tl.load(inner + j % depth, mask=j_ok, other=depth_blocks)
    j_in = (col_class < col_blocks) & (deep_class < depth_blocks)
    cell = tl.where(j_in, col_class * depth_blocks + deep_class, -1)
    cells = col_blocks * depth_blocks
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for block in range(0, row_blocks + 1):  # the last holds the rows beyond every choice
        first = tl.maximum(tl.load(bounds + block), top)
        last = end
        if block < row_blocks:
            last = tl.minimum(tl.load(bounds + block + 1), end)
        if first < last:
            key = block * cells + cell
            factor = tl.load(grid + key, mask=j_in & (key < row_blocks * cells), other=0.0)
            total = tl.zeros((BR, BC), SUM)
            for start in range(first, last, BR):
                r = start + tl.arange(0, BR)
                at = r.to(tl.int64)[:, None] * columns + j[None, :]
                ok = (r < last)[:, None] & j_ok[None, :]
                value = tl.load(values + at, mask=ok, other=0.0).to(SUM)
                tl.store(out + at, (value * factor[None, :]).to(out.dtype.element_ty), mask=ok)
                if weight is not None:
                    total += value * tl.load(weight + at, mask=ok, other=0.0).to(SUM)
            if weight is not None and block < row_blocks:
                column = tl.sum(total, 0)
                here = sums + (program * row_blocks + block) * cells
                low = tl.min(tl.where(j_in, cell, cells), 0)
                for c in range(low, tl.max(cell, 0) + 1):
                    tl.store(here + c, tl.sum(tl.where(cell == c, column, 0.0), 0))


def forward(weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor, inner: Tensor) -> Tensor:
    """``weight[r,c,s] * grid[rows[r], cols[c], inner[s]]``, zero outside the grid."""
    return _run(weight, None, grid, rows, cols, inner)[0]


def backward(
    grad: Tensor, weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor, inner: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight ``[R,C,S]`` and of grid ``[Gr,Gc,Gs]``."""
    return _run(grad, weight, grid, rows, cols, inner)


def _run(values, weight, grid, rows, cols, inner) -> tuple[Tensor, Tensor | None]:
    shape, blocks = values.shape, grid.shape
    if shape[1] == 1:  # vectors, depthwise: the same as one long row
        rows, cols, grid = cols, rows, grid.transpose(0, 1)
    values, grid = values.contiguous(), grid.contiguous()
    weight = None if weight is None else weight.contiguous()
    out = torch.empty_like(values)
    height, columns = rows.shape[0], cols.shape[0] * shape[2]
    tile = _tile(height, columns)
    strips = triton.cdiv(columns, tile.n)
    # A program's rows share its look-ups, as long as every multiprocessor keeps eight programs.
    wanted = triton.cdiv(8 * _triton.multiprocessors(values), max(strips, 1))
    span = tile.m * min(max(height // (tile.m * wanted), 1), 16)
    programs = (strips, triton.cdiv(height, span))
    sums = None if weight is None else grid.new_zeros(programs[0] * programs[1], grid.numel())
    _triton.launch(
        _entangle_kernel,
        programs,
        (values, weight, out, sums, grid, _triton.bounds(rows, grid.shape[0]), cols, inner,
         height, columns, shape[2], *grid.shape, span, tile.m, tile.n,
         _triton.triton_dtype(grid.dtype)),
        tile,
    )  # fmt: skip
    if sums is None:
        return out, None
    dgrid = sums.sum(0).view(grid.shape)
    return out, (dgrid.transpose(0, 1) if shape[1] == 1 else dgrid).reshape(blocks)


def _tile(height: int, columns: int) -> _triton.Tile:
    """Strips of up to 1024 columns, 2048 elements a step; narrow weights take more rows."""
    if _triton.interpreted():
        return _triton.Tile(8, 256, 1)
    strip = min(max(triton.next_power_of_2(columns), 16), 1024)
    rows = min(2048 // strip, triton.next_power_of_2(max(height, 1)))
    return _triton.Tile(rows, strip, 1, warps=4, stages=1)


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: a 256 x 256 x 7 x 7 convolution, 3 widths x 3 kernel sizes."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    weight, grid = empty(256, 256, 49), empty(3, 3, 9, kind=torch.float32)
    classes, inner = empty(256, kind=torch.int32), empty(49, kind=torch.int32)
    rest = (weight, grid, classes, classes, inner)
    size, count = weight.numel() * dtype.itemsize, weight.numel()
    name = "entangle {}, 256 x 256 x 7 x 7, 9 choices"
    return [
        _triton.Example(name.format("forward"), lambda: forward(*rest), count, 2 * size, "memory"),
        _triton.Example(
            name.format("backward"), lambda: backward(weight, *rest), 3 * count, 3 * size, "memory"
        ),
    ]
