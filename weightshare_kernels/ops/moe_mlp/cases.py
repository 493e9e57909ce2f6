"""Inputs, shapes and baselines of :func:`moe_mlp`, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.moe_mlp import moe_mlp, reference
from weightshare_kernels.ops.route import routing_of


def call(x, gate_up, down, gates, experts, padding=None, **settings) -> Tensor:
    """The op, routed by fixed experts and gates that want a gradient."""
    routing = routing_of(experts, gates, down.shape[0], padding)
    return moe_mlp(x, gate_up, down, routing, **settings)


def define(
    x, gate_up, down, gates, experts, padding=None, activation="swiglu", width=None
) -> Tensor:
    """The definition, in differentiable PyTorch."""
    routing = routing_of(experts, gates, down.shape[0], padding)
    widths = None
    if isinstance(width, list):
        width, widths = max(width), torch.tensor(width, device=x.device)
    tables = routing.offsets, routing.permutation
    width = down.shape[2] if width is None else width
    return reference.define(x, gate_up, down, routing.gates, *tables, widths, width, activation)[0]


def spread(m: Maker, tokens: int, k: int, experts: int) -> Tensor:
    """Each token's experts, drawn evenly."""
    noise = torch.rand(tokens, experts, generator=m.generator)
    return noise.topk(k, dim=1).indices


def zipf(m: Maker, tokens: int, k: int, experts: int) -> Tensor:
    """Each token's experts, drawn as often as 1 / rank."""
    weight = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    noise = torch.rand(tokens, experts, generator=m.generator).clamp_min(1e-9)
    return (noise.log() / weight).topk(k, dim=1).indices


def single(m: Maker, tokens: int, k: int, experts: int) -> Tensor:
    """All tokens on the same k experts."""
    return torch.arange(k).expand(tokens, k)


def _inputs(tokens, d, f, experts, k, draw=spread, padded=0, **settings):
    blocks = 2 if reference.GATED[settings.get("activation", "swiglu")] else 1

    def make(m: Maker) -> Inputs:
        chosen = draw(m, tokens, k, experts).to(m.device)
        gates = torch.rand(tokens, k, generator=m.generator, dtype=torch.float64)
        kind = torch.float64 if m.dtype == torch.float64 else torch.float32
        mask = (torch.arange(tokens) % 3 == 1).to(m.device)
        return {
            "x": m.randn(tokens, d),
            "gate_up": m.randn(experts, blocks * f, d, scale=max(d, 1) ** -0.5),
            "down": m.randn(experts, d, f, scale=max(f, 1) ** -0.5),
            "gates": gates.to(m.device, kind).requires_grad_(m.grad),
            "experts": chosen,
            **({"padding": mask} if padded else {}),
            **settings,
        }

    return make


_TESTS = {
    "even": _inputs(12, 16, 16, 4, 2),
    "odd_sizes": _inputs(13, 17, 11, 5, 3),
    "one_token": _inputs(1, 24, 16, 6, 2),
    "few_tokens": _inputs(5, 40, 36, 8, 2),
    "no_tokens": _inputs(0, 8, 8, 3, 2),
    "one_expert": _inputs(21, 16, 8, 1, 1),
    "all_experts": _inputs(6, 9, 7, 4, 4),
    "empty_experts": _inputs(25, 16, 16, 12, 2, single),
    "many_rows": _inputs(150, 33, 20, 3, 2, zipf),
    "wide": _inputs(40, 301, 40, 3, 2),
    "deep": _inputs(40, 24, 150, 3, 2),
    "padded": _inputs(14, 16, 12, 4, 2, padded=1),
    "gelu": _inputs(13, 18, 14, 4, 2, activation="gelu"),
    "relu2": _inputs(33, 18, 14, 2, 1, activation="relu2"),
    "width": _inputs(20, 16, 24, 4, 2, width=9),
    "width_zero": _inputs(7, 8, 8, 3, 2, width=0),
    "width_per_expert": _inputs(40, 16, 24, 5, 2, width=[24, 0, 7, 16, 12]),
    "width_gelu": _inputs(9, 8, 16, 3, 2, activation="gelu", width=5),
}

CASES = [Case(name, make, call, define) for name, make in _TESTS.items()]


# -- Baselines ---------------------------------------------------------------------------------


def grouped_mm(x, gate_up, down, gates, experts) -> Tensor:
    """PyTorch's grouped products between a gathered copy of x and a scattered sum."""
    k = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=down.shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    tokens = order // k
    product = torch.nn.functional.grouped_mm
    h = product(x.index_select(0, tokens), gate_up.transpose(1, 2), offs=ends)
    y = product(reference.activate(h, "swiglu"), down.transpose(1, 2), offs=ends)
    y = y * gates.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add(0, tokens, y)


