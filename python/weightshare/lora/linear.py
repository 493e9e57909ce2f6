"""A frozen linear layer with a low-rank update gathered from a shared pool."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightshare.lora.pool import ShardPool
from weightshare_kernels import shard_lora

Self = TypeVar("Self", bound="MoSLinear")


class MoSLinear(nn.Module):
    """``base(x) + alpha / r * (dropout(x) A^T) B^T``, A and B put together of a pool's shards.

    They are read where they are multiplied and never made; gradients of all layers of a pool are
    summed in one buffer.

    Args:
        base: the frozen layer, of any kind: it is only called. Its parameters get
            ``requires_grad = False``.
        pool: shared with other layers, which makes it appear once among the parameters of a model.
        layer: which of the pool's tables this layer uses.
        alpha: strength of the update, divided by r.
        dropout: share of the inputs of the update that are dropped in training.

    Raises:
        ValueError: the widths of base and pool differ, the pool has no such layer, or dropout is
            not in 0..1.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938).

    Example::

        plan = ShardPlan(r=8, equivalent_rank=2, private_rank=1, shards=4, layers=len(blocks))
        pool = ShardPool(1024, 1024, plan)
        for number, block in enumerate(blocks):
            block.q_proj = MoSLinear(block.q_proj, pool, number)
    """

    def __init__(
        self,
        base: nn.Module,
        pool: ShardPool,
        layer: int,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name in ("in_features", "out_features"):
            width = getattr(base, name, getattr(pool, name))
            if width != getattr(pool, name):
                raise ValueError(f"base has {name} {width}, but pool {getattr(pool, name)}")
        if not 0 <= layer < pool.plan.layers:
            raise ValueError(f"layer {layer} is outside the pool's {pool.plan.layers} layers")
        self.base, self.pool, self.layer = base.requires_grad_(False), pool, layer
        self.scale = alpha / pool.plan.r
        self.dropout = nn.Dropout(dropout)
        self._kept: Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether the update is in the weight of ``base``."""
        return self._kept is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x ``[..., d_in]``."""
        y = self.base(x)
        if self.merged:
            return y
        pool, n = self.pool, self.layer
        tables = pool.a_index[n], pool.b_index[n]
        return shard_lora(self.dropout(x), y, pool.a, pool.b, *tables, self.scale)

    @torch.no_grad()
    def merge(self: Self) -> Self:
        """Add the update to the weight of ``base``, of which a copy is kept for :meth:`unmerge`.

        Raises:
            TypeError: ``base`` is not an ``nn.Linear`` of floating point.
        """
        if self.merged:
            return self
        weight: Any = getattr(self.base, "weight", None)
        if not isinstance(self.base, nn.Linear) or not weight.is_floating_point():
            raise TypeError(
                f"merge needs an nn.Linear of floating point, but base is "
                f"{type(self.base).__name__} ({getattr(weight, 'dtype', 'no weight')})"
            )
        self._kept = weight.detach().clone()
        delta = self.pool.delta(self.layer, self.scale)
        weight.copy_(self._kept + delta)  # in the wider of the two, rounded once
        return self

    @torch.no_grad()
    def unmerge(self: Self) -> Self:
        """Put back the weight as it was before :meth:`merge`, bit by bit."""
        if self._kept is not None:
            self.base.weight.copy_(self._kept)  # type: ignore[operator, union-attr]
            self._kept = None
        return self

    def extra_repr(self) -> str:
        """Which layer of its pool this is."""
        return f"layer={self.layer}, scale={self.scale:g}, merged={self.merged}"
