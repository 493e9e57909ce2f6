"""Serving many adapters: AdapterBank against PEFT's mixed batches, and what a swap costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from weightshare_kernels._cases import Case, Inputs, Maker, Workload
from weightshare_kernels.ops.shard_lora.reference import matrix

LLAMA = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=256)
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = dict(r=16, equivalent_rank=8, private_rank=1, shards=8)
ADAPTERS, CONTEXT, ALPHA = 16, 48, 16.0

Adapter = dict[str, Tensor]  # pool format: TYPE.a, TYPE.b, TYPE.a_index, TYPE.b_index


def mixture(m: Maker, widths: dict[str, tuple[int, int]], layers: int, seed: int, **ranks):
    """A Mixture of Shards as its folder holds it, B drawn as well."""
    from weightshare.lora import ShardPlan

    plan, made = ShardPlan(**(RANKS | ranks), layers=layers, seed=seed), {}
    for kind, sizes in widths.items():
        for side, width, table in zip("ab", sizes, plan.tables(), strict=True):
            shape = plan.pool_shards, width // plan.shards
            made[f"{kind}.{side}"] = m.randn(*shape, scale=width**-0.5).detach()
            made[f"{kind}.{side}_index"] = table.to(m.device)
    return made


def matrices(adapter: Adapter, kind: str, layer: int) -> tuple[Tensor, Tensor]:
    """A ``[r, d_in]`` and B ``[d_out, r]`` of a layer."""
    a, b = [matrix(adapter[f"{kind}.{s}"], adapter[f"{kind}.{s}_index"][layer]) for s in "ab"]
    return a, b.t()


def one_times(function: Callable[[], Tensor]) -> Workload:
    """A forward pass alone, times one so that it has a backward."""
    like = function()
    one = torch.ones((), device=like.device, dtype=like.dtype, requires_grad=True)
    return Workload(lambda: one * function(), [one])


def no_grad(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function()

    return run


# -- A decoding step of a whole model --------------------------------------------------------------


def targets(model: nn.Module) -> list[tuple[str, str, int]]:
    """Path, projection type and layer of each."""
    return [
        (path, path.rpartition(".")[2], int(path.split(".")[2]))
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in TYPES
    ]


def decode_inputs(d: int, m: Maker) -> Inputs:
    """A token and a context of each sequence, a Llama, and an adapter per sequence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LLAMA | {"hidden_size": d, "intermediate_size": d * 11 // 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(m.device, m.dtype)
    base.requires_grad_(False)
    widths = {
        kind: (base.get_submodule(path).in_features, base.get_submodule(path).out_features)
        for path, kind, layer in targets(base)
        if layer == 0
    }
    return {
        "x": m.randn(ADAPTERS, 1, d),
        "context": m.randn(ADAPTERS, CONTEXT, d).detach(),
        "base": base,
        "adapters": [
            mixture(m, widths, LLAMA["num_hidden_layers"], seed) for seed in range(ADAPTERS)
        ],
    }


def stepper(model: Callable, context: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits of the token after a context that the model has read."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(inputs_embeds=context, past_key_values=cache, use_cache=True)

    def step(x: Tensor) -> Tensor:
        logits = model(inputs_embeds=x, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


def banked(base: nn.Module, adapters: list[Adapter]) -> Callable:
    """A copy of the model in an AdapterBank; sequence n uses adapter n."""
    from weightshare.lora import AdapterBank

    model = copy.deepcopy(base)
    rows = RANKS["equivalent_rank"] * LLAMA["num_hidden_layers"] * RANKS["shards"] * ADAPTERS
    bank = AdapterBank(
        model,
        TYPES,
        max_adapters=ADAPTERS,
        max_rank=RANKS["r"],
        shards=RANKS["shards"],
        pool_shards=rows,
    )
    names = [f"adapter{n}" for n in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        bank.add(name, adapter, scale=ALPHA / RANKS["r"])

    def call(**inputs):
        with bank.batch(names):
            return model(**inputs)

    return call


def pefted(base: nn.Module, adapters: list[Adapter]) -> Callable:
    """The same in PEFT, as LoRAs of the same matrices."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANKS["r"], lora_alpha=ALPHA, target_modules=list(TYPES))
    names = [f"adapter{n}" for n in range(len(adapters))]
    model = get_peft_model(copy.deepcopy(base), settings, names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    for path, kind, layer in targets(base):
        module = model.base_model.model.get_submodule(path)
        for name, adapter in zip(names, adapters, strict=True):
            a, b = matrices(adapter, kind, layer)
            module.lora_A[name].weight.data = a.clone()
            module.lora_B[name].weight.data = b.contiguous()
    return partial(model.eval(), adapter_names=names)


def decode(x, context, base, adapters) -> Tensor:
    """A decoding step through the bank: logits ``[sequences, 1, vocabulary]``."""
    return stepper(banked(base, adapters), context)(x)


def decode_alone(x, context, base, adapters) -> Tensor:
    """The definition: each sequence whole through a model with its adapter in the weights."""
    rows = []
    for n, adapter in enumerate(adapters):
        model = copy.deepcopy(base).to(x.dtype)
        for path, kind, layer in targets(base):
            a, b = matrices(adapter, kind, layer)
            delta = ALPHA / RANKS["r"] * b.to(x.dtype) @ a.to(x.dtype)
            model.get_submodule(path).weight.data += delta
        text = torch.cat([context[n : n + 1].to(x.dtype), x[n : n + 1]], 1)
        rows.append(model(inputs_embeds=text, logits_to_keep=1).logits)
    return torch.cat(rows)


def decode_workload(make: Callable, inputs: Inputs) -> Workload:
    x, model = inputs["x"].detach(), make(inputs["base"], inputs["adapters"])
    step = stepper(model, inputs["context"])
    return one_times(no_grad(lambda: step(x)))


# -- One layer, without what its base costs --------------------------------------------------------

LAYER_RANK, LAYER_SHARDS, LAYER_ADAPTERS, LAYER_ROWS = 32, 8, 64, 64


class Quiet(nn.Linear):
    """A linear layer whose product is left out: gives zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, for any x."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def layer_inputs(d: int):
    """Rows, the adapter of each (Zipf), and one layer in a model of its own."""
    ranks = dict(r=LAYER_RANK, equivalent_rank=LAYER_RANK, private_rank=LAYER_RANK)

    def make(m: Maker) -> Inputs:
        widths = {"q_proj": (d, d)}
        weights = 1 / torch.arange(1, LAYER_ADAPTERS + 1, dtype=torch.float64)
        base = nn.ModuleDict({"q_proj": Quiet(d, d, bias=False, device=m.device, dtype=m.dtype)})
        return {
            "x": m.randn(LAYER_ROWS, d),
            "ids": weights.multinomial(LAYER_ROWS, True, generator=m.generator).tolist(),
            "base": base.requires_grad_(False),
            "adapters": [
                mixture(m, widths, 1, seed, **ranks, shards=LAYER_SHARDS)
                for seed in range(LAYER_ADAPTERS)
            ],
        }

    return make


def layer_banked(ids, base, adapters) -> Callable:
    """The layer in an AdapterBank."""
    from weightshare.lora import AdapterBank

    model = nn.ModuleDict({"q_proj": base["q_proj"]})
    sizes = dict(max_rank=LAYER_RANK, shards=LAYER_SHARDS)
    bank = AdapterBank(model, ["q_proj"], max_adapters=LAYER_ADAPTERS, **sizes)
    for n, adapter in enumerate(adapters):
        bank.add(f"adapter{n}", adapter, scale=ALPHA / LAYER_RANK)
    names = [f"adapter{n}" for n in ids]

    def call(x: Tensor) -> Tensor:
        with bank.batch(names):
            return model["q_proj"](x)

    return call


def layer_pefted(ids, base, adapters) -> Callable:
    """The layer in PEFT."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    first, *rest = [f"adapter{n}" for n in range(len(adapters))]
    config = LoraConfig(r=LAYER_RANK, lora_alpha=ALPHA)
    layer = Linear(base["q_proj"], first, config, r=LAYER_RANK, lora_alpha=ALPHA)
    for name in rest:
        layer.update_layer(name, LAYER_RANK, lora_alpha=ALPHA, config=config)
    for name, adapter in zip((first, *rest), adapters, strict=True):
        a, b = matrices(adapter, "q_proj", 0)
        layer.lora_A[name].weight.data = a.clone()
        layer.lora_B[name].weight.data = b.contiguous()
    return partial(layer.eval(), adapter_names=[f"adapter{n}" for n in ids])


def layer(x, ids, base, adapters) -> Tensor:
    """The layer's update through the bank."""
    return layer_banked(ids, base, adapters)(x)


def layer_define(x, ids, base, adapters) -> Tensor:
    rows = []
    for row, n in zip(x.unbind(), ids, strict=True):
        a, b = matrices(adapters[n], "q_proj", 0)
        rows.append(ALPHA / LAYER_RANK * b.to(x.dtype) @ (a.to(x.dtype) @ row))
    return torch.stack(rows)


def layer_workload(make: Callable, inputs: Inputs) -> Workload:
    fixed = {name: value for name, value in inputs.items() if name != "x"}
    x, call = inputs["x"].detach(), make(**fixed)
    return one_times(no_grad(lambda: call(x)))


def _layer_case(d: int, bar: float) -> Case:
    return Case(
        f"mixed_64_adapters_d{d}",
        layer_inputs(d),
        layer,
        layer_define,
        {"peft": partial(layer_workload, layer_pefted)},
        ours=partial(layer_workload, layer_banked),
        flops=4 * LAYER_ROWS * LAYER_RANK * d,
        bars={"peft:forward": bar},
        tier="bench",
    )


# -- A swap ----------------------------------------------------------------------------------------

LLAMA_8B = dict.fromkeys(("q_proj", "o_proj"), (4096, 4096))
LLAMA_8B |= dict.fromkeys(("k_proj", "v_proj"), (4096, 1024))
LLAMA_8B |= {"gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
RANKS_8B = dict(r=64, equivalent_rank=4, private_rank=1, shards=8)
LAYERS_8B, SWAP_SCALE, LAYER = 32, 0.25, 17


class Silent(nn.Module):
    """A layer of these widths without weights: gives zeros."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, for any x."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def swap_inputs(m: Maker) -> Inputs:
    """Rows, and two adapters of the shape of Llama-3.1-8B."""
    return {
        "x": m.randn(4, 4096),
        "adapters": [mixture(m, LLAMA_8B, LAYERS_8B, seed, **RANKS_8B) for seed in range(2)],
    }


def swap_bank(adapters: list[Adapter], room: int):
    """A bank over layers of those shapes, with both adapters; "live" is the first one's."""
    from weightshare.lora import AdapterBank

    model = nn.ModuleList(
        nn.ModuleDict({kind: Silent(*widths) for kind, widths in LLAMA_8B.items()})
        for _ in range(LAYERS_8B)
    )
    pool = adapters[0]["q_proj.a"]
    if pool.is_cuda:
        model.register_buffer("place", pool.new_zeros(()))
    bank = AdapterBank(
        model,
        TYPES,
        max_adapters=room,
        max_rank=RANKS_8B["r"],
        shards=RANKS_8B["shards"],
        pool_shards=room * len(pool),
        dtype=pool.dtype,
    )
    for n, adapter in enumerate(adapters):
        bank.add(f"adapter{n}", adapter, scale=SWAP_SCALE)
    bank.alias("live", "adapter0")
    return model, bank


def written(bank) -> list[int]:
    """How often each tensor of the bank was written to."""
    sides = [side for slab in bank.memory.slabs.values() for side in slab.sides]
    return [t._version for side in sides for t in (side.pool, side.table)]


def swap(x, adapters) -> Tensor:
    """A layer's output after "live" has moved to the second adapter; asserts that it was free."""
    model, bank = swap_bank(adapters, 2)
    before = written(bank)
    bank.alias("live", "adapter1")
    assert written(bank) == before, "the swap wrote to shards or tables"
    with bank.batch(["live"] * len(x)):
        return model[LAYER]["q_proj"](x)


def swap_define(x, adapters) -> Tensor:
    a, b = matrices(adapters[1], "q_proj", LAYER)
    return SWAP_SCALE * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()


def on_the_host(function: Callable[[], object]) -> Workload:
    """Work without a kernel: a CUDA graph of it would be empty, so there is to be none."""
    nothing = torch.zeros(())

    def forward() -> Tensor:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("work of the host, which no graph holds")
        function()
        return nothing

    return one_times(forward)


def swap_workload(inputs: Inputs) -> Workload:
    """Move the name and open the next batch."""
    _, bank = swap_bank(inputs["adapters"], 2)
    turn = [0]

    def move() -> None:
        turn[0] ^= 1
        bank.alias("live", f"adapter{turn[0]}")
        with bank.batch(["live"]):
            pass

    return on_the_host(move)


def reload_workload(inputs: Inputs) -> Workload:
    """What it costs where the new adapter is not resident: its weights are copied."""
    _, bank = swap_bank(inputs["adapters"], 3)
    bank.remove("live")
    turn = [0]

    def load() -> None:
        turn[0] ^= 1
        bank.swap("adapter0", inputs["adapters"][turn[0]], SWAP_SCALE)

    return on_the_host(load)


def millisecond(inputs: Inputs) -> Workload:
    """The promise: a swap within a millisecond."""

    def wait() -> None:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass

    return on_the_host(wait)


def _decode_case(d: int) -> Case:
    return Case(
        f"llama_d{d}_decode_16_adapters",
        partial(decode_inputs, d),
        decode,
        decode_alone,
        {
            "peft": partial(decode_workload, pefted),
            "base": partial(decode_workload, lambda base, _: base),
        },
        ours=partial(decode_workload, banked),
        bars={"peft:forward": 2.0},
        tier="bench",
    )


CASES = [
    _decode_case(256),
    _decode_case(512),
    _layer_case(1024, 4.0),
    _layer_case(4096, 1.5),
    Case(
        "adapter_swap_8b",
        swap_inputs,
        swap,
        swap_define,
        {"millisecond": millisecond, "reload": reload_workload},
        ours=swap_workload,
        bars={"millisecond:forward": 1.0},
        tier="bench",
    ),
]
