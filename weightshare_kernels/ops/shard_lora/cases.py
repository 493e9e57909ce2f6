"""Inputs, shapes and baselines of :func:`shard_lora`, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.shard_lora import (
    group_by_adapter,
    reference,
    shard_lora,
    shard_lora_group,
)


def _layers(a_index: Tensor, b_index: Tensor, ids: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """The tables of each layer, ``[r, l]`` or, with ids, ``[adapters, r, l]``; often of one."""
    tables = a_index, b_index
    if a_index.dim() == (3 if ids is None else 4):
        return list(zip(*[t.unbind() for t in tables], strict=True))
    return [tables]


def _rows_of(ids: Tensor | None, x: Tensor, adapters: int):
    if ids is None:
        return None
    each = x.shape[:-1].numel() // max(1, ids.numel())
    return group_by_adapter(ids, adapters, each)


def call(x, base, a_pool, b_pool, a_index, b_index, scale=1.0, ids=None) -> Tensor:
    """One target; where there is a table per layer, each layer adds to the output of the last."""
    layers = _layers(a_index, b_index, ids)
    groups = ids if len(layers) == 1 else _rows_of(ids, x, layers[0][0].shape[0])
    y = base
    for a, b in layers:
        y = shard_lora(x, y, a_pool, b_pool, a, b, scale, adapters=groups)
    return y


def define(x, base, a_pool, b_pool, a_index, b_index, scale=1.0, ids=None) -> Tensor:
    """The same in differentiable PyTorch."""
    scales, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    y, rows = base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1])
    for a, b in _layers(a_index, b_index, ids):
        a, b = a.view(-1, *a.shape[-2:]), b.view(-1, *b.shape[-2:])
        groups = _rows_of(ids, x, a.shape[0])
        tables = groups and groups.offsets, groups and groups.permutation, scales, factor
        y = reference.define(rows, [y], [a_pool], [b_pool], [a], [b], *tables)[0][0]
    return y.view(base.shape)


def _targets(tensors: dict[str, Tensor]) -> tuple[list[Tensor], ...]:
    """Bases, A pools, B pools, A tables and B tables from arguments ``base_0``, ``base_1``, ..."""
    names = ("base", "a_pool", "b_pool", "a_index", "b_index")
    ordered = sorted(tensors.items())
    return tuple([value for key, value in ordered if key.startswith(name)] for name in names)


def call_group(x, scale=1.0, ids=None, **tensors) -> Tensor:
    """Several targets with one read of x, side by side."""
    bases, a_pools, b_pools, a_index, b_index = _targets(tensors)
    ys = shard_lora_group(x, bases, a_pools, b_pools, a_index, b_index, scale, adapters=ids)
    return torch.cat(ys, -1)


def define_group(x, scale=1.0, ids=None, **tensors) -> Tensor:
    """The same, one target after another."""
    ys = [
        define(x, base, a_pool, b_pool, a, b, scale, ids)
        for base, a_pool, b_pool, a, b in zip(*_targets(tensors), strict=True)
    ]
    return torch.cat(ys, -1)


def draw(m: Maker, shards: int, *shape: int) -> Tensor:
    """Shards of one or several matrices; within a matrix none twice."""
    count = shape[-1] * shape[-2]
    matrices = torch.Size(shape[:-2]).numel()
    ids = [torch.randperm(shards, generator=m.generator)[:count] for _ in range(matrices)]
    return torch.stack(ids).reshape(shape).to(m.device, torch.int32)


def _inputs(rows, d_in, d_out, r, la, lb, shards=None, adapters=0, layers=0, **how):
    """Inputs of one target.

    ``how``: ragged, replaced (shards named twice), wide (fp32 pools), scaled (a scale per
    adapter), batch (rows in sequences), absent (shards of zeros), none (rows of no adapter).
    """

    def make(m: Maker) -> Inputs:
        batch = how.get("batch")
        lead = (rows,) if batch is None else (batch, rows)
        tables = [(shards or 2 * r * n, n) for n in (la, lb)]
        shape = (*((layers,) if layers else ()), *((adapters,) if adapters else ()), r)
        a_index, b_index = [draw(m, count, *shape, n) for count, n in tables]
        if how.get("replaced"):
            a_index, b_index = a_index % max(1, r // 2), b_index % max(1, r // 2)
        if how.get("absent"):
            a_index[..., 0, :] = -1
            b_index[..., -1, 0] = 1 << 30
        if how.get("ragged"):
            for adapter in range(adapters):
                used = r - adapter % r
                a_index[adapter, used:] = b_index[adapter, used:] = -1
        pool_dtype = torch.float32 if how.get("wide") and m.dtype.itemsize < 4 else None
        kind = torch.float64 if m.dtype == torch.float64 else torch.float32
        made: Inputs = {
            "x": m.randn(*lead, d_in),
            "base": m.randn(*lead, d_out),
            "a_pool": m.randn(tables[0][0], d_in // la, scale=d_in**-0.5, dtype=pool_dtype),
            "b_pool": m.randn(tables[1][0], d_out // lb, dtype=pool_dtype),
            "a_index": a_index,
            "b_index": b_index,
            "scale": 0.5,
        }
        if adapters:
            weights = 1 / torch.arange(1, adapters + 1, dtype=torch.float64)  # Zipf
            if how.get("none"):
                weights = torch.cat([weights, torch.ones(1, dtype=torch.float64)])
            count = rows if batch is None else batch
            picked = weights.multinomial(max(1, count), True, generator=m.generator)[:count]
            picked[picked == adapters] = -1
            made["ids"] = picked.to(m.device)
        if how.get("scaled"):
            made["scale"] = torch.arange(1, adapters + 1, device=m.device, dtype=kind) / 4
        return made

    return make


def _group_inputs(rows, d_in, outs: Sequence[int], r, shards_each, adapters=0):
    """Inputs of several targets that share x."""

    def make(m: Maker) -> Inputs:
        made: Inputs = {}
        for n, d_out in enumerate(outs):
            one = _inputs(rows, d_in, d_out, r + n, shards_each, shards_each, None, adapters)(m)
            made |= {key: one[key] for key in ("x", "scale", "ids") if key in one}
            made |= {f"{key}_{n}": one[key] for key in one if key not in ("x", "scale", "ids")}
        return made

    return make


_TESTS = {
    "small": _inputs(12, 16, 24, 4, 2, 2),
    "odd_sizes": _inputs(13, 21, 35, 5, 3, 7),
    "one_shard": _inputs(9, 20, 12, 3, 1, 1),
    "different_shards": _inputs(7, 32, 24, 4, 4, 3),
    "one_row": _inputs(1, 64, 48, 8, 4, 4),
    "no_rows": _inputs(0, 16, 16, 4, 2, 2),
    "rank_one": _inputs(11, 16, 20, 1, 2, 2),
    "many_rows": _inputs(150, 48, 40, 6, 2, 4),
    "deep": _inputs(18, 320, 24, 40, 4, 2),
    "wide": _inputs(18, 24, 336, 9, 2, 4),
    "sequences": _inputs(7, 16, 24, 4, 2, 2, batch=3),
    "layers": _inputs(10, 16, 16, 4, 2, 2, layers=3, shards=12),
    "replaced": _inputs(14, 16, 24, 6, 2, 2, replaced=True),
    "absent": _inputs(10, 16, 24, 4, 2, 2, absent=True),
    "fp32_pools": _inputs(17, 32, 40, 4, 2, 2, wide=True),
    "adapters": _inputs(20, 16, 24, 4, 2, 2, adapters=3),
    "adapters_odd": _inputs(33, 21, 35, 5, 3, 7, 300, adapters=4, none=True),
    "adapters_ragged": _inputs(40, 16, 24, 6, 2, 2, adapters=5, ragged=True, scaled=True),
    "adapters_share": _inputs(24, 16, 24, 4, 2, 2, adapters=3, shards=8),
    "adapters_many": _inputs(10, 48, 32, 4, 4, 2, 600, adapters=16),
    "adapters_sequences": _inputs(5, 16, 24, 4, 2, 2, adapters=3, batch=6, none=True),
    "adapters_layers": _inputs(12, 16, 16, 4, 2, 2, adapters=3, layers=2),
    "adapters_no_rows": _inputs(0, 16, 24, 4, 2, 2, adapters=3),
    "adapters_fp32_pools": _inputs(26, 32, 40, 4, 2, 2, adapters=3, wide=True, scaled=True),
}
_GROUPS = {
    "group_qkv": _group_inputs(15, 24, (24, 8, 8), 4, 2),
    "group_adapters": _group_inputs(22, 32, (48, 40), 3, 4, adapters=3),
}

CASES = [Case(name, make, call, define) for name, make in _TESTS.items()]
CASES += [Case(name, make, call_group, define_group) for name, make in _GROUPS.items()]


# -- Baselines ---------------------------------------------------------------------------------


def _chain(layer: Callable, x, base, a_index, b_index) -> Tensor:
    """Each layer adds to the output of the last."""
    y = base
    for a, b in zip(a_index.unbind(), b_index.unbind(), strict=True):
        y = layer(x, y, a, b)
    return y


def gathered(x, base, a_pool, b_pool, a_index, b_index, scale=1.0) -> Tensor:
    """``pool[index]``, then two products: what a user of PyTorch writes."""

    def layer(x, y, a, b):
        down = a_pool[a.long()].reshape(a.shape[0], -1).to(x.dtype)
        up = b_pool[b.long()].reshape(b.shape[0], -1).to(x.dtype)
        return y + scale * (x @ down.t()) @ up

    return _chain(layer, x, base, a_index, b_index)


def in_columns(inputs: Inputs) -> Workload:
    """The layout of the authors' code: a shard is a column of its pool, gathered from there."""
    a_pool, b_pool = [
        inputs[name].detach().t().contiguous().requires_grad_() for name in ("a_pool", "b_pool")
    ]
    x, base, scale = inputs["x"], inputs["base"], inputs["scale"]

    def layer(x, y, a, b):
        down = a_pool[:, a.flatten().long()].view(-1, *a.shape).permute(1, 2, 0)
        up = b_pool[:, b.flatten().long()].view(-1, *b.shape).permute(1, 2, 0)
        down, up = down.reshape(a.shape[0], -1), up.reshape(b.shape[0], -1)
        return y + scale * (x @ down.t()) @ up

    call = partial(_chain, layer, x, base, inputs["a_index"], inputs["b_index"])
    return Workload(call, [x, base, a_pool, b_pool])


