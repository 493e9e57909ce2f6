"""A linear layer on selected rows and columns of a shared weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect, _config
from weightshare_kernels._register import define, lean
from weightshare_kernels._select import Axis, Selection, select, view
from weightshare_kernels.ops.sliced_linear import reference

_TRITON = "weightshare_kernels.ops.sliced_linear.triton"

# A slice in the schemas: index tables where an axis has one, and spans (start, length).
_SLICE = "Tensor? rows, Tensor? cols, SymInt row, SymInt out, SymInt col, SymInt in_"


def _span(tensor: Tensor, dim: int, index: Tensor | None, start: int, length: int) -> Tensor:
    return tensor if index is not None else tensor.narrow(dim, start, length)


def _on_views(function):
    """Give a function of (…, weight view, tables) the schema's whole weight and spans."""

    def forward(x, weight, bias, rows, cols, row, out, col, in_):
        weight = _span(_span(weight, 0, rows, row, out), 1, cols, col, in_)
        if bias is not None:
            bias = bias[rows] if rows is not None else bias.narrow(0, row, out)
        return function(x, weight, bias, rows, cols)

    def grad_x(grad, weight, rows, cols, row, out, col, in_):
        weight = _span(_span(weight, 0, rows, row, out), 1, cols, col, in_)
        return function(grad, weight, rows, cols)

    def grad_weight_(buffer, grad, x, rows, cols, row, out, col, in_, accumulate, bias_size):
        if not accumulate:
            buffer.zero_()
        target = _span(_span(buffer, 0, rows, row, out), 1, cols, col, in_)
        function(target, grad, x, rows, cols, accumulate)
        return _bias_gradient(grad, Axis(row, out, rows), bias_size)

    return {"forward": forward, "grad_x": grad_x, "grad_weight_": grad_weight_}[function.__name__]


_forward = define(
    f"sliced_linear(Tensor x, Tensor weight, Tensor? bias, {_SLICE}) -> Tensor",
    reference=reference.forward,
    fake=lambda x, weight, bias, rows, cols, row, out, col, in_: x.new_empty((*x.shape[:-1], out)),
    triton=f"{_TRITON}:forward",
    adapt=_on_views,
)
_grad_x = define(
    f"sliced_linear_grad_x(Tensor grad, Tensor weight, {_SLICE}) -> Tensor",
    reference=reference.grad_x,
    fake=lambda grad, weight, rows, cols, row, out, col, in_: grad.new_empty(
        (*grad.shape[:-1], in_)
    ),
    triton=f"{_TRITON}:grad_x",
    adapt=_on_views,
)
_grad_weight_ = define(
    f"sliced_linear_grad_weight_(Tensor(a!) buffer, Tensor grad, Tensor x, {_SLICE}, "
    "bool accumulate, SymInt bias_size) -> Tensor",
    reference=reference.grad_weight_,
    fake=lambda buffer, grad, x, rows, cols, row, out, col, in_, accumulate, bias_size: (
        grad.new_empty(bias_size)
    ),
    triton=f"{_TRITON}:grad_weight_",
    adapt=_on_views,
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
    repeats. Spans are read where they lie; index tables are gathered inside the kernel, or into
    a copy that lives for the call (picked columns on a CPU; low precision with many rows). The
    weight gradients of all slices used in a backward pass are summed in one buffer (see
    ``weightshare_kernels._collect``).

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
    x = _checks.autocast(x)  # the slice is cast where it is read: its gradient keeps its dtype
    if not _collect.plain():
        return _SlicedLinear.apply(x, weight, bias, rows, cols, None)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _lean(x, weight, bias, rows, cols, _collect.collect(weight))
    return _compute(x, weight, bias, rows, cols)


def _slice(rows: Axis, cols: Axis) -> tuple:
    """A slice as the schemas take it."""
    return rows.index, cols.index, rows.start, rows.length, cols.start, cols.length


_TORCH_ON_GPUS = _config.get("WEIGHTSHARE_BACKEND") in ("auto", "cuda")


def _plainly(x: Tensor, rows: Axis, cols: Axis) -> bool:
    """Tell whether PyTorch's own product serves: of spans on a GPU, where cuBLAS takes strides.

    Our kernels are for tables there. On a CPU ours also pack the weight and fill warm memory.
    """
    return x.is_cuda and _TORCH_ON_GPUS and rows.index is None and cols.index is None


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Axis, cols: Axis) -> Tensor:
    if _plainly(x, rows, cols):
        bias = None if bias is None else view(bias, 0, rows).to(x.dtype)
        return torch.nn.functional.linear(x, _part(weight, rows, cols).to(x.dtype), bias)
    if weight.dtype == x.dtype:
        return _forward(x, weight, bias, *_slice(rows, cols))
    bias = None if bias is None else bias.to(x.dtype)
    return _forward(x, *_as(x.dtype, weight, bias, rows, cols))


