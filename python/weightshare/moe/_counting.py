"""The op that counts an expert's tokens once per forward pass, recomputed or not.

Activation checkpointing runs a forward pass again within the backward pass. ``self.training``
does not tell the two apart, and neither does ``is_grad_enabled()`` under both modes; autograd
does: a graph task is running on this thread. The question has to be asked when the code runs, not
when it is traced, so it is asked within an op.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _State:
    """What the op did in this process, for the check that a step follows a forward pass."""

    calls = 0  # forward passes of layers that were counted
    captured = False  # a CUDA graph counts, unseen from here


state = _State()


def _count(total: Tensor, counts: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:
        return
    total.add_(counts)
    state.calls += 1
    if total.is_cuda and torch.cuda.is_current_stream_capturing():
        state.captured = True


# Not defined through weightshare_kernels: that floor holds ops with a reference, cases and
# kernels, and this is two lines of bookkeeping for modules.
_LIBRARY = torch.library.Library("weightshare", "FRAGMENT")
_LIBRARY.define("count_(Tensor(a!) total, Tensor counts) -> ()", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.impl("count_", _count, "CompositeExplicitAutograd")
torch.library.register_fake("weightshare::count_", lambda total, counts: None, lib=_LIBRARY)
_op = torch.ops.weightshare.count_.default


def count_(total: Tensor, counts: Tensor) -> None:
    """Add ``counts`` to ``total``, unless this runs within a backward pass.

    So the recomputation of activation checkpointing, in either mode, eager or compiled, adds
    nothing, and a CUDA graph records the addition in the forward pass alone.

    Args:
        total: what has been counted, ``[experts]`` int64; changed in place.
        counts: tokens of each expert in this forward pass, ``[experts]`` int64.
    """
    _op(total, counts)
