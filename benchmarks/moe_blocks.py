"""A whole sparse-MoE block of transformers (Qwen3-MoE), patched, against its own experts code."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightshare_kernels._cases import Case, Inputs, Maker, Workload
from weightshare_kernels._checks import accumulate_dtype
from weightshare_kernels.ops.moe_mlp import cases as moe_mlp

SIZES = dict(hidden_size=1024, moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8)
NAMES = {
    "gate": "gate.weight",
    "gate_up": "experts.gate_up_proj",
    "down": "experts.down_proj",
}


def blocks() -> dict[str, nn.Module]:
    """The block patched, and with each of transformers' own implementations of the experts."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    from weightshare.integrations.transformers import patch

    made = {}
    for name in ("ours", "grouped_mm", "eager"):
        config = Qwen3MoeConfig(**SIZES, norm_topk_prob=True)
        config._experts_implementation = "eager" if name == "ours" else name
        with torch.device("meta"):
            made[name] = Qwen3MoeSparseMoeBlock(config)
        if name == "ours":
            patch(made[name])
    return made


def inputs_of(tokens: int):
    """Tokens, the block's parameters, the experts that its gate chooses, and the blocks."""

    def make(m: Maker) -> Inputs:
        d, f, e = (SIZES[n] for n in ("hidden_size", "moe_intermediate_size", "num_experts"))
        inputs: Inputs = {
            "x": m.randn(1, tokens, d),
            "gate": m.randn(e, d, scale=d**-0.5),
            "gate_up": m.randn(e, 2 * f, d, scale=d**-0.5),
            "down": m.randn(e, d, f, scale=f**-0.5),
            "blocks": blocks(),
        }
        gate = inputs["blocks"]["eager"].gate
        with torch.no_grad():
            named = {"weight": inputs["gate"]}
            inputs["chosen"] = functional_call(gate, named, (inputs["x"][0],))[2]
        return inputs

    return make


def call(x, gate, gate_up, down, blocks, chosen, which="ours") -> Tensor:
    """The block with these parameters."""
    values = dict(zip(NAMES.values(), (gate, gate_up, down), strict=True))
    return functional_call(blocks[which], values, (x,))


def define(x, gate, gate_up, down, blocks, chosen) -> Tensor:
    """The definition, for experts that are chosen already: near ties depend on the dtype."""
    logits = torch.nn.functional.linear(x[0], gate)
    gates = logits.to(accumulate_dtype(x.dtype)).softmax(-1).gather(1, chosen)
    gates = gates / gates.sum(-1, keepdim=True)
    return moe_mlp.define(x[0], gate_up, down, gates, chosen)[None]


def workload(which: str, inputs: Inputs) -> Workload:
    """One of the blocks, with parameters of its own: what a model holds."""
    block = copy.deepcopy(inputs["blocks"][which])
    for name, path in NAMES.items():
        *parents, last = path.split(".")
        owner = block.get_submodule(".".join(parents))
        setattr(owner, last, nn.Parameter(inputs[name].detach()))
    x = inputs["x"].detach().clone().requires_grad_()
    return Workload(lambda: block(x), [x, *block.parameters()])


def _case(tokens: int) -> Case:
    d, f, k = (SIZES[n] for n in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok"))
    return Case(
        f"qwen3_moe_block_t{tokens}",
        inputs_of(tokens),
        call,
        define,
        {name: partial(workload, name) for name in ("grouped_mm", "eager")},
        ours=partial(workload, "ours"),
        flops=6 * tokens * k * d * f,
        bars={"grouped_mm": 1.2, "eager": 5.0},
        tier="bench",
    )


CASES = [_case(512), _case(4096)]
