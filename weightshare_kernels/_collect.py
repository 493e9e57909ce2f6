"""One gradient buffer for all slices of a shared weight.

Autograd gives every use of a slice its own full-size gradient: zeros, a copy, an addition. Here
all uses of a weight in a graph go through one *collector* node. Each use adds its gradient into
its slice of one buffer and passes nothing on; autograd runs the collector after all its users,
and the collector hands the buffer over as the weight's one gradient:

    W ── collector ─┬─ use 1 (largest subnet)     backward: buffer[:o1, :i1] += g1^T x1
                    ├─ use 2 (random subnet)                buffer[:o2, :i2] += g2^T x2
                    └─ use 3 (smallest subnet)              buffer[:o3, :i3] += g3^T x3
       W.grad <── buffer ──┘ (once)

What follows from that, each pinned by a test:

* hooks on W, DDP's reducer and post-accumulate hooks see one full-shape gradient, once;
* the collector saves nothing, so backward through a retained graph works any number of times;
* buffers are keyed by autograd's graph task, so nested, concurrent and partial backward passes
  (activation checkpointing, threads, ``autograd.grad``) never see each other's sums;
* a pass that does not reach W computes nothing for it;
* ``create_graph=True`` falls back to ordinary differentiable gradients;
* under ``torch.compile``, functorch transforms and tensor subclasses the collector steps aside:
  each use returns a padded gradient, which the compiler fuses into one accumulation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from weightshare_kernels._buffers import empty_like
from weightshare_kernels._register import lean
from weightshare_kernels._select import Axis


def plain() -> bool:
    """Tell whether this is ordinary eager autograd: no tracing, transform or forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class Collector:
    """Sums the gradients of all slices of one weight, one buffer per backward pass."""

    __slots__ = ("_buffers", "_weight")

    def __init__(self, weight: Tensor):
        self._weight = weakref.ref(weight)
        self._buffers: dict[int, Tensor] = {}

    def target(self, routed: Tensor) -> tuple[Tensor, bool]:
        """Buffer that a use's gradient goes to, and whether to add to what is there.

        Where not, the use writes its slice and zeroes all else.
        """
        direct = self._gradient_in_place(routed) if _in_place else None
        if direct is not None:
            return direct, True
        task = torch._C._current_graph_task_id()
        buffer = self._buffers.get(task)
        if buffer is not None:
            if buffer.dtype.itemsize < 4:  # sums of several slices are kept in fp32
                buffer = self._buffers[task] = buffer.float()
            return buffer, True
        buffer = self._buffers[task] = empty_like(routed)
        # A pass that stops early must not keep its buffer.
        Variable._execution_engine.queue_callback(partial(self._buffers.pop, task, None))
        return buffer, False

    def hand_over(self) -> Tensor | None:
        """The finished sum of the running backward pass, or None if no slice added to it."""
        return self._buffers.pop(torch._C._current_graph_task_id(), None)

    def _gradient_in_place(self, routed: Tensor) -> Tensor | None:
        """``weight.grad``, made if need be, where this pass would accumulate into it unseen."""
        weight = self._weight()
        if weight is None or not weight.is_leaf or weight.dtype.itemsize < 4:
            return None
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            return None
        try:
            if not torch._C._will_engine_execute_node(routed.grad_fn.next_functions[0][0]):
                return None
        except RuntimeError:  # autograd.grad captures the gradient instead of accumulating it
            return None
        if weight.grad is None:
            weight.grad = empty_like(weight).zero_()
        return weight.grad


def wanted(routed: Tensor) -> bool:
    """Tell whether the running backward pass reaches the weight behind ``routed``."""
    return torch._C._will_engine_execute_node(routed.grad_fn)


class _Collect(Function):
    """Identity on a weight; its backward hands over what the slices have summed."""

    @staticmethod
    def forward(weight: Tensor, collector: Collector) -> Tensor:
        # Not a view to autograd: one would not survive a change of the weight in place, and the
        # last step's loss often lives through the optimizer step and the next forward pass.
        return weight.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.collector = inputs[1]
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        total = ctx.collector.hand_over()
        if total is None:
            return grad, None
        if grad is not None:
            total += grad
        return total if total.dtype == ctx.dtype else total.to(ctx.dtype), None


_apply = lean(_Collect)
_live: dict[int, tuple[weakref.ref, weakref.ref, int, Collector]] = {}


def collect(weight: Tensor) -> tuple[Tensor, Collector | None]:
    """Route a weight through its collector, shared by all uses in the living graphs.

    For :func:`plain` autograd. Returns the tensor to differentiate through, which the caller must
    keep alive as long as its graph, and the collector; or the weight and None where it does not
    require grad or is of a subclass, whose uses return their own gradients.
    """
    if not weight.requires_grad or type(weight) not in (Tensor, torch.nn.Parameter):
        return weight, None
    key = id(weight)
    hit = _live.get(key)
    if hit is not None and hit[0]() is weight:
        routed = hit[1]()
        # An optimizer step or a swap of .data since then ends the sharing: a graph that still
        # lives must not be joined by uses of other values.
        if (
            routed is not None
            and hit[2] == weight._version
            and routed.data_ptr() == weight.data_ptr()
            and routed.dtype == weight.dtype
            and routed.shape == weight.shape
        ):
            return routed, hit[3]
    collector = Collector(weight)
    routed = _apply(weight, collector)
    _live[key] = (
        weakref.ref(weight),
        weakref.ref(routed, lambda ref: _forget(key, ref)),
        weight._version,
        collector,
    )
    return routed, collector


def _forget(key: int, ref: weakref.ref) -> None:
    entry = _live.get(key)
    if entry is not None and entry[1] is ref:
        del _live[key]


_in_place = 0


@contextlib.contextmanager
def accumulate_in_place() -> Iterator[None]:
    """Let backward passes add weight gradients straight into the slice of ``weight.grad``.

    For steps that call ``backward`` once per subnet: no buffer and no full-size addition per
    call. It serves leaf weights of 32 bits and more without hooks; all others, and
    ``torch.autograd.grad``, take the ordinary way. Results are the same, but what watches
    gradient accumulation from outside (DDP's reducer) is not told: do not use it under DDP.

    Example::

        with accumulate_in_place():
            for width in (1536, 1152, 768, 384):
                loss(model.set_active(width)(x)).backward()
    """
    global _in_place
    _in_place += 1
    try:
        yield
    finally:
        _in_place -= 1


def padded(grad: Tensor, shape: torch.Size, rows: Axis, cols: Axis) -> Tensor:
    """Gradient of a slice as a full-shape gradient, differentiably."""
    if cols.index is not None:
        wide = grad.new_zeros(grad.shape[0], shape[1])
        grad = wide.index_copy(1, cols.index, grad)
    if rows.index is not None:
        tall = grad.new_zeros(shape[0], grad.shape[1])
        grad = tall.index_copy(0, rows.index, grad)
    left = 0 if cols.index is not None else cols.start
    top = 0 if rows.index is not None else rows.start
    right, bottom = shape[1] - left - grad.shape[1], shape[0] - top - grad.shape[0]
    return torch.nn.functional.pad(grad, (left, right, top, bottom))
