"""LoRA whose vectors are shards of shared pools: gathered while they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect
from weightshare_kernels._register import define, has_kernel, lean
from weightshare_kernels.ops.route import _tables
from weightshare_kernels.ops.shard_lora import reference
from weightshare_kernels.ops.shard_lora._check import check

_TRITON = "weightshare_kernels.ops.shard_lora.triton"
_POOLS = "Tensor[] a_pools, Tensor[] b_pools, Tensor[] a_index, Tensor[] b_index"
_SCALES = "Tensor? scales, float scale"
_GROUPS = f"Tensor? offsets, Tensor? permutation, {_SCALES}"
DECODE_ROWS = 256  # up to so many rows are served without tables, see decode


def _fake_forward(x, bases, a_pools, b_pools, a_index, *rest):
    ranks = sum(table.shape[1] for table in a_index)
    h = x.new_empty((x.shape[0], ranks), dtype=_checks.accumulate_dtype(x.dtype))
    return [torch.empty_like(b, memory_format=torch.contiguous_format) for b in bases], h


def _fake_grad_x(grads, a_pools, b_pools, a_index, *rest):
    first = grads[0]
    d = a_index[0].shape[2] * a_pools[0].shape[1]
    ranks = sum(table.shape[1] for table in a_index)
    kind = _checks.accumulate_dtype(first.dtype)
    dx = first.new_empty((first.shape[0], d) if rest[-1] else (0,))
    return dx, first.new_empty((first.shape[0], ranks), dtype=kind)


_forward = define(
    f"shard_lora(Tensor x, Tensor[] bases, {_POOLS}, {_GROUPS}) -> (Tensor[], Tensor)",
    reference=reference.forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:forward",
)
_decode = define(
    f"shard_lora_decode(Tensor x, Tensor[] bases, {_POOLS}, Tensor? ids, {_SCALES}) -> Tensor[]",
    reference=reference.decode,
    fake=lambda x, bases, *_: [
        torch.empty_like(b, memory_format=torch.contiguous_format) for b in bases
    ],
)
_grad_x = define(
    f"shard_lora_grad_x(Tensor[] grads, {_POOLS}, {_GROUPS}, bool wants_x) -> (Tensor, Tensor)",
    reference=reference.grad_x,
    fake=_fake_grad_x,
    triton=f"{_TRITON}:grad_x",
)
_outer_ = define(
    f"shard_outer_(Tensor(a!) buffer, Tensor left, Tensor right, Tensor index, {_GROUPS}, "
    "bool add) -> ()",
    reference=reference.outer_,
    fake=lambda *_: None,
    triton=f"{_TRITON}:outer_",
)


@dataclass(frozen=True)
class AdapterGroups:
    """Rows by adapter, from :func:`group_by_adapter`; one serves all layers of a forward pass.

    Attributes:
        ids: adapter of each row, int64 ``[N]``; outside ``0..adapters - 1``: none.
        offsets: ``[adapters + 1]``, first position of each adapter in ``permutation``.
        permutation: ``[N]``, rows sorted by adapter (stable), those of none last.
    """

    ids: Tensor
    offsets: Tensor
    permutation: Tensor


def group_by_adapter(ids: Tensor, adapters: int, rows_each: int = 1) -> AdapterGroups:
    """Sort rows by adapter, without a host synchronisation.

    Args:
        ids: adapter of each row or sequence, integers of any shape; -1 for none.
        adapters: how many adapters the index tables have.
        rows_each: rows that each id stands for (the tokens of a sequence).

    Raises:
        TypeError: ids are not an integer tensor.
    """
    return _sorted(_ids(ids, rows_each), adapters)


def shard_lora(
    x: Tensor,
    base_out: Tensor | None,
    a_pool: Tensor,
    b_pool: Tensor,
    a_index: Tensor,
    b_index: Tensor,
    scale: float | Tensor = 1.0,
    *,
    adapters: AdapterGroups | Tensor | None = None,
) -> Tensor:
    """Mixture-of-Shards LoRA: ``base_out + scale * (x A^T) B``, A and B gathered from pools.

    ``A = a_pool[a_index].reshape(r, d_in)`` and ``B = b_pool[b_index].reshape(r, d_out)`` are
    never made: each shard is read from its pool where it is multiplied, and its gradient is added
    where it lies. All uses of a pool within a backward pass share one gradient buffer.

    Args:
        x: ``[..., d_in]``, N rows.
        base_out: what the frozen layer gave, ``[..., d_out]``; None for zero.
        a_pool: shards ``[Pa, ca]``, in x's dtype, or float32 with a lower x.
        b_pool: shards ``[Pb, cb]``, likewise.
        a_index: numbers of shards, int32 ``[r, la]`` with ``la * ca = d_in``, or
            ``[adapters, r, la]``. A number outside the pool stands for a shard of zeros: adapters
            of smaller rank fill their last rows with -1. Check tables once, when they are made,
            with :func:`shard_index`; kernels read nothing outside the pool.
        b_index: ``[r, lb]`` or ``[adapters, r, lb]`` with ``lb * cb = d_out``.
        scale: a number, or one per adapter, float32 ``[adapters]`` (no gradient).
        adapters: which adapter each row uses, with index tables of several: groups from
            :func:`group_by_adapter` (once per batch, for all layers), or ids of shape
            ``x.shape[:-1]`` or ``x.shape[:1]`` (one per sequence). An id outside the tables leaves
            the row's base_out as it is.

    Returns:
        ``[..., d_out]`` in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes or devices do not fit; the message names the argument and what was
            wanted.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938); batches of several adapters as in
    Punica (Chen et al., 2023, arXiv 2310.18547) and S-LoRA (Sheng et al., 2023, arXiv 2311.03285).
    """
    return shard_lora_group(
        x, [base_out], [a_pool], [b_pool], [a_index], [b_index], scale, adapters=adapters
    )[0]


def shard_lora_group(
    x: Tensor,
    base_outs: Sequence[Tensor | None],
    a_pools: Sequence[Tensor],
    b_pools: Sequence[Tensor],
    a_indices: Sequence[Tensor],
    b_indices: Sequence[Tensor],
    scale: float | Tensor = 1.0,
    *,
    adapters: AdapterGroups | Tensor | None = None,
) -> list[Tensor]:
    """:func:`shard_lora` for several targets with one read of x: q, k and v, or gate and up.

    Args and raises as there, with a list entry per target; ranks and shards may differ.

    Returns:
        A list with an output per target.
    """
    a_indices, b_indices = [list(map(_stacked, tables)) for tables in (a_indices, b_indices)]
    check(x, base_outs, a_pools, b_pools, a_indices, b_indices, scale)
    groups = _groups(adapters, x, a_indices[0].shape[0])
    x = _checks.autocast(x)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    widths = [table.shape[2] * p.shape[1] for table, p in zip(b_indices, b_pools, strict=True)]
    bases = [
        rows.new_zeros(rows.shape[0], width)
        if base is None
        else _checks.autocast(base).reshape(rows.shape[0], width)
        for base, width in zip(base_outs, widths, strict=True)
    ]
    # Gradients are written in a pool's dtype or in fp32: another low one is cast before.
    pools = [p if p.dtype.itemsize >= 4 else _cast(p, x.dtype) for p in (*a_pools, *b_pools)]
    scales, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    tensors = (*bases, *pools, *a_indices, *b_indices)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *bases, *pools))
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        a_pools, b_pools = pools[: len(bases)], pools[len(bases) :]
        tables = (*_tables_of(groups, a_indices[0].shape[0]), scales, factor)
        ys, _ = reference.define(rows, bases, a_pools, b_pools, a_indices, b_indices, *tables)
    elif not tracked and torch.autograd.forward_ad._current_level < 0:
        ys = infer(rows, tensors, groups, scales, factor, len(bases))
    else:
        tables = (*_tables_of(groups, a_indices[0].shape[0]), scales)
        arguments = (rows, factor, len(bases), *tensors, *tables)
        if _collect.plain():
            ys = _lean(*arguments, *_collectors(pools))[: len(bases)]
        else:
            ys = _ShardLoRA.apply(*arguments, *[None for _ in pools])[: len(bases)]
    return list(ys) if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def shard_index(index: Tensor, shards: int, name: str = "index") -> Tensor:
    """A checked index table: int32, contiguous, every number within a pool or -1.

    Args:
        index: integers ``[..., r, l]``.
        shards: rows of the pool.
        name: what messages call it.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: a number is beyond the pool.
    """
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected a tensor of integers, got {kind}")
    if index.numel():
        low, high = map(int, torch.aminmax(index))
        if low < -1 or high >= shards:
            bad = low if low < -1 else high
            raise ValueError(
                f"{name}: shard {bad} is outside the pool of {shards} (0..{shards - 1}, or -1 for "
                "none); was the table made for another pool?"
            )
    return index.to(torch.int32).contiguous()


def _stacked(table):
    """An index table ``[adapters, r, l]``; one of one adapter gets its first dimension."""
    return table[None] if isinstance(table, Tensor) and table.dim() == 2 else table


def _groups(adapters, x: Tensor, count: int) -> AdapterGroups | Tensor | None:
    """Groups of x's rows by adapter, or their ids; None where there is but one adapter for all."""
    if adapters is None:
        if count != 1:
            raise ValueError(
                f"adapters: the index tables have {count} adapters; say which each row uses"
            )
        return None
    rows = x.shape[:-1].numel()
    if isinstance(adapters, Tensor):
        shape = adapters.shape
        if shape not in (x.shape[:-1], x.shape[:-1][:1]):
            raise ValueError(
                f"adapters: expected ids of shape {tuple(x.shape[:-1])} or "
                f"{tuple(x.shape[:-1][:1])}, got {tuple(shape)}"
            )
        _checks.same_device("adapters", adapters, "x", x)
        each = 1 if shape == x.shape[:-1] else x.shape[1:-1].numel()
        return _ids(adapters, each)
    if not isinstance(adapters, AdapterGroups):
        raise TypeError(
            f"adapters: expected AdapterGroups or a tensor of ids, got {type(adapters).__name__}"
        )
    if adapters.ids.shape != (rows,) or adapters.offsets.shape != (count + 1,):
        raise ValueError(
            f"adapters: groups of {adapters.ids.shape[0]} rows over "
            f"{adapters.offsets.shape[0] - 1} adapters, but x has {rows} rows and the index tables "
            f"{count} adapters"
        )
    _checks.same_device("adapters", adapters.ids, "x", x)
    return adapters


