"""Patched transformers blocks and models: values, gradients and routing as in their own code."""

import copy
import importlib
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers_blocks import BLOCKS, SIZES, Doubled, block, modeling, transformers
from weightshare.integrations.gates import gate_of
from weightshare.integrations.transformers import Patched, patch, register, unpatch
from weightshare.moe import LoadBalancer

WHOLE = dict(vocab_size=60, hidden_size=32, intermediate_size=16, moe_intermediate_size=16,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
CAUSAL = {
    "DeepseekV3": dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1,
                       q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
                       v_head_dim=8, num_key_value_heads=4),
    "Qwen3Moe": dict(num_experts=8, norm_topk_prob=True),
    "Mixtral": dict(num_local_experts=8),
    "Olmoe": dict(num_experts=8),
}  # fmt: skip


def routed(module, x):
    """Experts of each token, ascending, by the module's own gate."""
    gate = next(child for child in module.modules() if gate_of(child) or hasattr(child, "top_k"))
    return gate(x)[2].sort(1).values


def clear_tokens(model, dtype, count=40):
    """Tokens that go to the same experts in every dtype."""
    x = torch.randn(4 * count, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    with torch.no_grad():
        low = routed(block(model, dtype).gate, x)
        with Doubled():
            exact = routed(block(model, dtype).double().gate, x.double())
    kept = x[(low == exact).all(1)]
    assert len(kept) >= count
    return kept[:count].view(2, count // 2, -1)


def values_and_gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(y, [x, *named.values()], g.to(x.dtype).to(y.dtype))
    return dict(zip(["output", "x", *named], [y, *grads], strict=True))


def error(got, wanted):
    """Largest deviation, relative to the largest wanted value."""
    return ((got.double() - wanted).abs().max() / wanted.abs().max()).item()


def check_against(ours, theirs, exact, dtype):
    """The project's rule: at most twice the error that their code has in the same dtype."""
    eps = torch.finfo(dtype).eps
    floor = 8 * eps if dtype == torch.float32 else eps  # as in test_ops.py: a few roundings
    for name, wanted in exact.items():
        assert ours[name].dtype == theirs[name].dtype == dtype, name
        allowed = max(2 * error(theirs[name], wanted), floor)
        assert error(ours[name], wanted) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", BLOCKS)
def test_block_equals_theirs(model, dtype):
    """Forward and all gradients, patched and as an experts implementation."""
    x = clear_tokens(model, dtype)
    with Doubled():
        exact = values_and_gradients(block(model, dtype).double(), x.double())
    found = {}
    for name in ("eager", "grouped_mm", "weightshare", "patched"):
        made = block(model, dtype)
        if name == "patched":
            assert patch(made) == Patched(1, 1, {})
        else:
            made.experts.config._experts_implementation = name
        found[name] = values_and_gradients(made, x)
    for theirs in ("eager", "grouped_mm"):
        for ours in ("weightshare", "patched"):
            check_against(found[ours], found[theirs], exact, dtype)


# -- Whole models --------------------------------------------------------------------------------


def causal(kind, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**WHOLE, **CAUSAL[kind], **more})
    config._experts_implementation = "eager"
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


TOKENS = torch.arange(1, 25).view(2, 12)
EVERY = pytest.mark.parametrize("kind", CAUSAL)


@EVERY
def test_whole_model_there_and_back(kind):
    model = causal(kind)
    before, keys = model(TOKENS).logits, list(model.state_dict())
    parameters = dict(model.named_parameters())
    wanted = model.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False)

    done = patch(model)
    assert done.gates == done.experts == (1 if kind == "DeepseekV3" else 2) and not done.skipped
    assert patch(model) == done
    torch.testing.assert_close(model(TOKENS).logits, before)
    assert torch.equal(model.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False), wanted)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())

    assert unpatch(model) == 2 * done.gates and unpatch(model) == 0
    assert torch.equal(model(TOKENS).logits, before)


@EVERY
def test_router_logits_and_auxiliary_loss(kind):
    more = {} if kind == "DeepseekV3" else {"output_router_logits": True}
    model = causal(kind, **more)
    wanted = model(TOKENS, labels=TOKENS, output_router_logits=True)
    patch(model)
    got = model(TOKENS, labels=TOKENS, output_router_logits=True)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.router_logits, wanted.router_logits)
    if more:
        torch.testing.assert_close(got.aux_loss, wanted.aux_loss)


@pytest.mark.parametrize("kind", ["DeepseekV3", "Mixtral"])
def test_checkpoint_round_trip(kind, tmp_path):
    model = causal(kind)
    model.save_pretrained(tmp_path / "before")
    patch(model)
    model.save_pretrained(tmp_path / "after")
    names = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "after", experts_implementation="weightshare")
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    model.load_state_dict(loaded.state_dict())


def test_experts_implementation_is_set_and_taken_back():
    model = causal("Qwen3Moe")
    before = model(TOKENS).logits
    model.set_experts_implementation("weightshare")
    torch.testing.assert_close(model(TOKENS).logits, before)
    model.set_experts_implementation("eager")
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("kind", ["DeepseekV3", "Olmoe"])
def test_training_step_with_both_checkpoints(kind):
    grads = []
    for mode in (None, True, False):
        model = causal(kind).train()
        patch(model)
        if mode is not None:
            model.gradient_checkpointing_enable({"use_reentrant": mode})
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert any(g is not None for g in grads[0])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


