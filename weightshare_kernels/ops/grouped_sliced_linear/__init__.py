"""A linear layer whose row groups use different prefixes of one shared weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect
from weightshare_kernels._register import define, lean
from weightshare_kernels.ops.grouped_sliced_linear import reference

_TRITON = "weightshare_kernels.ops.grouped_sliced_linear.triton"
_GROUPS = "SymInt[] sizes, SymInt[] outs, SymInt[] ins"

# The gradient of x is the same product with W transposed, and outs and ins exchanged.
_product = define(
    f"grouped_sliced_linear(Tensor x, Tensor weight, Tensor? bias, {_GROUPS}, SymInt width)"
    " -> Tensor",
    reference=reference.forward,
    fake=lambda x, weight, bias, sizes, outs, ins, width: x.new_empty((x.shape[0], width)),
    triton=f"{_TRITON}:forward",
)
_grad_weight_ = define(
    f"grouped_sliced_linear_grad_weight_(Tensor(a!) buffer, Tensor grad, Tensor x, {_GROUPS}, "
    "bool accumulate, SymInt bias_size) -> Tensor",
    reference=reference.grad_weight_,
    fake=lambda buffer, grad, x, sizes, outs, ins, accumulate, bias_size: grad.new_empty(
        (bias_size,)
    ),
    triton=f"{_TRITON}:grad_weight_",
)


def grouped_sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int],
    outs: Sequence[int] | None = None,
    ins: Sequence[int] | None = None,
) -> Tensor:
    """Linear layer on row groups of one batch, each with its own prefix of a shared weight.

    Group ``g`` is the next ``sizes[g]`` rows of x and computes
    ``x[rows, :ins[g]] W[:outs[g], :ins[g]]^T + b[:outs[g]]``. The distinct widths cut W into
    bands, and each band is read once for all groups that use it: requests of several widths are
    served in one batch, and the subnets of a sandwich step train in one pass. The result is
    rectangular, so that the next layer takes it as it is, with this call's ``outs`` as ``ins``.

    Args:
        x: input ``[N, I']``; columns beyond a group's ``ins[g]`` are neither read nor
            differentiated, whatever they hold.
        weight: shared weight ``[O, I]``.
        bias: shared bias ``[O]``, or None.
        sizes: rows of each group, in the order of x; they add up to N. Groups may be empty and
            may come in any order; equal widths need not be adjacent.
        outs: outputs of each group; None: all O.
        ins: inputs of each group; None: all I (x must then have exactly I columns).

    Returns:
        ``[N, max(outs)]``, in x's dtype (autocast's under autocast), zero beyond ``outs[g]``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: sizes do not add up to N, a width is out of range, or shapes, devices or
            dtypes do not fit; the message names the argument and what was wanted.

    Source: sandwich training (Yu and Huang, 2019) and mixed widths of MatFormer (Devvrit et al.,
    2024), whose nested widths are what lets one read of W serve all.
    """
    _checks.linear_arguments(x, weight, bias)
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions [N, in], got shape {tuple(x.shape)}")
    count = _check_sizes(sizes, x.shape[0])
    if ins is None and x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x: last dimension is {x.shape[1]}, but weight has {weight.shape[1]} columns; give "
            "the groups' widths as ins"
        )
    outs = _check_widths("outs", outs, count, weight.shape[0], "rows of the weight")
    ins = _check_widths("ins", ins, count, weight.shape[1], "columns of the weight")
    ins = _check_widths("ins", ins, count, x.shape[1], "columns of x")
    groups = (list(sizes), outs, ins)
    x = _checks.autocast(x)
    if not _collect.plain():
        return _GroupedSlicedLinear.apply(x, weight, bias, *groups, None)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _lean(x, weight, bias, *groups, _collect.collect(weight))
    return _compute(x, weight, bias, *groups)


def _largest(widths: list[int]) -> int:
    """The largest width; in a trace without a guard on which of them it is."""
    if torch.compiler.is_dynamo_compiling():  # whose max is that of symbols, where there are some
        return max(widths)
    return reduce(torch.sym_max, widths)


def _check_integers(name: str, values) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{name}: expected a sequence of ints, got {type(values).__name__}")
    for number, value in enumerate(values):
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
            raise TypeError(
                f"{name}[{number}]: expected an int, got {value!r} of type {type(value).__name__}"
            )


def _check_sizes(sizes, rows: int) -> int:
    """Check the row counts; returns the number of groups."""
    _check_integers("sizes", sizes)
    if len(sizes) == 0:
        raise ValueError("sizes: is empty; give the rows of each group, [N] for a single one")
    for number, size in enumerate(sizes):
        if size < 0:
            raise ValueError(f"sizes[{number}]: {size} is negative")
    if sum(sizes) != rows:
        raise ValueError(f"sizes: add up to {sum(sizes)}, but x has {rows} rows")
    return len(sizes)


def _check_widths(name: str, widths, count: int, most: int, what: str) -> list[int]:
    """Check one width per group within ``0..most``; None stands for ``most`` everywhere."""
    if widths is None:
        return [most] * count
    _check_integers(name, widths)
    if len(widths) != count:
        raise ValueError(f"{name}: has {len(widths)} widths, but sizes has {count} groups")
    for number, width in enumerate(widths):
        if not 0 <= width <= most:
            raise ValueError(f"{name}[{number}]: {width} is outside 0..{most}, the {what}")
    return list(widths)


def _cast(weight: Tensor, dtype: torch.dtype, outs: list[int], ins: list[int]) -> Tensor:
    """The weight in x's dtype (autocast); only what some group uses is copied."""
    if weight.dtype == dtype:
        return weight
    return weight[: _largest(outs), : _largest(ins)].to(dtype)