def _ids(ids: Tensor, rows_each: int) -> Tensor:
    """The adapter of each row, int64 ``[N]``."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: expected a tensor of integers, got {kind}")
    ids = ids.reshape(-1).long()
    return ids if rows_each == 1 else ids[:, None].expand(-1, rows_each).reshape(-1)


def _sorted(ids: Tensor, adapters: int) -> AdapterGroups:
    _, offsets, permutation, _ = _tables(ids[:, None], None, adapters)
    return AdapterGroups(ids, offsets, permutation)


def _tables_of(groups: AdapterGroups | Tensor | None, adapters: int):
    """Offsets and permutation; rows that came by their ids are sorted only here."""
    if groups is None:
        return None, None
    groups = _sorted(groups, adapters) if isinstance(groups, Tensor) else groups
    return groups.offsets, groups.permutation


def _cast(pool: Tensor, dtype: torch.dtype) -> Tensor:
    return pool if pool.dtype == dtype else pool.to(dtype)


def _lists(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Bases, A pools, B pools, A tables and B tables, as the ops take them."""
    return [list(tensors[i : i + count]) for i in range(0, 5 * count, count)]


def infer(x, tensors, groups, scales, scale, count) -> list[Tensor]:
    """Outputs alone: few rows by a kernel that needs no tables, where there is one."""
    bases, *pools = _lists(tensors, count)
    few = x.shape[0] <= DECODE_ROWS and not x.is_meta
    if few and has_kernel("shard_lora_decode", x.device.type.upper()):
        ids = groups.ids if isinstance(groups, AdapterGroups) else groups
        return _decode(x, bases, *pools, ids, scales, scale)
    tables = _tables_of(groups, pools[2][0].shape[0])
    return _forward(x, bases, *pools, *tables, scales, scale)[0]


