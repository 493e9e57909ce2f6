"""MoS in PEFT: injection, sharing, counts, adapters, bad input."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
import tiny_llama as tiny
from peft import PeftType, get_peft_model
from tiny_llama import IDS
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from weightshare.lora import MoSConfig, MoSModel, ShardPool
from weightshare.lora.tuner.layer import MoSLayer
from weightshare.lora.tuner.register import register

SIZES = {
    "llama2_7b": (4_997_120, {"intermediate_size": 11008}),
    "llama3_8b": (5_242_880, {"intermediate_size": 14336, "num_key_value_heads": 8}),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_real_models(name):
    wanted, sizes = SIZES[name]
    settings = LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=32000, **sizes)
    with torch.device("meta"):
        base = LlamaForCausalLM(settings)
    model = get_peft_model(base, MoSConfig(target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] == wanted
    assert len(model.base_model.mos_pools["default"]) == 7


def test_forward_and_gradients_equal_the_definition():
    """Against weights put together by hand, in float64, of a model with dense weights."""
    model = tiny.adapted()
    dense = tiny.base()
    pools = {
        kind: {part: getattr(pool, part).detach().clone() for part in ("a", "b")}
        for kind, pool in model.base_model.mos_pools["default"].items()
    }
    leaves = [part.requires_grad_() for mine in pools.values() for part in mine.values()]
    weights = {}
    for name, module in dense.named_modules():
        kind = name.rpartition(".")[2]
        if kind in pools:
            layer = int(name.split(".")[2])
            shard = model.base_model.mos_pools["default"][kind]
            a = pools[kind]["a"][shard.a_index[layer].long()].reshape(4, -1)
            b = pools[kind]["b"][shard.b_index[layer].long()].reshape(4, -1)
            weights[name + ".weight"] = module.weight.detach() + 16 / 4 * b.t() @ a
    kept = {"input_ids": IDS, "labels": IDS}
    wanted = torch.func.functional_call(dense, weights, kwargs=kept)
    got = model(**kept)
    torch.testing.assert_close(got.logits, wanted.logits)
    found = tiny.gradients(model, got.loss)
    for n, grad in enumerate(torch.autograd.grad(wanted.loss, leaves)):
        kind, part = list(pools)[n // 2], "ab"[n % 2]
        torch.testing.assert_close(found[f"base_model.mos_pools.default.{kind}.{part}"], grad)


def test_autocast():
    model = tiny.adapted(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS)
        rows = model(IDS, adapter_names=["default"] * len(IDS)).logits
        found = tiny.gradients(model, out.loss)
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(rows, out.logits, rtol=0.05, atol=0.1)
    for grad in found.values():
        assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().max() > 0


def test_pools_are_shared_and_counted_once(capsys):
    model = tiny.adapted()
    layers = [m for m in model.modules() if isinstance(m, MoSLayer)]
    assert len(layers) == 12
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        f"base_model.mos_pools.default.{kind}.{part}"
        for kind in ("q_proj", "v_proj", "down_proj")
        for part in "ab"
    ]
    assert [key for key in model.state_dict() if key in trained] == trained
    wanted = 2 * 4 * ((32 + 32) + (32 + 16) + (48 + 32))
    assert model.get_nb_trainable_parameters()[0] == wanted
    model.print_trainable_parameters()
    assert f"trainable params: {wanted:,}" in capsys.readouterr().out
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    assert len(optimizer.param_groups[0]["params"]) == 6
    for layer in layers:  # layers in the model's order, each with its own table
        assert layer.pool_of("default") is model.base_model.mos_pools["default"][layer.key[0]]
    numbers = [layer.mos_layer["default"] for layer in layers]
    assert sorted(numbers) == sorted([*range(4)] * 3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    clone = copy.deepcopy(model)
    tiny.fill(clone, seed=9)
    assert not torch.equal(clone(IDS).logits, model(IDS).logits)
    assert clone.base_model.mos_pools["default"]["q_proj"] is next(
        m for m in clone.modules() if isinstance(m, MoSLayer)
    ).pool_of("default")


def test_untrained_adapter_changes_nothing():
    base = tiny.base()
    wanted = base(IDS).logits
    model = get_peft_model(base, tiny.config())
    assert torch.equal(model(IDS).logits, wanted)
    for pool in model.base_model.mos_pools["default"].values():
        bound = pool.in_features**-0.5
        assert pool.b.eq(0).all() and 0.8 * bound < pool.a.abs().max() <= bound


def test_tables_follow_from_seed_and_type():
    tables = {
        seed: [
            pool.a_index
            for pool in tiny.adapted(seed=seed).base_model.mos_pools["default"].values()
        ]
        for seed in (0, 1)
    }
    again = tiny.adapted().base_model.mos_pools["default"]
    for pool, table in zip(again.values(), tables[0], strict=True):
        assert torch.equal(pool.a_index, table) and not torch.equal(pool.a_index, pool.b_index)
    assert not torch.equal(tables[0][0], tables[0][1])
    assert not torch.equal(tables[0][0], tables[1][0])


def test_registration_is_idempotent():
    register()
    register()
    kind = PeftType["MOS"]
    assert kind is PeftType.MOS is PeftType("MOS") and kind == "MOS" and "MOS" in list(PeftType)
    assert isinstance(kind, PeftType) and list(PeftType).count("MOS") == 1
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] is MoSModel
    assert copy.deepcopy(tiny.config()).peft_type is kind


RUN = """
import sys
import weightshare.lora
from weightshare.lora import MoSLinear, ShardPlan
import weightshare.lora.tuner.files
assert not any(name.split('.')[0] in ('peft', 'transformers') for name in sys.modules)
sys.modules['peft'] = None
for name in ('MoSConfig', 'MoSModel', 'export_lora', 'swap_adapter'):
    try:
        getattr(weightshare.lora, name)
    except ImportError as error:
        assert f'{name} needs PEFT 0.21 or later' in str(error)
        assert 'weightshare-kernels[peft]' in str(error)
    else:
        raise AssertionError(name)
