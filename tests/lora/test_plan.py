"""Index tables and pools of Mixture of Shards: strategies, counts, errors."""

import pytest
import torch
from weightshare.lora import ShardPlan, ShardPool

LLAMA2_7B = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
LLAMA3_8B = [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)]


@pytest.mark.parametrize(
    ("projections", "wanted"), [(LLAMA2_7B, 4_997_120), (LLAMA3_8B, 5_242_880)]
)
def test_parameters_of_real_models(projections, wanted):
    plan = ShardPlan(r=16, equivalent_rank=2, private_rank=1, shards=4, layers=32)
    pools = [ShardPool(*widths, plan, device="meta") for widths in projections]
    assert sum(p.numel() for pool in pools for p in pool.parameters()) == wanted
    assert sum(plan.parameters(*widths) for widths in projections) == wanted


@pytest.mark.parametrize(("r", "e", "p", "l", "layers"), [(6, 2, 1, 4, 6), (8, 3, 0, 2, 5)])
def test_strategies(r, e, p, l, layers):
    plan = ShardPlan(r, e, p, l, layers, seed=3)
    a, b = plan.tables()
    shared = (e - p) * layers * l
    for table in (a, b):
        assert table.dtype == torch.int32 and table.shape == (layers, r, l)
        public, own = table[:, : r - p], table[:, r - p :]
        assert public.min() >= 0 and public.max() < shared
        # Privatisation: the layers' own shards follow one another, and are all the rest.
        wanted = torch.arange(shared, plan.pool_shards, dtype=torch.int32)
        assert torch.equal(own.flatten(), wanted)
        # Subset selection: injective within a layer, different between layers.
        rows = table.flatten(1)
        assert all(len(set(row.tolist())) == r * l for row in rows)
        assert len({tuple(row.tolist()) for row in public.flatten(1)}) == layers
        # Vector sharding: the pieces of a vector are not neighbours by rule.
        if l > 1:
            assert not (public.diff(dim=2) == 1).all()
    # Pair dissociation.
    assert not torch.equal(a, b)
    together = ShardPlan(r, e, p, l, layers, seed=3, dissociate=False).tables()
    assert torch.equal(*together)


def test_tables_are_uniform_draws():
    """Every shared shard is as likely as any other at every place."""
    counts = torch.zeros(8)
    for seed in range(400):
        a, _ = ShardPlan(2, 2, 0, 1, 4, seed=seed).tables()
        counts += torch.bincount(a[1, 0], minlength=8)
    assert counts.min() > 20 and counts.max() < 85  # 50 each; 7 is the standard deviation


def test_tables_depend_on_the_plan_alone():
    plan = ShardPlan(6, 2, 1, 4, 6, seed=5)
    first = plan.tables()
    torch.manual_seed(123)
    with torch.device("meta"):
        again = plan.tables()
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = ShardPlan(6, 2, 1, 4, 6, seed=6).tables()
    assert not torch.equal(first[0], other[0])


def test_plain_lora_shares_nothing():
    a, b = ShardPlan(4, 4, 4, 1, 3).tables()
    assert torch.equal(a.flatten(), torch.arange(12, dtype=torch.int32)) and torch.equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((8, 2, 1, 4, 6), ["r - private_rank", "8 - 1 = 7", "(2 - 1) * 6 = 6"]),
        ((4, 2, 2, 4, 6), ["private_rank = equivalent_rank = 2", "r must be 2", "got 4"]),
        ((4, 2, 3, 4, 6), ["private_rank 3", "equivalent_rank 2"]),
        ((1, 3, 2, 4, 6), ["private_rank 2", "r 1"]),
        ((4, 2, -1, 4, 6), ["private_rank must be at least 0, got -1"]),
        ((0, 2, 0, 4, 6), ["r must be at least 1, got 0"]),
        ((4, 2, 0, 0, 6), ["shards must be at least 1, got 0"]),
        ((4, 2, 0, 1, 0), ["layers must be at least 1, got 0"]),
    ],
)
def test_bad_plans(sizes, parts):
    with pytest.raises(ValueError) as error:
        ShardPlan(*sizes)
    assert all(part in str(error.value) for part in parts), error.value


def test_bad_types():
    with pytest.raises(TypeError, match="r: expected an integer, got float"):
        ShardPlan(4.0, 2, 1, 1, 4)
    with pytest.raises(ValueError, match="seed: expected an integer >= 0"):
        ShardPlan(4, 2, 1, 1, 4, seed=-1)


@pytest.mark.parametrize(("widths", "name"), [((30, 16), "in_features: 30"), ((16, 18), "18 / 4")])
def test_shards_must_divide(widths, name):
    with pytest.raises(ValueError, match="shards must divide") as error:
        ShardPool(*widths, ShardPlan(4, 2, 1, 4, 6))
    assert name in str(error.value)