def dense_lora(inputs: Inputs) -> Workload:
    """The floor: LoRA of that rank with weights of its own, one A and B per layer."""
    x, base, scale = inputs["x"], inputs["base"], inputs["scale"]
    down = [
        reference.matrix(inputs["a_pool"].detach(), a).to(x.dtype).requires_grad_()
        for a in inputs["a_index"].unbind()
    ]
    up = [
        reference.matrix(inputs["b_pool"].detach(), b).to(x.dtype).t().contiguous().requires_grad_()
        for b in inputs["b_index"].unbind()
    ]

    def forward() -> Tensor:
        y, linear = base, torch.nn.functional.linear
        for a, b in zip(down, up, strict=True):
            y = y + linear(linear(x, a), b) * scale
        return y

    return Workload(forward, [x, base, *down, *up])


def mixed_batch(x, base, a_pool, b_pool, a_index, b_index, ids, scale=1.0) -> Tensor:
    """A loop over the adapters of the batch with LoRA weights ready-made, as PEFT has it."""
    linear, y = torch.nn.functional.linear, base.clone()
    for adapter in ids.unique().tolist():
        rows = (ids == adapter).nonzero()[:, 0]
        y[rows] += linear(linear(x[rows], a_index[adapter]), b_index[adapter]) * scale
    return y


