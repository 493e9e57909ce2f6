"""A sparse mixture of experts in plain PyTorch; this file needs nothing but torch.

``MoE.export()`` returns these modules. They are a loop over experts, slow and easy to read, which
also makes them what the tests compare the real layer with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def relu2(x: Tensor) -> Tensor:
    """Square of the positive part."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "relu2": relu2,
}
GATED = {"swiglu": True, "gelu": False, "relu2": False}
OPTIONS = ("score_fn", "groups", "topk_groups", "group_score", "normalize", "scale")
SCORES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
}


class Choice(NamedTuple):
    """Experts ``[T, k]`` of T tokens, best first, and their gates ``[T, k]``."""

    experts: Tensor
    gates: Tensor


class Router(nn.Module):
    """Chooses experts: the top k of ``score + balance_bias``; gates are the scores alone."""

    balance_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score_fn: str = "sigmoid",
        bias: bool = True,
        groups: int = 1,
        topk_groups: int | None = None,
        group_score: str = "top2",
        normalize: bool = True,
        scale: float = 1.0,
        device=None,
    ):
        super().__init__()
        self.k, self.score_fn, self.normalize, self.scale = k, score_fn, normalize, scale
        self.groups, self.topk_groups, self.group_score = groups, topk_groups or 1, group_score
        self.weight = nn.Parameter(torch.zeros(num_experts, dim, device=device))
        offset = torch.zeros(num_experts, device=device) if bias else None
        self.register_buffer("balance_bias", offset)

    def forward(self, x: Tensor) -> Choice:
        """Choice of experts for tokens ``[T, d]``."""
        kind = torch.promote_types(x.dtype, torch.float32)
        scores = SCORES[self.score_fn](F.linear(x.to(kind), self.weight.to(kind)))
        ranked = scores.detach()
        if self.balance_bias is not None:
            ranked = ranked + self.balance_bias
        ranked = ranked.masked_fill(ranked.isnan(), -torch.inf)
        allowed = torch.ones_like(ranked, dtype=torch.bool)
        if self.groups > 1:
            parts = ranked.unflatten(1, (self.groups, -1))
            count = 2 if self.group_score == "top2" else self.k // self.topk_groups
            best = _top(parts, min(count, parts.shape[2]))
            worth = parts.gather(2, best).sum(2)
            chosen = torch.zeros_like(worth, dtype=torch.bool)
            chosen.scatter_(1, _top(worth, self.topk_groups), True)
            allowed = chosen.repeat_interleave(parts.shape[2], 1)
        experts = _top(ranked, self.k, allowed)
        gates = scores.gather(1, experts)
        if self.normalize:
            gates = gates / (gates.sum(1, keepdim=True) + 1e-20)
        return Choice(experts, gates * self.scale)


def _top(values: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """Places of the greatest values, the lowest place first among equals (topk promises none)."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    if allowed is not None:  # those that are not allowed go last, whatever their value
        behind = (~allowed).gather(-1, order).to(torch.uint8)
        order = order.gather(-1, behind.argsort(dim=-1, stable=True))
    return order[..., :count]


class Experts(nn.Module):
    """Feed-forward experts, one after the other."""

    def __init__(
        self, num_experts: int, dim: int, hidden: int, *, activation: str = "swiglu", device=None
    ):
        super().__init__()
        self.activation = activation
        rows = 2 * hidden if GATED[activation] else hidden
        self.gate_up = nn.Parameter(torch.zeros(num_experts, rows, dim, device=device))
        self.down = nn.Parameter(torch.zeros(num_experts, dim, hidden, device=device))

    def forward(self, x: Tensor, routing) -> Tensor:
        """Gated sum of the chosen experts.

        Args:
            x: tokens ``[T, d]``.
            routing: a :class:`Choice`, or whatever else has ``experts`` and ``gates``.
        """
        function = ACTIVATIONS[self.activation]
        y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for expert in range(self.down.shape[0]):
            tokens, slots = (routing.experts == expert).nonzero(as_tuple=True)
            h = F.linear(x[tokens], self.gate_up[expert])
            if GATED[self.activation]:
                gate, up = h.chunk(2, -1)
                h = function(gate) * up
            else:
                h = function(h)
            out = F.linear(h, self.down[expert]) * routing.gates[tokens, slots, None]
            y = y.index_add(0, tokens, out.to(y.dtype))
        return y.to(x.dtype)


class SharedMLP(nn.Module):
    """The dense block of the shared experts."""

    def __init__(self, dim: int, hidden: int, *, activation: str = "swiglu", device=None):
        super().__init__()
        self.activation = activation
        options = {"bias": False, "device": device}
        if GATED[activation]:
            self.gate_up_proj = nn.Linear(dim, 2 * hidden, **options)
            self.down_proj = nn.Linear(hidden, dim, **options)
        else:
            self.fc1 = nn.Linear(dim, hidden, **options)
            self.fc2 = nn.Linear(hidden, dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Feed x ``[..., d]`` through the block."""
        function = ACTIVATIONS[self.activation]
        if not GATED[self.activation]:
            return self.fc2(function(self.fc1(x)))
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(function(gate) * up)


class MoE(nn.Module):
    """Router, experts and shared experts; arguments as those of ``weightshare.moe.MoE``.

    Shape:
        ``[..., d]`` in and out.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        activation: str = "swiglu",
        shared_hidden: int = 0,
        shared_gate: bool = False,
        device=None,
        **router,
    ):
        super().__init__()
        self.router = Router(dim, num_experts, k, device=device, **router)
        self.experts = Experts(num_experts, dim, hidden, activation=activation, device=device)
        self.shared: nn.Module | None = None
        if shared_hidden:
            self.shared = SharedMLP(dim, shared_hidden, activation=activation, device=device)
        self.shared_gate = nn.Linear(dim, 1, bias=False, device=device) if shared_gate else None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Send tokens ``[..., d]`` through their experts; padding goes through the shared alone."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        if padding_mask is not None:
            gates = routing.gates.masked_fill(padding_mask.reshape(-1, 1), 0)
            routing = Choice(routing.experts, gates)
        y = self.experts(flat, routing).view(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        return y
