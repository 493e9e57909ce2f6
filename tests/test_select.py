"""Axis selections: what kernels are given, what is cached, what is refused."""

import gc

import pytest
import torch

from weightshare_kernels import _select
from weightshare_kernels._select import Axis, select, view

CPU = torch.device("cpu")
SIZE = 20


def elements(axis):
    """The selected elements of an axis, in order."""
    if axis.index is not None:
        return axis.index.tolist()
    return list(range(axis.start, axis.start + axis.length))


def chosen(spec):
    return elements(select("out", spec, SIZE, CPU))


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (None, range(20)),
        (0, range(0)),
        (7, range(7)),
        (20, range(20)),
        (slice(None), range(20)),
        (slice(3, 9), range(3, 9)),
        (slice(9, 9), range(0)),
        (slice(0, 20, 3), range(0, 20, 3)),
        (slice(4, 5, 7), [4]),
        ([], range(0)),
        ([slice(2, 2), slice(5, 5)], range(0)),
        ([slice(0, 4), slice(4, 9)], range(9)),
        ((slice(10, 14), slice(0, 4)), [10, 11, 12, 13, 0, 1, 2, 3]),
        ([slice(0, 20, 3), slice(1, 20, 3)], [*range(0, 20, 3), *range(1, 20, 3)]),
        (torch.tensor([3, 1, 19]), [3, 1, 19]),
        (torch.tensor([3, 1, 19], dtype=torch.int32), [3, 1, 19]),
        (torch.tensor([], dtype=torch.int64), []),
        (torch.arange(5, 9), range(5, 9)),
        (torch.arange(40)[::4][:5], [0, 4, 8, 12, 16]),
    ],
)
def test_elements(spec, wanted):
    axis = select("out", spec, SIZE, CPU)
    assert elements(axis) == list(wanted) and axis.length == len(wanted)


@pytest.mark.parametrize(
    "spec",
    [
        None, 6, slice(2, 9), [slice(2, 5), slice(5, 9)], [slice(4, 9), slice(9, 9)],
        torch.arange(4, 11), slice(3, 4, 2), torch.tensor([7]),
    ],
)  # fmt: skip
def test_what_can_be_a_view_is_one(spec):
    assert select("out", spec, SIZE, CPU).index is None


def test_view():
    matrix = torch.arange(SIZE * 2).view(SIZE, 2)
    for spec in (None, 5, slice(3, 9), slice(0, 20, 3), torch.tensor([4, 2])):
        axis = select("out", spec, SIZE, CPU)
        part = view(matrix, 0, axis)
        picked = part if axis.index is None else part[axis.index]
        assert torch.equal(picked, matrix[elements(axis)])
        assert part.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
        assert axis.index is None or part is matrix


def test_selection_is_cached():
    blocks, index = [slice(0, 4), slice(8, 12)], torch.tensor([3, 9, 1])
    assert select("out", blocks, SIZE, CPU) is select("out", list(blocks), SIZE, CPU)
    assert select("out", index, SIZE, CPU) is select("out", index, SIZE, CPU)


def test_cache_tells_sizes_apart():
    assert chosen(slice(None)) == list(range(20))
    assert elements(select("out", slice(None), 6, CPU)) == list(range(6))
    index = torch.tensor([3, 9, 1])
    select("out", index, SIZE, CPU)
    with pytest.raises(ValueError, match="outside"):
        select("out", index, 5, CPU)


def test_index_changed_in_place_is_checked_anew():
    index = torch.tensor([3, 9, 1])
    assert chosen(index) == [3, 9, 1]
    index[0] = 4
    assert chosen(index) == [4, 9, 1]
    index[0] = 99
    with pytest.raises(ValueError, match="99"):
        chosen(index)


def test_table_does_not_change_behind_the_check():
    index = torch.tensor([3, 9, 1])
    axis = select("out", index, SIZE, CPU)
    index.numpy()[0] = 99  # unseen by the version counter
    assert elements(axis) == [3, 9, 1]


