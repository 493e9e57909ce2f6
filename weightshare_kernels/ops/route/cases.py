"""Inputs, shapes and baselines of :func:`route`, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload, leaves
from weightshare_kernels.ops.route import Routing, route, routing_of


def dense_gates(gates: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Gates ``[T, k]`` laid out as ``[T, E]``: one float tensor that shows choice and gates."""
    return gates.new_zeros(gates.shape[0], num_experts).scatter(1, experts, gates)


def ours(scores: Tensor, k: int, **options) -> Tensor:
    """Dense gates of :func:`route`."""
    routing = route(scores, k, **options)
    return dense_gates(routing.gates, routing.experts, scores.shape[1])


def definition(scores: Tensor, k: int, **options) -> Tensor:
    """The same from the eager sequence, with the order of equals that the op promises."""
    routing = eager(scores, k, top=_stable_top, **options)
    return dense_gates(routing.gates, routing.experts, scores.shape[1])


def _top(values: Tensor, k: int) -> Tensor:
    return values.topk(k, -1).indices


def _stable_top(values: Tensor, k: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def eager(
    scores: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    score_fn: str = "sigmoid",
    groups: int = 1,
    topk_groups: int | None = None,
    group_score: str = "top2",
    normalize: bool = True,
    scale: float = 1.0,
    padding_mask: Tensor | None = None,
    top: Callable[[Tensor, int], Tensor] = _top,
) -> Routing:
    """Routing as models write it: topk and gather, then bincount, cumsum and argsort."""
    experts = scores.shape[1]
    x = scores if scores.dtype == torch.float64 else scores.float()
    functions = {
        "sigmoid": torch.sigmoid,
        "softmax": lambda v: v.softmax(-1),
        "sqrt_softplus": lambda v: torch.nn.functional.softplus(v).sqrt(),
    }
    s = functions[score_fn](x)
    choice = s.detach() if bias is None else s.detach() + bias
    if groups > 1:
        assert topk_groups is not None
        count = 2 if group_score == "top2" else k // topk_groups
        by_group = choice.unflatten(1, (groups, -1))
        best = by_group.topk(min(count, by_group.shape[-1]), -1).values.sum(-1)
        allowed = torch.zeros_like(best).scatter(1, top(best, topk_groups), 1.0)
        allowed = allowed.bool().repeat_interleave(experts // groups, 1)
        choice = choice.masked_fill(~allowed, -torch.inf)
    ids = top(choice, k)
    gates = s.gather(1, ids)
    if normalize:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    gates = gates * scale
    key = ids
    if padding_mask is not None:
        gates = gates.masked_fill(padding_mask[:, None], 0.0)
        key = ids.masked_fill(padding_mask[:, None], experts)
    counts = torch.bincount(key.flatten(), minlength=experts)[:experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    permutation = key.flatten().argsort(stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=scores.device)
    return Routing(ids, gates, counts, offsets, permutation, inverse)


def _inputs(rows: int, experts: int, k: int, bias: bool = False, padding: bool = False, **options):
    def make(m: Maker) -> Inputs:
        made: Inputs = {"scores": m.randn(rows, experts), "k": k, **options}
        if bias:
            made["bias"] = m.randn(experts, scale=0.1, dtype=torch.float32).detach()
        if padding:
            made["padding_mask"] = (m.randn(rows, dtype=torch.float32) > 0.5).detach()
        return made

    return make


_GROUPED: dict[str, Any] = {"groups": 4, "topk_groups": 2}
_TESTS = {
    "sigmoid": _inputs(33, 24, 2),
    "softmax": _inputs(33, 24, 2, score_fn="softmax"),
    "sqrt_softplus": _inputs(33, 24, 3, score_fn="sqrt_softplus"),
    "bias": _inputs(17, 64, 4, bias=True, scale=2.5),
    "softmax_bias": _inputs(17, 60, 3, bias=True, score_fn="softmax", scale=0.5),
    "softmax_unnormalized": _inputs(9, 8, 2, score_fn="softmax", normalize=False),
    "sigmoid_unnormalized": _inputs(9, 16, 2, bias=True, normalize=False, scale=1.5),
    "padding": _inputs(21, 16, 2, bias=True, padding=True),
    "softmax_padding": _inputs(21, 16, 2, padding=True, score_fn="softmax"),
    "groups_top2": _inputs(19, 32, 3, bias=True, **_GROUPED),
    "groups_topk": _inputs(19, 32, 4, bias=True, group_score="topk", **_GROUPED),
    "groups_softmax": _inputs(19, 36, 3, score_fn="softmax", padding=True, **_GROUPED),
    "groups_of_one": _inputs(7, 12, 2, groups=12, topk_groups=3),
    "all_groups": _inputs(7, 12, 2, groups=3, topk_groups=3),
    "odd": _inputs(13, 37, 3, bias=True, score_fn="sqrt_softplus"),
    "wide": _inputs(5, 300, 9, bias=True),
    "one_expert": _inputs(6, 1, 1, normalize=False),  # whose gate is not always 1
    "every_expert": _inputs(6, 5, 5, bias=True, normalize=False),
    "one_token": _inputs(1, 16, 2),
    "no_tokens": _inputs(0, 16, 2, bias=True),
    "no_tokens_softmax": _inputs(0, 16, 2, score_fn="softmax"),
}

CASES = [Case(name, make, ours, definition) for name, make in _TESTS.items()]


def _sorted_gates(experts: Tensor, gates: Tensor, num_experts: int, padding_mask=None) -> Tensor:
    """Gates in order of the experts, by the tables of :func:`routing_of`."""
    routing = routing_of(experts, gates, num_experts, padding_mask)
    weight = 1 + routing.inverse.to(gates.dtype) / 64  # so that the inverse shows, too
    return routing.gates.flatten()[routing.permutation] + routing.gates.flatten() * weight


def _sorted_by_torch(experts: Tensor, gates: Tensor, num_experts: int, padding_mask=None) -> Tensor:
    """The same by a stable sort."""
    key = experts if padding_mask is None else experts.masked_fill(padding_mask[:, None], 1 << 40)
    gates = gates.double() if gates.dtype == torch.float64 else gates.float()
    if padding_mask is not None:
        gates = gates * ~padding_mask[:, None]
    order = key.flatten().argsort(stable=True)
    weight = 1 + order.argsort().to(gates.dtype) / 64
    return gates.flatten()[order] + gates.flatten() * weight


def _table_inputs(rows: int, experts: int, k: int, padding: bool = False):
    def make(m: Maker) -> Inputs:
        ids = [m.index(k, experts) for _ in range(rows)]
        made: Inputs = {
            "experts": torch.stack(ids) if rows else m.index(0, experts).view(0, k),
            "gates": m.randn(rows, k),
            "num_experts": experts,
        }
        if padding:
            made["padding_mask"] = (m.randn(rows, dtype=torch.float32) > 0).detach()
        return made

    return make


CASES += [
    Case(f"tables_{name}", make, _sorted_gates, _sorted_by_torch)
    for name, make in {
        "small": _table_inputs(21, 8, 2),
        "padding": _table_inputs(40, 33, 3, padding=True),
        "no_tokens": _table_inputs(0, 8, 2),
    }.items()
]


def _workload(call, inputs: Inputs) -> Workload:
    return Workload(lambda: call(**inputs).gates, leaves(inputs))


def _bench(name: str, rows: int, experts: int, k: int, bars, **options) -> Case:
    return Case(
        name,
        _inputs(rows, experts, k, bias=True, **options),
        ours,
        definition,
        {"eager": lambda inputs: _workload(eager, inputs)},
        ours=lambda inputs: _workload(route, inputs),
        flops=rows * experts * 4,
        bytes=lambda itemsize: rows * experts * itemsize + rows * k * (4 + 3 * 8),
        bars=bars,
        tier="bench",
    )


CASES += [
    _bench("t4096_e128", 4096, 128, 8, {"eager:forward": 5.0}),
    _bench("t4096_e256", 4096, 256, 8, {"eager:forward": 5.0}),
    _bench("deepseek_v3_t4096", 4096, 256, 8, {"eager:forward": 5.0},
           groups=8, topk_groups=4, scale=2.5),
]  # fmt: skip
