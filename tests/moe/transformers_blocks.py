"""Blocks of transformers, small and filled with values."""

import torch
from peers import peer
from torch.overrides import TorchFunctionMode

transformers = peer("transformers")

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
