"""A linear layer whose weight is a mixture of nested slices of one weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _buffers, _checks, _collect, _grid
from weightshare_kernels._register import define, lean
from weightshare_kernels.ops.entangled_linear import reference

_TRITON = "weightshare_kernels.ops.entangled_linear.triton"

_forward = define(
    "entangled_linear(Tensor x, Tensor weight, Tensor? bias, Tensor grid, Tensor rows, "
    "Tensor cols) -> Tensor",
    reference=reference.forward,
    fake=lambda x, weight, bias, grid, rows, cols: x.new_empty((*x.shape[:-1], weight.shape[0])),
    triton=f"{_TRITON}:forward",
)
_grad_x = define(
    "entangled_linear_grad_x(Tensor grad, Tensor weight, Tensor grid, Tensor rows, Tensor cols) "
    "-> Tensor",
    reference=reference.grad_x,
    fake=lambda grad, weight, grid, rows, cols: grad.new_empty((*grad.shape[:-1], weight.shape[1])),
    triton=f"{_TRITON}:grad_x",
)
_grad_weight_ = define(
    "entangled_linear_grad_weight_(Tensor(a!) target, Tensor grad, Tensor x, Tensor weight, "
    "Tensor grid, Tensor rows, Tensor cols, bool accumulate) -> Tensor",
    reference=reference.grad_weight_,
    fake=lambda target, grad, x, weight, grid, rows, cols, accumulate: torch.empty_like(grid),
    triton=f"{_TRITON}:grad_weight_",
)


def entangled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    choices: Sequence[tuple[int, int]],
    alpha: Tensor,
) -> Tensor:
    """Linear layer of ``sum_k alpha_k Pad(W[:o_k, :i_k])``, bias likewise, without the sum.

    The factors ``C = sum_k alpha_k 1[o < o_k, i < i_k]`` are constant on the blocks of a small
    grid; kernels scale tiles of W by them inside the product, or where there are many rows (on a
    GPU, and in low precision on a CPU) make one scaled copy for the call. Nothing of W's size is
    saved but W itself. Backward returns dW and every d alpha from one pass.

    Args:
        x: input ``[..., I]``.
        weight: shared weight ``[O, I]``.
        bias: shared bias ``[O]`` or None.
        choices: K pairs ``(out, in)`` of prefix sizes. Instead of a size, a sequence of slices
            may stand: a prefix of each block of a fused qkv.
        alpha: ``[K]`` mixture coefficients.

    Returns:
        ``[..., O]``; outputs beyond the largest ``out`` are zero.

    Raises:
        TypeError, ValueError: shapes, dtypes, choices or alpha do not fit; names the argument.

    Source: TangleNAS (Sukthanker et al., 2023, arXiv 2312.10440).
    """
    _checks.linear_arguments(x, weight, bias)
    _check_width(x, weight)
    _grid.check_choices(choices, alpha, weight.shape, ("out", "in"))
    _checks.same_device("alpha", alpha, "weight", weight)
    if x.dim() == 1:
        return entangled_linear(x[None], weight, bias, choices, alpha)[0]
    grid = _grid.make_grid(weight.shape, choices, alpha)
    x = _checks.autocast(x)  # the weight is cast where it is read: its gradient keeps its dtype
    cells = _grid.mixture(grid, alpha).view(grid.shape)
    cells = cells.to(_checks.accumulate_dtype(weight.dtype))
    if bias is not None:
        outs = _grid.make_grid(weight.shape[:1], [(out,) for out, _ in choices], alpha)
        bias = (bias * _grid.mixture_of_elements(outs, alpha)).to(x.dtype)
    if not _collect.plain():
        return _EntangledLinear.apply(x, weight, bias, cells, *grid.classes, None)
    collector = _collect.collect(weight) if torch.is_grad_enabled() else None
    return _entangled(x, weight, bias, cells, *grid.classes, collector)


def entangled_linear_independent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outs: Sequence[int],
    alpha_out: Tensor,
    ins: Sequence[int],
    alpha_in: Tensor,
) -> Tensor:
    """Entangled linear whose output and input sizes are mixed independently.

    The outer product of two mixtures separates: ``diag(u) W diag(v)``. So inputs are scaled by v
    and outputs by u, and the product runs on W itself.

    Args:
        x: input ``[..., I]``.
        weight: shared weight ``[O, I]``.
        bias: shared bias ``[O]`` or None, mixed by ``alpha_out``.
        outs: prefix sizes of the output axis, or sequences of slices.
        alpha_out: ``[len(outs)]`` coefficients.
        ins: prefix sizes of the input axis, or sequences of slices.
        alpha_in: ``[len(ins)]`` coefficients.

    Returns:
        ``[..., O]``; outputs beyond the largest ``out`` are zero.

    Raises:
        TypeError, ValueError: as :func:`entangled_linear`.
    """
    _checks.linear_arguments(x, weight, bias)
    _check_width(x, weight)
    for name, sizes, alpha, size in (
        ("out", outs, alpha_out, weight.shape[0]),
        ("in", ins, alpha_in, weight.shape[1]),
    ):
        _grid.check_sizes(name, sizes, alpha, size)
        _checks.same_device(f"alpha_{name}", alpha, "weight", weight)
    if x.dim() == 1:
        y = entangled_linear_independent(x[None], weight, bias, outs, alpha_out, ins, alpha_in)
        return y[0]
    x = _checks.autocast(x)
    weight = weight.to(x.dtype)
    u = _mixture(outs, alpha_out, weight.shape[0])
    v = _mixture(ins, alpha_in, weight.shape[1])
    if bias is not None:
        bias = (bias * u).to(x.dtype)
    apply = _scaled if _collect.plain() else _ScaledLinear.apply
    return apply(x, weight, bias, u.to(x.dtype), v.to(x.dtype))


def _mixture(sizes: Sequence[int], alpha: Tensor, size: int) -> Tensor:
    """Factor of every element of an axis, ``sum_k alpha_k [j < size_k]``."""
    grid = _grid.make_grid((size,), [(s,) for s in sizes], alpha)
    return _grid.mixture_of_elements(grid, alpha)


def _check_width(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: last dimension is {x.shape[-1]}, but weight has {weight.shape[1]} columns"
        )


class _EntangledLinear(Function):
    """Autograd of :func:`entangled_linear`; saves x, the shared weight and the small grid."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, grid, rows, cols, collector):
        return _forward(x, weight.to(x.dtype), bias, grid, rows, cols)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, grid, rows, cols, collector = inputs
        ctx.save_for_backward(x, weight, grid, rows, cols)
        ctx.weight = weight  # for its shape and its .grad; the values come from what is saved
        ctx.collector = collector
        if collector is not None:
            collector.join(ctx)

    @staticmethod
    def backward(ctx, grad):
        x, weight, grid, rows, cols = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_grid = ctx.needs_input_grad[:4]
        dx = dw = db = dgrid = None
        if torch.is_grad_enabled():
            dx = reference.grad_x(grad, weight.to(grad.dtype), grid, rows, cols)
            effective = grad.flatten(0, -2).t() @ x.flatten(0, -2)
            dw = effective * _grid.factors(grid, (rows, cols)).to(effective.dtype)
            dgrid = reference.block_sums((effective * weight).to(grid.dtype), grid, (rows, cols))
        else:
            if wants_x:
                dx = _grad_x(grad, weight.to(grad.dtype), grid, rows, cols)
            if wants_weight or wants_grid:
                dw, dgrid = _weight_gradient(ctx, grad, x, weight, grid, rows, cols)
        if wants_bias:
            db = _collect.column_sums(grad)
        return dx, dw, db, dgrid, None, None, None


