"""Entangled weights in plain PyTorch: the definition of the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightshare_kernels import _grid


def forward(weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor, inner: Tensor) -> Tensor:
    """``weight[r,c,s] * grid[rows[r], cols[c], inner[s]]``, zero outside the grid."""
    return (weight * _grid.factors(grid, (rows, cols, inner))).to(weight.dtype)


def backward(
    grad: Tensor, weight: Tensor, grid: Tensor, rows: Tensor, cols: Tensor, inner: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight ``[R,C,S]`` and of grid ``[Gr,Gc,Gs]``."""
    product = grad.to(grid.dtype) * weight.to(grid.dtype)
    return forward(grad, grid, rows, cols, inner), block_sums(product, grid, (rows, cols, inner))


def block_sums(values: Tensor, grid: Tensor, classes: Sequence[Tensor]) -> Tensor:
    """Sum of ``values`` over each block of the grid, always in the same order.

    A pass per block: ``index_add`` adds by atomics on a GPU, and a product with an indicator
    matrix might be rounded (TF32, autocast).
    """
    for axis, index in enumerate(classes):
        rest = [1] * (values.dim() - axis - 1)
        parts = [
            torch.where((index == block).view(-1, *rest), values, 0.0).sum(axis)
            for block in range(grid.shape[axis])
        ]
        values = torch.stack(parts, axis) if parts else values.narrow(axis, 0, 0)
    return values.contiguous()


def pad_and_sum(weight: Tensor, choices: Sequence[Sequence[int]], alpha: Tensor) -> Tensor:
    """``sum_k alpha_k Pad(crop_k(W))`` as the papers state it: K padded copies."""
    total = torch.zeros_like(weight)
    for choice, a in zip(choices, alpha, strict=True):
        crop = weight
        pads: list[int] = []
        for axis, (size, full) in enumerate(zip(choice, weight.shape, strict=True)):
            if not isinstance(size, int):  # pieces are padded where they lie
                crop = crop * _mask(crop, axis, size)
                pads = [0, 0, *pads]
                continue
            start = 0 if axis < 2 else (full - size) // 2
            crop = crop.narrow(axis, start, size)
            pads = [start, full - size - start, *pads]
        total = total + a.to(weight.dtype) * torch.nn.functional.pad(crop, pads)
    return total


def _mask(tensor: Tensor, axis: int, pieces: Sequence[slice]) -> Tensor:
    """One inside the slices of an axis, zero elsewhere; broadcasts over the other axes."""
    mask = tensor.new_zeros(tensor.shape[axis])
    for piece in pieces:
        mask[piece] = 1
    return mask.view([-1 if d == axis else 1 for d in range(tensor.dim())])
