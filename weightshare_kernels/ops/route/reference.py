"""Routing in plain PyTorch: the definition of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels import _checks

EPSILON = 1e-20  # added to the sum of a token's gates, as DeepSeek-V3 does


def forward(
    scores: Tensor,  # [T, E]
    bias: Tensor | None,  # [E]
    padding: Tensor | None,  # [T]
    k: int,
    score_fn: str,
    groups: int,
    topk_groups: int,
    group_top: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Experts and gates ``[T, k]``, and the tables of :func:`tables`."""
    s = score(scores, score_fn)
    experts = choose(s if bias is None else s + bias, k, groups, topk_groups, group_top)
    if padding is not None:
        experts = torch.where(padding[:, None], torch.arange(k, device=s.device), experts)
    gates = gates_of(s.gather(1, experts), padding, normalize, scale)
    return experts, gates, *tables(experts, padding, scores.shape[1])


def score(logits: Tensor, score_fn: str) -> Tensor:
    """Scores of logits, in float32, or float64 for float64.

    Rounded from float64: the vector and the scalar part of one PyTorch loop differ in the last
    bit, and equal logits must have equal scores, or they would not tie.
    """
    x = logits.double()
    if score_fn == "sigmoid":
        s = x.sigmoid()
    elif score_fn == "softmax":
        s = x.softmax(-1)
    else:
        s = torch.logaddexp(x, x.new_zeros(())).sqrt()  # softplus without its threshold
    return s.to(_checks.accumulate_dtype(logits.dtype))


def choose(choice: Tensor, k: int, groups: int, topk_groups: int, group_top: int) -> Tensor:
    """The k best experts of each row, best first; of equals the lowest id, NaN below all else."""
    rows, experts = choice.shape
    choice = choice.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    candidates = torch.arange(experts, device=choice.device).expand(rows, experts)
    if topk_groups < groups:
        size = experts // groups
        best = choice.view(rows, groups, size).sort(dim=-1, descending=True).values
        total = best[..., 0]
        for rank in range(1, group_top):
            total = total + best[..., rank]
        total = total.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        chosen = total.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
        first = chosen.sort(-1).values[..., None] * size
        candidates = (first + torch.arange(size, device=choice.device)).flatten(1)
    order = choice.gather(1, candidates).sort(dim=-1, descending=True, stable=True).indices
    return candidates.gather(1, order[:, :k])


def gates_of(chosen: Tensor, padding: Tensor | None, normalize: bool, scale: float) -> Tensor:
    """Gates of the chosen experts' scores ``[T, k]``; zero for padding."""
    gates = chosen / (chosen.sum(-1, keepdim=True) + EPSILON) if normalize else chosen
    gates = gates * scale
    return gates if padding is None else torch.where(padding[:, None], 0.0, gates)


def tables(
    experts: Tensor, padding: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts ``[E]``, offsets ``[E + 1]``, permutation and its inverse ``[T * k]``.

    Pairs of padding, and pairs whose id is no expert's, are not counted and come last.
    """
    outside = (experts < 0) | (experts >= num_experts)
    if padding is not None:
        outside = outside | padding[:, None]
    key = torch.where(outside, num_experts, experts).flatten()
    counts = key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.cat([key.new_zeros(1), counts[:num_experts].cumsum(0)])
    permutation = key.argsort(stable=True)
    inverse = torch.empty_like(permutation)
    inverse.scatter_(0, permutation, torch.arange(key.numel(), device=key.device))
    return counts[:num_experts].clone(), offsets, permutation, inverse


def backward(
    grad: Tensor,  # [T, k], of the gates
    scores: Tensor,  # [T, E]
    experts: Tensor,  # [T, k]
    padding: Tensor | None,  # [T]
    score_fn: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Gradient of the logits ``[T, E]``; differentiable."""
    x = scores.to(_checks.accumulate_dtype(scores.dtype))
    if padding is not None:  # whatever a padded row holds, it must not reach a product
        x = torch.where(padding[:, None], 0.0, x)
        grad = torch.where(padding[:, None], 0.0, grad)
    s = score(x, score_fn)
    chosen = s.gather(1, experts)
    d = grad * scale  # of the chosen scores
    if normalize:
        total = chosen.sum(-1, keepdim=True) + EPSILON
        d = (d - (d * chosen / total).sum(-1, keepdim=True)) / total
    if score_fn == "softmax":
        along = torch.zeros_like(s).scatter(1, experts, d)
        return (s * (along - (d * chosen).sum(-1, keepdim=True))).to(scores.dtype)
    if score_fn == "sigmoid":
        slope = chosen * (1 - chosen)
    else:  # d sqrt(softplus(x)) = sigmoid(x) / (2 s), whose limit where s vanishes is 0
        alive = chosen > 0
        at = x.gather(1, experts)
        slope = torch.where(alive, at.sigmoid() / (2 * torch.where(alive, chosen, 1.0)), 0.0)
        slope = torch.where(at.isnan(), at, slope)
    return torch.zeros_like(s).scatter(1, experts, d * slope).to(scores.dtype)
