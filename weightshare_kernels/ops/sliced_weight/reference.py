"""Slices of a weight in plain PyTorch: the definition of the op, and what it runs on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightshare_kernels._select import Axis

Axes = Mapping[int, Axis]  # selected dimensions; the others are whole


def part(weight: Tensor, axes: Axes) -> Tensor:
    """The slice: a view of the weight, gathered along axes that have a table."""
    weight = _spans(weight, axes)
    for dim, axis in axes.items():
        if axis.index is not None:
            weight = weight.index_select(dim, axis.index)
    return weight


def add_(target: Tensor, grad: Tensor, axes: Axes, accumulate: bool) -> None:
    """``target[axes] += grad`` (``=`` where not to accumulate), in place."""
    target = _spans(target, axes)
    tables = {dim: axis.index for dim, axis in axes.items() if axis.index is not None}
    if not tables:
        target.add_(grad) if accumulate else target.copy_(grad)
    elif len(tables) == 1:
        ((dim, table),) = tables.items()
        target.index_add_(dim, table, grad.to(target.dtype))  # a fresh target is zero
    else:  # one index per axis, open to broadcast; without repeats, so a plain write adds up
        where = tuple(
            tables.get(dim, torch.arange(size, device=target.device)).view(
                [-1 if d == dim else 1 for d in range(target.dim())]
            )
            for dim, size in enumerate(target.shape)
        )
        target[where] = target[where] + grad if accumulate else grad.to(target.dtype)


def padded(grad: Tensor, shape: torch.Size, axes: Axes) -> Tensor:
    """Gradient of a slice as a full-shape gradient, differentiably."""
    pads = [0] * (2 * len(shape))
    for dim, axis in axes.items():
        if axis.index is not None:
            size = list(grad.shape)
            size[dim] = shape[dim]
            grad = grad.new_zeros(size).index_copy(dim, axis.index, grad)
        else:
            at = 2 * (len(shape) - 1 - dim)
            pads[at : at + 2] = axis.start, shape[dim] - axis.start - axis.length
    return torch.nn.functional.pad(grad, pads)


def _spans(tensor: Tensor, axes: Axes) -> Tensor:
    whole = slice(None)
    where = [whole] * tensor.dim()
    for dim, axis in axes.items():
        if axis.index is None:
            where[dim] = slice(axis.start, axis.start + axis.length)
    return tensor[tuple(where)]  # one call: half the time of a narrow for each axis