def test_tables_die_with_their_tensors():
    gc.collect()
    before = len(_select._tables)
    for _ in range(50):
        select("out", torch.randperm(SIZE)[:7], SIZE, CPU)
    gc.collect()
    assert len(_select._tables) == before


def test_span_cache_is_bounded():
    for size in range(_select._CACHE_SIZE + 10):
        select("out", 0, size, CPU)
    assert len(_select._spans) <= _select._CACHE_SIZE


def test_equal_keys_of_other_types_are_not_confused():
    """1.0 == 1 == True: a cached good selection must not let a bad one through."""
    assert chosen(slice(0, 1)) == [0] and chosen(1) == [0]
    for bad in (slice(0, 1.0), slice(False, True), [slice(0.0, 1)], True, 1.0):
        with pytest.raises(TypeError, match="out"):
            chosen(bad)


BAD = {
    "negative": (-1, ValueError, r"out: prefix -1 .*0\.\.20"),
    "too_long": (21, ValueError, r"out: prefix 21 .*0\.\.20"),
    "huge": (2**70, ValueError, "out: prefix"),
    "bool": (True, TypeError, "out: .*bool"),
    "float": (4.0, TypeError, "out: .*float"),
    "string": ("4", TypeError, "out: .*str"),
    "bytes": (b"ab", TypeError, "out: .*bytes"),
    "ints": ([1, 2], TypeError, "out: .*list"),
    "range": (range(4), TypeError, "out: .*range"),
    "mixed": ([slice(0, 2), 5], TypeError, "out: .*list"),
    "dict": ({}, TypeError, "out: .*dict"),
    "negative_start": (slice(-4, None), ValueError, "out: .*-4"),
    "negative_stop": (slice(0, -1), ValueError, "out: .*-1"),
    "beyond": (slice(0, 21), ValueError, "out: .*21"),
    "reversed": (slice(9, 3), ValueError, "out: .*start <= stop"),
    "step_zero": (slice(0, 9, 0), ValueError, "out: .*step"),
    "step_negative": (slice(9, 0, -1), ValueError, "out: .*step"),
    "float_stop": (slice(0, 4.5), TypeError, "out: .*float"),
    "string_stop": (slice(0, "a"), TypeError, "out: .*str"),
    "list_stop": (slice(0, [3]), TypeError, "out: .*list"),
    "overlap": ([slice(0, 5), slice(4, 9)], ValueError, "out: .*(repeat|twice|overlap)"),
    "same_twice": ([slice(0, 5), slice(0, 5)], ValueError, "out: .*(repeat|twice|overlap)"),
    "index_repeats": (torch.tensor([1, 2, 1]), ValueError, "out: 1 repeated"),
    "index_beyond": (torch.tensor([1, 20]), ValueError, r"out: .*1 to 20.*0\.\.19"),
    "index_negative": (torch.tensor([1, -1]), ValueError, r"out: .*-1 to 1"),
    "index_mask": (torch.ones(20, dtype=torch.bool), TypeError, "out: .*bool.*nonzero"),
    "index_uint8": (torch.ones(3, dtype=torch.uint8), TypeError, "out: .*uint8"),
    "index_float": (torch.tensor([1.0, 2.0]), TypeError, "out: .*float32"),
    "index_empty_float": (torch.tensor([]), TypeError, "out: .*float32"),
    "index_complex": (torch.tensor([1j]), TypeError, "out: .*complex"),
    "index_scalar": (torch.tensor(3), ValueError, r"out: .*1-D.*\(\)"),
    "index_matrix": (torch.tensor([[1, 2]]), ValueError, r"out: .*1-D.*\(1, 2\)"),
    "index_meta": (torch.empty(3, dtype=torch.int64, device="meta"), ValueError, "out: .*meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    spec, kind, message = BAD[name]
    for _ in range(2):  # and refused again: a bad selection is never cached
        with pytest.raises(kind, match=message):
            chosen(spec)


def test_empty_axis():
    for spec in (None, 0, slice(None), [], torch.tensor([], dtype=torch.int64)):
        assert select("out", spec, 0, CPU) == Axis(0, 0, None)
    with pytest.raises(ValueError, match="out"):
        select("out", torch.tensor([0]), 0, CPU)
