"""Merging and exact unmerging, of plain and of quantised layers; training on NF4."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import tiny_llama as tiny
from peft import PeftModel, get_peft_model
from tiny_llama import IDS
from weightshare.lora.tuner.layer import MoSLayer


def weights(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoSLayer)}
    return {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    model = tiny.adapted(dtype).eval()
    tiny.add(model, "b", 4, r=2)
    before, wanted = weights(model), model(IDS).logits
    model.merge_adapter()
    assert all(layer.merged for layer in model.modules() if isinstance(layer, MoSLayer))
    merged = model(IDS).logits
    tolerance = 1e-10 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(merged, wanted, rtol=tolerance, atol=tolerance)
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.base_model.merge_adapter(["b"])
    assert not torch.equal(model(IDS).logits, merged)
    model.unmerge_adapter()
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(model(IDS).logits, wanted)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, tiny.base(dtype)(IDS).logits, rtol=0, atol=0)
    assert torch.equal(model(IDS).logits, wanted)  # disabling has unmerged it


def test_merge_and_unload():
    model = tiny.adapted().eval()
    wanted = model(IDS).logits
    plain = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(plain(IDS).logits, wanted)
    assert not any(isinstance(m, MoSLayer) for m in plain.modules())
    assert plain.state_dict().keys() == tiny.base().state_dict().keys()
    back = tiny.adapted().unload()
    assert torch.equal(back(IDS).logits, tiny.base()(IDS).logits)


def test_merge_refuses_what_is_not_finite():
    model = tiny.adapted()
    before = weights(model)
    with torch.no_grad():
        model.base_model.mos_pools["default"]["v_proj"].b.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"merging \['default'\] into v_proj gives weights that"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


# -- Quantised base models -----------------------------------------------------------------------


def quantised(kind, nested=True):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.base(torch.float32, hidden=64)
    for module in model.model.layers.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                sizes = child.in_features, child.out_features
                if kind == "nf4":
                    new = bnb.nn.Linear4bit(
                        *sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32
                    )
                    new.weight = bnb.nn.Params4bit(
                        child.weight.data,
                        requires_grad=False,
                        quant_type="nf4",
                        compress_statistics=nested,
                    )
                else:
                    new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False)
                setattr(module, name, new.to("cpu"))
    return model


def dense(model):
    """The same model with the quantised weights as floats."""
    copy = tiny.base(torch.float32, hidden=64)
    for name, module in model.named_modules():
        if isinstance(module, MoSLayer):
            copy.get_submodule(name).weight.data = module.get_base_weight().float().clone()
    return copy


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_on_a_quantised_base(kind, tmp_path):
    model = get_peft_model(quantised(kind), tiny.config(target_modules="all-linear"))
    tiny.fill(model)
    base = model.get_base_model()
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    assert all(p.dtype == torch.float32 for p in model.base_model.mos_pools.parameters())
    reference = get_peft_model(dense(base), tiny.config(target_modules="all-linear"))
    tiny.fill(reference)
    loss, wanted = [m(IDS, labels=IDS).loss for m in (model, reference)]
    near = {"rtol": 1e-4, "atol": 1e-4} if kind == "nf4" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(loss, wanted, **near)
    found = tiny.gradients(model, loss)
    for name, grad in tiny.gradients(reference, wanted).items():
        assert (found[name] - grad).norm() < (0.001 if kind == "nf4" else 0.2) * grad.norm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(kind), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        names = ["default", "__base__", "default", "__base__"]
        rows = model(IDS, adapter_names=names).logits
        torch.testing.assert_close(rows[::2], model(IDS).logits[::2], rtol=1e-3, atol=1e-3)


def test_training_after_an_evaluation_of_nf4():
    """bitsandbytes packs weights for evaluation on some CPUs; gradients must not be lost by it."""
    model = get_peft_model(quantised("nf4"), tiny.config(target_modules="all-linear"))
    tiny.fill(model)
    before = tiny.gradients(model, model(IDS, labels=IDS).loss)
    with torch.no_grad():
        model.eval()(IDS)
    after = tiny.gradients(model, model.train()(IDS, labels=IDS).loss)
    for name, grad in before.items():
        assert (after[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("int8", False)])
@torch.no_grad()
def test_merging_into_a_quantised_base(kind, nested):
    model = get_peft_model(quantised(kind, nested), tiny.config()).eval()
    tiny.fill(model)
    for pool in model.base_model.mos_pools["default"].values():
        pool.b.mul_(0.3)
    wanted, before = model(IDS).logits, weights(model)
    with model.disable_adapter():
        base = model(IDS).logits
    model.merge_adapter()
    merged = model(IDS).logits
    assert (merged - wanted).norm() < 0.5 * (base - wanted).norm()
    model.unmerge_adapter()
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(model(IDS).logits, wanted)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(IDS).logits, merged, rtol=0.1, atol=0.1)
