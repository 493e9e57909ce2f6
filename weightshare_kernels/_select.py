"""Axis selections: which rows or columns of a shared weight a subnet uses.

A selection is one of ``None`` (all), an ``int`` (prefix), a ``slice``, a sequence of slices
(concatenated in order) or a 1-D integer index tensor. Kernels read either a span, which is a
strided view, or an index table. Tables are range-checked once, when they are made.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Selection = int | slice | Sequence[slice] | Tensor | None  # type: ignore[assignment]
_CACHE_SIZE = 4096


class Axis(NamedTuple):
    """A checked selection of one axis: a span if ``index`` is None, else an index table."""

    start: int
    length: int
    index: Tensor | None  # type: ignore[assignment]  # [length] int64, on the weight's device


_spans: dict[tuple, Axis] = {}
_tables: dict[tuple, tuple[weakref.ref, int, Axis]] = {}


def select(name: str, spec: Selection, size: int, device: torch.device) -> Axis:
    """Check a selection against an axis and return what kernels read.

    Args:
        name: the argument's name, for error messages.
        spec: the selection.
        size: number of elements of the axis.
        device: where an index table must live.

    Raises:
        TypeError: the selection is of no known kind.
        ValueError: it is out of range or selects an element twice.
    """
    if isinstance(spec, type(None)):  # not "is": the compiler would fix the bounds of a slice
        return Axis(0, size, None)
    if torch.compiler.is_compiling():
        return _make(name, spec, size, device, trusted=True)
    if spec.__class__ is int and 0 <= spec <= size:
        return Axis(0, spec, None)
    if isinstance(spec, Tensor):
        return _cached_table(name, spec, size, device)
    key = (_key(name, spec), size, device)
    if temporary():
        return _make(name, spec, size, device)
    axis = _spans.get(key)
    if axis is None:
        with lasting():
            axis = _make(name, spec, size, device)
        if len(_spans) >= _CACHE_SIZE:
            _spans.clear()
        _spans[key] = axis
    return axis


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Make plain tensors, fit for a cache, whatever mode or transform the first use runs in."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def temporary() -> bool:
    """Tell whether a dispatch mode runs: the tensors it makes (fake ones) must not be cached."""
    return torch._C._len_torch_dispatch_stack() > 0


def view(tensor: Tensor, dim: int, axis: Axis) -> Tensor:
    """Narrow a dimension to a span; an index table leaves it whole for the kernel to gather."""
    if axis.index is not None:
        return tensor
    # Saves a call; a compiler would ask whether a width is the whole, and compile for either.
    if not torch.compiler.is_compiling() and axis.start == 0 and axis.length == tensor.shape[dim]:
        return tensor
    return tensor.narrow(dim, axis.start, axis.length)


def _key(name: str, spec):
    """Hashable form of a selection (a slice is not hashable before Python 3.12)."""
    if isinstance(spec, int):
        return spec if not isinstance(spec, bool) else _reject(name, spec)
    if isinstance(spec, slice):
        return _bounds(name, spec)
    if isinstance(spec, Sequence) and not isinstance(spec, str | bytes):
        for piece in spec:
            if not isinstance(piece, slice):
                _reject(name, spec)
        return tuple(_bounds(name, piece) for piece in spec)
    return _reject(name, spec)


def _bounds(name: str, piece: slice) -> tuple:
    bounds = (piece.start, piece.stop, piece.step)
    for bound in bounds:
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
            raise TypeError(f"{name}: {piece} has a bound of type {type(bound).__name__}, not int")
    return bounds


def _reject(name: str, spec):
    raise TypeError(
        f"{name}: expected None, an int (prefix), a slice, a sequence of slices or a 1-D integer "
        f"tensor, got {spec!r} of type {type(spec).__name__}"
    )


def _make(name: str, spec, size: int, device: torch.device, trusted: bool = False) -> Axis:
    if isinstance(spec, Tensor):
        return _table(name, spec, size, device, trusted)
    if isinstance(spec, int | torch.SymInt) and not isinstance(spec, bool):
        if not 0 <= spec <= size:
            raise ValueError(f"{name}: prefix {spec} is outside 0..{size}, the size of the axis")
        return Axis(0, spec, None)  # type: ignore[arg-type]  # symbolic in a trace
    if not trusted:
        _key(name, spec)
    pieces = [spec] if isinstance(spec, slice) else list(spec)
    ranges = [_range(name, piece, size) for piece in pieces]
    if not trusted:  # in a trace, whether pieces meet would be a guard on their sizes
        ranges = _merge(ranges)
    if not ranges:
        return Axis(0, 0, None)
    if len(ranges) == 1 and ranges[0][2] == 1:
        start, stop, _ = ranges[0]
        return Axis(start, stop - start, None)
    if not trusted:
        chosen = [element for bounds in ranges for element in range(*bounds)]
        if repeats := len(chosen) - len(set(chosen)):
            raise ValueError(f"{name}: the slices overlap, {repeats} elements are selected twice")
    index = torch.cat([torch.arange(a, b, step, device=device) for a, b, step in ranges])
    return Axis(0, index.shape[0], index)


def _range(name: str, piece: slice, size: int) -> tuple[int, int, int]:
    """Bounds of one slice; unlike Python's own slicing, out of range is an error."""
    start = 0 if piece.start is None else piece.start
    stop = size if piece.stop is None else piece.stop
    step = 1 if piece.step is None else piece.step
    if step < 1:
        raise ValueError(f"{name}: {piece} has step {step}; a selection needs step >= 1")
    if not 0 <= start <= stop <= size:
        raise ValueError(
            f"{name}: {piece} does not fit 0 <= start <= stop <= {size}, the size of the axis"
        )
    if stop - start <= step:  # one element or none
        stop, step = min(stop, start + 1), 1
    return start, stop, step


