"""Sizes of layers that depend on named choices: what a subnet, or a mixture of subnets, uses.

A :class:`Dim` is one choice of a search space (a width, a number of heads, a depth). Layers hold
:class:`Size` objects made of dims (``heads * 64``, ``embed * ratio``); activating a subnet sets
the dims, and every layer that depends on them reads its new size. In mixed mode a dim carries
``alpha``, one weight per choice, and layers run the mixture of all choices instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Value = int | float


class Size:
    """A length of an axis that depends on dims; ``value`` is the active one.

    Attributes:
        dims: the dims it depends on, without repeats.
    """

    _active: int  # kept up to date by the dims; `supernet.one_graph` knows it by this name
    dims: tuple[Dim, ...]

    def __init__(self, parts: Iterable[Size]):
        self.dims = tuple(dict.fromkeys(dim for part in parts for dim in part.dims))
        for dim in self.dims:
            dim.dependents.append(self)
        self.refresh()

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Length where the dims have these values (a dim that is not named: its active one)."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Take over the active values of the dims."""
        self._active = self.at({})

    @property
    def value(self) -> int:
        """Active length."""
        return self._active

    @property
    def selection(self):
        """Active part of an axis, as ops take it: a prefix."""
        return self.value

    def selection_at(self, values: Mapping[Dim, Value]):
        """The same where the dims have these values."""
        return self.at(values)

    @property
    def max(self) -> int:
        """Greatest length over all choices of the dims."""
        return max(self.at(point) for point in points(self.dims))

    @property
    def mixed(self) -> bool:
        """Whether a dim it depends on carries mixture weights."""
        return any(dim.alpha is not None for dim in self.dims)

    def __mul__(self, factor: Size | Value) -> Product:
        return Product((self, factor))

    __rmul__ = __mul__

    def rounded(self, divisor: int) -> Product:
        """Rounded to the nearest multiple, never down by more than a tenth (as MobileNets do)."""
        return Product((self,), divisor)


