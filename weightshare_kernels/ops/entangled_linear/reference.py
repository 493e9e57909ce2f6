"""Entangled linear in plain PyTorch: the definition of the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightshare_kernels import _grid
from weightshare_kernels.ops.entangle.reference import block_sums
from weightshare_kernels.ops.entangle.reference import pad_and_sum as mix


def _scaled(weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``C * W``, the mixed weight, materialised."""
    return (weight * _grid.factors(grid, (rows, cols))).to(weight.dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Tensor, rows: Tensor, cols: Tensor
) -> Tensor:
    """``y = x (C * W)^T + bias``; x ``[..., I]``, bias ``[O]`` (already mixed) -> ``[..., O]``."""
    y = x @ _scaled(weight, grid, rows, cols).t()
    return y if bias is None else y + bias


def grad_x(grad: Tensor, weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``dx = dy (C * W)``; grad ``[..., O]`` -> ``[..., I]``."""
    return grad @ _scaled(weight, grid, rows, cols)


def grad_weight_(
    target: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: Tensor,
    rows: Tensor,
    cols: Tensor,
    accumulate: bool,
) -> Tensor:
    """``target (+)= C * (dy^T x)`` in place; returns ``d grid``, block sums of ``W * (dy^T x)``."""
    effective = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(grid.dtype)
    value = (effective * _grid.factors(grid, (rows, cols))).to(target.dtype)
    target.add_(value) if accumulate else target.copy_(value)
    return block_sums(effective * weight.to(grid.dtype), grid, (rows, cols))


def pad_and_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    choices: Sequence[Sequence[int]],
    alpha: Tensor,
) -> Tensor:
    """The layer as the papers state it: pad every choice, sum, one linear."""
    if bias is not None:
        bias = mix(bias, [choice[:1] for choice in choices], alpha)
    return torch.nn.functional.linear(x, mix(weight, choices, alpha), bias)
