"""Sliced linear in plain PyTorch: the definition of the op."""

from __future__ import annotations

from torch import Tensor


def _pick(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """The slice itself, ``[out, in]``."""
    if rows is not None:
        weight = weight[rows]
    return weight if cols is None else weight[:, cols]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """``y = x W[rows][:, cols]^T + bias``; x ``[..., in]``, bias ``[out]`` -> ``[..., out]``."""
    y = x @ _pick(weight, rows, cols).t()
    return y if bias is None else y + bias


def grad_x(grad: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``dx = dy W[rows][:, cols]``; grad ``[..., out]`` -> ``[..., in]``."""
    return grad @ _pick(weight, rows, cols)


def grad_weight_(
    target: Tensor,
    grad: Tensor,
    x: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    accumulate: bool,
) -> None:
    """``target[rows][:, cols] (+)= dy^T x``, in place; nothing else of target is touched."""
    value = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(target.dtype)
    if rows is None and cols is None:
        target.add_(value) if accumulate else target.copy_(value)
        return
    if cols is None:
        target[rows] = target[rows] + value if accumulate else value
        return
    where = (slice(None), cols) if rows is None else (rows[:, None], cols)
    target[where] = target[where] + value if accumulate else value
