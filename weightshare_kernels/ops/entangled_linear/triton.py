"""Entangled linear on Triton.

For few rows the mixture is applied inside the product. W itself is the operand: along the axis that
is summed over, the grid's factor is constant on blocks, so each block's sum is scaled once; along
the other it is one factor per output column. For more rows one pass makes the mixed weight, for the
call, and the GPU's own library multiplies: at 512 rows of 1536 x 1536 the product alone took an
H100 13 us, the pass and the library's product take 3 and 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels import _products, _triton
from weightshare_kernels._select import lasting, temporary
from weightshare_kernels.ops.entangle import _forward as _entangle

_zeros: dict[torch.device, Tensor] = {}


def _mixed(weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``C * W``; as :func:`entangle` takes it, a weight of one element on a third axis."""
    inner = None if temporary() else _zeros.get(weight.device)
    if inner is None:
        with lasting():
            inner = rows.new_zeros(1)
        captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if not temporary() and not captured:
            _zeros[weight.device] = inner
    return _entangle(weight.contiguous()[:, :, None], grid[:, :, None], rows, cols, inner)[:, :, 0]


def _few(x: Tensor) -> bool:
    return x.numel() <= _products.FEW_ROWS * x.shape[-1]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Tensor, rows: Tensor, cols: Tensor
) -> Tensor:
    """``y = x (C * W)^T + bias``; x ``[..., I]``, bias ``[O]`` (already mixed) -> ``[..., O]``."""
    if not _few(x):
        return torch.nn.functional.linear(x, _mixed(weight, grid, rows, cols), bias)
    bias = None if bias is None else bias.contiguous()
    mixture = _products.Mixture(grid, cols, rows, k_axis=1)
    return _products.product(x, weight.t(), bias, mixture=mixture)


def grad_x(grad: Tensor, weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``dx = dy (C * W)``; grad ``[..., O]`` -> ``[..., I]``."""
    if not _few(grad):
        return grad @ _mixed(weight, grid, rows, cols)
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
        few = tokens <= _products.FEW_ROWS
        for name, extra, call in (
            ("forward", 0, lambda x=x: forward(x, weight, None, grid, classes, classes)),
            ("grad_x", 0, lambda x=x: grad_x(x, weight, grid, classes, classes)),
            (
                "grad_weight",
                2 * e * size * size,
                lambda x=x: grad_weight_(weight, x, x, weight, grid, classes, classes, True),
            ),
        ):
            if name != "grad_weight" and not few:  # no kernel of this module
                continue
            label = f"entangled_linear {name}, {tokens} tokens, 12 choices of 1536 x 1536"
            found.append(_triton.Example(label, call, flops, moved + extra, bound))
    return found
