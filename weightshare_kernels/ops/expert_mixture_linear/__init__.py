"""A linear layer whose weight is a mixture of experts' weights, sliced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _buffers, _checks, _collect
from weightshare_kernels._register import define, lean
from weightshare_kernels._select import Axis, Selection, select, view
from weightshare_kernels.ops.expert_mixture_linear import reference

_TRITON = "weightshare_kernels.ops.expert_mixture_linear.triton"


def _on_target(function):
    """Give a function that writes a slice of target the schema's whole buffer."""

    def grad_weight_(buffer, grad, x, experts, mix, rows, cols, row, col, accumulate):
        if not accumulate:
            buffer.zero_()
        target = buffer if rows is not None else buffer.narrow(1, row, mix.shape[1])
        target = target if cols is not None else target.narrow(2, col, x.shape[-1])
        return function(target, grad, x, experts, mix, rows, cols, accumulate)

    return grad_weight_


# Experts come narrowed to spans, [M, out, in] after tables; mix is [M, out], contiguous, in the
# dtype that sums are kept in; bias is mixed already.
_forward = define(
    "expert_mixture_linear(Tensor x, Tensor experts, Tensor? bias, Tensor mix, Tensor? rows, "
    "Tensor? cols) -> Tensor",
    reference=reference.forward,
    fake=lambda x, experts, bias, mix, rows, cols: x.new_empty((*x.shape[:-1], mix.shape[1])),
    triton=f"{_TRITON}:forward",
)
_grad_x = define(
    "expert_mixture_linear_grad_x(Tensor grad, Tensor experts, Tensor mix, Tensor? rows, "
    "Tensor? cols) -> Tensor",
    reference=reference.grad_x,
    fake=lambda grad, experts, mix, rows, cols: grad.new_empty(
        (*grad.shape[:-1], experts.shape[2] if cols is None else cols.shape[0])
    ),
    triton=f"{_TRITON}:grad_x",
)
_grad_weight_ = define(
    "expert_mixture_linear_grad_weight_(Tensor(a!) buffer, Tensor grad, Tensor x, "
    "Tensor experts, Tensor mix, Tensor? rows, Tensor? cols, SymInt row, SymInt col, "
    "bool accumulate) -> Tensor",
    reference=reference.grad_weight_,
    fake=lambda buffer, grad, x, experts, mix, rows, cols, row, col, accumulate: torch.empty_like(
        mix
    ),
    triton=f"{_TRITON}:grad_weight_",
    adapt=_on_target,
)


def expert_mixture_linear(
    x: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    mix: Tensor,
    *,
    out: Selection = None,
    in_: Selection = None,
) -> Tensor:
    """Linear layer of a slice of mixed experts: ``W = sum_m diag(mix^m) E^m[out, in_]``.

    The experts are summed tile by tile while the product reads them. The mixed weight is never
    saved for backward, nor made but for one copy that lives for the call (more than 16 rows on a
    GPU; on a CPU many rows, picked columns). Backward computes ``dy^T x`` once, and from each of
    its tiles every expert's gradient and every ``d mix``. The experts' gradients of all slices used
    in a backward pass are summed in one buffer (see ``weightshare_kernels._collect``).

    Args:
        x: input ``[..., in]``, ``in`` being the size of the ``in_`` selection.
        experts: weights of M experts ``[M, O, I]``.
        bias: biases ``[M, O]``, mixed and selected as the rows are, or None.
        mix: coefficients ``[M]`` (layer-wise), or ``[M, O]`` (neuron-wise: one per expert and
            output neuron, selected by ``out`` together with the rows). Any floating dtype.
        out: selected rows: None (all), an int (prefix), a slice, slices or a 1-D index tensor.
        in_: selected columns, likewise.

    Returns:
        ``[..., out]``, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a selection is out of range or repeats an element, or shapes or devices do not
            fit; the message names the argument and what was wanted.

    Source: Mixture-of-Supernets (Jawahar et al., 2023, arXiv 2306.04845).
    """
    _check(x, experts, bias, mix)
    rows = select("out", out, experts.shape[1], experts.device)
    cols = select("in_", in_, experts.shape[2], experts.device)
    if x.shape[-1] != cols.length:
        raise ValueError(
            f"x: last dimension is {x.shape[-1]}, but in_={in_!r} selects {cols.length} of "
            f"{experts.shape[2]} columns; slice x or change in_"
        )
    if x.dim() == 1:
        return expert_mixture_linear(x[None], experts, bias, mix, out=out, in_=in_)[0]
    x = _checks.autocast(x)  # the experts are cast where they are read: gradients keep their dtype
    mix = mix.to(_checks.accumulate_dtype(x.dtype))
    mix = mix[:, None].expand(-1, rows.length) if mix.dim() == 1 else _along(mix, 1, rows)
    if bias is not None:
        bias = (mix * _along(bias, 1, rows)).sum(0).to(x.dtype)
    mix = mix.contiguous()
    if not _collect.plain():
        return _ExpertMixtureLinear.apply(x, experts, bias, mix, rows, cols, None)
    collector = _collect.collect(experts) if torch.is_grad_enabled() else None
    return _lean(x, experts, bias, mix, rows, cols, collector)


