"""The experts of a sparse MoE spread over ranks: rows travel to them and results back.

Rows arrive in the order of the source ranks and, from each, of its tokens: an expert sees them in
the order in which one process would see the concatenated batch, and two runs are bitwise equal.

Source: GShard (Lepikhin et al., 2020, arXiv 2006.16668), without its capacity: sizes are exchanged
first, so no token is dropped and none is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weightshare_kernels import Routing, _checks, moe_mlp, routing_of
from weightshare_kernels.ops.moe_mlp import _widths


@torch.compiler.disable
def parallel_moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    group: dist.ProcessGroup,
    *,
    activation: str = "swiglu",
    width: int | Sequence[int] | Tensor | None = None,
    average: bool = True,
) -> Tensor:
    """``moe_mlp`` where the experts are spread over the W ranks of a group.

    Three exchanges forward (counts, rows, results) and two backward (their gradients). A row is
    sent once for each expert that its token chose; padded tokens are not sent. Messages need
    their sizes on the host, so each call waits once for the ``2 W`` numbers of rows that are sent
    and received: it cannot be captured in a CUDA graph, and ``torch.compile`` leaves it out.

    Args:
        x: this rank's tokens ``[..., d]``, T of them, possibly none.
        gate_up: this rank's block of the experts' first matrices, ``[e, 2f, d]`` or ``[e, f, d]``;
            which experts those are tells :func:`block_of`, and there may be none.
        down: likewise ``[e, d, f]``.
        routing: routing of this rank's tokens over all E experts.
        group: the ranks.
        activation: as in ``moe_mlp``.
        width: as in ``moe_mlp``; one per expert means all E of them.
        average: divide the gradients of gate_up and down by W.

    Returns:
        ``[..., d]``, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes do not fit, or the block is not this rank's.
        RuntimeError: an exchange failed: a peer died or did not take part in time.
    """
    own = block_of(routing.counts.shape[0], group.size(), group.rank())
    _check(x, gate_up, down, routing, own)
    width = _own_widths(width, routing.counts.shape[0], down, own)
    rows = _checks.autocast(x.reshape(-1, x.shape[-1]))
    plan = _plan(routing.counts, group)
    order = routing.permutation[: sum(plan.sent)]
    inverse = routing.inverse.view_as(routing.experts)
    rows = _Spread.apply(rows, order, inverse)
    rows = _Exchange.apply(rows, plan.sent, plan.received, group)
    divisor = group.size() if average else 1
    gate_up, down = _Divide.apply(gate_up, divisor), _Divide.apply(down, divisor)
    rows = _compute(rows, gate_up, down, plan.experts, activation, width)
    rows = _Exchange.apply(rows, plan.received, plan.sent, group)
    gates = routing.gates
    if len(order) < gates.numel():  # what was not sent adds nothing, even if its gate is NaN
        gates = torch.where(inverse < len(order), gates, 0.0)
    y = _Combine.apply(rows, gates, order, inverse)
    return y if x.dim() == 2 else y.view(x.shape)


class _Plan(NamedTuple):
    """Rows to each rank, rows from each rank, and the local expert of each row that arrives."""

    sent: list[int]
    received: list[int]
    experts: Tensor


def _plan(counts: Tensor, group) -> _Plan:
    """Tell every rank how many rows come for each of its experts; waits for the device."""
    ranks = group.size()
    block = -(-counts.shape[0] // ranks)
    leaving = counts.new_zeros(ranks * block)
    leaving[: counts.shape[0]] = counts
    arriving = torch.empty_like(leaving)
    _all_to_all(arriving, leaving, None, None, group, "counts")
    sizes = torch.stack((leaving, arriving)).view(2, ranks, block).sum(2)
    sent, received = sizes.tolist()
    local = torch.arange(block, device=counts.device).repeat(ranks)
    return _Plan(sent, received, local.repeat_interleave(arriving, output_size=sum(received)))


def _compute(rows, gate_up, down, experts, activation, width) -> Tensor:
    """The rank's experts on the rows that came, each for one expert and with gate 1."""
    if gate_up.shape[0] == 0:
        # No rows come. Peers exchange in backward, and optimizers look for gradients on all ranks
        # alike: the result depends on everything that it does on the others.
        return rows + (gate_up.sum() + down.sum()).to(rows.dtype)
    kind = _checks.accumulate_dtype(rows.dtype)
    gates = torch.ones(rows.shape[0], 1, dtype=kind, device=rows.device)
    routing = routing_of(experts[:, None], gates, gate_up.shape[0])
    return moe_mlp(rows, gate_up, down, routing, activation=activation, width=width)