class Dim(Size):
    """One named choice of a search space.

    Attributes:
        name: unique in its space, such as ``embed`` or ``ratio.3``.
        choices: its values, ascending.
        allowed: the choices that samplers may take; a splitter narrows them.
        alpha: mixture weight of each choice ``[K]``, or None: the active choice alone.
    """

    def __init__(self, name: str, choices: Sequence[Value]):
        self.name = name
        self.choices = _checked_choices(name, choices)
        self.allowed = self.choices
        self.alpha: Tensor | None = None
        self.dependents: list[Size] = []
        self._active = self.choices[-1]  # type: ignore[assignment]  # a ratio is no length

    @property
    def value(self):
        """Active choice; the largest at first."""
        return self._active

    @property
    def dims(self) -> tuple[Dim, ...]:  # type: ignore[override]
        """Itself."""
        return (self,)

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Its value among these."""
        return values.get(self, self.value)  # type: ignore[return-value]

    def set(self, value: Value) -> None:
        """Make a choice the active one.

        Raises:
            ValueError: it is no choice of this dim.
        """
        if value == self.value and type(value) is type(self.value):
            return
        self._active = self.choices[self.index(value)]  # type: ignore[assignment]
        for size in self.dependents:
            size.refresh()

    def index(self, value: Value) -> int:
        """Position of a value among the choices.

        Raises:
            ValueError: it is none of them.
        """
        if isinstance(value, bool) or value not in self.choices:
            raise ValueError(f"{self.name}: {value!r} is none of the choices {list(self.choices)}")
        return self.choices.index(value)

    def __repr__(self) -> str:
        return f"Dim({self.name!r}, {list(self.choices)}, value={self.value})"


class Product(Size):
    """A product of sizes and numbers, cut to an int or rounded to a divisor."""

    def __init__(self, factors: Sequence[Size | Value], divisor: int = 1):
        self.factors, self.divisor = tuple(factors), divisor
        self._whole = divisor == 1 and all(map(_is_whole, factors))
        super().__init__(f for f in factors if isinstance(f, Size))

    @property
    def value(self) -> int:
        """Active length."""
        if self._whole and torch.compiler.is_compiling():
            # In terms of the dims: a trace then knows that 64 divides 3 * heads * 64, and need
            # not compute indices by divisions, which took 6 ms of a block's backward of 12 ms.
            values: list = [f.value if isinstance(f, Size) else f for f in self.factors]
            return math.prod(values)
        return self._active

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Length where the dims have these values."""
        exact = math.prod(f.at(values) if isinstance(f, Size) else f for f in self.factors)
        if self.divisor == 1:
            return int(exact + 1e-6)  # 0.1 * 30 is 3, whatever its last bit says
        near = max(self.divisor, int(exact + self.divisor / 2) // self.divisor * self.divisor)
        return near + self.divisor if near < 0.9 * exact else near


class Blocks(Size):
    """An axis of blocks laid end to end, each cut to a prefix: fused qkv, fused gate and up.

    Args:
        parts: active size of each block; a plain int is a fixed one.
        totals: whole size of each block.
    """

    def __init__(self, parts: Sequence[Size | int], totals: Sequence[int]):
        self.parts, self.totals = tuple(parts), tuple(totals)
        self.starts = (0, *itertools.accumulate(totals))[:-1]
        super().__init__(p for p in parts if isinstance(p, Size))

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Elements of all blocks together."""
        return sum(p.at(values) if isinstance(p, Size) else p for p in self.parts)

    def refresh(self) -> None:
        """Take over the active values of the dims."""
        super().refresh()
        self._slices = self.selection_at({})

    def _cut(self, lengths: Sequence[int]) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.starts, lengths, strict=True))

    @property
    def selection(self):
        """Active part: one slice per block."""
        if torch.compiler.is_compiling():  # a trace takes lengths as variable, slices as constant
            return self._cut([p.value if isinstance(p, Size) else p for p in self.parts])
        return self._slices

    def selection_at(self, values: Mapping[Dim, Value]):
        """The same where the dims have these values."""
        return self._cut([p.at(values) if isinstance(p, Size) else p for p in self.parts])


class Interleaved(Size):
    """An axis whose blocks lie interleaved, element by element: AutoFormer's fused qkv.

    Args:
        part: active size of each block.
        blocks: number of blocks.
    """

    def __init__(self, part: Size, blocks: int):
        self.part, self.blocks = part, blocks
        super().__init__((part,))

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Elements of all blocks together."""
        return self.part.at(values) * self.blocks

    def _cut(self, length: int) -> tuple[slice, ...]:
        return tuple(slice(i, length, self.blocks) for i in range(self.blocks))

    @property
    def selection(self):
        """Active part: one strided slice per block, joined."""
        return self._cut(self.value)

    def selection_at(self, values: Mapping[Dim, Value]):
        """The same where the dims have these values."""
        return self._cut(self.at(values))


class Mixture(NamedTuple):
    """Choices of some axes together, and their weights."""

    choices: tuple[tuple, ...]  # K tuples, one selection per axis
    alpha: Tensor  # [K]


def points(dims: Sequence[Dim]) -> Iterator[dict[Dim, Value]]:
    """Every combination of choices, the last dim changing fastest."""
    for values in itertools.product(*(dim.choices for dim in dims)):
        yield dict(zip(dims, values, strict=True))


class Joint:
    """Several axes of one weight, and the mixture of all their choices together.

    Axes that share dims are coupled: the choices are the combinations of the dims' choices, and
    their weights the outer product of the alphas. A dim without alpha counts with its active
    value, an axis that is an int (a fixed size) as it is.

    Args:
        axes: one :class:`Size` or int per axis.
    """

    def __init__(self, *axes: Size | int):
        self.axes = axes
        self.dims = dims_of(*axes)
        self._choices: dict[tuple, tuple[tuple, ...]] = {}

    @property
    def mixed(self) -> bool:
        """Whether a dim of these axes carries mixture weights."""
        return any(dim.alpha is not None for dim in self.dims)

    def mixture(self) -> Mixture:
        """Choices and weights; the dims that carry none count with their active value."""
        dims = [dim for dim in self.dims if dim.alpha is not None]
        key = tuple(None if dim.alpha is not None else dim.value for dim in self.dims)
        if key not in self._choices:
            self._choices[key] = tuple(
                tuple(a.selection_at(point) if isinstance(a, Size) else a for a in self.axes)
                for point in points(dims)
            )
        alpha, *others = [dim.alpha for dim in dims if dim.alpha is not None]
        for other in others:
            alpha = (alpha[:, None] * other).flatten()
        return Mixture(self._choices[key], alpha)


def dims_of(*axes: Size | int) -> tuple[Dim, ...]:
    """Dims that some of the axes depend on, without repeats."""
    return tuple(dict.fromkeys(d for axis in axes if isinstance(axis, Size) for d in axis.dims))


def _is_whole(factor: Size | Value) -> bool:
    """Whether a factor is an int at any choice."""
    if isinstance(factor, Dim):
        return all(isinstance(choice, int) for choice in factor.choices)
    return isinstance(factor, int) or (isinstance(factor, Product) and factor._whole)


def _checked_choices(name: str, choices: Sequence[Value]) -> tuple[Value, ...]:
    """Choices, ascending."""
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise TypeError(f"{name}: expected a sequence of numbers, got {choices!r}")
    if not choices:
        raise ValueError(f"{name}: has no choices")
    for value in choices:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: choice {value!r} is no number")
        if value < 0:
            raise ValueError(f"{name}: choice {value!r} is negative")
    if len(set(choices)) != len(choices):
        raise ValueError(f"{name}: choices {list(choices)} repeat a value")
    return tuple(sorted(choices))
