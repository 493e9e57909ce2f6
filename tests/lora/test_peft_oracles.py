"""MoS against code that was written by others: PEFT's LoRA and its VB-LoRA with topk=1."""

import json

import pytest
import torch

pytest.importorskip("peft")

import tiny_llama as tiny
from peft import (
    LoraConfig,
    PeftModel,
    VBLoRAConfig,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny_llama import IDS
from weightshare.lora import export_lora

from weightshare_kernels import shard_lora


def logits_and_gradient(model, **kwargs):
    """What a model gives, and the gradient of its loss by the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    out = model(inputs_embeds=embedded, labels=IDS, **kwargs)
    return out.logits, *torch.autograd.grad(out.loss, [embedded])


CHANGES = [{}, {"r": 3, "alpha": 5.0, "shards": 2}, {"target_modules": "all-linear"}]


@pytest.mark.parametrize("changes", CHANGES)
def test_exported_adapter_in_peft(tmp_path, changes):
    model = tiny.adapted(**changes).eval()
    wanted = logits_and_gradient(model)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(tiny.base(), tmp_path, is_trainable=True)
    for got, want in zip(logits_and_gradient(lora.eval()), wanted, strict=True):
        torch.testing.assert_close(got, want)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = changes.get("r", 4)
    assert config["peft_type"] == "LORA" and config["r"] == rank and config["bias"] == "none"
    assert config["lora_alpha"] == changes.get("alpha", 16)
    assert not config["use_rslora"] and not config["use_dora"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (rank, 32)
    assert tensors[key.format("B")].shape == (32, rank)
    assert len(tensors) == 2 * 4 * (3 if "target_modules" not in changes else 7)


def test_gradients_of_an_exported_adapter_are_those_of_the_shards(tmp_path):
    """LoRA's gradients, added up by the tables, are those of the pools."""
    model = tiny.adapted()
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(tiny.base(), tmp_path, is_trainable=True)
    found = tiny.gradients(model, model(IDS, labels=IDS).loss)
    lora(IDS, labels=IDS).loss.backward()
    for kind, pool in model.base_model.mos_pools["default"].items():
        for part, index in (("a", pool.a_index), ("b", pool.b_index)):
            total = torch.zeros_like(getattr(pool, part))
            for name, p in lora.named_parameters():
                if f"{kind}.lora_{part.upper()}" in name:
                    table = index[int(name.split(".")[4])].flatten().long()
                    rows = p.grad if part == "a" else p.grad.t()
                    total.index_add_(0, table, rows.reshape(-1, total.shape[1]))
            torch.testing.assert_close(found[f"base_model.mos_pools.default.{kind}.{part}"], total)


def test_export_names_modules_where_their_ends_do_not_tell(tmp_path):
    model = tiny.adapted(layers_to_transform=[1, 3], r=2)
    export_lora(model, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 6 and "model.layers.1.self_attn.q_proj" in targets
    lora = PeftModel.from_pretrained(tiny.base(), tmp_path).eval()
    torch.testing.assert_close(lora(IDS).logits, model.eval()(IDS).logits)


def test_export_of_what_is_not_there(tmp_path):
    model = tiny.adapted()
    with pytest.raises(ValueError, match="there is no 'b', only"):
        export_lora(model, tmp_path, "b")
    tiny.add(model, "b", 4)
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="which of the active adapters"):
        export_lora(model, tmp_path)


def test_conversion_by_peft():
    """PEFT's own conversion decomposes the updates; at their rank it loses nothing."""
    model = tiny.adapted().eval()
    config, tensors = convert_to_lora(model, rank=4)
    lora = get_peft_model(tiny.base(), config).eval()
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(lora(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_lower_precision_is_as_good_as_peft_lora(tmp_path, how):
    """Errors of outputs and gradients against float64, beside those of PEFT's LoRA."""
    model = tiny.adapted().eval()
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(tiny.base(), tmp_path).eval()
    if how == "bfloat16":
        for each in (model, lora):
            for module in each.modules():  # base and adapters hold what bfloat16 can hold
                for p in module.parameters(recurse=False):
                    p.data = p.data.bfloat16().double()
    exact = logits_and_gradient(model)
    errors = []
    for each in (model, lora):
        each.to(torch.float32 if how == "autocast" else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = logits_and_gradient(each)
        errors.append([(x - y).norm() for x, y in zip(found, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.5 * theirs


def test_plain_lora_is_peft_lora():
    """e = p = r and one shard per vector: the same weights, outputs and all gradients."""
    targets = ["q_proj", "down_proj"]
    options = {"r": 4, "target_modules": targets}
    ours = tiny.adapted(equivalent_rank=4, private_rank=4, shards=1, **options)
    lora = get_peft_model(tiny.base(), LoraConfig(lora_alpha=16, **options))
    assert ours.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()
    pools = ours.base_model.mos_pools["default"]

    def rows(name):
        kind, layer = name.split(".")[6], int(name.split(".")[4])
        part = "a" if "lora_A" in name else "b"
        return kind, part, slice(4 * layer, 4 * layer + 4)

    with torch.no_grad():
        for name, p in lora.named_parameters():
            if p.requires_grad:
                kind, part, where = rows(name)
                shards = getattr(pools[kind], part)[where]
                p.copy_(shards if part == "a" else shards.t())
    torch.testing.assert_close(ours(IDS).logits, lora(IDS).logits)
    found = tiny.gradients(ours, ours(IDS, labels=IDS).loss)
    lora(IDS, labels=IDS).loss.backward()
    for name, p in lora.named_parameters():
        if p.requires_grad:
            kind, part, where = rows(name)
            grad = found[f"base_model.mos_pools.default.{kind}.{part}"][where]
            torch.testing.assert_close(grad if part == "a" else grad.t(), p.grad)


def test_vblora_of_one_vector_is_a_gather():
    """One bank for A and B of all modules; PEFT picks each vector by an argmax."""
    torch.manual_seed(0)
    config = VBLoRAConfig(
        r=4, num_vectors=40, vector_length=8, topk=1, vblora_dropout=0.0,
        target_modules=["q_proj", "down_proj"], init_vector_bank_bound=0.5,
    )  # fmt: skip
    theirs = get_peft_model(tiny.base(torch.float32), config)
    bank = theirs.base_model.vblora_vector_bank["default"]
    ours = tiny.base(torch.float32)
    mine = bank.detach().clone().requires_grad_()
    for name, module in theirs.base_model.model.named_modules():
        if not hasattr(module, "vblora_logits_A"):
            continue
        a = module.vblora_logits_A["default"].argmax(-1)  # [r, d_in / 8]
        b = module.vblora_logits_B["default"].argmax(-1)  # [d_out / 8, r]
        tables = a.int(), b.t().contiguous().int()
        target = ours.get_submodule(name)

        def hook(module, args, y, tables=tables):
            return shard_lora(args[0], y, mine, mine, *tables, 1.0)

        target.register_forward_hook(hook)
    for model in (theirs, ours):
        model.eval()
    got, wanted = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    torch.testing.assert_close(got.logits, wanted.logits)
    (grad,) = torch.autograd.grad(got.loss, [mine])
    (want,) = torch.autograd.grad(wanted.loss, [bank])
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    assert want.abs().max() > 0
