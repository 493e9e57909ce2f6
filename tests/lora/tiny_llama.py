"""A Llama small enough for tests, and adapters on it."""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from weightshare.lora import MoSConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(1))


def base(dtype=torch.float64, layers=4, hidden=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size={32: 48, 64: 128}[hidden],
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


def config(**changes):
    sizes = {"r": 4, "equivalent_rank": 2, "private_rank": 1, "shards": 4, "dropout": 0.0}
    return MoSConfig(**{**sizes, "target_modules": TARGETS, **changes})


def fill(model, name="default", seed=3):
    """B is zero at first: draw it."""
    generator = torch.Generator().manual_seed(seed)
    for pool in model.base_model.mos_pools[name].values():
        with torch.no_grad():
            pool.b.copy_(torch.randn(pool.b.shape, generator=generator, dtype=pool.b.dtype) * 0.2)
            pool.a.copy_(torch.randn(pool.a.shape, generator=generator, dtype=pool.a.dtype) * 0.2)


def adapted(dtype=torch.float64, model=None, **changes):
    model = get_peft_model(base(dtype) if model is None else model, config(**changes))
    fill(model)
    return model


def add(model, name, seed, **changes):
    """Another adapter, whose parameters learn, too."""
    model.add_adapter(name, config(**changes))
    fill(model, name, seed)
    model.set_requires_grad([*model.peft_config], True)


def gradients(model, loss):
    """Gradients of all pools by name; those that got none are zero."""
    pools = {n: p for n, p in model.named_parameters() if "mos_pools" in n}
    learning = {n: p for n, p in pools.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    given = {n: grad for n, grad in zip(learning, found, strict=True) if grad is not None}
    return {n: given.get(n, torch.zeros_like(p)) for n, p in pools.items()}
