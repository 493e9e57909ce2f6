"""Sliced linear on Triton, and on the GPU's own matrix library where that is quicker.

A span of rows and columns is a strided view, which the library multiplies as it is. Kernels take
over where it cannot: index tables (gathered at the operand's addresses, scattered at the
result's) and few rows, where the one cost is reading W and each of its tiles is read once. With
very many rows a copy of the slice costs less than kernels that gather lose to the library:
12608 rows of 384 -> 1152 took them 47 us, and 96 us for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightshare_kernels import _products, _triton

GATHER_ROWS = 128 if _triton.interpreted() else 1024  # from which a copy of the slice pays


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """``y = x W[rows][:, cols]^T + bias``; x ``[..., in]``, bias ``[out]`` -> ``[..., out]``."""
    if _plain(x, rows, cols):
        return torch.nn.functional.linear(x, _part(weight, rows, cols), bias)
    bias = None if bias is None else bias.contiguous()
    return _products.product(x, weight.t(), bias, k_table=cols, n_table=rows)


def grad_x(grad: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``dx = dy W[rows][:, cols]``; grad ``[..., out]`` -> ``[..., in]``."""
    if _plain(grad, rows, cols):
        return grad @ _part(weight, rows, cols)
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
    elif _more(grad, GATHER_ROWS) and (rows is not None or cols is not None):
        _put_(target, _products.across(grad, x, target.dtype), rows, cols, accumulate)
    else:  # a table, or a sum kept in fp32 over lower inputs
        _products.outer_(target, grad, x, accumulate, (rows, cols))


def _more(x: Tensor, count: int) -> bool:
    return x.numel() > count * x.shape[-1]


def _plain(x: Tensor, rows: Tensor | None, cols: Tensor | None) -> bool:
    spans = rows is None and cols is None
    return _more(x, _products.FEW_ROWS if spans else GATHER_ROWS)


def _where(rows: Tensor | None, cols: Tensor | None) -> tuple:
    if rows is None or cols is None:
        return (slice(None) if rows is None else rows, slice(None) if cols is None else cols)
    return (rows[:, None], cols)


def _part(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """The slice: the weight itself, or a copy where there are tables."""
    return weight if rows is None and cols is None else weight[_where(rows, cols)]


def _put_(
    target: Tensor, value: Tensor, rows: Tensor | None, cols: Tensor | None, accumulate: bool
) -> None:
    """Write or add a slice's gradient; no element is met twice."""
    if rows is not None and cols is not None:
        where = _where(rows, cols)
        target[where] = target[where] + value if accumulate else value
        return
    dim, table = (0, rows) if cols is None else (1, cols)
    (target.index_add_ if accumulate else target.index_copy_)(dim, table, value)


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: rows of 3072 x 3072 by index (pruning), 896 and 8 tokens."""
    size, out, e = 3072, 1536, dtype.itemsize

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    weight, index = empty(size, size), empty(out, kind=torch.int64)
    found = []
    for tokens in (896, 8):
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
