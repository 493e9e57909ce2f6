"""Batches whose rows use different adapters, in inference and in training."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

import tiny_llama as tiny
from peft import LoraConfig, get_peft_model
from tiny_llama import IDS
from weightshare.lora.tuner import mixed

NAMES = ["b", "__base__", "default", "c"]
# Other ranks, other shards (3 x 2 of 16), other modules.
OTHERS = {
    "b": {"r": 6, "shards": 2, "private_rank": 0, "alpha": 5.0},
    "c": {"target_modules": ["q_proj", "up_proj"], "r": 2},
}


def three(**options):
    model = tiny.adapted(**options)
    for seed, (name, changes) in enumerate(OTHERS.items()):
        tiny.add(model, name, seed, **{**options, **changes})
    return model


def alone(model, row, name):
    """What one row gives with its adapter active."""
    ids = IDS[row : row + 1]
    if name == "__base__":
        with model.disable_adapter():
            return model(ids).logits
    model.base_model.set_adapter(name)
    return model(ids).logits


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_rows_equal_those_of_their_adapters(task):
    model = three(task_type=task).eval()
    with torch.no_grad():
        got = model(IDS, adapter_names=NAMES).logits
        again = model(IDS, adapter_names=NAMES).logits
        wanted = torch.cat([alone(model, row, name) for row, name in enumerate(NAMES)])
    assert torch.equal(got, again)
    torch.testing.assert_close(got, wanted)
    assert len({tuple(row.flatten().tolist()) for row in got.round(decimals=4)}) == len(NAMES)
    assert model.base_model._running.batch is None


def test_training_gives_each_adapter_its_gradient():
    model = three().train()
    loss = model(IDS, adapter_names=NAMES).logits.square().sum()
    found = tiny.gradients(model, loss)
    wanted = {name: torch.zeros_like(grad) for name, grad in found.items()}
    for row, name in enumerate(NAMES):
        if name != "__base__":
            model.base_model.set_adapter(name)
            for key, grad in tiny.gradients(model, alone(model, row, name).square().sum()).items():
                wanted[key] += grad
    for key, grad in found.items():
        torch.testing.assert_close(grad, wanted[key])
        assert grad.abs().max() > 0


@pytest.mark.parametrize("names", [None, NAMES], ids=["one", "mixed"])
def test_gradients_repeat_bit_by_bit(names):
    model = tiny.adapted(torch.float32)
    for seed, (name, changes) in enumerate(OTHERS.items()):
        tiny.add(model, name, seed, **changes)
    runs = [tiny_gradients(model, names) for _ in range(2)]
    assert all(torch.equal(runs[0][name], grad) for name, grad in runs[1].items())


def test_only_named_adapters_are_touched():
    model = three()
    loss = model(IDS, adapter_names=["b", "b", "__base__", "b"]).logits.square().sum()
    for name, grad in tiny.gradients(model, loss).items():
        assert grad.eq(0).all() == (".b." not in name)
    model.base_model.set_adapter("b")  # the others are frozen now
    loss = model(IDS, adapter_names=NAMES).logits.square().sum()
    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".b." in name for name in trained)


def test_one_call_per_module_however_many_adapters(monkeypatch):
    from weightshare.lora.tuner import layer

    model, calls = three(), []
    monkeypatch.setattr(
        layer, "shard_lora", lambda *a, f=layer.shard_lora, **k: calls.append(1) or f(*a, **k)
    )
    groups = []
    monkeypatch.setattr(
        mixed, "group_by_adapter", lambda *a, f=mixed.group_by_adapter: groups.append(1) or f(*a)
    )
    model(IDS, adapter_names=NAMES)
    assert len(calls) == 4 * 4 and len(groups) == 1  # q, v, up and down of four layers


def test_copies_of_pools_are_kept_while_they_last(monkeypatch):
    model, made = three().eval(), []
    monkeypatch.setattr(
        mixed.Stack, "__init__", lambda s, *a, f=mixed.Stack.__init__: made.append(1) or f(s, *a)
    )
    with torch.no_grad():
        first = model(IDS, adapter_names=NAMES).logits
        count = len(made)
        assert count and torch.equal(model(IDS, adapter_names=NAMES).logits, first)
        assert len(made) == count
        tiny.fill(model, "b", 99)
        assert not torch.equal(model(IDS, adapter_names=NAMES).logits[0], first[0])
        assert len(made) == 2 * count
        model.delete_adapter("c")
    assert model.base_model._stacks is None


def test_absent_shards_and_all_rows_without_an_adapter():
    model = tiny.adapted().eval()
    tiny.add(model, "b", 4, shards=2, r=3)
    wanted = model(IDS, adapter_names=["b", "default", "b", "b"]).logits
    pool = model.base_model.mos_pools["b"]["q_proj"]
    with torch.no_grad():
        pool.a_index[1, 0, 0] = -1  # no shard: zeros, in every way of computing it
    got = model(IDS, adapter_names=["b", "default", "b", "b"]).logits
    torch.testing.assert_close(got[1], wanted[1])
    model.set_adapter("b")
    torch.testing.assert_close(got[2:], model(IDS[2:]).logits)
    model.merge_adapter()
    torch.testing.assert_close(got[2:], model(IDS[2:]).logits)
    model.unmerge_adapter()
    none = model(IDS, adapter_names=["__base__"] * len(IDS)).logits
    assert torch.equal(none, tiny.base()(IDS).logits)


def test_inference_mode_and_training_take_turns():
    model = three().eval()
    model.requires_grad_(False)
    with torch.inference_mode():
        wanted = model(IDS, adapter_names=NAMES).logits
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    out = model(inputs_embeds=embedded, adapter_names=NAMES).logits
    torch.testing.assert_close(out, wanted.clone())
    out.sum().backward()
    assert embedded.grad.abs().max() > 0


def test_dropout_of_each_adapter():
    model = tiny.adapted(dropout=0.5)
    tiny.add(model, "b", 4, dropout=0.0)
    model.train()
    names = ["default", "b", "__base__", "b"]
    torch.manual_seed(0)
    one, two = [model(IDS, adapter_names=names).logits for _ in range(2)]
    assert not torch.equal(one[0], two[0]) and torch.equal(one[1:], two[1:])
    batch = model.base_model._mixed_batch(names)
    x = torch.ones(4, 500, 8)
    dropped = batch.dropped(x)
    assert set(dropped[0].unique().tolist()) == {0.0, 2.0} and dropped[1:].eq(1).all()
    assert abs(dropped[0].mean() - 1) < 0.1
    tiny_model = model.eval()
    assert torch.equal(*[tiny_model(IDS, adapter_names=names).logits for _ in range(2)])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("names", [None, NAMES], ids=["one", "mixed"])
def test_gradient_checkpointing(reentrant, names):
    model = three().train()
    model.base_model.set_adapter(["default", "b", "c"])

    def run():
        return tiny_gradients(model, names)

    wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for key, grad in run().items():
        torch.testing.assert_close(grad, wanted[key])
    # Two passes before one backward: each is computed anew with its own batch.
    if names is not None:
        other = names[::-1]
        one, two = tiny_gradients(model, names), tiny_gradients(model, other)
        model.zero_grad()
        loss = sum(model(IDS, adapter_names=n).logits.square().sum() for n in (names, other))
        loss.backward()
        for key, p in model.named_parameters():
            if key in one:
                torch.testing.assert_close(p.grad, one[key] + two[key])


def tiny_gradients(model, names):
    model.zero_grad()
    model(IDS, adapter_names=names).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpoints_that_forget_the_batch_are_refused():
    model = three().train()
    for layer in model.get_base_model().model.layers:
        forward = layer.forward
        layer.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
    loss = model(IDS, adapter_names=NAMES).logits.sum()
    with torch.no_grad():  # an evaluation before backward
        model(IDS, adapter_names=NAMES)
        model(IDS)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()
    model(IDS).logits.sum().backward()


def test_generation():
    model = three().eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(input_ids=IDS[row : row + 1], **options)
        else:
            model.base_model.set_adapter(name)
            want = model.generate(input_ids=IDS[row : row + 1], **options)
        assert torch.equal(got[row : row + 1], want)
    beams = model.generate(input_ids=IDS, adapter_names=NAMES, num_beams=2, **options)
    assert beams.shape == got.shape


def test_modules_to_save_follow_the_rows():
    model = tiny.adapted(modules_to_save=["lm_head"])
    tiny.add(model, "b", 4, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(3)
    names = ["default", "b", "__base__", "b"]
    model.eval()
    got = model(IDS, adapter_names=names).logits
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(got[row : row + 1], model(IDS[row : row + 1]).logits)
    torch.testing.assert_close(got[2:3], tiny.base()(IDS[2:3]).logits)


def test_same_as_peft_lora():
    """Plain LoRA as MoS against PEFT's own mixed batches."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    plain = {"equivalent_rank": 4, "private_rank": 4, "shards": 1, **options}
    ours = tiny.adapted(**plain)
    tiny.add(ours, "b", 4, **plain)
    lora = get_peft_model(tiny.base(), LoraConfig(lora_alpha=16, **options))
    lora.add_adapter("b", LoraConfig(lora_alpha=16, **options))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_" in name:
                parts = name.split(".")
                pool = ours.base_model.mos_pools[parts[-2]][parts[6]]
                a, b = pool.matrices(int(parts[4]))
                p.copy_(a if parts[7] == "lora_A" else b)
    names = ["default", "b", "__base__", "b"]
    got, wanted = [m.eval()(IDS, adapter_names=names).logits for m in (ours, lora)]
    torch.testing.assert_close(got, wanted)


def test_bad_names():
    model = three().eval()
    with pytest.raises(
        ValueError, match=r"\['nope'\] given, but the adapters are \['default', 'b'"
    ):
        model(IDS, adapter_names=["b", "nope", "b", "b"])
    with pytest.raises(TypeError, match="expected a list of strings"):
        model(IDS, adapter_names="b")
    with pytest.raises(ValueError, match="adapter_names has 3 names, but a module got x of shape"):
        model(IDS, adapter_names=["b"] * 3)
    assert model.base_model._running.batch is None
    model.base_model.merge_adapter(["b"])
    with pytest.raises(ValueError, match=r"adapter_names cannot be used while \['b'\] are merged"):
        model(IDS, adapter_names=NAMES)
    model.base_model.unmerge_adapter()
    model.delete_adapter("b")
    with pytest.raises(ValueError, match=r"\['b'\] given"):
        model(IDS, adapter_names=NAMES)