def _part(weight: Tensor, rows: Axis, cols: Axis) -> Tensor:
    """Spans of a weight, as a view."""
    return view(view(weight, 0, rows), 1, cols)


def _as(dtype: torch.dtype, weight: Tensor, bias: Tensor | None, rows: Axis, cols: Axis) -> tuple:
    """Weight, bias and slice as the schema takes them, cast; of spans the slice alone is cast."""
    if rows.index is None and cols.index is None:
        weight = _part(weight, rows, cols)
        bias = None if bias is None else view(bias, 0, rows)
        rows, cols = Axis(0, rows.length, None), Axis(0, cols.length, None)
    return weight.to(dtype), bias, *_slice(rows, cols)


class _SlicedLinear(Function):
    """Autograd of :func:`sliced_linear`; saves x and the shared weight, no slice of it.

    Each is saved only for the other's gradient: a first layer's weight may change before its
    backward, and a frozen layer keeps no activations.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, rows, cols, collector):
        return _compute(x, weight, bias, rows, cols)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, rows, cols, collector = inputs
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        if torch.compiler.is_compiling():  # a trace keeps for backward only what it sees in here
            rows, cols = rows._replace(length=output.shape[-1]), cols._replace(length=x.shape[-1])
        ctx.axes = rows, cols
        ctx.bias_size = 0 if bias is None else bias.shape[0]
        ctx.weight = weight  # for its shape and its .grad; the values come from what is saved
        ctx.collector = collector
        if collector is not None:
            collector.join(ctx)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(ctx, grad, x, weight)
        rows, cols = ctx.axes
        part = _slice(rows, cols)
        plainly = _plainly(grad, rows, cols)
        dx = dw = db = None
        if wants_x and plainly:
            dx = grad @ _part(weight, rows, cols).to(grad.dtype)
        elif wants_x and weight.dtype == grad.dtype:
            dx = _grad_x(grad, weight, *part)
        elif wants_x:
            weight, _, *cast = _as(grad.dtype, weight, None, rows, cols)
            dx = _grad_x(grad, weight, *cast)
        if wants_weight and ctx.collector is None:
            dw = _collect.padded(_product(grad, x), ctx.weight.shape, rows, cols)
        elif wants_weight and _collect.wanted(accumulator := ctx.next_functions[1][0]):
            buffer, accumulate = ctx.collector.open(ctx.weight, accumulator)
            size = ctx.bias_size if wants_bias else 0
            if plainly and buffer.dtype == grad.dtype == x.dtype:
                _add_product(buffer, grad, x, rows, cols, accumulate)
            else:
                db = _grad_weight_(buffer, grad, x, *part, accumulate, size)
            del buffer  # autograd takes a gradient over as it is only from its sole owner
            dw = ctx.collector.close(ctx.weight.dtype)
        if not wants_bias:
            db = None
        elif db is None:
            db = _bias_gradient(grad, rows, ctx.bias_size)
        return dx, dw, db, None, None, None


_lean = lean(_SlicedLinear)


def _differentiable_gradients(ctx, grad, x, weight):
    """Gradients in terms of differentiable PyTorch, for double backward."""
    rows, cols = ctx.axes
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        part = view(view(weight, 0, rows), 1, cols).to(grad.dtype)  # an axis with a table is whole
        dx = reference.grad_x(grad, part, rows.index, cols.index)
    if ctx.needs_input_grad[1]:
        dw = _collect.padded(_product(grad, x), ctx.weight.shape, rows, cols)
    if ctx.needs_input_grad[2]:
        db = _bias_gradient(grad, rows, ctx.bias_size)
    return dx, dw, db, None, None, None


def _product(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _add_product(buffer: Tensor, grad: Tensor, x: Tensor, rows: Axis, cols: Axis, accumulate: bool):
    """``buffer[rows, cols] (+)= grad^T x``, zero elsewhere, by PyTorch's product."""
    target = _part(buffer, rows, cols)
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if accumulate:
        target.addmm_(grad.t(), x)
        return
    if target is not buffer:
        buffer.zero_()
    torch.mm(grad.t(), x, out=target)


def _bias_gradient(grad: Tensor, rows: Axis, size: int) -> Tensor:
    """Column sums of grad, put where the bias was taken from; zero elsewhere."""
    if size == 0:
        return grad.new_empty(0)
    db = _collect.column_sums(grad)
    if rows.index is not None:
        return db.new_zeros(size).index_copy(0, rows.index, db)
    return torch.nn.functional.pad(db, (rows.start, size - rows.start - rows.length))
