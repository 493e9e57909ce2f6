"""shard_lora on Triton: two products a call, whatever the number of targets and adapters.

Forward shrinks x to h and expands h onto the bases; backward does the same with B and A in each
other's place, and adds a pool's gradient straight to the shards that a table names. No matrix is
gathered in memory, no host waits for the adapters' counts, and every sum has its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from weightshare_kernels import _triton
from weightshare_kernels._products import add_parts
from weightshare_kernels._triton import Tile
from weightshare_kernels.ops.shard_lora.triton_outer import _outer_kernel, repeats
from weightshare_kernels.ops.shard_lora.triton_products import (
    _expand_kernel,
    _shrink_kernel,
)

FEW = 16  # rows per adapter up to which reading the shards is all the work


@dataclass(frozen=True)
class _Groups:
    """Rows by adapter as kernels take them."""

    offsets: Tensor | None
    permutation: Tensor | None
    scales: Tensor | None
    scale: float
    rows: int
    adapters: int

    @property
    def mean(self) -> float:
        """Rows of an adapter, on average."""
        return self.rows if self.offsets is None else self.rows / max(1, self.adapters)

    def slots(self, height: int) -> int:
        """Most tiles of rows there can be; rows without an adapter make tiles of their own."""
        if self.offsets is None:
            return triton.cdiv(self.rows, height)
        return self.rows // height + min(self.adapters + 1, self.rows)

    @property
    def lists(self) -> tuple:
        """Offsets, permutation, scales, rows and adapters."""
        return self.offsets, self.permutation, self.scales, self.rows, self.adapters

    @property
    def bins(self) -> int:
        """Length of a vector that has an element per adapter and one for rows of none."""
        return triton.next_power_of_2(self.adapters + 1)


def _groups(offsets, permutation, scales, scale, rows: int, adapters: int) -> _Groups:
    tensors = [t if t is None else t.contiguous() for t in (offsets, permutation, scales)]
    return _Groups(*tensors, float(scale), rows, adapters)


@dataclass(frozen=True)
class _Side:
    """The pools and tables of all targets, A's or B's."""

    pools: list[Tensor]  # [shards, width]
    tables: list[Tensor]  # int32 [adapters, rank, length], the last two dimensions contiguous

    @property
    def ranks(self) -> list[int]:
        """Rank of each target."""
        return [table.shape[1] for table in self.tables]

    @property
    def sizes(self) -> list[int]:
        """Columns of each target's matrix."""
        return [t.shape[2] * p.shape[1] for p, t in zip(self.pools, self.tables, strict=True)]

    @property
    def columns(self) -> list[int]:
        """First column of each target in h, and the width of h."""
        firsts = [0]
        for rank in self.ranks:
            firsts.append(firsts[-1] + rank)
        return firsts

    def step(self, most: int) -> tuple[int, bool]:
        """Columns of a step, and whether each step lies within one shard."""
        least = 16 if _triton.interpreted() else 32
        step = most
        while step > least and any(pool.shape[1] % step for pool in self.pools):
            step //= 2
        whole = not any(pool.shape[1] % step for pool in self.pools)
        return (step, True) if whole else (min(most, 64), False)

    def alike(self) -> list[list[int]]:
        """Targets that one launch serves: those whose pools have the same dtype."""
        dtypes = list(dict.fromkeys(pool.dtype for pool in self.pools))
        return [[n for n, p in enumerate(self.pools) if p.dtype == dtype] for dtype in dtypes]

    def arguments(self, which: Sequence[int]) -> tuple:
        """Pools, tables, sizes and strides of some targets, as kernels take them."""
        pools, tables = [self.pools[n] for n in which], [self.tables[n] for n in which]
        return (
            tuple(pools), tuple(tables),
            tuple(t.shape[1] for t in tables), tuple(t.shape[2] for t in tables),
            tuple(p.shape[1] for p in pools), tuple(p.shape[0] for p in pools),
            tuple(p.stride(0) for p in pools), tuple(p.stride(1) for p in pools),
            tuple(t.stride(0) for t in tables),
        )  # fmt: skip


def _side(pools: Sequence[Tensor], tables: Sequence[Tensor]) -> _Side:
    return _Side(list(pools), [_rows_whole(table) for table in tables])


def _rows_whole(table: Tensor) -> Tensor:
    """A table whose matrices are contiguous."""
    return table if table[:1].is_contiguous() else table.contiguous()


