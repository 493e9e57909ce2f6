"""Entangled linear on Triton: the mixture is applied inside the product.

W itself is the operand. Along the axis that is summed over, the grid's factor is constant on
blocks, so each block's sum is scaled once; along the other it is one factor per output column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels import _products, _triton


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Tensor, rows: Tensor, cols: Tensor
) -> Tensor:
    """``y = x (C * W)^T + bias``; x ``[..., I]``, bias ``[O]`` (already mixed) -> ``[..., O]``."""
    bias = None if bias is None else bias.contiguous()
    mixture = _products.Mixture(grid, cols, rows, k_axis=1)
    return _products.product(x, weight.t(), bias, mixture=mixture)


def grad_x(grad: Tensor, weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``dx = dy (C * W)``; grad ``[..., O]`` -> ``[..., I]``."""
    return _products.product(grad, weight, mixture=_products.Mixture(grid, rows, cols, k_axis=0))


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
    mixture = (weight, grid, rows, cols)
    return _products.outer_(target, grad, x, accumulate, mixture=mixture)


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: 12 coupled choices of 1536 x 1536, 512 and 8 tokens."""
    size, e = 1536, dtype.itemsize

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    weight, grid = empty(size, size), empty(4, 3, kind=torch.float32)
    classes = empty(size, kind=torch.int32)
    found = []
    for tokens in (512, 8):
        x = empty(tokens, size)
        flops, moved = 2 * tokens * size * size, e * (size * size + 2 * tokens * size)
        bound = "memory" if tokens <= _products.FEW_ROWS else "matrix"
        for name, extra, call in (
            ("forward", 0, lambda x=x: forward(x, weight, None, grid, classes, classes)),
            ("grad_x", 0, lambda x=x: grad_x(x, weight, grid, classes, classes)),
            (
                "grad_weight",
                2 * e * size * size,
                lambda x=x: grad_weight_(weight, x, x, weight, grid, classes, classes, True),
            ),
        ):
            label = f"entangled_linear {name}, {tokens} tokens, 12 choices of 1536 x 1536"
            found.append(_triton.Example(label, call, flops, moved + extra, bound))
    return found
