"""Patched transformers blocks and models: values, gradients and routing as in their own code."""

import ast
import copy
import fnmatch
import importlib
import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peers import peer
from torch import nn
from torch.overrides import TorchFunctionMode

transformers = peer("transformers")

from weightshare.integrations.gates import GATES, fingerprint, gate_of  # noqa: E402
from weightshare.integrations.transformers import (  # noqa: E402
    Patched,
    patch,
    register,
    unpatch,
    unserved,
)
from weightshare.moe import LoadBalancer  # noqa: E402

MODELS = Path(transformers.__file__).parent / "models"
SIZES = dict(hidden_size=64, moe_intermediate_size=32, num_experts_per_tok=4)
BLOCKS = {
    "deepseek_v3": ("DeepseekV3MoE", dict(n_routed_experts=32, n_group=8, topk_group=4,
                                          n_shared_experts=1, routed_scaling_factor=2.5)),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", dict(num_experts=16, norm_topk_prob=True)),
    "mixtral": ("MixtralSparseMoeBlock", dict(num_local_experts=8, intermediate_size=32)),
    "olmoe": ("OlmoeSparseMoeBlock", dict(num_experts=16, intermediate_size=32)),
    "qwen2_moe": ("Qwen2MoeSparseMoeBlock", dict(num_experts=12, norm_topk_prob=False,
                                                 shared_expert_intermediate_size=24)),
}  # fmt: skip
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