_entangled = lean(_EntangledLinear)


def _weight_gradient(ctx, grad, x, weight, grid, rows, cols):
    """Gradient of W, through its collector where there is one, and of the grid."""
    arguments = (grad, x, weight.to(x.dtype), grid, rows, cols)
    if ctx.collector is None or not _collect.wanted(accumulator := ctx.next_functions[1][0]):
        # Tracing cannot see through kept memory, and what it makes must not be kept.
        make = torch.empty_like if ctx.collector is None else _buffers.empty_like
        target = make(weight)
        return target, _grad_weight_(target, *arguments, False)
    target, accumulate = ctx.collector.open(ctx.weight, accumulator)
    dgrid = _grad_weight_(target, *arguments, accumulate)
    del target  # autograd takes a gradient over as it is only from its sole owner
    return ctx.collector.close(ctx.weight.dtype), dgrid


class _ScaledLinear(Function):
    """``u * (W (v * x)) + bias``; saves x and W, and no scaled copy of either."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, u, v):
        y = torch.nn.functional.linear(x * v, weight) * u
        return y if bias is None else y + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, u, v = inputs
        ctx.save_for_backward(x, weight, u, v)

    @staticmethod
    def backward(ctx, grad):
        x, weight, u, v = ctx.saved_tensors
        scaled = x * v
        inner = (grad * u) @ weight
        product = grad.flatten(0, -2).t() @ scaled.flatten(0, -2)
        return (
            inner * v,
            product * u[:, None],
            _collect.column_sums(grad) if ctx.needs_input_grad[2] else None,
            (product * weight).sum(1),
            (inner * x).flatten(0, -2).sum(0),
        )


_scaled = lean(_ScaledLinear)
