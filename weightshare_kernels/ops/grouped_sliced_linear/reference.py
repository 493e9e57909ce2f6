"""Grouped sliced linear in plain PyTorch: the definition of the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightshare_kernels import _checks


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    outs: Sequence[int],
    ins: Sequence[int],
    width: int,
) -> Tensor:
    """``y = x W[:out, :in]^T + bias[:out]`` group by group; x ``[N, I]`` -> ``[N, width]``."""
    parts = [x.new_empty(0, width)]
    for rows, out, in_ in zip(x.split(list(sizes)), outs, ins, strict=True):
        shift = None if bias is None else bias[:out]
        y = torch.nn.functional.linear(rows[:, :in_], weight[:out, :in_], shift)
        parts.append(torch.nn.functional.pad(y, (0, width - out)))
    return torch.cat(parts)


def grad_weight_(
    buffer: Tensor,
    grad: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    outs: Sequence[int],
    ins: Sequence[int],
    accumulate: bool,
    bias_size: int,
) -> Tensor:
    """``buffer (+)= sum over groups of dy^T x`` in place; returns ``db [bias_size]``."""
    kind = _checks.accumulate_dtype(buffer.dtype)
    total = torch.zeros(buffer.shape, dtype=kind, device=buffer.device)
    db = torch.zeros(bias_size, dtype=kind, device=buffer.device)
    groups = zip(grad.split(list(sizes)), x.split(list(sizes)), outs, ins, strict=True)
    for g, rows, out, in_ in groups:
        total[:out, :in_] += g[:, :out].t() @ rows[:, :in_]
        if bias_size:
            db[:out] += g[:, :out].sum(0)
    buffer.add_(total) if accumulate else buffer.copy_(total)
    return db.to(grad.dtype)
