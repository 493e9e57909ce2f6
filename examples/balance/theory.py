"""The fixed point of load balancing by a bias: the dual of an assignment problem.

Tokens are assigned to experts, K each, so that the scores add up to the most while every expert
gets its share ``T K / E``. With a price ``-b`` on the experts instead of the second condition, each
token takes its best K of ``s + b``, as the router does, and the dual objective per token is ::

    D(b) = mean_t sum topK(s_t + b) - (K / E) sum(b)

It is convex, and ``count / T - K / E`` is a subgradient: every rule goes down it. Source: Han and
Zhong, 2025 (arXiv 2512.03915). A linear program solver that knows nothing of rules finds the same
optimum from the other side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from weightshare.moe import max_violation, update_balance_bias_


class Assignment(NamedTuple):
    """The assignment problem of scores, solved.

    Attributes:
        value: greatest sum of scores per token.
        bias: duals ``[E]`` of the experts' shares, of mean 0.
        shares: who goes where ``[T, E]``, 0 to 1.
        unique: whether there are no other duals: the tokens that are split connect all experts.
    """

    value: float
    bias: Tensor
    shares: Tensor
    unique: bool


def assign(scores: Tensor, k: int) -> Assignment:
    """Solve the problem for scores ``[T, E]`` (float64)."""
    tokens, experts = scores.shape
    rows = sparse.vstack([
        sparse.kron(sparse.eye(tokens), np.ones((1, experts))),
        sparse.kron(np.ones((1, tokens)), sparse.eye(experts)),
    ])  # fmt: skip
    wanted = np.r_[np.full(tokens, float(k)), np.full(experts, tokens * k / experts)]
    found = linprog(
        -scores.numpy().ravel(), A_eq=rows.tocsr(), b_eq=wanted, bounds=(0, 1), method="highs"
    )
    if found.status:
        raise RuntimeError(f"assignment: {found.message}")
    shares = found.x.reshape(tokens, experts)
    split = sparse.csr_array((shares > 1e-9) & (shares < 1 - 1e-9))
    graph = sparse.block_array([[None, split], [split.T, None]])
    parts = connected_components(graph, directed=False)[1][tokens:]
    # The program minimises, so these are the gains by a smaller share: the bias, up to a shift.
    bias = torch.from_numpy(found.eqlin.marginals[tokens:].copy())
    return Assignment(
        -found.fun / tokens, bias - bias.mean(), torch.from_numpy(shares), len(set(parts)) == 1
    )


def dual(scores: Tensor, bias: Tensor, k: int) -> tuple[float, Tensor]:
    """D(b) for scores ``[T, E]``, and the tokens of each expert ``[E]``."""
    experts = scores.shape[1]
    best, chosen = (scores + bias).topk(k, dim=1)
    value = best.sum(1).mean() - k / experts * bias.sum()
    return value.item(), torch.bincount(chosen.flatten(), minlength=experts)


def distance(bias: Tensor, other: Tensor) -> float:
    """Greatest difference of two biases, whatever their shift."""
    return ((bias - bias.mean()) - (other - other.mean())).abs().max().item()


def iterate(scores: Tensor, k: int, rule: str, steps: int, best: Assignment) -> dict:
    """Update a bias from 0 on the same tokens over and over; how far it is from the optimum.

    ``gap`` is ``D(b) - D(b*)`` as a share of the first one, ``distance`` that of b.
    """
    bias = torch.zeros(scores.shape[1], dtype=torch.float64)
    first, counts = dual(scores, bias, k)
    way = first - best.value
    rows: dict = {"gap": [], "distance": [], "violation": []}
    for step in range(1, steps + 1):
        update_balance_bias_(bias, counts, rule=rule, step=step)
        value, counts = dual(scores, bias, k)
        rows["gap"].append((value - best.value) / way)
        rows["distance"].append(distance(bias, best.bias))
        rows["violation"].append(max_violation(counts).item())
    return rows


def compare(scores: Tensor, bias: Tensor, k: int) -> dict:
    """A bias from training against the duals of two disjoint halves of the tokens.

    How far the two duals are apart tells what so few tokens leave open.
    """
    one, other = (assign(part, k) for part in scores.chunk(2))
    here = scores[: len(scores) // 2]
    start, found = (dual(here, b, k)[0] - one.value for b in (torch.zeros_like(bias), bias))
    sampled = dual(here, other.bias, k)[0] - one.value
    return {
        "bias": (bias - bias.mean()).tolist(), "dual": one.bias.tolist(), "unique": one.unique,
        "optimum": one.value, "relative_gap": found / one.value,
        "gap": found / start, "gap_of_other_half": sampled / start,
        "distance": distance(bias, one.bias),
        "distance_of_other_half": distance(other.bias, one.bias),
        "correlation": torch.corrcoef(torch.stack([bias, one.bias]))[0, 1].item(),
    }  # fmt: skip


def check_reading(scores: Tensor, k: int, best: Assignment, tries: int = 200) -> dict:
    """What the primal-dual reading claims, as numbers; each is an error, 0 but for rounding.

    ``duality``: D at the solver's duals is its optimum. ``subgradient``: D lies nowhere below the
    line along ``count / T - K / E``. ``shift``: adding a constant to b changes nothing. ``rule``:
    the proportional rule is a step of ``rate E / K`` against the subgradient. ``choice``: tokens
    that are not split and whose top k by the duals is not the solver's choice.
    """
    tokens, experts = scores.shape
    draw = torch.Generator().manual_seed(0)
    spread = best.bias.std()
    below = shift = rule = 0.0

    def some() -> Tensor:
        return spread * torch.randn(experts, generator=draw, dtype=torch.float64)

    for _ in range(tries):
        b, other = some(), some()
        value, counts = dual(scores, b, k)
        slope = counts.double() / tokens - k / experts
        line = value + (slope * (other - b)).sum().item()
        below = max(below, line - dual(scores, other, k)[0])
        shift = max(shift, abs(dual(scores, b + other[0], k)[0] - value))
        moved = update_balance_bias_(b.clone(), counts, rule="proportional", rate=0.01)
        wanted = b - 0.01 * experts / k * slope
        rule = max(rule, distance(moved, wanted))
    whole = ((best.shares < 1e-9) | (best.shares > 1 - 1e-9)).all(1)
    chosen = (scores + best.bias).topk(k, dim=1).indices
    missed = best.shares.gather(1, chosen)[whole] < 0.5
    return {
        "duality": abs(dual(scores, best.bias, k)[0] - best.value) / best.value,
        "subgradient": below, "shift": shift, "rule": rule,
        "choice": int(missed.any(1).sum()), "split_tokens": int((~whole).sum()),
    }  # fmt: skip
