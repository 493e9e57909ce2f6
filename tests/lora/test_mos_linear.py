"""MoSLinear against plain PyTorch in float64; merging; sharing."""

import copy

import pytest
import torch
from torch import nn
from weightshare.lora import MoSLinear, ShardPlan, ShardPool


def layers(dtype=torch.float64, plan=None, dropout=0.0, count=4):
    torch.manual_seed(0)
    plan = plan or ShardPlan(4, 2, 1, 4, count)
    pool = ShardPool(16, 16, plan, dtype=dtype)
    nn.init.normal_(pool.b, std=0.1)
    options = {"dropout": dropout}
    bases = [nn.Linear(16, 16, dtype=dtype) for _ in range(count)]
    return nn.Sequential(*[MoSLinear(b, pool, n, **options) for n, b in enumerate(bases)])


def expected(model, x):
    for layer in model:
        a, b = layer.pool.matrices(layer.layer)
        x = layer.base(x) + 4.0 * (x @ a.t()) @ b.t()  # alpha / r = 16 / 4
    return x


def test_forward_and_gradients():
    model = layers()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.pool.a",
        "0.pool.b",
    ]
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, model[0].pool.a, model[0].pool.b]
    weight = torch.randn(3, 5, 16, dtype=torch.float64)
    ours, theirs = model(x), expected(model, x)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad((ours * weight).sum(), leaves)
    wanted = torch.autograd.grad((theirs * weight).sum(), leaves)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_exact_unmerge(dtype):
    model = layers(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    before = [layer.base.weight.clone() for layer in model]
    with torch.no_grad():
        y = model(x)
        for layer in model:
            assert layer.merge() is layer and layer.merged
            layer.merge()  # again changes nothing
        merged = model(x)
        for layer in model:
            layer.unmerge().unmerge()
        assert all(
            torch.equal(layer.base.weight, weight)
            for layer, weight in zip(model, before, strict=True)
        )
        assert torch.equal(model(x), y)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(merged, y, rtol=tolerance, atol=tolerance * y.abs().max().item())
    assert not torch.equal(merged, y) or dtype == torch.float64


def test_fp32_pools_serve_a_lower_base():
    model = layers(torch.bfloat16).to(torch.bfloat16)
    model[0].pool.float()
    y = model(torch.randn(5, 16, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model[0].pool.a.grad.dtype == torch.float32


def test_dropout_is_of_the_update_alone():
    model = layers(dropout=1.0)
    x = torch.randn(5, 16, dtype=torch.float64)
    plain = nn.Sequential(*[layer.base for layer in model])
    assert torch.equal(model(x), plain(x))
    torch.testing.assert_close(model.eval()(x), expected(model, x))


def test_state_and_copies_share_one_pool():
    model = layers()
    clone = copy.deepcopy(model)
    assert clone[0].pool is clone[3].pool and clone[0].pool is not model[0].pool
    clone.load_state_dict(model.state_dict())
    assert len(list(model.parameters())) == 2 * len(model) + 2


def test_plain_lora_is_the_case_of_no_sharing():
    model = layers(plan=ShardPlan(3, 3, 3, 1, 4))
    pool = model[0].pool
    for number in range(4):
        a, b = pool.matrices(number)
        assert torch.equal(a, pool.a[3 * number : 3 * number + 3])
        assert torch.equal(b.t(), pool.b[3 * number : 3 * number + 3])


def test_bad_input():
    pool = ShardPool(16, 16, ShardPlan(4, 2, 1, 4, 4))
    with pytest.raises(ValueError, match="base has out_features 8, but pool 16"):
        MoSLinear(nn.Linear(16, 8), pool, 0)
    with pytest.raises(ValueError, match="layer 4 is outside the pool's 4 layers"):
        MoSLinear(nn.Linear(16, 16), pool, 4)
    with pytest.raises(TypeError, match="merge needs an"):
        MoSLinear(nn.Identity(), pool, 0).merge()