def _merge(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Drop empty pieces and join unit-step pieces that follow one another."""
    merged: list[tuple[int, int, int]] = []
    for start, stop, step in ranges:
        if start == stop:
            continue
        if merged and step == 1 == merged[-1][2] and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop, 1)
        else:
            merged.append((start, stop, step))
    return merged


def _checked_axis(name: str, index: Tensor, size: int) -> Axis:
    """Wrap an index table, checked for range and repeats; a run of neighbours becomes a span."""
    length = index.shape[0]
    if length == 0:
        return Axis(0, 0, None)
    ordered = index.sort().values
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= size:
        raise ValueError(
            f"{name}: indices run from {low} to {high}, outside 0..{size - 1}; the axis has "
            f"{size} elements"
        )
    repeats = int((ordered[1:] == ordered[:-1]).sum())
    if repeats:
        raise ValueError(
            f"{name}: {repeats} repeated indices; each element may be selected once "
            "(gather the output instead, or torch.unique the indices)"
        )
    if high - low + 1 == length and bool((index == ordered).all()):
        return Axis(low, length, None)
    return Axis(0, length, index)


def _table(name: str, spec: Tensor, size: int, device: torch.device, trusted: bool) -> Axis:
    if spec.dtype in (torch.bool, torch.uint8) or spec.is_floating_point() or spec.is_complex():
        raise TypeError(
            f"{name}: an index tensor must be int64 or int32, got {spec.dtype}"
            + ("; use mask.nonzero().flatten()" if spec.dtype == torch.bool else "")
        )
    if spec.dim() != 1:
        raise ValueError(f"{name}: an index tensor must be 1-D, got shape {tuple(spec.shape)}")
    if spec.device.type == "meta" and not trusted:
        raise ValueError(f"{name}: the index tensor is on meta, so its values cannot be checked")
    index = spec.detach().to(device=device, dtype=torch.int64).contiguous()
    if trusted:  # traced: its values are not known, the kernels bound-check every access
        return Axis(0, index.shape[0], index)
    if index is spec or index.data_ptr() == spec.data_ptr():
        index = index.clone()  # the table must not change behind the check
    return _checked_axis(name, index, size)


def _cached_table(name: str, spec: Tensor, size: int, device: torch.device) -> Axis:
    if temporary() or spec.is_inference():  # inference tensors do not tell when they change
        return _table(name, spec, size, device, trusted=False)
    key = (id(spec), size, device)
    hit = _tables.get(key)
    if hit is not None and hit[0]() is spec and hit[1] == spec._version:
        return hit[2]
    with lasting():
        axis = _table(name, spec, size, device, trusted=False)
    forget = weakref.ref(spec, lambda ref: _forget_table(key, ref))
    _tables[key] = (forget, spec._version, axis)
    return axis


def _forget_table(key: tuple, ref: weakref.ref) -> None:
    entry = _tables.get(key)
    if entry is not None and entry[0] is ref:
        del _tables[key]