class Doubled(TorchFunctionMode):
    """Runs code that asks for float32 in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def double(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(map(double, args))
        return function(*args, **{k: double(v) for k, v in (kwargs or {}).items()})


def config_of(model, **sizes):
    found = transformers.AutoConfig.for_model(model, **sizes)
    found._experts_implementation = "eager"
    return found


def modeling(model):
    return peer(f"transformers.models.{model}.modeling_{model}")


def block(model, dtype=torch.float32, seed=0, **more):
    """A block whose gate decides clearly, so that no dtype changes who is chosen."""
    name, sizes = BLOCKS[model]
    made = getattr(modeling(model), name)(config_of(model, **{**SIZES, **sizes, **more}))
    generator = torch.Generator().manual_seed(seed)
    for key, value in sorted(made.state_dict().items()):
        scale = 1.0 if "gate.weight" in key else value.shape[-1] ** -0.5
        value.copy_(scale * torch.randn(value.shape, generator=generator))
    return made.to(dtype)


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


# -- The table of gates --------------------------------------------------------------------------


def kinds_of(row):
    """Model and class of every gate in this transformers that a row names, and its source."""
    for kind in row.kinds:
        model, name = kind.split(".")
        for path in sorted(MODELS.glob(f"{model}/modeling_*.py")):
            source = path.read_text()
            for node in ast.parse(source).body if "Router" in source else ():
                if isinstance(node, ast.ClassDef) and fnmatch.fnmatchcase(node.name, name):
                    forward = next(f for f in node.body if getattr(f, "name", "") == "forward")
                    yield kind, path, node.name, ast.unparse(forward)


ROWS = pytest.mark.parametrize("row", GATES, ids=lambda row: row.kinds[0])


def gate(path, name, **options):
    """One gate, made from attributes that configurations share."""
    module = peer(f"transformers.models.{path.parent.name}.{path.stem}")
    config = SimpleNamespace(
        num_experts=16, num_local_experts=16, n_routed_experts=16, hidden_size=24,
        num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=True,
        topk_method="greedy", router_scaling_factor=1.5, routed_scaling_factor=2.5,
    )  # fmt: skip
    vars(config).update(options)
    made = getattr(module, name)(config)
    generator = torch.Generator().manual_seed(0)
    for value in made.state_dict().values():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return made


@ROWS
def test_row_names_gates_of_one_source(row):
    found = list(kinds_of(row))
    assert {kind for kind, *_ in found} == set(row.kinds)
    assert len({source for *_, source in found}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ROWS
def test_gate_equals_theirs(row, dtype):
    """Logits bit for bit, experts, and weights in the same dtype; gradients of both."""
    _, path, name, _ = next(iter(kinds_of(row)))
    for normalized in (True, False):
        theirs = gate(path, name, norm_topk_prob=normalized).to(dtype)
        ours = copy.deepcopy(theirs)
        assert patch(ours) == Patched(1, 0, {})
        x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        bias = (torch.linspace(-0.1, 0.1, 16),) if row.bias == "()" else ()
        results = []
        for module in (theirs, ours):
            value = x.clone().requires_grad_()
            logits, weights, experts = module(value, *bias)
            order = experts.argsort(1)
            weights, experts = weights.gather(1, order), experts.gather(1, order)
            g = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
            grads = torch.autograd.grad(weights, [value, module.weight], g.to(weights.dtype))
            results.append((logits, experts, weights, *grads))
        (logits, experts, *theirs), (our_logits, our_experts, *ours) = results
        assert torch.equal(logits, our_logits) and logits.dtype == our_logits.dtype
        # Scores that are equal in bfloat16 leave the choice open; theirs then takes any.
        same = (experts == our_experts).all(1)
        assert same.float().mean() > (0.9 if dtype == torch.bfloat16 else 0.99)
        torch.testing.assert_close(ours[0][same], theirs[0][same])
        if same.all():
            torch.testing.assert_close(ours[1:], theirs[1:])


def test_gate_with_other_code_is_not_taken():
    module = modeling("mixtral")

    class Own(module.MixtralTopKRouter):
        def forward(self, x):
            return super().forward(x * 2)

    class Named(module.MixtralTopKRouter):
        pass

    made = block("mixtral")
    made.gate.__class__ = Own
    assert patch(made) == Patched(0, 1, {}) and type(made.gate) is Own
    made = block("mixtral")
    made.gate.__class__ = Named
    assert patch(made) == Patched(1, 1, {})


def test_gate_of_another_version_is_not_taken(monkeypatch):
    """The same name, with other code or without an attribute that the table needs."""
    kind = modeling("mixtral").MixtralTopKRouter
    made = block("mixtral")
    del made.gate.top_k
    assert list(patch(made).skipped) == ["gate"]

    def forward(self, hidden_states):
        return None

    monkeypatch.setattr(kind, "forward", forward)
    done = patch(other := block("mixtral"))
    assert done[:2] == (0, 1) and "another version" in done.skipped["gate"]
    assert type(other.gate) is kind


def test_fingerprint_is_of_the_code_alone(tmp_path, monkeypatch):
    def define(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return fingerprint(importlib.import_module(name).Gate.forward)

    one = define("gate_one", "class Gate:\n    def forward(self, x):\n        return x + 1\n")
    same = define(
        "gate_same",
        "class Gate:\n  def forward(self,  x):\n\n    # a remark\n    return x + 1  # more\n",
    )
    other = define("gate_other", "class Gate:\n    def forward(self, x):\n        return x + 2\n")
    assert one == same != other
    assert fingerprint(torch.relu) == ""


def test_group_limited_greedy_of_deepseek_v2_stays():
    sizes = dict(n_routed_experts=8, n_group=4, topk_group=2, **SIZES)
    config = config_of("deepseek_v2", topk_method="greedy", **sizes)
    assert patch(modeling("deepseek_v2").DeepseekV2Moe(config)) == Patched(1, 1, {})
    config = config_of("deepseek_v2", topk_method="group_limited_greedy", **sizes)
    done = patch(modeling("deepseek_v2").DeepseekV2Moe(config))
    assert done[:2] == (0, 1) and "topk_method='group_limited_greedy'" in done.skipped["gate"]


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


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("model", ["deepseek_v3", "qwen3_moe"])
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


# -- Experts of other kinds ----------------------------------------------------------------------


def test_experts_without_a_gate():
    module = modeling("nemotron_h")
    config = SimpleNamespace(n_routed_experts=6, hidden_size=24, moe_intermediate_size=16,
                             moe_latent_size=None, mlp_hidden_act="relu2",
                             _experts_implementation="eager")  # fmt: skip
    for act in ("relu2", "gelu"):
        config.mlp_hidden_act = act
        made = module.NemotronHExperts(config)
        for p in made.parameters():
            nn.init.normal_(p, std=0.3)
        x, ids = torch.randn(9, 24), torch.rand(9, 6).topk(2).indices
        wanted = made(x, ids, torch.rand(9, 2, generator=torch.Generator().manual_seed(0)))
        assert patch(made) == Patched(0, 1, {})
        got = made(x, ids, torch.rand(9, 2, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(got, wanted)


def test_experts_of_other_ranks_add_nothing():
    made = block("mixtral").experts
    made._is_expert_parallel = True
    x, ids = torch.randn(7, 64), torch.rand(7, 9).topk(4).indices  # 8 is not on this rank
    weights = torch.rand(7, 4).masked_fill(ids == 8, 0.0)
    found = []
    for name in ("eager", "weightshare"):
        made.config._experts_implementation = name
        w, value = weights.clone().requires_grad_(), x.clone().requires_grad_()
        y = made(value, ids, w)
        found.append([y, *torch.autograd.grad(y.square().sum(), [value, w])])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_bias": True}, "biases"),
        ({"is_transposed": True}, "transposed"),
        ({"is_concatenated": False}, "interleaves"),
        ({"has_post_expert_norm": True}, "normalises"),
        ({"act_fn": nn.GELU()}, "activation GELU; with a gate the kernels know SiLU"),
        ({"has_gate": False}, r"SiLUActivation; without a gate the kernels know ReLU\^2"),
        ({"has_gate": False, "act_fn": nn.GELU("tanh")}, "activation GELU"),
    ],
)
def test_refused_experts_say_why(changes, words):
    made = block("mixtral").experts
    vars(made).update({k: v for k, v in changes.items() if k != "act_fn"})
    if "act_fn" in changes:
        made.act_fn = changes["act_fn"]
    with pytest.raises(ValueError, match=words):
        patch(made)
    made.config._experts_implementation = "weightshare"
    with pytest.raises(NotImplementedError, match=f"{words}.*use 'grouped_mm'"):
        made(torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))


def test_clamped_gate_is_refused_and_left_alone():
    experts = object.__new__(modeling("deepseek_v4").DeepseekV4Experts)
    nn.Module.__init__(experts)
    for name in ("has_bias", "is_transposed"):
        setattr(experts, name, False)
    experts.has_gate = experts.is_concatenated = True
    experts.num_experts, experts.down_proj = 1, None
    assert "gate of its own" in unserved(experts)
    both = nn.ModuleDict({"other": experts, "known": block("mixtral")})
    done = patch(both)
    assert (done.gates, done.experts) == (1, 1) and list(done.skipped) == ["other"]


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