def _all_to_all(out: Tensor, rows: Tensor, received, sent, group, what: str) -> None:
    try:
        dist.all_to_all_single(out, rows, received, sent, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"exchange of {what} among {group.size()} ranks failed: a peer died, or did not run "
            "this layer within the group's timeout. All ranks run forward and backward equally "
            f"often, those without tokens as well. The cause: {error}"
        ) from error


class _Exchange(Function):
    """Rows to the ranks they are for; gradients go the way back."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.way_back = received, sent, group
        out = rows.new_empty(sum(received), rows.shape[1])
        _all_to_all(out, rows.contiguous(), received, sent, group, "rows")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.way_back), None, None, None


class _Divide(Function):
    """Identity whose gradient is divided."""

    @staticmethod
    def forward(ctx, tensor, divisor):
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.divisor == 1 else grad / ctx.divisor, None


def _sums(rows: Tensor, gates: Tensor | None, inverse: Tensor) -> Tensor:
    """``sum_j gates[t, j] * rows[inverse[t, j]]`` in a fixed order; padded pairs are zero."""
    kind = _checks.accumulate_dtype(rows.dtype)
    total = torch.zeros(inverse.shape[0], rows.shape[1], dtype=kind, device=rows.device)
    for slot, part in enumerate(_slots(rows, inverse)):
        if gates is None:
            total += part
        else:
            total.addcmul_(part.to(kind), gates[:, slot, None].to(kind))
    return total.to(rows.dtype)


def _slots(rows: Tensor, inverse: Tensor) -> Iterator[Tensor]:
    """For each slot of a token's choice, the rows ``[T, d]`` of all tokens."""
    if rows.shape[0] < inverse.numel():  # of padded tokens: they were not sent, and one zero serves
        inverse = inverse.clamp(max=rows.shape[0])
        rows = nn.functional.pad(rows, (0, 0, 0, 1))
    for index in inverse.unbind(1):
        yield rows.index_select(0, index)


class _Spread(Function):
    """Rows of the tokens, one for each expert they chose, sorted by expert.

    A function of its own because the gradient of ``index_select`` adds in any order on a GPU.
    """

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order // inverse.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _sums(grad, None, *ctx.saved_tensors), None, None


class _Combine(Function):
    """Weighted sums of the rows that came back; the inverse of :class:`_Spread`."""

    @staticmethod
    def forward(ctx, rows, gates, order, inverse):
        ctx.save_for_backward(rows, gates, order, inverse)
        return _sums(rows, gates, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, gates, order, inverse = ctx.saved_tensors
        drows = dgates = None
        if ctx.needs_input_grad[0]:
            drows = grad.index_select(0, order // inverse.shape[1])
            drows.mul_(gates.flatten().index_select(0, order)[:, None])  # in the gates' precision
        if ctx.needs_input_grad[1]:
            wide = grad.to(_checks.accumulate_dtype(grad.dtype))
            parts = [(wide * part).sum(1) for part in _slots(rows, inverse)]
            dgates = torch.stack(parts, 1).to(gates.dtype)
        return drows, dgates, None, None


def block_of(experts: int, ranks: int, rank: int) -> range:
    """Experts of a rank: blocks of ``ceil(experts / ranks)``, as DTensor shards a dimension."""
    size = -(-experts // ranks)
    return range(min(rank * size, experts), min((rank + 1) * size, experts))


def _check(x, gate_up, down, routing, own: range) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all fit together."""
    _checks.tensor("x", x)
    experts = routing.counts.shape[0]
    for name, weight in (("gate_up", gate_up), ("down", down)):
        _checks.tensor(name, weight, 3)
        _checks.same_kind(name, weight, "x", x)
        if weight.shape[0] != len(own):
            raise ValueError(
                f"{name}: has {weight.shape[0]} experts, but of the routing's {experts} this rank "
                f"owns {len(own)}, {own.start}..{own.stop}; give that block of them"
            )
    tokens, d = routing.experts.shape[0], down.shape[1]
    if x.dim() == 0 or x.shape[:-1].numel() != tokens or x.shape[-1] != d:
        raise ValueError(
            f"x: expected [..., {d}] with the {tokens} tokens of the routing, got shape "
            f"{tuple(x.shape)}"
        )


def _own_widths(width, experts: int, down: Tensor, own: range):
    """The rank's part of the widths; what is wrong with any of them is said on every rank."""
    _widths(width, down.new_empty(experts, 0, down.shape[2], device="meta"))
    if width is None or isinstance(width, int | torch.SymInt):
        return width
    return width[own.start : own.stop]
