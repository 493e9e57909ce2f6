"""The table of gates, against transformers' own; experts that are served and that are not."""

import ast
import copy
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peers import peer
from torch import nn
from transformers_blocks import SIZES, block, config_of, modeling, transformers
from weightshare.integrations.gates import GATES, fingerprint
from weightshare.integrations.transformers import Patched, patch, unserved

MODELS = Path(transformers.__file__).parent / "models"


# -- The table of gates --------------------------------------------------------------------------


def kinds_of(row):
    """Model and class of every gate in this transformers that a row names, and its source."""
    for kind in row.kinds:
        model, name = kind.split(".")
        for path in sorted(MODELS.glob(f"{model}/modeling_*.py")):
            source = path.read_text()
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
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