def _collectors(pools: Sequence[Tensor]) -> list[_collect.Collector | None]:
    """The collector of each pool; none for one with two parts in a call: its use counts once."""
    names = [id(pool) for pool in pools]
    return [
        _collect.collect(pool) if names.count(name) == 1 else None
        for pool, name in zip(pools, names, strict=True)
    ]


class _ShardLoRA(Function):
    """Autograd of :func:`shard_lora_group`; saves x, h and nothing that was gathered."""

    generate_vmap_rule = True

    # ``rest`` is, per target, bases, A pools, B pools, A tables and B tables; then offsets,
    # permutation and scales; then the collectors of the pools.
    @staticmethod
    def forward(x, scale, count, *rest):
        ys, h = _forward(x, *_lists(rest, count), *rest[5 * count : 5 * count + 3], scale)
        return *ys, h

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, count, *rest = inputs
        h = output[-1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, *rest[count : 5 * count + 3])
        ctx.scale, ctx.count = scale, count
        # For their shapes and their .grad; the values come from what is saved.
        ctx.pools = rest[count : 3 * count]
        ctx.collectors = rest[5 * count + 3 :]
        for collector in ctx.collectors:
            if collector is not None:
                collector.join(ctx)

    @staticmethod
    def backward(ctx, *given):
        count = ctx.count
        x, h, *saved = ctx.saved_tensors
        lists = [saved[i : i + count] for i in range(0, 4 * count, count)]
        groups = (*saved[4 * count :], ctx.scale)
        grads = list(given[:count])
        if torch.is_grad_enabled():  # create_graph=True
            dx, dpools = _differentiable_gradients(ctx, grads, x, lists, groups)
        else:
            dx, dpools = _gradients(ctx, grads, x, h, lists, groups)
        rest = (None,) * (2 * count + 3 + len(ctx.collectors))
        return dx, None, None, *grads, *dpools, *rest


