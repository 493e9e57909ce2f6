"""A linear layer on selected rows and columns of a shared weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect
from weightshare_kernels._register import applier, define
from weightshare_kernels._select import Axis, Selection, select, take, view
from weightshare_kernels.ops.sliced_linear import reference

_TRITON = "weightshare_kernels.ops.sliced_linear.triton"

_forward = define(
    "sliced_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? rows, Tensor? cols) -> Tensor",
    reference=reference.forward,
    fake=lambda x, weight, bias, rows, cols: x.new_empty(
        (*x.shape[:-1], (weight if rows is None else rows).shape[0])
    ),
    triton=f"{_TRITON}:forward",
)
_grad_x = define(
    "sliced_linear_grad_x(Tensor grad, Tensor weight, Tensor? rows, Tensor? cols) -> Tensor",
    reference=reference.grad_x,
    fake=lambda grad, weight, rows, cols: grad.new_empty(
        (*grad.shape[:-1], weight.shape[1] if cols is None else cols.shape[0])
    ),
    triton=f"{_TRITON}:grad_x",
)
_grad_weight_ = define(
    "sliced_linear_grad_weight_(Tensor(a!) target, Tensor grad, Tensor x, Tensor? rows, "
    "Tensor? cols, bool accumulate) -> ()",
    reference=reference.grad_weight_,
    fake=lambda target, grad, x, rows, cols, accumulate: None,
    triton=f"{_TRITON}:grad_weight_",
)


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Selection = None,
    in_: Selection = None,
) -> Tensor:
    """Linear layer on a slice of a shared weight: ``x W[out, in_]^T + b[out]``.

    A selection is ``None`` (all), an int (prefix), a slice, a sequence of slices (one prefix per
    block of a fused qkv or gate+up weight, interleaved heads) or a 1-D index tensor without
    repeats. No copy of the slice is made, and the weight gradients of all slices used in a step
    are summed in one buffer (see ``weightshare_kernels._collect``).

    Args:
        x: input ``[..., in]``, ``in`` being the size of the ``in_`` selection.
        weight: shared weight ``[O, I]``.
        bias: shared bias ``[O]``, selected by ``out``, or None.
        out: selected rows of the weight.
        in_: selected columns of the weight.

    Returns:
        ``[..., out]``, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a selection is out of range or repeats an element, or shapes, devices or
            dtypes do not fit; the message names the argument and what was wanted.

    Source: slicing as in Once-for-All (Cai et al., 2020) and AutoFormer (Chen et al., 2021).
    """
    _checks.linear_arguments(x, weight, bias)
    rows = select("out", out, weight.shape[0], weight.device)
    cols = select("in_", in_, weight.shape[1], weight.device)
    if x.shape[-1] != cols.length:
        raise ValueError(
            f"x: last dimension is {x.shape[-1]}, but in_={in_!r} selects {cols.length} of "
            f"{weight.shape[1]} columns; slice x or change in_"
        )
    if x.dim() == 1:
        return sliced_linear(x[None], weight, bias, out=out, in_=in_)[0]
    x, weight, bias = _checks.autocast(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        collector = None
        if weight.requires_grad:
            weight, collector = _collect.collect(weight)
        return _differentiable(x, weight, bias, rows, cols, collector)
    return _compute(x, weight, bias, rows, cols)


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Axis, cols: Axis) -> Tensor:
    if bias is not None:
        bias = take(bias, rows)
    return _forward(x, view(view(weight, 0, rows), 1, cols), bias, rows.index, cols.index)


class _SlicedLinear(Function):
    """Autograd of :func:`sliced_linear`; saves x and the shared weight, no slice of it."""

    @staticmethod
    def forward(x, weight, bias, rows, cols, collector):
        return _compute(x, weight, bias, rows, cols)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, rows, cols, collector = inputs
        ctx.save_for_backward(x, weight)
        ctx.axes = rows, cols
        ctx.bias_size = None if bias is None else bias.shape[0]
        # Kept beside the saved tensor, so that the living graphs go on sharing one collector
        # when saved-tensor hooks replace what is saved.
        ctx.collected = None if collector is None else (weight, collector)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, cols = ctx.axes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            dx, dw = _double_differentiable(grad, x, weight, rows, cols)
        else:
            part = view(view(weight, 0, rows), 1, cols)
            dx = _grad_x(grad, part, rows.index, cols.index) if wants_x else None
            dw = _weight_gradient(ctx, grad, x, weight, rows, cols) if wants_weight else None
        db = _bias_gradient(grad, ctx.bias_size, rows) if wants_bias else None
        return dx, dw, db, None, None, None


_differentiable = applier(_SlicedLinear)


def _weight_gradient(ctx, grad, x, weight, rows: Axis, cols: Axis) -> Tensor | None:
    if ctx.collected is not None:
        routed, collector = ctx.collected
        if _collect.wanted(routed):
            target, accumulate = collector.target(routed, rows, cols)
            _grad_weight_(target, grad, x, rows.index, cols.index, accumulate)
        return None
    dw = grad.flatten(0, -2).t() @ x.flatten(0, -2)
    return _collect.padded(dw, weight.shape, rows, cols)


def _double_differentiable(grad, x, weight, rows: Axis, cols: Axis):
    """Gradients in terms of differentiable PyTorch, for ``create_graph=True``."""
    part = view(view(weight, 0, rows), 1, cols)
    dx = reference.grad_x(grad, part, rows.index, cols.index)
    dw = grad.flatten(0, -2).t() @ x.flatten(0, -2)
    return dx, _collect.padded(dw, weight.shape, rows, cols)


def _bias_gradient(grad: Tensor, size: int, rows: Axis) -> Tensor:
    db = (grad if grad.dim() == 2 else grad.flatten(0, -2)).sum(0)
    if rows.index is not None:
        return db.new_zeros(size).index_copy(0, rows.index, db)
    if rows.length == size:
        return db
    return torch.constant_pad_nd(db, (rows.start, size - rows.start - rows.length))
