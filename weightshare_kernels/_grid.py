"""The algebra of weight entanglement: nested choices become a small grid of factors.

``sum_k alpha_k Pad(W[choice_k])`` equals ``C * W`` elementwise, and C is constant on the blocks
that the distinct sizes of each axis cut out. So a mixture of K choices needs one number per
block: ``grid = membership @ alpha``, and autograd through that small product returns every
``d alpha_k`` from one ``d grid``. (Weight-Entanglement Meets Gradient-Based NAS, Sukthanker et
al., 2023, materialises the K padded copies instead.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weightshare_kernels._select import lasting, select, temporary


class Grid(NamedTuple):
    """Blocks of a weight on which the mixture factor is constant."""

    shape: tuple[int, ...]  # blocks per axis
    membership: Tensor  # [blocks, K]: 1 where choice k covers the block
    classes: tuple[Tensor, ...]  # per axis [size] int32: block of each element, shape[d] = outside
    folded: tuple[Tensor, Tensor, Tensor]  # the same for (rows, columns, all further axes as one)
    elements: Tensor | None  # of a vector, [size, K]: 1 where choice k covers the element


_CACHE_SIZE = 1024
_cache: dict[tuple, Grid] = {}
_checked: set[tuple] = set()


def prefix_classes(size: int, sizes: Sequence[int]) -> tuple[list, list[int]]:
    """Distinct prefix sizes, ascending, and per element the first of them that covers it."""
    edges = sorted(set(sizes))
    return edges, [next((c for c, e in enumerate(edges) if j < e), len(edges)) for j in range(size)]


def centre_classes(size: int, sizes: Sequence[int]) -> tuple[list, list[int]]:
    """The same for centred crops: a crop of size s of n starts at ``(n - s) // 2``."""
    edges = sorted(set(sizes))
    spans = [((size - e) // 2, (size - e) // 2 + e) for e in edges]
    classes = [
        next((c for c, (a, b) in enumerate(spans) if a <= j < b), len(edges)) for j in range(size)
    ]
    return edges, classes


def run_classes(size: int, selections: Sequence) -> tuple[list, list[int]]:
    """The same for sequences of slices (or prefixes): one class per run of equal membership.

    Runs are numbered as they lie, so that classes ascend along the axis, as kernels want them; a
    class stands for the set of those choices that hold it. What follows the last is outside.
    """
    held = [set(_elements(size, selection)) for selection in selections]
    edges: list[tuple[bool, ...]] = []
    classes = []
    for j in range(size):
        here = tuple(j in elements for elements in held)
        if not edges or edges[-1] != here:
            edges.append(here)
        classes.append(len(edges) - 1)
    if edges and not any(edges[-1]):
        edges.pop()
    return edges, classes


def _elements(size: int, selection) -> Iterable[int]:
    if isinstance(selection, int):
        return range(selection)
    return itertools.chain.from_iterable(range(size)[slice(*bounds)] for bounds in selection)


def _frozen(choices) -> tuple[tuple, ...]:
    """Choices as a key: a slice, not hashable before Python 3.12, becomes its bounds."""
    return tuple(
        tuple(
            v if isinstance(v, int) else tuple((s.start, s.stop, s.step) for s in v) for v in choice
        )
        for choice in choices
    )


def make_grid(
    shape: Sequence[int], choices: Sequence[Sequence], like: Tensor, centred_from: int = 2
) -> Grid:
    """Cut a weight of ``shape`` into blocks for ``choices``; cached.

    Args:
        shape: shape of the weight.
        choices: K tuples, one size (or sequence of slices) per axis; validated by
            :func:`check_choices`.
        like: alpha; gives device and dtype of the membership matrix.
        centred_from: axes from here on are centre-cropped (spatial), those before are prefixes.
    """
    key = (tuple(shape), _frozen(choices), like.device, like.dtype, centred_from)
    if torch.compiler.is_compiling() or temporary():
        return _make(*key)
    grid = _cache.get(key)
    if grid is None:
        with lasting():
            grid = _make(*key)
        if len(_cache) >= _CACHE_SIZE:
            _cache.clear()
        _cache[key] = grid
    return grid


def _make(shape, choices, device, dtype, centred_from) -> Grid:
    held, classes = [], []  # held[axis][choice]: the set of blocks that the choice covers
    for axis, size in enumerate(shape):
        sizes = [choice[axis] for choice in choices]
        if all(isinstance(s, int) for s in sizes):
            cut = prefix_classes if axis < centred_from else centre_classes
            edges, axis_classes = cut(size, sizes)
            held.append([[s >= edge for edge in edges] for s in sizes])
        else:
            edges, axis_classes = run_classes(size, sizes)
            held.append([[edge[k] for edge in edges] for k in range(len(sizes))])
        classes.append(torch.tensor(axis_classes, dtype=torch.int32, device=device))
    blocks = tuple(len(choices_held[0]) for choices_held in held)
    rows = [
        [
            float(all(axis[k][b] for axis, b in zip(held, block, strict=True)))
            for k in range(len(choices))
        ]
        for block in itertools.product(*map(range, blocks))
    ]
    membership = torch.tensor(rows, dtype=dtype, device=device).reshape(-1, len(choices))
    elements = None
    if len(shape) == 1:
        elements = torch.nn.functional.pad(membership, (0, 0, 0, 1))[classes[0]]
    return Grid(blocks, membership, tuple(classes), _fold(blocks, classes), elements)


def _fold(blocks: Sequence[int], classes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Classes of a weight seen as [rows, columns, inner]; an axis it lacks has one element."""
    one = classes[0].new_zeros(1)
    inner = one
    for count, axis in zip(blocks[2:], classes[2:], strict=True):
        # A block index of the folded axis; "outside" in any axis is outside in all.
        outside = (inner < 0)[:, None] | (axis == count)[None, :]
        inner = torch.where(outside, -1, inner[:, None] * count + axis[None, :]).flatten()
    cells = math.prod(blocks[2:])
    inner = torch.where(inner < 0, cells, inner).to(torch.int32)
    return classes[0], classes[1] if len(classes) > 1 else one, inner


def mixture(grid: Grid, alpha: Tensor) -> Tensor:
    """Factor of every block, ``membership @ alpha``."""
    return _times(grid.membership, alpha)


def _times(matrix: Tensor, alpha: Tensor) -> Tensor:
    """``matrix @ alpha`` in alpha's precision: autocast would take the product for a layer's."""
    if torch._C._is_any_autocast_enabled():
        return (matrix * alpha).sum(1)
    return matrix.mv(alpha)


def mixture_of_elements(grid: Grid, alpha: Tensor) -> Tensor:
    """Factor of every element of a vector, zero outside.

    Straight from alpha: the backward of an indexed mixture sorts on a GPU, which takes longer than
    the product of a layer.
    """
    assert grid.elements is not None, "a grid of a vector"
    return _times(grid.elements, alpha)


def check_choices(choices, alpha, shape: Sequence[int], axes: Sequence[str]) -> None:
    """Raise TypeError or ValueError, naming the argument, unless choices and alpha fit."""
    if _known(choices, shape):
        check_alpha("alpha", alpha, len(choices))
        return
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise TypeError(f"choices: expected a sequence of {_form(axes)}, got {choices!r}")
    if not choices:
        raise ValueError("choices: is empty; a mixture needs at least one choice")
    for number, choice in enumerate(choices):
        if isinstance(choice, str) or not isinstance(choice, Sequence):
            raise TypeError(f"choices[{number}]: expected {_form(axes)}, got {choice!r}")
        if len(choice) != len(axes):
            raise ValueError(f"choices[{number}]: expected {_form(axes)}, got {tuple(choice)}")
        for axis, value, size in zip(axes, choice, shape, strict=True):
            check_size(f"choices[{number}]: {axis}", value, size)
    check_alpha("alpha", alpha, len(choices))
    if len(_checked) >= _CACHE_SIZE:
        _checked.clear()
    _checked.add((tuple(shape), _frozen(choices)))


def _known(choices, shape: Sequence[int]) -> bool:
    """Tell whether these very choices have been checked; a float equal to an int is not one."""
    if torch.compiler.is_compiling():
        return False
    try:
        key = (tuple(shape), _frozen(choices))
        return key in _checked and all(type(v) in (int, tuple) for choice in key[1] for v in choice)
    except (TypeError, AttributeError):  # no sequence of sequences: the checks say what it is
        return False


def check_sizes(axis: str, sizes, alpha, size: int) -> None:
    """The same for one axis: ``sizes`` are prefix sizes, or sequences of slices."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"{axis}s: expected a sequence of ints, got {sizes!r}")
    if not sizes:
        raise ValueError(f"{axis}s: is empty; a mixture needs at least one choice")
    for number, value in enumerate(sizes):
        check_size(f"{axis}s[{number}]", value, size)
    check_alpha(f"alpha_{axis}", alpha, len(sizes))


def check_size(name: str, value, size: int) -> None:
    """Require an int within an axis, or a sequence of slices of it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        select(name, value, size, torch.device("cpu"))
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if not 0 <= value <= size:
        raise ValueError(f"{name}: is {value}, outside 0..{size}, the weight's size")


def check_alpha(name: str, alpha, count: int) -> None:
    """Require a floating-point vector with one entry per choice."""
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor [{count}], got {alpha!r}")
    if tuple(alpha.shape) != (count,):
        raise ValueError(
            f"{name}: expected shape ({count},), one per choice, got {tuple(alpha.shape)}"
        )


def _form(axes: Sequence[str]) -> str:
    return "(" + ", ".join(axes) + ")"


def factors(grid: Tensor, classes: Sequence[Tensor]) -> Tensor:
    """Expand a grid to one factor per element, zero outside; not for kernels' paths.

    By indexing: on a GPU its backward sorts, where that of ``index_select`` adds by atomics.
    """
    padded = torch.nn.functional.pad(grid, [0, 1] * grid.dim())
    for axis, index in enumerate(classes):
        padded = padded[(slice(None),) * axis + (index.long(),)]
    return padded
