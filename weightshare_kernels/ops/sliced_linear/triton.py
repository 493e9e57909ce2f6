"""Sliced linear on Triton, and on the GPU's own matrix library where a slice is a plain span.

A span of rows and columns is a strided view, which the library multiplies as it is. Kernels take
over where it cannot: index tables (gathered at the operand's addresses, scattered at the
result's) and few rows, where the one cost is reading W and each of its tiles is read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels import _products, _triton


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """``y = x W[rows][:, cols]^T + bias``; x ``[..., in]``, bias ``[out]`` -> ``[..., out]``."""
    if rows is None and cols is None and not _few(x):
        return torch.nn.functional.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    return _products.product(x, weight.t(), bias, k_table=cols, n_table=rows)


def grad_x(grad: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``dx = dy W[rows][:, cols]``; grad ``[..., out]`` -> ``[..., in]``."""
    if rows is None and cols is None and not _few(grad):
        return grad @ weight
    return _products.product(grad, weight, k_table=rows, n_table=cols)


def grad_weight_(
    target: Tensor,
    grad: Tensor,
    x: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    accumulate: bool,
) -> None:
    """``target[rows][:, cols] (+)= dy^T x``, in place; nothing else of target is touched."""
    if rows is None and cols is None and target.dtype == grad.dtype:
        target.addmm_(_products.matrix(grad).t(), _products.matrix(x), beta=int(accumulate))
    else:  # a table, or a sum kept in fp32 over lower inputs
        _products.outer_(target, grad, x, accumulate, (rows, cols))


def _few(x: Tensor) -> bool:
    return x.numel() <= _products.FEW_ROWS * x.shape[-1]


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: rows of 3072 x 3072 by index (pruning), 1792 and 8 tokens."""
    size, out, e = 3072, 1536, dtype.itemsize

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    weight, index = empty(size, size), empty(out, kind=torch.int64)
    found = []
    for tokens in (1792, 8):
        x, g, narrow = empty(tokens, size), empty(tokens, out), empty(tokens, out)
        flops = 2 * tokens * out * size
        moved = e * (out * size + tokens * (size + out))
        bound = "memory" if tokens <= _products.FEW_ROWS else "matrix"
        for name, call in {
            "index rows, forward": lambda x=x: forward(x, weight, None, index, None),
            "index columns, forward": lambda a=narrow: forward(a, weight, None, None, index),
            "index rows, grad_x": lambda g=g: grad_x(g, weight, index, None),
            "index rows, grad_weight": lambda g=g, x=x: grad_weight_(
                weight, g, x, index, None, True
            ),
        }.items():
            extra = e * out * size * ("weight" in name)
            label = f"sliced_linear {name}, {tokens} tokens, 3072 -> 1536"
            found.append(_triton.Example(label, call, flops, moved + extra, bound))
    x = empty(8, 768)
    part = weight[:out, :768]
    label = "sliced_linear prefix, forward, 8 tokens, 768 -> 1536"
    moved = e * (out * 768 + 8 * (768 + out))
    call = lambda: forward(x, part, None, None, None)  # noqa: E731
    return [*found, _triton.Example(label, call, 2 * 8 * 768 * out, moved, "memory")]
