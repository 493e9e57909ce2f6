"""One gradient buffer for all slices of a shared weight.

Autograd gives every use of a slice its own full-size gradient: zeros, a copy, an addition. Here
the uses of a weight within one backward pass share a buffer. Each adds its gradient into its
slice of it and passes nothing on; the last one to run hands the buffer over:

    use 1 (largest subnet)     buffer[:o1, :i1] += g1^T x1  ->  None
    use 2 (random subnet)      buffer[:o2, :i2] += g2^T x2  ->  None
    use 3 (smallest subnet)    buffer[:o3, :i3] += g3^T x3  ->  buffer, the gradient of W

Which is the last is no guess: a use asks autograd's engine which of the weight's living uses the
running pass will execute, and counts them down. What follows, each pinned by a test:

* hooks on W, DDP's reducer and post-accumulate hooks see one full-shape gradient, once;
* there is no extra node in the graph and nothing is saved for one, so backward through a
  retained graph works any number of times;
* counts and buffers are keyed by autograd's graph task, so nested, concurrent and partial
  backward passes (activation checkpointing, threads, ``autograd.grad``) never meet;
* a pass that does not reach W leaves its gradient alone and, unless a mixture's d alpha needs
  the same product, computes nothing for it;
* ``create_graph=True`` falls back to ordinary differentiable gradients;
* under ``torch.compile``, functorch transforms and tensor subclasses each use returns a padded
  gradient, which the compiler fuses into one accumulation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Variable

from weightshare_kernels import _config
from weightshare_kernels._buffers import empty_like
from weightshare_kernels._select import Axis, temporary

_runs = torch._C._will_engine_execute_node
_task = torch._C._current_graph_task_id
_running = torch._C._current_autograd_node


def plain() -> bool:
    """Tell whether this is ordinary eager autograd: no tracing, transform or forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class Collector:
    """Sums the gradients of all uses of one weight, one buffer per backward pass."""

    __slots__ = ("_buffers", "_passes", "_uses", "_waiting")

    def __init__(self) -> None:
        self._uses: set[weakref.ref] = set()
        self._buffers: dict[int, Tensor] = {}
        self._passes: dict[int, list[weakref.ref]] = {}  # all uses of the pass
        self._waiting: dict[int, int] = {}  # how many of them have yet to run

    def join(self, node) -> None:
        """Count an autograd node among the uses of the weight, as long as it lives."""
        self._uses.add(weakref.ref(node, self._uses.discard))

    def open(self, weight: Tensor, accumulator) -> tuple[Tensor, bool]:
        """Buffer for the gradient of the use that runs now, and whether to add to what is there.

        Where not, the use writes its slice and zeroes all else. ``accumulator`` is the node that
        the weight's gradient goes to. Follow with :meth:`close`.
        """
        direct = _gradient_in_place(weight, accumulator) if _in_place else None
        if direct is not None:
            return direct, True
        task = _task()
        buffer = self._buffers.get(task)
        if buffer is not None:
            if buffer.dtype.itemsize < 4:  # sums of several slices are kept in fp32
                buffer = self._buffers[task] = buffer.float()
            return buffer, True
        self._forget_failed()
        running = _running()  # the root of a pass is not among the nodes that the engine names
        uses = self._passes[task] = [
            use for use in tuple(self._uses) if use() is running or _will_run(use())
        ]
        self._waiting[task] = len(uses)
        buffer = self._buffers[task] = empty_like(weight)
        if self._waiting[task] > 1:  # a pass that stops early must not keep its buffer
            Variable._execution_engine.queue_callback(partial(self._forget, task))
        return buffer, False

    def close(self, dtype: torch.dtype) -> Tensor | None:
        """The finished sum for the last use of the pass; None for the others."""
        task = _task()
        if task not in self._waiting:  # summed in place
            return None
        self._waiting[task] -= 1
        if self._waiting[task] > 0:
            return None
        total = self._buffers[task]
        self._forget(task)
        return total if total.dtype == dtype else total.to(dtype)

    def _forget_failed(self) -> None:
        """Drop what failed passes left; a pass that still runs keeps its uses alive."""
        for task, uses in tuple(self._passes.items()):
            if all(use() is None for use in uses):
                self._forget(task)

    def _forget(self, task: int) -> None:
        self._buffers.pop(task, None)
        self._passes.pop(task, None)
        self._waiting.pop(task, None)


def _will_run(node) -> bool:
    return node is not None and _runs(node)


def wanted(accumulator) -> bool:
    """Tell whether the running backward pass asks for the gradient that goes to a node."""
    try:
        return _runs(accumulator)
    except RuntimeError:  # a leaf whose gradient autograd.grad captures
        return True


_live: dict[int, tuple[weakref.ref, int, Collector]] = {}


def collect(weight: Tensor) -> Collector | None:
    """The collector of a weight, for :func:`plain` autograd; None where it can have none.

    A non-leaf that is changed in place gets a new one: its gradient then goes elsewhere.
    """
    if not weight.requires_grad or type(weight) not in (Tensor, torch.nn.Parameter):
        return None
    key = id(weight)
    stamp = 0 if weight.grad_fn is None else weight._version
    hit = _live.get(key)
    if hit is not None and hit[0]() is weight and hit[1] == stamp:
        return hit[2]
    collector = Collector()
    _live[key] = (weakref.ref(weight, partial(_forget, key)), stamp, collector)
    return collector


def _forget(key: int, ref: weakref.ref) -> None:
    entry = _live.get(key)
    if entry is not None and entry[0] is ref:
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


def _gradient_in_place(weight: Tensor, accumulator) -> Tensor | None:
    """``weight.grad``, made if need be, where this pass would accumulate into it unseen."""
    if not weight.is_leaf or weight.dtype.itemsize < 4:
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    try:
        if not _runs(accumulator):
            return None
    except RuntimeError:  # autograd.grad captures the gradient instead of accumulating it
        return None
    if weight.grad is None:
        weight.grad = empty_like(weight).zero_()
    return weight.grad


def alone(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Views to differentiate a definition by, within a backward pass that is differentiable.

    By the tensors themselves it would go on from one to another: through x to the layers before,
    which have the same weights, or through gates to the x that they were made of. These give the
    gradient of a use alone. ``needs`` tells which of them are differentiated by; those of a
    functorch level that has ended do not know any more that they are.
    """
    views = [t.view_as(t) for t in tensors]
    return [
        t if t.requires_grad or not needed else t.detach().requires_grad_()
        for t, needed in zip(views, needs, strict=True)
    ]


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


def column_sums(grad: Tensor) -> Tensor:
    """Sums of ``[..., n]`` over all but the last dimension: the gradient of a bias."""
    rows = grad.flatten(0, -2)
    apart = plain() and not temporary() and not torch.is_grad_enabled()
    if apart and (_triton_sums if rows.is_cuda else _interpreted_sums):
        from weightshare_kernels import _sums

        return _sums.column_sums(rows)
    return rows.sum(0)


_backend = _config.get("WEIGHTSHARE_BACKEND")
_triton_sums = _backend != "reference" and importlib.util.find_spec("triton") is not None
_interpreted_sums = _backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