def _height(g: _Groups, like: Tensor) -> int:
    """Rows of a tile: what an adapter has on average, at least a tensor core's 16."""
    if _triton.interpreted():
        return 16 if g.mean <= FEW else 32
    most = {8: 16, 4: 64}.get(like.element_size(), 128)
    if g.mean <= FEW:
        return 16
    return min(most, 64 if g.mean <= 4 * FEW else 128)


def _stages(depth: int, size: int) -> int:
    """Stages that keep ``depth`` steps under way: a step's numbers come before its shards."""
    return 2 * depth + 1 if size < 8 else 3


def _block(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


def _shrink_tile(g: _Groups, side: _Side, like: Tensor) -> tuple[Tile, bool]:
    """Tile of *shrink*, split until every multiprocessor has two programs; whole shards."""
    height, size = _height(g, like), like.element_size()
    n = _block(max(side.ranks), {8: 16, 4: 64}.get(size, 128))
    k, whole = side.step(32 if size > 2 else 128 if height == 16 else 64)
    if _triton.interpreted():
        return Tile(height, n, k, split=2, stages=1), whole
    tiles = g.slots(height) * sum(triton.cdiv(rank, n) for rank in side.ranks)
    split = triton.cdiv(2 * _triton.multiprocessors(like), max(1, tiles))
    split = max(1, min(split, 16 if height == 16 else 4, max(side.sizes) // (2 * k)))
    warps = 8 if height * n * size > 128 * 64 * 2 or (size == 4 and height > 16) else 4
    return Tile(height, n, k, warps=warps, stages=_stages(3, size), split=split), whole


def _expand_tile(g: _Groups, side: _Side, like: Tensor, summed: int) -> tuple[Tile, bool, int]:
    """Tile of *expand* with a sum over some targets; whole shards; tiles of a program.

    A step takes the whole rank where shared memory holds h of all targets.
    """
    height, size = _height(g, like), like.element_size()
    if _triton.interpreted():
        n, whole = side.step(128)
        return Tile(height, n, _block(max(side.ranks), 32), stages=1), whole, 2
    rank = max(side.ranks)
    few, several = height == 16, summed > 1
    k = _block(rank, 32 if size > 2 else 128 if rank <= 128 else 64)
    if size == 4 and not few:  # longer steps spill
        k = 16
    if not several:  # the base takes registers
        height = min(height, 64)
    if size == 2 and summed * height * k > 32 * 1024:
        k, height = min(k, 64), min(height, 64)
    n, whole = side.step({8: 16, 4: 64}.get(size, 64 if several or k > 64 else 128))
    warps = 8 if height == 128 or (not few and (size == 4 or rank > k)) else 4
    stages = _stages(1 if several or size > 2 else 2, size)
    each = 1 if few else 8 if several else 4
    return Tile(height, n, k, warps=warps, stages=stages), whole, each


def _shrink(xs: Sequence[Tensor], side: _Side, g: _Groups) -> Tensor:
    """``factor * x G^T`` of all targets, as partial sums ``[split, rows, sum of ranks]``."""
    like, columns = xs[0], side.columns
    tile, whole = _shrink_tile(g, side, like)
    h = like.new_empty(tile.split, g.rows, columns[-1], dtype=_triton.sum_dtype(like))
    for which in side.alike():
        tiles = sum(triton.cdiv(side.ranks[n], tile.n) for n in which)
        _triton.launch(
            _shrink_kernel,
            (g.slots(tile.m) * tiles, tile.split),
            (tuple(xs[n] for n in which), h, *side.arguments(which),
             tuple(xs[n].stride(0) for n in which), tuple(xs[n].stride(1) for n in which),
             tuple(columns[n] for n in which), *g.lists, columns[-1], len(which), g.scale,
             tile.split, whole, tile.m, tile.n, tile.k, g.bins, _triton.precision(like),
             _triton.triton_dtype(h.dtype)),
            tile,
        )  # fmt: skip
    return h


def _summed(parts: Tensor, height: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parts for *expand* to read, h, and h again where *expand* is to write it.

    With few rows a launch would take longer than to read the parts once more per tile.
    """
    if parts.shape[0] == 1:
        return parts, parts[0], None
    h = parts.new_empty(parts.shape[1:])
    if height == 16:
        return parts, h, h
    add_parts(parts, None, h)
    return h[None], h, None


def _expand(
    parts: Tensor, bases: Sequence[Tensor], side: _Side, g: _Groups
) -> tuple[list[Tensor], Tensor]:
    """``base + factor * h G`` of each target, and h."""
    tile, whole, each = _expand_tile(g, side, bases[0], 1)
    parts, h, h_sum = _summed(parts, tile.m)
    ys = [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]
    for which in side.alike():
        outputs = [bases[n] for n in which], [ys[n] for n in which]
        _launch_expand(parts, h_sum, *outputs, side, which, g, tile, whole, each)
    return ys, h


def _expand_sum(parts: Tensor, like: Tensor, side: _Side, g: _Groups) -> tuple[Tensor, Tensor]:
    """``sum over targets of h G`` in like's dtype, and h."""
    tile, whole, each = _expand_tile(g, side, like, len(side.pools))
    parts, h, h_sum = _summed(parts, tile.m)
    y, base = like.new_empty(g.rows, side.sizes[0]), None
    for which in side.alike():
        _launch_expand(parts, h_sum, [base], [y], side, which, g, tile, whole, each)
        base = y
    return y, h


def _launch_expand(
    parts: Tensor, h_sum: Tensor | None, bases: Sequence[Tensor | None], ys: Sequence[Tensor],
    side: _Side, which: Sequence[int], g: _Groups, tile: Tile, whole: bool, each: int,
) -> None:  # fmt: skip
    """Launch *expand* for some targets, with an output each or one that sums over them."""
    like, columns = ys[0], side.columns
    one = len(ys) < len(which) or bases[0] is None
    strides = [(0, 0) if base is None else base.stride() for base in bases]
    tiles = sum(triton.cdiv(y.shape[1], each * tile.n) for y in ys)
    _triton.launch(
        _expand_kernel,
        (g.slots(tile.m) * tiles,),
        (parts, h_sum, tuple(bases), tuple(ys), *side.arguments(which),
         *zip(*strides, strict=True), tuple(columns[n] for n in which), *g.lists, columns[-1],
         len(which), one, g.scale, parts.shape[0], whole, max(side.ranks) > tile.k, each,
         tile.m, tile.n, tile.k, g.bins, tile.stages, _triton.precision(like),
         _triton.triton_dtype(parts.dtype)),
        tile,
    )  # fmt: skip


# -- The op ----------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    bases: Sequence[Tensor],
    a_pools: Sequence[Tensor],
    b_pools: Sequence[Tensor],
    a_index: Sequence[Tensor],
    b_index: Sequence[Tensor],
    offsets: Tensor | None,
    permutation: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> tuple[list[Tensor], Tensor]:
    """Outputs ``[N, d_out]``, one per target, and ``h [N, sum of ranks]``."""
    tables = offsets, permutation, scales, scale
    g = _groups(*tables, x.shape[0], a_index[0].shape[0])
    parts = _shrink([x] * len(bases), _side(a_pools, a_index), replace(g, scales=None, scale=1.0))
    return _expand(parts, bases, _side(b_pools, b_index), g)


def grad_x(
    grads: Sequence[Tensor],
    a_pools: Sequence[Tensor],
    b_pools: Sequence[Tensor],
    a_index: Sequence[Tensor],
    b_index: Sequence[Tensor],
    offsets: Tensor | None,
    permutation: Tensor | None,
    scales: Tensor | None,
    scale: float,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    """``dx [N, d_in]`` (empty if not wanted) and ``dh [N, sum of ranks]``."""
    like = grads[0]
    g = _groups(offsets, permutation, scales, scale, like.shape[0], a_index[0].shape[0])
    parts = _shrink(grads, _side(b_pools, b_index), g)
    if wants_x:
        plain = replace(g, scales=None, scale=1.0)  # dh is scaled
        return _expand_sum(parts, like, _side(a_pools, a_index), plain)
    return like.new_empty(0), _summed(parts, 0)[1]


def outer_(
    buffer: Tensor,
    left: Tensor,
    right: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    permutation: Tensor | None,
    scales: Tensor | None,
    scale: float,
    add: bool,
) -> None:
    """Adds ``factor * left^T right`` of every adapter to the shards of the buffer that it names."""
    if not add:
        buffer.zero_()
    twice = repeats(index, buffer.shape[0])
    index = _rows_whole(index)
    adapters, rank, length = index.shape
    if not (buffer.numel() and right.numel() and index.numel()):
        return
    g = _groups(offsets, permutation, scales, scale, right.shape[0], adapters)
    width = buffer.shape[1]
    tile = _outer_tile(g, rank, width, length, right)
    parts = None
    if tile.split > 1:
        shape = tile.split, adapters, rank, length * width
        parts = right.new_empty(shape, dtype=_triton.sum_dtype(right))

    def launch(where: str, splits: int, tile: Tile = tile) -> None:
        programs = adapters * triton.cdiv(rank, tile.m) * length * triton.cdiv(width, tile.n)
        _triton.launch(
            _outer_kernel,
            (programs, splits),
            (left, right, buffer, parts, index, *g.lists, rank, length, width, buffer.shape[0],
             *left.stride(), *right.stride(), *buffer.stride(), index.stride(0), g.scale, add,
             tile.split, twice, where, tile.m, tile.n, tile.k, 64, _triton.precision(right),
             _triton.triton_dtype(_triton.sum_dtype(right))),
            tile,
        )  # fmt: skip

    if parts is None:
        launch("through", 1)
    else:
        launch("to", tile.split)
        launch("from", 1, replace(tile, m=16))


def _outer_tile(g: _Groups, rank: int, width: int, length: int, like: Tensor) -> Tile:
    """Tile of a pool's gradient; the rows are split where one adapter leaves processors idle."""
    size = like.element_size()
    if _triton.interpreted():
        split = 2 if g.adapters == 1 and g.rows > 64 else 1
        return Tile(_block(rank, 64), _block(width, 64), 64, split=split, stages=1)
    m, n = _block(rank, 64), _block(width, 128)
    if size == 8:
        return Tile(min(m, 16), 16, 16, stages=2)
    if size == 4:
        return Tile(m, min(n, 64), 32, warps=8)
    k = 64 if g.mean > 4 * FEW else 16 if g.mean <= FEW else 32
    if g.adapters == 1:
        programs = triton.cdiv(rank, m) * length * triton.cdiv(width, n)
        wanted = triton.cdiv(2 * _triton.multiprocessors(like), programs)
        split = min(wanted, 8, g.rows // (4 * k))
        if split > 1:
            return Tile(m, n, k, stages=4 if g.offsets is None else 7, split=split)
    return Tile(m, min(n, 64), k, stages=_stages(3, size))


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: rank 64, 8 shards to a vector, on q, k and v of Llama-3.1-8B."""
    return [
        *_shape_examples(dtype, 4096, 1),
        *_shape_examples(dtype, 4096, 32),
        *_shape_examples(dtype, 64, 32, ("shrink", "expand")),
    ]


def _shape_examples(
    dtype: torch.dtype, rows: int, adapters: int, only: tuple[str, ...] | None = None
) -> list[_triton.Example]:
    d, outs, r, shards, e = 4096, (4096, 1024, 1024), 64, 8, dtype.itemsize
    used = min(adapters, rows)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    tables = [empty(adapters, r, shards, kind=torch.int32) for _ in outs]
    a_pools = [empty(8192, d // shards) for _ in outs]
    b_pools = [empty(8192, out // shards) for out in outs]
    lists = empty(adapters + 1, kind=torch.int64), empty(rows, kind=torch.int64)
    groups = lists if adapters > 1 else (None, None)
    g = _groups(*groups, None, 0.25, rows, adapters)
    a, b = _side(a_pools, tables), _side(b_pools, tables)
    x, ys = empty(rows, d), [empty(rows, out) for out in outs]
    h = empty(1, rows, len(outs) * r, kind=_triton.sum_dtype(x))
    buffer = empty(8192, d // shards, kind=torch.float32)
    all_out, at_h = sum(outs), 4 * h.numel()
    at_x, at_y = e * rows * d, e * rows * all_out
    at_a, at_b = e * used * len(outs) * r * d, e * used * r * all_out
    down, up = 2 * rows * len(outs) * r * d, 2 * rows * r * all_out
    dense = "matrix" if rows > FEW * adapters else "memory"
    left = h[0, :, :r]
    listed = {
        "shrink": (lambda: _shrink([x] * len(outs), a, g), down, at_x + at_a + at_h, dense),
        "expand": (lambda: _expand(h, ys, b, g), up, 2 * at_y + at_b + at_h, "memory"),
        "grad h": (lambda: _shrink(ys, b, g), up, at_y + at_b + at_h, dense),
        "grad x": (lambda: _expand_sum(h, x, a, g), down, at_x + at_a + at_h, "memory"),
        "grad a_pool": (
            lambda: outer_(buffer, left, x, tables[0], *groups, None, 0.25, True),
            2 * rows * r * d, at_x + 4 * rows * r + 8 * used * r * d, dense,
        ),
    }  # fmt: skip
    name = f"{rows} tokens, {adapters} adapter{'s' if adapters > 1 else ''} of rank {r}, q k v"
    return [
        _triton.Example(f"shard_lora {kind}, {name}", call, flops, moved, bound)
        for kind, (call, flops, moved, bound) in listed.items()
        if only is None or kind in only
    ]
