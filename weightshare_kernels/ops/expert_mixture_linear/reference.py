"""Expert mixture in plain PyTorch: the definition of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def _active(experts: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """The slices themselves, ``[M, out, in]``."""
    if rows is not None:
        experts = experts[:, rows]
    return experts if cols is None else experts[:, :, cols]


def _mixed(experts: Tensor, mix: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``sum_m diag(mix^m) experts^m``, the mixed weight, materialised."""
    return (mix[:, :, None] * _active(experts, rows, cols)).sum(0).to(experts.dtype)


def forward(
    x: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    mix: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
) -> Tensor:
    """``y = x W^T + bias``; x ``[..., in]``, mix ``[M, out]``, bias ``[out]`` -> ``[..., out]``."""
    y = x @ _mixed(experts, mix, rows, cols).t()
    return y if bias is None else y + bias


def grad_x(
    grad: Tensor, experts: Tensor, mix: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """``dx = dy W``; grad ``[..., out]`` -> ``[..., in]``."""
    return grad @ _mixed(experts, mix, rows, cols)


def gradients(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mix: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the slices ``[M, out, in]`` and of mix ``[M, out]``."""
    product = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(mix.dtype)
    return mix[:, :, None] * product, (product * _active(experts, rows, cols)).sum(2)


def grad_weight_(
    target: Tensor,
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mix: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """``target[:, rows][:, :, cols] (+)= mix^m (dy^T x)``, in place; returns ``d mix``."""
    value, dmix = gradients(grad, x, experts, mix, rows, cols)
    for expert, part in zip(target, value.to(target.dtype), strict=True):
        every = [torch.arange(n, device=target.device) for n in expert.shape]
        where = (
            (every[0] if rows is None else rows)[:, None],
            every[1] if cols is None else cols,
        )
        expert[where] = expert[where] + part if accumulate else part
    return dmix