def _check(x, experts, bias, mix) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the tensors fit."""
    _checks.tensor("x", x)
    _checks.tensor("experts", experts, 3)
    _checks.tensor("mix", mix)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension [..., in], got a scalar")
    count, size, _ = experts.shape
    if count == 0:
        raise ValueError("experts: has no expert; a mixture needs at least one, [M, O, I]")
    _checks.same_kind("experts", experts, "x", x)
    _checks.same_device("mix", mix, "experts", experts)
    if tuple(mix.shape) not in ((count,), (count, size)):
        raise ValueError(
            f"mix: expected shape ({count},), one per expert, or ({count}, {size}), one per expert "
            f"and row, got {tuple(mix.shape)}"
        )
    if bias is not None:
        _checks.tensor("bias", bias, 2)
        _checks.same_kind("bias", bias, "x", x)
        if bias.shape != experts.shape[:2]:
            raise ValueError(
                f"bias: expected shape ({count}, {size}), one per expert and row, got "
                f"{tuple(bias.shape)}; pass it whole, it is selected together with the rows"
            )


def _along(tensor: Tensor, dim: int, axis: Axis) -> Tensor:
    """A selection of one dimension, differentiably."""
    if axis.index is not None:
        return tensor.index_select(dim, axis.index)
    return view(tensor, dim, axis)


def _spans(experts: Tensor, rows: Axis, cols: Axis, dtype: torch.dtype) -> Tensor:
    """The experts narrowed to spans, tables left to the kernels; the slice alone is cast."""
    for dim, axis in ((1, rows), (2, cols)):
        experts = experts if axis.index is not None else _along(experts, dim, axis)
    return experts.to(dtype)


class _ExpertMixtureLinear(Function):
    """Autograd of :func:`expert_mixture_linear`; saves x, the shared experts and the small mix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, experts, bias, mix, rows, cols, collector):
        return _forward(x, _spans(experts, rows, cols, x.dtype), bias, mix, rows.index, cols.index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, experts, _, mix, rows, cols, collector = inputs
        ctx.save_for_backward(x, experts, mix)
        ctx.axes = rows, cols
        ctx.experts = experts  # for its shape and its .grad; the values come from what is saved
        ctx.collector = collector
        if collector is not None:
            collector.join(ctx)

    @staticmethod
    def backward(ctx, grad):
        x, experts, mix = ctx.saved_tensors
        rows, cols = ctx.axes
        wants_x, wants_experts, wants_bias, wants_mix = ctx.needs_input_grad[:4]
        arguments = (_spans(experts, rows, cols, grad.dtype), mix, rows.index, cols.index)
        dx = dw = db = dmix = None
        if torch.is_grad_enabled():  # create_graph=True: in terms of differentiable PyTorch
            dx = reference.grad_x(grad, *arguments)
            slices, dmix = reference.gradients(grad, x, *arguments)
            dw = _padded(slices.to(experts.dtype), experts.shape, rows, cols)
        else:
            if wants_x:
                dx = _grad_x(grad, *arguments)
            if wants_experts or wants_mix:
                dw, dmix = _weight_gradient(ctx, grad, x, *arguments)
        if wants_bias:
            db = _collect.column_sums(grad)
        return dx, dw, db, dmix, None, None, None


_lean = lean(_ExpertMixtureLinear)


def _weight_gradient(ctx, *arguments):
    """Gradient of the experts, through their collector where there is one, and of mix."""
    starts = [axis.start for axis in ctx.axes]
    if ctx.collector is None or not _collect.wanted(accumulator := ctx.next_functions[1][0]):
        # Tracing cannot see through kept memory, and what it makes must not be kept.
        make = torch.empty_like if ctx.collector is None else _buffers.empty_like
        buffer = make(ctx.experts)
        return buffer, _grad_weight_(buffer, *arguments, *starts, False)
    buffer, accumulate = ctx.collector.open(ctx.experts, accumulator)
    dmix = _grad_weight_(buffer, *arguments, *starts, accumulate)
    del buffer  # autograd takes a gradient over as it is only from its sole owner
    return ctx.collector.close(ctx.experts.dtype), dmix


def _padded(grad: Tensor, shape: torch.Size, rows: Axis, cols: Axis) -> Tensor:
    """Gradients of the slices ``[M, out, in]`` as a full-shape gradient, differentiably."""
    return torch.stack([_collect.padded(expert, shape[1:], rows, cols) for expert in grad])
