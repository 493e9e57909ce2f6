"""Saving, loading, swapping and exporting adapters."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import safetensors.torch
import tiny_llama as tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import IDS, TARGETS
from weightshare.lora import MoSConfig, swap_adapter
from weightshare.lora.tuner import files

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """An adapter, the folder it was saved to, and what it gives."""
    model = tiny.adapted().eval()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter", model(IDS).logits


def same(one, other):
    return torch.equal(one, other)


def test_round_trip(saved):
    model, folder, wanted = saved
    config, tensors = files.load_adapter(folder)
    parts = ("a", "b", "a_index", "b_index")
    assert set(tensors) == {f"{kind}.{part}" for kind in TARGETS for part in parts}
    assert tensors["q_proj.a"].shape == (2 * 4 * 4, 32 // 4)
    assert tensors["q_proj.a_index"].shape == (4, 4, 4)
    assert tensors["q_proj.a_index"].dtype == torch.int32
    assert config["layers"] == {
        "q_proj": [4, 32, 32],
        "v_proj": [4, 32, 16],
        "down_proj": [4, 48, 32],
    }
    assert config["target_modules"] == sorted(TARGETS) and config["peft_type"] == "MOS"
    loaded = PeftModel.from_pretrained(tiny.base(), folder)
    assert same(loaded(IDS).logits, wanted)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny.base(), folder, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    trainable.train()(IDS, labels=IDS).loss.backward()


def test_tables_come_from_the_file_not_the_seed(saved):
    _, folder, wanted = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 99}))
    assert same(PeftModel.from_pretrained(tiny.base(), folder)(IDS).logits, wanted)


@pytest.mark.parametrize("name", ["b", "a", "q_proj", "a_index"])
def test_names_of_adapters_may_be_those_of_tensors(saved, tmp_path, name):
    model, folder, wanted = saved
    model.load_adapter(folder, name)
    tiny.fill(model, name, 8)
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(tiny.base(), tmp_path / "both")
    assert same(again(IDS).logits, wanted)
    again.load_adapter(tmp_path / "both" / name, name)
    again.set_adapter(name)
    model.set_adapter(name)
    assert same(again(IDS).logits, model(IDS).logits) and not same(model(IDS).logits, wanted)


def test_low_memory_loading(saved):
    _, folder, wanted = saved
    model = PeftModel.from_pretrained(tiny.base(), folder, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert same(model(IDS).logits, wanted)
    model.load_adapter(folder, "b", low_cpu_mem_usage=True)
    model.set_adapter("b")
    assert same(model(IDS).logits, wanted)


def test_modules_to_save(tmp_path):
    model = tiny.adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base(), tmp_path)
    assert same(again(IDS).logits, model(IDS).logits)


def test_lower_precision_is_kept_in_float32(tmp_path):
    model = tiny.adapted(torch.bfloat16)
    pool = model.base_model.mos_pools["default"]["q_proj"]
    assert pool.a.dtype == torch.float32
    y = model(IDS, labels=IDS)
    y.loss.backward()
    assert y.logits.dtype == torch.bfloat16 and pool.a.grad.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base(torch.bfloat16), tmp_path)
    assert torch.equal(again.base_model.mos_pools["default"]["q_proj"].a, pool.a)
    low = get_peft_model(tiny.base(torch.bfloat16), tiny.config(), autocast_adapter_dtype=False)
    assert low.base_model.mos_pools["default"]["q_proj"].a.dtype == torch.bfloat16
    low(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("where", ["weights", "config"])
def test_interrupted_save_leaves_the_old_files(saved, monkeypatch, where):
    model, folder, wanted = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}
    tiny.fill(model, seed=8)
    model.peft_config["default"].alpha = 3.0

    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of")
        raise OSError("disk full")

    replace = os.replace

    def refuse(old, new):
        if str(new).endswith("config.json"):
            raise OSError("disk full")
        replace(old, new)

    if where == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    now = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}
    if where == "config":
        now[WEIGHTS] = before[WEIGHTS]  # the new one, whole
    assert now == before
    again = PeftModel.from_pretrained(tiny.base(), folder)
    assert same(again(IDS).logits, wanted) == (where == "weights")


def test_other_methods_are_saved_by_peft_itself(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(files, "write_tensors", lambda *_: called.append(1))
    model = get_peft_model(tiny.base(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).exists() and not called


def test_adapter_of_another_base(saved):
    _, folder, _ = saved
    path = folder / "adapter_config.json"
    named = {**json.loads(path.read_text()), "base_model_name_or_path": "some/model"}
    path.write_text(json.dumps(named))
    for other in (tiny.base(layers=3), tiny.base(hidden=64)):
        with pytest.raises(ValueError, match=r"another base model \(some/model\)") as error:
            PeftModel.from_pretrained(other, folder)
        assert "q_proj: 4 of 32 -> 32" in str(error.value)
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, MoSConfig)
    config.layers = None
    get_peft_model(tiny.base(hidden=64), config)


def changed(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: [t.pop(k) for k in list(t) if "v_proj" in k], "lacks pools for ['v_proj']"),
        (lambda t: t.update({"o_proj.a": t["q_proj.a"].clone()}), "has pools for ['o_proj']"),
        (lambda t: t.pop("q_proj.b"), "missing ['q_proj.b']"),
        (lambda t: t.update({"q_proj.b": t["q_proj.b"][:8].clone()}), "has shape (8, 8)"),
        (lambda t: t.update({"q_proj.b": t["q_proj.b"].long()}), "got torch.int64"),
        (lambda t: t.update({"q_proj.b_index": t["q_proj.b_index"].float()}), "got torch.float32"),
        (lambda t: t["q_proj.b_index"].fill_(32), "q_proj.b_index: shard 32 is outside the pool"),
        (lambda t: t["v_proj.a_index"].fill_(-2), "v_proj.a_index: shard -2 is outside"),
    ],
)  # fmt: skip
def test_bad_files(saved, change, part):
    model, folder, wanted = saved
    changed(folder, change)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(tiny.base(), folder)
    assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        swap_adapter(model, "default", folder)
    assert part in str(error.value) and same(model(IDS).logits, wanted)


# -- Swapping ----------------------------------------------------------------------------------


def test_swap_in_place(saved, tmp_path):
    model, _, first = saved
    other = tiny.adapted(seed=7, alpha=8.0, dropout=0.5).eval()
    tiny.fill(other, seed=8)
    other.save_pretrained(tmp_path / "other")
    places = {name: t.data_ptr() for name, t in model.state_dict().items()}
    swap_adapter(model, "default", tmp_path / "other")
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == places
    assert same(model(IDS).logits, other(IDS).logits) and not same(model(IDS).logits, first)
    names = ["default"] * len(IDS)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, adapter_names=names).logits, other(IDS).logits)
    assert model.peft_config["default"].alpha == 8.0
    model.save_pretrained(tmp_path / "again")
    assert files.load_adapter(tmp_path / "again")[0]["seed"] == 7


def test_swap_refusals(saved, tmp_path):
    model, folder, wanted = saved
    tiny.adapted(r=2).save_pretrained(tmp_path / "rank")
    with pytest.raises(ValueError, match=r"q_proj.a_index: the adapter has shape \(4, 2, 4\)"):
        swap_adapter(model, "default", tmp_path / "rank")
    with pytest.raises(ValueError, match="there is no MoS adapter 'b'"):
        swap_adapter(model, "b", folder)
    get_peft_model(tiny.base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter of type LORA, not MOS"):
        swap_adapter(model, "default", tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        swap_adapter(model, "default", folder)
    model.unmerge_adapter()
    assert same(model(IDS).logits, wanted)