_lean = lean(_ShardLoRA)


def _gradients(ctx, grads, x, h, lists, groups):
    """Gradients of x and of the pools; an output that was not used adds nothing."""
    count, needs = ctx.count, ctx.needs_input_grad
    wants_pool = needs[3 + count : 3 + 3 * count]
    live = [n for n in range(count) if grads[n] is not None]
    ranks = [table.shape[1] for table in lists[2]]
    dx, hs, dhs = None, h.split(ranks, 1), [None] * count
    if live and (needs[0] or any(wants_pool[:count])):
        some = [[values[n] for n in live] for values in (grads, *lists)]
        dx, dh = _grad_x(*some, *groups, needs[0])
        for n, part in zip(live, dh.split([ranks[n] for n in live], 1), strict=True):
            dhs[n] = part
    plain = (*groups[:2], None, 1.0)  # dh is scaled, h is not
    dpools = []
    for number, wanted in enumerate(wants_pool):
        n, of_a = number % count, number < count
        left, right, scaling = (dhs[n], x, plain) if of_a else (hs[n], grads[n], groups)
        part = (left, right, lists[2 if of_a else 3][n], *scaling) if n in live else None
        dpools.append(_pool_gradient(ctx, number, part) if wanted else None)
    return dx if needs[0] else None, dpools


def _pool_gradient(ctx, number: int, part: tuple | None) -> Tensor | None:
    """Gradient of one pool, in its collector's buffer where there is one; nothing to add: None."""
    pool, collector = ctx.pools[number], ctx.collectors[number]
    if collector is None:
        if part is None:
            return None
        buffer = torch.empty_like(pool, memory_format=torch.contiguous_format)
        _outer_(buffer, *part, False)
        return buffer
    accumulator = ctx.next_functions[1 + ctx.count + number][0]
    if not _collect.wanted(accumulator):
        return None
    buffer, add = collector.open(pool, accumulator)
    if part is not None:
        _outer_(buffer, *part, add)
    elif not add:
        buffer.zero_()
    del buffer  # autograd takes a gradient over as it is only from its sole owner
    return collector.close(pool.dtype)


def _differentiable_gradients(ctx, grads, x, lists, groups):
    """Gradients in terms of differentiable PyTorch, for double backward."""
    count = ctx.count
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3 + count : 3 + 3 * count]]
    live = [n for n in range(count) if grads[n] is not None]
    if not any(needs) or not live:
        return None, [None] * (2 * count)
    with torch.enable_grad():
        tensors = x, *pools = _collect.alone([x, *lists[0], *lists[1]], needs)
        wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
        zeros = [torch.zeros_like(grads[n]) for n in live]
        lists = pools[:count], pools[count:], *lists[2:]
        some = [[values[n] for n in live] for values in lists]
        a_pools, b_pools, a_index, b_index = some
        ys, _ = reference.define(x, zeros, a_pools, b_pools, a_index, b_index, *groups)
        given = [grads[n] for n in live]
        found = torch.autograd.grad(ys, wanted, given, create_graph=True, allow_unused=True)
    left = iter(found)
    dx, *dpools = [next(left) if needed else None for needed in needs]
    return dx, dpools