"""


def test_peft_is_imported_for_the_tuner_alone():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_several_adapters():
    model = tiny.adapted()
    first = model(IDS).logits
    before = [p.requires_grad for p in model.parameters()]
    model.add_adapter("b", tiny.config(r=6, shards=2, private_rank=0, target_modules=["q_proj"]))
    assert torch.equal(model(IDS).logits, first)
    pools = model.base_model.mos_pools
    assert [
        p.requires_grad
        for p in model.parameters()
        if not any(p is q for q in pools["b"].parameters())
    ] == before
    assert not any(p.requires_grad for p in pools["b"].parameters())
    tiny.fill(model, "b", 5)
    model.set_adapter("b")
    second = model(IDS).logits
    assert not torch.equal(second, first)
    assert all(p.requires_grad for p in pools["b"].parameters())
    assert not any(p.requires_grad for p in pools["default"].parameters())
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, tiny.base()(IDS).logits)
    assert torch.equal(model(IDS).logits, second)
    model.base_model.set_adapter(["default", "b"])
    both = model(IDS).logits
    assert not torch.equal(both, first) and not torch.equal(both, second)
    status = model.get_model_status()
    assert status.available_adapters == ["b", "default"] and status.peft_types["b"] == "MOS"
    assert status.requires_grad == {"default": True, "b": True}
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    model.delete_adapter("b")
    assert "b" not in pools and torch.equal(model(IDS).logits, first)
    assert not any(".b." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="b"):
        model.set_adapter("b")


class Mixed(nn.Module):
    """Modules of several kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.conv1d = nn.ModuleList([Conv1D(12, 16), Conv1D(12, 12)])
        self.attention = nn.MultiheadAttention(12, 2)
        self.conv = nn.Conv2d(1, 1, 1)
        self.up, self.c_proj = nn.Linear(12, 16), Conv1D(16, 16)

    def forward(self, x):
        y = self.up(self.conv1d[0](self.first(x)))
        return y + self.c_proj(y)


def test_conv1d_of_transformers():
    torch.manual_seed(0)
    base = Mixed().double()
    model = get_peft_model(base, tiny.config(target_modules=["c_proj"], r=2, private_rank=1))
    tiny.fill(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    pool = model.base_model.mos_pools["default"]["c_proj"]
    a, b = pool.matrices(0)
    y = base.up(base.conv1d[0](base.first(x)))
    torch.testing.assert_close(model(x), y + base.c_proj.base_layer(y) + 8.0 * y @ a.t() @ b.t())
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"r": 8, "private_rank": 0, "equivalent_rank": 1},
         ["q_proj (4 of 32 -> 32)", "8 - 0 = 8 > (1 - 0) * 4 = 4"]),
        ({"shards": 5}, ["q_proj", "shards must divide in_features: 32 / 5"]),
        ({"target_modules": ["down_proj"], "shards": 32}, ["in_features: 48 / 32"]),
        ({"target_modules": ["q_proj", "nope"]}, ["['nope']", "not found", "'k_proj'"]),
        ({"target_modules": ["lm_head", "embed_tokens"]}, ["embed_tokens", "is Embedding"]),
    ],
)  # fmt: skip
def test_bad_configurations_for_a_model(changes, parts):
    with pytest.raises((ValueError, TypeError)) as error:
        get_peft_model(tiny.base(), tiny.config(**changes))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"equivalent_rank": 2, "private_rank": 2}, "r must be 2, too: got 4"),
        ({"private_rank": 3}, "private_rank must not exceed equivalent_rank"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_configurations(changes, part):
    with pytest.raises(ValueError) as error:
        tiny.config(**changes)
    assert part in str(error.value)


def test_bad_modules():
    for targets, error, part in (
        (["conv"], TypeError, "conv is Conv2d"),
        (["out_proj"], TypeError, "nn.MultiheadAttention"),
        (
            r"conv1d\.\d|first\.0",
            ValueError,
            "0 is 16 -> 12, but other modules named 0 are 8 -> 16",
        ),
    ):
        with pytest.raises(error, match=part):
            get_peft_model(Mixed(), tiny.config(target_modules=targets, r=2))


def test_failed_addition_leaves_the_model_alone():
    model = tiny.adapted()
    wanted, names = model(IDS).logits, list(model.state_dict())
    with pytest.raises(ValueError, match="shards must divide"):
        model.add_adapter("b", tiny.config(shards=7))
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names
    assert torch.equal(model(IDS).logits, wanted)
    assert isinstance(model.base_model.mos_pools["default"]["q_proj"], ShardPool)
