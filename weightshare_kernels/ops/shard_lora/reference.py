"""LoRA gathered from shared pools in plain PyTorch: the definition of the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightshare_kernels import _checks


def matrix(pool: Tensor, index: Tensor) -> Tensor:
    """``[..., r, l * c]`` of a pool ``[P, c]`` and an index ``[..., r, l]``; differentiable.

    A shard whose number is outside the pool is zero.
    """
    inside = (index >= 0) & (index < pool.shape[0])
    if not pool.shape[0]:
        return pool.new_zeros(*index.shape[:-1], index.shape[-1] * pool.shape[1])
    shards = pool[index.clamp(0, pool.shape[0] - 1).long()]
    return torch.where(inside[..., None], shards, torch.zeros_like(shards)).flatten(-2)


def segments(index: Tensor, x: Tensor, offsets: Tensor | None, permutation: Tensor | None):
    """Pairs of an adapter's number and its rows of x; one adapter has all rows."""
    if offsets is None or permutation is None:
        return [(0, slice(None))] if index.shape[0] else []
    bounds = offsets.tolist()
    return [(n, permutation[bounds[n] : bounds[n + 1]]) for n in range(index.shape[0])]


def define(
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
    """``base + scale * (x A^T) B`` per target, differentiable, and ``h = x A^T`` of them all."""
    kind, ys, hs = _checks.accumulate_dtype(x.dtype), [], []
    targets = zip(bases, a_pools, b_pools, a_index, b_index, strict=True)
    for base, a_pool, b_pool, a_table, b_table in targets:
        y = base.to(kind)
        h = x.new_zeros(x.shape[0], a_table.shape[1], dtype=kind)
        for number, rows in segments(a_table, x, offsets, permutation):
            a, b = matrix(a_pool, a_table[number]), matrix(b_pool, b_table[number])
            part = x[rows] @ a.to(x.dtype).t()
            factor = scale if scales is None else scale * scales[number].to(kind)
            out = factor * (part @ b.to(x.dtype)).to(kind)
            if isinstance(rows, slice):
                y, h = y + out, part.to(kind)
            else:
                y, h = y.index_add(0, rows, out), h.index_copy(0, rows, part.to(kind))
        ys.append(y.to(x.dtype))
        hs.append(h)
    return ys, torch.cat(hs, 1)


forward = define


def decode(
    x: Tensor,
    bases: Sequence[Tensor],
    a_pools: Sequence[Tensor],
    b_pools: Sequence[Tensor],
    a_index: Sequence[Tensor],
    b_index: Sequence[Tensor],
    ids: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """The outputs of :func:`forward`, by the adapter of each row (``[N]``) instead of tables."""
    offsets = permutation = None
    if ids is not None:
        adapters = a_index[0].shape[0]
        keys = torch.where((ids >= 0) & (ids < adapters), ids, adapters)
        permutation = keys.argsort(stable=True)
        counts = torch.bincount(keys, minlength=adapters + 1)[:adapters]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    pools = a_pools, b_pools, a_index, b_index
    return define(x, bases, *pools, offsets, permutation, scales, scale)[0]


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
    """``dx = sum over targets of dh A`` (empty if not wanted) and ``dh = scale * dy B^T``."""
    first = grads[0]
    kind, dhs = _checks.accumulate_dtype(first.dtype), []
    d = a_index[0].shape[2] * a_pools[0].shape[1]
    dx = first.new_zeros(first.shape[0], d, dtype=kind) if wants_x else first.new_empty(0)
    for grad, a_pool, b_pool, a_table, b_table in zip(
        grads, a_pools, b_pools, a_index, b_index, strict=True
    ):
        dh = grad.new_zeros(grad.shape[0], a_table.shape[1], dtype=kind)
        for number, rows in segments(a_table, grad, offsets, permutation):
            b = matrix(b_pool, b_table[number]).to(grad.dtype)
            factor = scale if scales is None else scale * scales[number].to(kind)
            part = (factor * (grad[rows] @ b.t()).to(kind)).to(grad.dtype)
            dh[rows] = part.to(kind)
            if wants_x:
                dx[rows] += (part @ matrix(a_pool, a_table[number]).to(grad.dtype)).to(kind)
        dhs.append(dh)
    return dx.to(first.dtype), torch.cat(dhs, 1)


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
    """Gradient of a pool: adds ``scale * left^T right`` of each adapter to the shards it names.

    ``left [N, r]`` is h or dh, ``right [N, l * c]`` x or dy. Where not ``add``, all other shards
    of the buffer become zero. A shard named more than once gets the sum.
    """
    if not add:
        buffer.zero_()
    total = torch.zeros_like(buffer, dtype=left.dtype)
    for number, rows in segments(index, right, offsets, permutation):
        factor = scale if scales is None else scale * scales[number].to(left.dtype)
        with torch.autocast(left.device.type, enabled=False):  # backward may run under it
            product = factor * (left[rows].t() @ right[rows].to(left.dtype))
        names = index[number].flatten()
        inside = (names >= 0) & (names < buffer.shape[0])
        shards = product.reshape(-1, buffer.shape[1])[inside]
        total.index_add_(0, names[inside].long(), shards)
    buffer.add_(total)
