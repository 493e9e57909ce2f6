"""The selected part of a shared weight, for layers that are not linear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect
from weightshare_kernels._register import lean
from weightshare_kernels._select import Axis, Selection, select
from weightshare_kernels.ops.sliced_weight import reference

# Bytes from which the shared buffer pays. On a CPU, forward and backward of one use and of four:
# 0.6 MB  eagerly 116 and 412 us, shared 131 and 336 us
# 2.4 MB  eagerly 344 and 2098 us, shared 273 and 865 us
# Low precision is shared whatever the size: its sums are kept in fp32.
_SMALL = 1 << 20
_NAMES = tuple(f"axis {d}" for d in range(8))


def sliced_weight(weight: Tensor, *selections: Selection) -> Tensor:
    """Take the selected part of a shared weight; its gradient goes to one shared buffer.

    Eager slicing gives each use a full-size gradient: zeros, a copy, an addition. Here all slices
    that a backward pass uses add theirs into one buffer (see ``weightshare_kernels._collect``),
    and what was not sliced is not touched again.

    Axes 0 and 1 are cut as in :func:`sliced_linear`; on further (spatial) axes an int is the size
    of the centre crop, so that a 7x7 kernel holds a 5x5 and a 3x3 one.

    It is no dispatcher op, because a custom one must not return a view of its input: forward is
    ``narrow``, backward ``narrow`` and ``add_``, which need no kernel of ours on any device.
    Small weights, and those that have no buffer to share (in a trace, a functorch transform), are
    sliced plainly: bookkeeping would cost more than it saves, and a compiler fuses by itself.

    Args:
        weight: shared weight of any rank ``[O, I, ...]``.
        selections: one per axis, from the first: ``None`` (all), an int, a slice, a sequence of
            slices or a 1-D index tensor without repeats; axes that are not named are whole.

    Returns:
        The part: a view of the weight unless an axis is gathered, so not to be written to.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a selection is out of range or repeats an element, or there are more
            selections than axes.

    Source: Once-for-All (Cai et al., 2020), elastic width and centre-cropped kernels.
    """
    _checks.tensor("weight", weight)
    if len(selections) > weight.dim():
        raise ValueError(f"selections: {len(selections)} for a weight of {weight.dim()} axes")
    shape, device, axes = weight.shape, weight.device, {}
    for dim, spec in enumerate(selections):
        if isinstance(spec, type(None)):  # not "is": the compiler would fix the bounds of a slice
            continue
        axis = select(_NAMES[min(dim, 7)], spec, shape[dim], device)
        if dim >= 2 and isinstance(spec, int):
            axis = Axis((shape[dim] - axis.length) // 2, axis.length, None)
        axes[dim] = axis
    if not _shares(weight):
        return reference.part(weight, axes)
    axes = {d: a for d, a in axes.items() if a.index is not None or a.length != shape[d]}
    if not axes:
        return weight
    collector = _collect.collect(weight)
    return reference.part(weight, axes) if collector is None else _lean(weight, axes, collector)


def _shares(weight: Tensor) -> bool:
    """Tell whether the gradients of a weight's slices can share a buffer, and are worth it."""
    if not (weight.requires_grad and torch.is_grad_enabled() and _collect.plain()):
        return False
    size = weight.dtype.itemsize
    return size < 4 or weight.numel() * size >= _SMALL


class _SlicedWeight(Function):
    """Autograd of :func:`sliced_weight` where a collector sums the gradients; saves nothing."""

    @staticmethod
    def forward(weight, axes, collector):
        return reference.part(weight, axes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight, ctx.axes, ctx.collector = inputs  # for its shape and its .grad
        ctx.collector.join(ctx)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            return reference.padded(grad, ctx.weight.shape, ctx.axes), None, None
        accumulator = ctx.next_functions[0][0]
        if not _collect.wanted(accumulator):
            return None, None, None
        buffer, accumulate = ctx.collector.open(ctx.weight, accumulator)
        reference.add_(buffer if accumulate else buffer.zero_(), grad, ctx.axes, accumulate)
        del buffer  # autograd takes a gradient over as it is only from its sole owner
        return ctx.collector.close(ctx.weight.dtype), None, None


_lean = lean(_SlicedWeight)
