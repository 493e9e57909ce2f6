"""The CUDA kernel of shard_lora_decode, run on the host."""

import ctypes
import random

import pytest
import torch
from cuda_host import _build, sharding
from test_cuda_host import pointer, stays_inside

from weightshare_kernels.ops.shard_lora import reference

pytestmark = pytest.mark.skipif(_build.compiler() is None, reason="no C++ compiler on this machine")
THREADS = 512


def shim(name, *arguments):
    _build.call(getattr(_build.load("shard_lora"), f"shard_lora_{name}"), *arguments)


def inputs(rows, d, outs, rank, shards_each, adapters, dtype=torch.float32, spare=0):
    """Arguments of the op, with ``spare`` shards in each pool that no table names."""
    generator = torch.Generator().manual_seed(rows + d)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lists = [[], [], [], [], []]
    for d_out in outs:
        tables, count = [], adapters * rank * shards_each
        for _ in "ab":
            order = torch.randperm(count + spare, generator=generator)[:count]
            tables.append(order.view(adapters, rank, shards_each).int())
        pools = [randn(count + spare, width // shards_each) for width in (d, d_out)]
        for to, tensor in zip(lists, (randn(rows, d_out), *pools, *tables), strict=True):
            to.append(tensor)
    ids = torch.randint(adapters, (rows,), generator=generator)
    return [randn(rows, d), *lists, ids, None, 0.5]


def exact(case):
    def wide(value):
        if isinstance(value, list):
            return [wide(v) for v in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return reference.decode(*map(wide, case))


def close(got, wanted, eps):
    for y, want in zip(got, wanted, strict=True):
        assert (y.double() - want).abs().max() <= eps * want.abs().max()


@pytest.mark.parametrize(
    "ids",
    [[0], [-1], [2, 0, 2, 1], [1] * 9, [0, 7, -1, 0, 0, 0, 0, 1 << 40], None, [*range(256)]],
    ids=str,
)
@pytest.mark.parametrize("most", [4, 8])
def test_tiles_hold_rows_of_one_adapter(ids, most):
    adapters, rows = 256 if ids and len(ids) > 99 else 3, 5 if ids is None else len(ids)
    out = torch.full((2 + 2 * rows,), -1, dtype=torch.int32)
    held = None if ids is None else torch.tensor(ids)
    shim("tiles", None if ids is None else pointer(held), rows, adapters, most, pointer(out))
    keys = [i if 0 <= i < adapters else adapters for i in ids] if ids else [0] * rows
    wanted, tiles, active = [None] * rows, 0, 0
    for key in sorted(set(keys)):
        members = [row for row, other in enumerate(keys) if other == key]
        for at, row in enumerate(members):
            wanted[row] = [tiles + at // most, at % most]
        tiles += -(-len(members) // most)
        active = tiles if key < adapters else active
    assert out[:2].tolist() == [tiles, active]
    assert out[2:].view(rows, 2).tolist() == wanted


def split(matrix, tiles, rows, rank, d, blocks):
    """The split of all threads and the host: of ranks, or in slices, and warps of a team."""
    out = torch.full((THREADS + 1, 2), -1, dtype=torch.int32)
    shim("split", int(matrix), tiles, rows, rank, d, ctypes.c_int64(blocks), pointer(out))
    assert (out == out[0]).all()
    return out[0].tolist()


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("tiles, rows, rank, d", [(1, 1, 64, 4096), (40, 99, 64, 64), (0, 3, 0, 0)])
def test_all_threads_choose_one_split(matrix, tiles, rows, rank, d):
    each, team = split(matrix, tiles, rows, rank, d, 3)
    assert team in (1, 2, 4, 8, 16)
    assert each in (1, 2, 4)
    assert not matrix or each * tiles <= max(rows, 4)  # what scratch memory holds


def test_few_items_go_to_large_teams_and_many_to_warps():
    assert split(False, 1, 1, 192, 4096, 132) == [2, 16]  # 96 teams of a block each
    assert split(True, 1, 1, 192, 4096, 132) == [4, 16]
    assert split(False, 256, 256, 192, 4096, 132) == [4, 1]
    assert split(True, 256, 256, 192, 4096, 132)[1] <= 2


CASES = [
    ("one_row", (1, 64, (48, 16, 16), 8, 4, 1)),
    ("long_rows", (3, 2048, (24,), 5, 2, 2)),
    ("wide", (2, 16, (1200, 8), 3, 1, 2)),
    ("deep", (2, 32, (24,), 80, 2, 2)),
    ("odd", (7, 33, (15, 9), 5, 3, 3)),
    ("six_targets", (6, 16, (8, 16, 24, 8, 8, 40), 2, 2, 3)),
    ("more_rows_than_a_launch", (600, 16, (24,), 3, 2, 5)),
]


@pytest.mark.parametrize("dtype", sharding.DTYPES, ids=str)
@pytest.mark.parametrize("name, sizes", CASES, ids=[name for name, _ in CASES])
def test_matches_the_definition(name, sizes, dtype):
    case = inputs(*sizes, dtype)
    eps = {torch.float64: 1e-14, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    close(sharding.decode(*case), exact(case), eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_repeats_bitwise_in_any_thread_order(dtype):
    case, results = inputs(21, 520, (136, 40), 9, 2, 3, dtype), []
    for descending in (0, 1, 0):
        _build.load("shard_lora").run_descending(descending)
        results.append(sharding.decode(*case))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_batch_but_for_rounding():
    case = inputs(40, 64, (48,), 6, 2, 4)
    (whole,) = sharding.decode(*case)
    for row in (0, 17, 39):
        some = [case[0][row : row + 1], [case[1][0][row : row + 1]], *case[2:6]]
        (alone,) = sharding.decode(*some, case[6][row : row + 1], *case[7:])
        torch.testing.assert_close(alone[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reads_only_what_it_names(dtype):
    """NaN in shards that no row's adapter names, in tables of absurd numbers, leaves no trace."""
    case = inputs(12, 64, (48, 24), 6, 2, 4, dtype, spare=9)
    case[6] = torch.tensor([0, 2, -1, 0, 3, 2, 4, 0, 0, 1 << 62, 0, 3])  # 1 is unused
    clean = sharding.decode(*case)
    for pools, tables in ((case[2], case[4]), (case[3], case[5])):
        for pool, table in zip(pools, tables, strict=True):
            named = torch.zeros(pool.shape[0], dtype=torch.bool)
            named[table[[0, 2, 3]].flatten().long()] = True
            pool[~named] = float("nan")
            table[1] = torch.iinfo(torch.int32).min
    for a, b in zip(clean, sharding.decode(*case), strict=True):
        assert torch.equal(a, b)
    for y, base in zip(clean, case[1], strict=True):
        outside = [2, 6, 9]
        assert torch.equal(y[outside], base[outside])


def test_absent_shards_are_zeros():
    case = inputs(9, 32, (24,), 4, 2, 2)
    wild = (-1, -(2**31), 2**31 - 1, case[2][0].shape[0])
    rng = random.Random(0)
    for (table,) in (case[4], case[5]):
        for at in rng.sample(range(table.numel()), 5):
            table.view(-1)[at] = rng.choice(wild)
    close(sharding.decode(*case), exact(case), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [8, 7])
def test_h_is_not_rounded(dtype, d):
    """Between the products, h of 1 + 2^-12 and of -1, whose sum 16 bits would lose."""
    a, b = torch.zeros(2, d, dtype=dtype), torch.ones(2, d, dtype=dtype)
    a[0, 0], a[0, 1], a[1, 0] = 1, 2.0**-12, -1
    index = torch.tensor([[[0], [1]]], dtype=torch.int32)
    x, base = torch.ones(1, d, dtype=dtype), torch.zeros(1, d, dtype=dtype)
    (y,) = sharding.decode(x, [base], [a], [b], [index], [index], None, None, 1.0)
    assert torch.equal(y, torch.full_like(y, 2.0**-12))


def test_a_scale_of_each_adapter_multiplies_the_common_one():
    case = inputs(9, 32, (24, 8), 4, 2, 3)
    case[7] = torch.tensor([0.5, -2.0, 3.0])
    close(sharding.decode(*case), exact(case), 1e-5)


def test_no_rows():
    assert sharding.decode(*inputs(0, 16, (8,), 2, 2, 1))[0].shape == (0, 8)


def test_stays_inside_its_memory():
    stays_inside("guarded_shard_lora", 60)