def eager(x, gate_up, down, gates, experts) -> Tensor:
    """A loop over the experts that got tokens, as model code writes it."""
    y = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        h = torch.nn.functional.linear(x[tokens], gate_up[expert])
        out = torch.nn.functional.linear(reference.activate(h, "swiglu"), down[expert])
        y = y.index_add(0, tokens, (out * gates[tokens, slots, None]).to(y.dtype))
    return y


def dense(inputs: Inputs) -> Workload:
    """The floor of the arithmetic: one dense layer on as many rows as there are pairs."""
    used = _used(inputs)
    f, pairs = inputs["down"].shape[2], inputs["experts"].numel()
    x = inputs["x"].detach().repeat(-(-pairs // max(len(inputs["x"]), 1)), 1)[:pairs]
    up = torch.cat([inputs["gate_up"].detach()[0, i : i + used] for i in (0, f)])
    own = [t.clone().requires_grad_() for t in (x, up, inputs["down"].detach()[0, :, :used])]

    def forward() -> Tensor:
        h = torch.nn.functional.linear(own[0], own[1])
        return torch.nn.functional.linear(reference.activate(h, "swiglu"), own[2])

    return Workload(forward, own)


def read(inputs: Inputs) -> Workload:
    """The floor of the memory: sums over the weights of the experts in use, read once each."""
    used = inputs["experts"].unique().tolist()
    parts = [inputs[name].detach()[expert] for name in ("gate_up", "down") for expert in used]
    one = torch.ones((), device=parts[0].device, requires_grad=True)  # so that it has a backward
    return Workload(lambda: one * torch.stack([part.sum() for part in parts]).sum(), [one])


def inference(function: Callable) -> Callable[[Inputs], Workload]:
    """A forward pass alone: gradients of all experts would leave none of them in the caches."""

    def make(inputs: Inputs) -> Workload:
        fixed = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        one = torch.ones((), device=inputs["x"].device, dtype=inputs["x"].dtype, requires_grad=True)
        return Workload(lambda: one * function(**fixed), [one])  # so that it has a backward

    return make


def full_width(inputs: Inputs) -> Workload:
    """Our own op at all hidden units."""
    whole = {name: value for name, value in inputs.items() if name != "width"}
    return Workload(lambda: call(**whole), leaves(inputs))


def _used(inputs: Inputs) -> int:
    return inputs.get("width") or inputs["down"].shape[2]


def _plain(function: Callable) -> Callable[[Inputs], Workload]:
    names = ("x", "gate_up", "down", "gates", "experts")

    def make(inputs: Inputs) -> Workload:
        return Workload(partial(function, *[inputs[n] for n in names]), leaves(inputs))

    return make


BASELINES = {"grouped_mm": _plain(grouped_mm), "eager": _plain(eager), "dense": dense}


def _bench(name, shape, bars, draw=spread, baselines=BASELINES, ours=None, **settings) -> Case:
    tokens, d, f, experts, k = shape
    used = settings.get("width", f)
    touched = min(experts, tokens * k)
    return Case(
        name,
        _inputs(tokens, d, f, experts, k, draw, **settings),
        call,
        define,
        baselines,
        ours,
        flops=6 * tokens * k * d * used,
        bytes=lambda itemsize: itemsize * (touched * 3 * d * used + 2 * tokens * d),
        bars=bars,
        tier="bench",
    )


_SPEC = (512, 1024, 384, 64, 8)
_FORWARD = {"grouped_mm:forward": 1.2, "dense:forward": 0.85}
_STEP = {"grouped_mm": 1.2, "eager": 5.0}
_SKEW = {"eager:forward": 1.0, "eager": 1.0}
_SKEWED = {name: BASELINES[name] for name in ("grouped_mm", "eager", "dense")}
_DECODE = {"read": read, "grouped_mm": inference(grouped_mm), "eager": inference(eager)}

CASES += [
    _bench("t512", _SPEC, {**_FORWARD, **_STEP}),
    _bench("t4096", (4096, *_SPEC[1:]), _STEP),
    *[
        _bench(
            f"decode_t{tokens}",
            (tokens, *_SPEC[1:]),
            {"read:forward": 0.8, "eager:forward": 1.0},
            baselines=_DECODE,
            ours=inference(call),
        )
        for tokens in (1, 2, 4, 8)
    ],
    _bench("t512_one_expert_set", _SPEC, _SKEW, single, _SKEWED),
    _bench("t512_zipf", _SPEC, _SKEW, zipf, _SKEWED),
    _bench(
        "t512_half_width",
        _SPEC,
        {"full_width:forward": 1 / 0.55, "full_width": 1 / 0.55},
        baselines={"full_width": full_width, "dense": dense},
        width=192,
    ),
]