def peft_loop(inputs: Inputs) -> Workload:
    """:func:`mixed_batch` on LoRA weights of its own, in inference."""
    fixed = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    kind = fixed["x"].dtype
    fixed["a_index"] = reference.matrix(fixed["a_pool"], fixed["a_index"]).to(kind)
    up = reference.matrix(fixed["b_pool"], fixed["b_index"]).to(kind)
    fixed["b_index"] = up.transpose(1, 2).contiguous()
    return _inference(mixed_batch, fixed)


def read(inputs: Inputs) -> Workload:
    """The floor of the memory: sums over all that must be read, LoRA's matrices ready-made."""
    kind, parts = inputs["x"].dtype, []
    used = range(1) if "ids" not in inputs else inputs["ids"].unique().tolist()
    for side in ("a", "b"):
        pool, index = inputs[f"{side}_pool"].detach(), inputs[f"{side}_index"]
        index = index if index.dim() == 3 else index[None]
        parts += [reference.matrix(pool, index[n]).to(kind) for n in used if n >= 0]
    return _inference(lambda: torch.stack([part.sum() for part in parts]).sum(), {})


def _inference(function: Callable, fixed: Inputs) -> Workload:
    """A forward pass alone: its output is a leaf, so that it has a backward that does nothing."""
    return Workload(lambda: function(**fixed).requires_grad_(), [])