def _compute(x, weight, bias, sizes, outs, ins) -> Tensor:
    width = _largest(outs)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _product(x, _cast(weight, x.dtype, outs, ins), bias, sizes, outs, ins, width)


class _GroupedSlicedLinear(Function):
    """Autograd of :func:`grouped_sliced_linear`; saves x and the shared weight, no slice of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, sizes, outs, ins, collector):
        return _compute(x, weight, bias, sizes, outs, ins)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *groups, collector = inputs
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        ctx.groups = groups
        ctx.columns = x.shape[1]
        ctx.bias_size = 0 if bias is None else bias.shape[0]
        ctx.weight = weight  # for its shape and its .grad; the values come from what is saved
        ctx.collector = collector
        if collector is not None:
            collector.join(ctx)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        sizes, outs, ins = ctx.groups
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, grad, x, weight), None, None, None, None
        dx = dw = db = None
        if wants_x:
            across = _cast(weight, grad.dtype, outs, ins).t()
            dx = _product(grad, across, None, sizes, ins, outs, ctx.columns)
        size = ctx.bias_size if wants_bias else 0
        if wants_weight and ctx.collector is None:
            dw = grad.new_empty(ctx.weight.shape, dtype=ctx.weight.dtype)
            db = _grad_weight_(dw, grad, x, *ctx.groups, False, size)
        elif wants_weight and _collect.wanted(accumulator := ctx.next_functions[1][0]):
            buffer, accumulate = ctx.collector.open(ctx.weight, accumulator)
            db = _grad_weight_(buffer, grad, x, *ctx.groups, accumulate, size)
            del buffer  # autograd takes a gradient over as it is only from its sole owner
            dw = ctx.collector.close(ctx.weight.dtype)
        if wants_bias and db is None:
            db = _bias_gradient(ctx, grad)
        return dx, dw, db if wants_bias else None, None, None, None, None


_lean = lean(_GroupedSlicedLinear)


def _bias_gradient(ctx, grad: Tensor) -> Tensor:
    """Sums of grad over the rows that use each output; zero beyond."""
    pad = torch.nn.functional.pad
    sizes, outs, _ = ctx.groups
    parts = [
        pad(g[:, :out].sum(0), (0, ctx.bias_size - out))
        for g, out in zip(grad.split(sizes), outs, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _differentiable_gradients(ctx, grad, x, weight):
    """Gradients in terms of differentiable PyTorch, for double backward."""
    pad = torch.nn.functional.pad
    sizes, outs, ins = ctx.groups
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        part = weight.to(grad.dtype).t()
        dx = _GroupedSlicedLinear.apply(grad, part, None, sizes, ins, outs, None)
        dx = pad(dx, (0, ctx.columns - dx.shape[1]))
    if ctx.needs_input_grad[1]:
        rows, cols = ctx.weight.shape
        dw = grad.new_zeros(rows, cols)
        groups = zip(grad.split(sizes), x.split(sizes), outs, ins, strict=True)
        for g, part, out, in_ in groups:
            dw = dw + pad(g[:, :out].t() @ part[:, :in_], (0, cols - in_, 0, rows - out))
    if ctx.needs_input_grad[2]:
        db = _bias_gradient(ctx, grad)
    return dx, dw, db
