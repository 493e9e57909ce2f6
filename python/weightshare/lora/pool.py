"""The parameters that the layers of one projection type share, and their index tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightshare.lora.plan import ShardPlan
from weightshare_kernels.ops.shard_lora.reference import matrix


class ShardPool(nn.Module):
    """A pool of A shards, one of B shards, and which of them each layer uses.

    Args:
        in_features: d_in of the layers.
        out_features: d_out of the layers.
        plan: how the layers share; see :class:`ShardPlan`.
        device: where parameters and tables live.
        dtype: of the parameters; float32 serves layers of lower precision, too.

    Attributes:
        a: shards of A ``[P, d_in / l]``, drawn from ``U(-1/sqrt(d_in), 1/sqrt(d_in))``.
        b: shards of B ``[P, d_out / l]``, zeros at first.
        a_index: numbers of A's shards, int32 ``[layers, r, l]``; part of the state dict.
        b_index: numbers of B's shards.

    Raises:
        ValueError: ``plan.shards`` does not divide both widths.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938).
    """

    a_index: Tensor
    b_index: Tensor

    def __init__(
        self, in_features: int, out_features: int, plan: ShardPlan, *, device=None, dtype=None
    ):
        super().__init__()
        self.in_features, self.out_features, self.plan = in_features, out_features, plan
        a_width, b_width = plan.widths(in_features, out_features)
        options = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(plan.pool_shards, a_width, **options))
        self.b = nn.Parameter(torch.empty(plan.pool_shards, b_width, **options))
        for name in ("a_index", "b_index"):
            table = torch.empty(plan.layers, plan.r, plan.shards, dtype=torch.int32, device=device)
            self.register_buffer(name, table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A anew, zero B, and write the plan's tables: all that a pool from meta needs."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)
        for table, drawn in zip((self.a_index, self.b_index), self.plan.tables(), strict=True):
            table.copy_(drawn)

    def matrices(self, layer: int) -> tuple[Tensor, Tensor]:
        """A ``[r, d_in]`` and B ``[d_out, r]`` of a layer, put together: copies, differentiable."""
        return self.a_matrix(layer), self.b_matrix(layer).t()

    def a_matrix(self, layer: int) -> Tensor:
        """A ``[r, d_in]`` of a layer."""
        return matrix(self.a, self.a_index[layer])

    def b_matrix(self, layer: int) -> Tensor:
        """The transpose of B, ``[r, d_out]``, of a layer: its rows are what is put together."""
        return matrix(self.b, self.b_index[layer])

    def delta(self, layer: int, scale: float) -> Tensor:
        """What the layer adds to its weight: ``scale * B A``, ``[d_out, d_in]``.

        Summed in float32 where the pools are lower.
        """
        a, b = self.matrices(layer)
        if a.dtype.itemsize < 4:
            a, b = a.float(), b.float()
        return (scale * b) @ a

    def extra_repr(self) -> str:
        """The widths and the plan."""
        return f"{self.in_features}, {self.out_features}, {self.plan}"