def _ours_inference(inputs: Inputs) -> Workload:
    return _inference(
        call, {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    )


def _untracked(baseline: Callable[[Inputs], Workload]) -> Callable[[Inputs], Workload]:
    """A baseline in inference."""
    return lambda inputs: _inference(torch.no_grad()(baseline(inputs).forward), {})


def _gathered(inputs: Inputs) -> Workload:
    return Workload(partial(gathered, **inputs), leaves(inputs))


def _bytes(rows, d_in, d_out, r, matrices) -> Callable[[int], int]:
    return lambda size: size * (matrices * r * (d_in + d_out) + rows * (d_in + 2 * d_out))


def _bench(name, rows, d, r, l, equivalent, layers, bars, baselines, ours=None) -> Case:
    """One target of ``layers`` layers, whose pools are those of ``32 * equivalent`` ranks."""
    return Case(
        name,
        _inputs(rows, d, d, r, l, l, 32 * equivalent * l, layers=layers),
        call,
        define,
        baselines,
        ours,
        flops=4 * rows * r * d * layers,
        bytes=_bytes(rows, d, d, r, layers),
        bars=bars,
        tier="bench",
    )


def _serve(name, rows, d, r, l, adapters, bars) -> Case:
    return Case(
        name,
        _inputs(rows, d, d, r, l, l, adapters * r * l // 2, adapters=adapters),
        call,
        define,
        {"peft_loop": peft_loop, "read": read},
        _ours_inference,
        flops=4 * rows * r * d,
        bytes=_bytes(rows, d, d, r, min(adapters, rows)),
        bars=bars,
        tier="bench",
    )


_TRAIN = {"gathered": _gathered, "in_columns": in_columns, "dense_lora": dense_lora}
_FORWARD = {name: _untracked(baseline) for name, baseline in _TRAIN.items()}

CASES += [
    _bench("t16_d4096_r32", 16, 4096, 32, 8, 8, 1,
           {"in_columns:forward": 3.0, "dense_lora:forward": 1 / 1.1}, _FORWARD, _ours_inference),
    _bench("train_32_layers_t16", 16, 4096, 32, 8, 8, 32, {"gathered": 3.0}, _TRAIN),
    _bench("train_32_layers_t256", 256, 4096, 32, 8, 8, 32, {"gathered": 1.2}, _TRAIN),
    _serve("serve_64_adapters_d1024", 64, 1024, 32, 8, 64,
           {"peft_loop:forward": 4.0, "read:forward": 0.7}),
    _serve("serve_64_adapters_d4096", 64, 4096, 32, 8, 64,
           {"peft_loop:forward": 1.5, "read:forward": 0.7}),
]  # fmt: skip
