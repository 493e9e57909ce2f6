"""ShardPool: initial values, matrices, state."""

import torch
from weightshare.lora import ShardPlan, ShardPool


def pool(dtype=None):
    torch.manual_seed(0)
    return ShardPool(16, 24, ShardPlan(6, 2, 1, 4, 6), dtype=dtype)


def test_initial_values():
    made = pool()
    assert made.a.shape == (48, 4) and made.b.shape == (48, 6)
    assert made.a.abs().max() <= 16**-0.5 and made.a.abs().max() > 0.9 * 16**-0.5
    assert abs(made.a.mean()) < 0.05 and made.b.eq(0).all()


def test_made_without_memory():
    """Like other modules: on meta first, then memory of its own, then values, tables included."""
    with torch.device("meta"):
        made = pool()
    made.to_empty(device="cpu")
    made.a_index.fill_(-1)
    made.reset_parameters()
    torch.manual_seed(0)
    wanted = pool()
    assert torch.equal(made.a_index, wanted.a_index) and torch.equal(made.b_index, wanted.b_index)
    assert made.b.eq(0).all() and made.a.abs().max() > 0


def test_matrices_are_put_together_of_shards():
    made = pool(torch.float64)
    torch.nn.init.normal_(made.b)
    for layer in (0, 5):
        a, b = made.matrices(layer)
        for rank in range(6):
            shards = [made.a[made.a_index[layer, rank, n]] for n in range(4)]
            assert torch.equal(a[rank], torch.cat(shards))
            shards = [made.b[made.b_index[layer, rank, n]] for n in range(4)]
            assert torch.equal(b[:, rank], torch.cat(shards))
        torch.testing.assert_close(made.delta(layer, 0.5), 0.5 * b @ a)


def test_state_holds_tables():
    made, other = pool(), ShardPool(16, 24, ShardPlan(6, 2, 1, 4, 6, seed=9))
    assert set(made.state_dict()) == {"a", "b", "a_index", "b_index"}
    assert not torch.equal(made.a_index, other.a_index)
    other.load_state_dict(made.state_dict())
    assert torch.equal(made.a_index, other.a_index)
    half = made.to(torch.bfloat16)
    assert half.a_index.dtype == torch.int32
    assert half.delta(0, 1.0).dtype == torch.float32
