"""Models and adapters for the tests of AdapterBank."""

import copy

import torch
from torch import nn
from weightshare.lora import ShardPlan

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Block(nn.Module):
    """The projections of a decoder layer, without its attention: every row for itself."""

    def __init__(self, d=16, kv=8, f=24):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, kv), nn.Linear(d, kv)
        self.o_proj = nn.Linear(d, d)
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(d, f),
            nn.Linear(d, f),
            nn.Linear(f, d),
        )

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = x + self.o_proj(torch.tanh(q) * torch.cat([k, v], -1))
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self, layers=3, **sizes):
        super().__init__()
        self.layers = nn.ModuleList(Block(**sizes) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def net(layers=3, seed=0, **sizes):
    torch.manual_seed(seed)
    return Net(layers, **sizes).eval()


def paths_of(model, kind):
    return [path for path, _ in model.named_modules() if path.rpartition(".")[2] == kind]


def mos(model, seed=0, *, r=4, e=2, p=1, l=2, types=TYPES, alpha=2.0):
    """Configuration and tensors of a Mixture of Shards for a model, B drawn as well."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for kind in types:
        layers = paths_of(model, kind)
        base = model.get_submodule(layers[0])
        plan = ShardPlan(r, e, p, l, len(layers), seed=seed)
        for side, width in (("a", base.in_features), ("b", base.out_features)):
            shape = plan.pool_shards, width // l
            tensors[f"{kind}.{side}"] = torch.randn(shape, generator=draw) / width**0.5
        tensors[f"{kind}.a_index"], tensors[f"{kind}.b_index"] = plan.tables()
    return {"peft_type": "MOS", "r": r, "alpha": alpha}, tensors


def dense(model, adapter, dtype=torch.float64):
    """A copy of the model with the adapter added to its weights: what to compare with."""
    made = copy.deepcopy(model).to(dtype)
    if adapter is None:
        return made
    config, tensors = adapter
    scale = config["alpha"] / config["r"]
    for kind in {name.partition(".")[0] for name in tensors}:
        parts = [tensors[f"{kind}.{part}"] for part in ("a", "b", "a_index", "b_index")]
        a_pool, b_pool, a_index, b_index = parts
        for n, path in enumerate(paths_of(model, kind)):
            a = a_pool.to(dtype)[a_index[n].long()].flatten(1)
            b = b_pool.to(dtype)[b_index[n].long()].flatten(1)
            made.get_submodule(path).weight.data += scale * b.t() @ a
    return made


def lora(model, seed=0, *, ranks=None, r=3, alpha=2.0, types=TYPES):
    """The same of a plain LoRA in PEFT's names; ``ranks`` are those of layers that differ."""
    draw = torch.Generator().manual_seed(seed)
    tensors, pattern = {}, {}
    for kind in types:
        for path in paths_of(model, kind):
            base = model.get_submodule(path)
            rank = (ranks or {}).get(path, r)
            if rank != r:
                pattern[path] = rank
            a, b = (rank, base.in_features), (base.out_features, rank)
            name = f"base_model.model.{path}.lora_"
            tensors[f"{name}A.weight"] = torch.randn(a, generator=draw) / base.in_features**0.5
            tensors[f"{name}B.weight"] = torch.randn(b, generator=draw) / rank
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "rank_pattern": pattern}
    return config, tensors


def dense_lora(model, adapter, dtype=torch.float64):
    """A copy of the model with a LoRA added to its weights."""
    made, (config, tensors) = copy.deepcopy(model).to(dtype), adapter
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")].to(dtype)
            path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            scale = config["lora_alpha"] / len(a)
            made.get_submodule(path).weight.data += scale * b @ a.to(dtype)
    return made