@pytest.mark.parametrize(("model", "patched"), [("deepseek_v3", True), ("qwen2_moe", False)])
def test_compiles_whole(model, patched):
    made = block(model)
    if patched:
        patch(made)
    else:
        made.experts.config._experts_implementation = "weightshare"
    x = torch.randn(2, 10, 64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    wanted, got = values_and_gradients(made, x), values_and_gradients(compiled, x)
    torch._dynamo.reset()
    torch.testing.assert_close(list(got.values()), list(wanted.values()))


def test_whole_model_compiles_for_all_lengths(traced):
    model = causal("Qwen3Moe")
    patch(model)
    compiled = traced(model)
    with torch.no_grad():
        for count in (12, 5, 7):
            x = TOKENS[:, :count].clone()
            torch.testing.assert_close(compiled(x).logits, model(x).logits)
    assert len(traced.graphs) == 1


def test_autocast_returns_what_theirs_does():
    for model in ("deepseek_v3", "mixtral"):
        made, x = block(model), torch.randn(2, 10, 64)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = made(x)
            patch(made)
            got = made(x)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)


def test_copies_and_pickles():
    made = block("deepseek_v3")
    patch(made)
    x = torch.randn(2, 5, 64)
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(x), made(x))
        assert isinstance(other.gate, modeling("deepseek_v3").DeepseekV3TopkRouter)
        assert unpatch(other) == 2 and type(other.gate).forward is not type(made.gate).forward


def test_hooks_see_the_chosen_experts():
    made, seen = block("mixtral"), []
    made.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    x = torch.randn(1, 6, 64)
    made(x)
    patch(made)
    made(x)
    assert torch.equal(seen[0], seen[1])


def test_float16_bias_is_read_in_float32():
    """A whole model cast to bfloat16 has a bias in bfloat16, which their arithmetic promotes."""
    made = block("deepseek_v3").bfloat16()
    assert made.gate.e_score_correction_bias.dtype == torch.bfloat16
    x = torch.randn(1, 6, 64, dtype=torch.bfloat16)
    wanted = made(x)
    patch(made)
    torch.testing.assert_close(made(x), wanted, rtol=0.02, atol=0.02)


def test_load_balancer_counts_and_moves_a_patched_model():
    """The same counts and biases as unpatched, with checkpointing, over two steps."""
    found = []
    for patched in (False, True):
        model = causal("DeepseekV3").train()
        if patched:
            patch(model)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        balancer = LoadBalancer(model, rate=0.01)
        for _ in range(2):
            model(TOKENS, labels=TOKENS).loss.backward()
            balancer.step()
        (block,) = (m for m in model.modules() if hasattr(m, "shared_experts"))
        found.append((block.gate.e_score_correction_bias, balancer.max_violation()))
        assert found[-1][0].any()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# -- Bad input -----------------------------------------------------------------------------------


def test_nothing_known_lists_what_is():
    with pytest.raises(ValueError, match=r"Linear has no MoE block.*deepseek_v3.*mixtral"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a module, got str"):
        patch("model")


def test_replaced_forward_is_refused_before_anything_changes():
    made = block("mixtral")
    made.experts.forward = made.experts.forward
    with pytest.raises(TypeError, match=r"experts: its forward.*experts_implementation"):
        patch(made)
    assert type(made.gate).forward is modeling("mixtral").MixtralTopKRouter.forward


def test_hooks_of_accelerate_call_the_new_forward():
    """They keep the bound forward of before and put a function of theirs in its place."""
    made, x = block("mixtral"), torch.randn(1, 6, 64)
    wanted = made(x)
    gate = made.gate
    gate._old_forward = gate.forward
    gate.forward = lambda *args: gate._old_forward(*args)
    patch(made)
    assert gate._old_forward.__func__ is type(gate).forward
    torch.testing.assert_close(made(x), wanted)
    unpatch(made)
    assert torch.equal(made(x), wanted)


def test_class_swapped_since_must_be_undone_first():
    made = block("mixtral")
    patch(made)
    kind = type(made.gate)
    made.gate.__class__ = type("FSDPGate", (kind,), {})
    with pytest.raises(TypeError, match="gate: is a FSDPGate"):
        unpatch(made)
    made.gate.__class__ = kind
    assert unpatch(made) == 2


@pytest.mark.parametrize("what", ["missing", "no interface", "other interface"])
def test_missing_or_old_transformers(monkeypatch, what):
    if what == "missing":
        monkeypatch.setitem(sys.modules, "transformers", None)
    elif what == "no interface":
        monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
        monkeypatch.delattr(transformers.integrations, "moe", raising=False)
    else:
        moe = importlib.import_module("transformers.integrations.moe")
        monkeypatch.setattr(moe, "use_experts_implementation", lambda kind: kind)
    words = "not installed" if what == "missing" else r"transformers \d.* is too old"
    for call in (register, lambda: patch(nn.Linear(1, 1))):
        with pytest.raises(ImportError, match=rf"{words}.*pip install -U"):
            call()
