"""shard_lora refuses what does not fit, and takes what is empty."""

import pytest
import torch
from test_shard_lora import DEVICE, OPS, on_cpu, problem

from weightshare_kernels import group_by_adapter, shard_lora, shard_lora_group

T, V = TypeError, ValueError
BAD = [
    ("x", [1.0], T, "x: expected a tensor, got list"),
    ("x", torch.ones(10, 16).int(), T, "x: expected a floating-point tensor, got torch.int32"),
    ("x", torch.tensor(1.0), V, "x: expected at least 1 dimension"),
    ("x", torch.randn(10, 15).double(), V, r"a_index: 2 shards of 8 make 16, but x has 15 columns"),
    ("x", torch.randn(9, 16).double(), V, r"base_out: has shape \(10, 15\), but x has \(9, 16\)"),
    ("base_out", 3, T, "base_out: expected a tensor, got int"),
    ("base_out", torch.randn(10, 15), T, "base_out: is torch.float32, but x is torch.float64"),
    ("base_out", torch.randn(10, 16).double(), V, "b_index: 3 shards of 5 .* base_out has 16"),
    ("base_out", torch.tensor(1.0).double(), V, r"base_out: has shape \(\)"),
    ("base_out", torch.empty(10, 15, device="meta").double(), V, "base_out: is on meta"),
    ("a_pool", None, T, "a_pool: expected a tensor, got NoneType"),
    ("a_pool", torch.randn(24, 8), T, "a_pool: is torch.float32, but x is torch.float64"),
    ("a_pool", torch.randn(24).double(), V, "a_pool: expected 2 dimensions"),
    ("a_pool", torch.randn(24, 7).double(), V, "a_index: 2 shards of 7 make 14"),
    ("b_pool", torch.randn(24, 5).half(), T, "b_pool: is torch.float16, but x is torch.float64"),
    ("b_pool", torch.empty(24, 5, device="meta").double(), V, "b_pool: is on meta"),
    ("a_index", torch.zeros(4, 2).long(), T, r"a_index: expected int32, .* shard_index\(\)"),
    ("a_index", torch.zeros(4, 2), T, "a_index: expected a tensor of integers, got torch.float32"),
    ("a_index", [[0, 1]], T, "a_index: expected a tensor of integers, got list"),
    ("a_index", torch.zeros(4).int(), V, r"a_index: expected \[r, l\] or \[adapters, r, l\]"),
    ("a_index", torch.zeros(4, 2, device="meta").int(), V, "a_index: is on meta"),
    ("a_index", torch.zeros(3, 4, 2).int(), V, "b_index: has .*1, 4.* but a_index has .*3, 4"),
    ("b_index", torch.zeros(5, 3).int(), V, "b_index: has .*1, 5.* but a_index has .*1, 4"),
    ("b_index", torch.zeros(4, 3).bool(), T, "b_index: .*torch.bool"),
    ("scale", "2", T, "scale: expected a number or a tensor, got str"),
    ("scale", True, T, "scale: .*bool"),
    ("scale", torch.ones(2).double(), V, r"scale: expected torch.float64 of shape \(1,\)"),
    ("scale", torch.ones(1), V, "scale: expected torch.float64 .* got torch.float32"),
    ("adapters", [0] * 10, T, "adapters: .*got list"),
    ("adapters", torch.zeros(10), T, "ids: .*float32"),
    ("adapters", torch.zeros(9).long(), V, r"adapters: expected ids of shape \(10,\)"),
    ("adapters", torch.zeros(10, device="meta").long(), V, "adapters: is on meta"),
    ("adapters", group_by_adapter(torch.zeros(9).long(), 1), V, "adapters: groups of 9 rows"),
    ("adapters", group_by_adapter(torch.zeros(10).long(), 2), V, "over 2 adapters"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(name, value, error, message):
    made = problem()
    if torch.is_tensor(value) and value.device.type != "meta":
        value = value.to(DEVICE)
    made[name] = value
    with pytest.raises(error, match=message) as raised:
        shard_lora(**made)
    assert type(raised.value) is error


def test_empty_dimensions_and_tensors_without_data():
    x, table = torch.ones(2, 3, 8, device=DEVICE), torch.zeros(2, 1, device=DEVICE).int()
    pool, none = torch.ones(4, 8, device=DEVICE), torch.ones(4, 0, device=DEVICE)
    assert shard_lora(x, x[..., :0], pool, none, table, table).shape == (2, 3, 0)
    assert torch.equal(shard_lora(x[..., :0], x, none, pool, table, table), x)
    meta = [t.to("meta") for t in (x, x, pool, pool, table, table)]
    assert shard_lora(*meta).shape == x.shape


def test_ids_of_a_single_row():
    x, table = torch.ones(8, device=DEVICE), torch.zeros(1, 2, 1, device=DEVICE).int()
    pool = torch.ones(4, 8, device=DEVICE)
    got = shard_lora(x, x, pool, pool, table, table, adapters=torch.tensor(0, device=DEVICE))
    assert torch.equal(got, 17 * x)
    with pytest.raises(ValueError, match=r"ids of shape \(\) or \(\), got \(8,\)"):
        shard_lora(x, x, pool, pool, table, table, adapters=torch.zeros(8, device=DEVICE).int())


def test_tables_of_several_adapters_need_ids():
    made = problem(adapters=3)
    del made["adapters"]
    with pytest.raises(ValueError, match="adapters: the index tables have 3 adapters; say which"):
        shard_lora(**made)


def test_lists_of_a_group_fit():
    made = problem()
    lists = [[made[k]] for k in ("base_out", "a_pool", "b_pool", "a_index", "b_index")]
    with pytest.raises(ValueError, match=r"one entry per target .*base_outs 1, a_pools 2"):
        shard_lora_group(made["x"], lists[0], lists[1] * 2, *lists[2:])
    with pytest.raises(ValueError, match="at least one target"):
        shard_lora_group(made["x"], [], [], [], [], [])
    with pytest.raises(ValueError, match=r"b_index\[1\]: .* ranks"):
        index = [made["b_index"], made["b_index"][:3]]
        shard_lora_group(made["x"], *[v * 2 for v in lists[:4]], index)


@on_cpu
def test_ops_refuse_what_does_not_fit():
    """The dispatcher ops are public, too: no call may read outside of a tensor."""
    made = {k: v.detach() if torch.is_tensor(v) else v for k, v in problem().items()}
    x, base, a, b, ai, bi, _ = made.values()
    ai, bi, none = ai[None], bi[None], (None, None, None, 1.0)
    h = torch.randn(10, 4, dtype=torch.float64)
    for call in (
        lambda: OPS.shard_lora(x, [base], [a], [b], [ai], [bi[..., :2]], *none),
        lambda: OPS.shard_lora(x, [base], [a], [b], [ai[:, :3]], [bi], *none),
        lambda: OPS.shard_lora(x[:, :7], [base], [a], [b], [ai], [bi], *none),
        lambda: OPS.shard_lora(x, [base[:3]], [a], [b], [ai], [bi], *none),
        lambda: OPS.shard_lora(x, [base], [a], [b], [ai.long()], [bi], *none),
        lambda: OPS.shard_lora(x, [base], [a, a], [b], [ai], [bi], *none),
        lambda: OPS.shard_lora(x, [base], [a.float()], [b], [ai], [bi], *none),
        lambda: OPS.shard_lora_decode(
            x, [base], [a], [b], [ai], [bi], torch.zeros(3).long(), None, 1.0
        ),
        lambda: OPS.shard_lora_grad_x([base], [a[:, :3]], [b[:, :4]], [ai], [bi], *none, True),
        lambda: OPS.shard_outer_(a, h[:, :3], x, ai, *none, True),
        lambda: OPS.shard_outer_(a, h.float(), x, ai, *none, True),
        lambda: OPS.shard_outer_(a, h, x[:, :8], ai, *none, True),
        lambda: OPS.shard_outer_(a.float(), h, x, ai, *none, True),
    ):
        with pytest.raises(RuntimeError):
            call()
