"""A mixture of nested crops of one weight, of any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect, _grid
from weightshare_kernels._register import define, lean
from weightshare_kernels.ops.entangle import reference

_TRITON = "weightshare_kernels.ops.entangle.triton"

_forward = define(
    "entangle(Tensor weight, Tensor grid, Tensor rows, Tensor cols, Tensor inner) -> Tensor",
    reference=reference.forward,
    fake=lambda weight, grid, rows, cols, inner: torch.empty_like(weight),
    triton=f"{_TRITON}:forward",
)
_backward = define(
    "entangle_backward(Tensor grad, Tensor weight, Tensor grid, Tensor rows, Tensor cols, "
    "Tensor inner) -> (Tensor, Tensor)",
    reference=reference.backward,
    fake=lambda grad, weight, grid, rows, cols, inner: (
        torch.empty_like(weight),
        torch.empty_like(grid),
    ),
    triton=f"{_TRITON}:backward",
)


def entangle(weight: Tensor, choices: Sequence[Sequence[int]], alpha: Tensor) -> Tensor:
    """Mix nested crops of one weight: ``sum_k alpha_k Pad(crop_k(W))``, in one pass.

    Axes 0 and 1 are cropped to prefixes, further (spatial) axes to their centre, so that a 7x7
    kernel holds a 5x5 and a 3x3 one. No padded copy is made; backward returns the gradients of
    the weight and of every alpha in one pass.

    Args:
        weight: shared weight of 1 or more dimensions ``[O, I, ...]``.
        choices: K tuples, one size per axis of the weight; on axes 0 and 1 a sequence of slices
            may stand instead.
        alpha: ``[K]`` mixture coefficients.

    Returns:
        The mixed weight, in the shape and dtype of ``weight``.

    Raises:
        TypeError, ValueError: choices or alpha do not fit the weight.

    Source: weight superposition of TangleNAS (Sukthanker et al., 2023, arXiv 2312.10440).
    """
    _checks.tensor("weight", weight)
    if weight.dim() == 0:
        raise ValueError("weight: expected at least 1 dimension, got a scalar")
    axes = [f"size of axis {d}" for d in range(weight.dim())]
    _grid.check_choices(choices, alpha, weight.shape, axes)
    _checks.same_device("alpha", alpha, "weight", weight)
    grid = _grid.make_grid(weight.shape, choices, alpha)
    rows, cols, *rest = (*grid.shape, 1)[: max(2, len(grid.shape))]
    cells = _grid.mixture(grid, alpha).to(_checks.accumulate_dtype(weight.dtype))
    cells = cells.view(rows, cols, math.prod(rest))
    folded = weight.reshape([c.shape[0] for c in grid.folded])
    apply = _lean if _collect.plain() else _Entangle.apply
    return apply(folded, cells, *grid.folded).view(weight.shape)


class _Entangle(Function):
    """Autograd of :func:`entangle` on ``[R, C, S]``; saves the weight and the small grid."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, grid, rows, cols, inner):
        return _forward(weight.contiguous(), grid, rows, cols, inner)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        weight, grid, *classes = ctx.saved_tensors
        if torch.is_grad_enabled():
            dw, dgrid = reference.backward(grad, weight, grid, *classes)
        else:
            dw, dgrid = _backward(grad.contiguous(), weight.contiguous(), grid, *classes)
        return dw, dgrid, None, None, None


_lean = lean(_Entangle)
