"""What all elastic modules share: the active part of a parameter, or its mixture.

An axis of a parameter is a :class:`~weightshare.sizes.Size`, or an int where it is fixed. Every
elastic module has ``export()``, which copies the active part into a plain module.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from weightshare.sizes import Joint, Size
from weightshare_kernels import entangle
from weightshare_kernels._select import Selection, select, view

Axis = Size | int
Module = TypeVar("Module", bound=nn.Module)


def total(axis: Axis) -> int:
    """Whole size of an axis."""
    return axis.max if isinstance(axis, Size) else axis


def length(axis: Axis) -> int:
    """Active size of an axis: the whole one while it is mixed."""
    if not isinstance(axis, Size):
        return axis
    return axis.max if axis.mixed else axis.value


def selection(axis: Axis) -> Selection:
    """Active part of an axis, as ops take it; None is all of it."""
    return axis.selection if isinstance(axis, Size) else None


def take(tensor: Tensor, joint: Joint) -> Tensor:
    """Active part of a small parameter (a norm's, a bias, a token), or its mixture.

    Args:
        tensor: the whole parameter, with as many dimensions as ``joint`` has axes.
        joint: its axes.
    """
    if joint.mixed:
        tensor = _mixture(tensor, joint)
    for dim, axis in enumerate(joint.axes):
        tensor = narrow(tensor, dim, axis)
    return tensor


def _mixture(tensor: Tensor, joint: Joint) -> Tensor:
    choices, alpha = joint.mixture()
    if tensor.dim() < 3:
        return entangle(tensor, choices, alpha)
    if any(isinstance(axis, Size) for axis in joint.axes[:-1]):
        raise ValueError("of 3 or more axes only the last can be mixed")
    flat = tensor.flatten(0, -2)  # a matrix: of a third axis `entangle` takes the centre
    return entangle(flat, [(flat.shape[0], sizes[-1]) for sizes in choices], alpha).view_as(tensor)


def narrow(tensor: Tensor, dim: int, axis: Axis) -> Tensor:
    """Active part of one dimension; a mixed axis is whole."""
    if isinstance(axis, Size) and axis.mixed:
        return tensor
    return _part(tensor, dim, axis)


def widen(x: Tensor, axis: Axis, size: int) -> Tensor:
    """Put the active part of the last dimension in its place among zeros; inverse of narrow."""
    if not isinstance(axis, Size) or axis.mixed:
        return x
    if not torch.compiler.is_compiling() and x.shape[-1] == size:  # there, a guard on its size
        return x
    chosen = select("axis", axis.selection, size, x.device)
    if chosen.index is None:
        return nn.functional.pad(x, (chosen.start, size - chosen.start - chosen.length))
    return x.new_zeros(*x.shape[:-1], size).index_copy(-1, chosen.index, x)


def copy(tensor: Tensor, joint: Joint) -> Tensor:
    """Active part in memory of its own, detached."""
    with torch.no_grad():
        part = tensor.detach()
        for dim, axis in enumerate(joint.axes):
            part = _part(part, dim, axis)
        return part.clone(memory_format=torch.contiguous_format)


def copy_parameter(parameter: nn.Parameter, joint: Joint) -> nn.Parameter:
    """The same as a parameter; whether it wants a gradient is kept."""
    return nn.Parameter(copy(parameter, joint), parameter.requires_grad)


def _part(tensor: Tensor, dim: int, axis: Axis) -> Tensor:
    if not isinstance(axis, Size):
        return tensor
    prefix = axis.selection
    if isinstance(prefix, int):  # asking whether it is the whole axis would be a guard on its size
        return tensor.narrow(dim, 0, prefix)
    chosen = select("axis", prefix, tensor.shape[dim], tensor.device)
    if chosen.index is not None:
        return tensor.index_select(dim, chosen.index)
    return view(tensor, dim, chosen)
