"""Which shards of a pool make up the low-rank matrices of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardPlan:
    """How the layers of one projection type share a pool of A shards and one of B shards.

    Four strategies keep the layers different: each layer takes a random subset of the pool's
    vectors (subset selection), A and B are drawn apart (pair dissociation), vectors are put
    together of ``shards`` pieces from anywhere (vector sharding), and the last ``private_rank``
    vectors of each layer belong to it alone (privatisation). With ``equivalent_rank =
    private_rank = r`` and one shard per vector nothing is shared, which is plain LoRA.

    Args:
        r: rank of every layer's matrices.
        equivalent_rank: e, the rank of the plain LoRA that has as many parameters.
        private_rank: p of the r ranks that a layer does not share.
        shards: l, pieces of each vector.
        layers: L, layers that share the pool.
        seed: of the draw; the tables depend on the fields of the plan and on nothing else.
        dissociate: whether A and B are drawn apart; else B's table is A's.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes do not fit together; the message names the constraint and the numbers.

    Source: MoS (Wang et al., ICLR 2025, arXiv 2410.00938).
    """

    r: int
    equivalent_rank: int
    private_rank: int
    shards: int
    layers: int
    seed: int = 0
    dissociate: bool = True

    def __post_init__(self) -> None:
        check_ranks(self.r, self.equivalent_rank, self.private_rank, self.shards, self.layers)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed!r}")

    @property
    def pool_shards(self) -> int:
        """Shards P in the pool of A, and as many in the pool of B."""
        return self.equivalent_rank * self.layers * self.shards

    def parameters(self, d_in: int, d_out: int) -> int:
        """Trainable parameters of the two pools of a projection ``[d_out, d_in]``."""
        self.widths(d_in, d_out)
        return self.equivalent_rank * self.layers * (d_in + d_out)

    def widths(self, d_in: int, d_out: int) -> tuple[int, int]:
        """Elements of a shard of A and of one of B.

        Raises:
            ValueError: the pieces of a vector would not be of one size.
        """
        for name, width in (("in_features", d_in), ("out_features", d_out)):
            if width <= 0 or width % self.shards:
                raise ValueError(
                    f"shards must divide {name}: {width} / {self.shards} is not whole; choose "
                    "shards among the common divisors of both"
                )
        return d_in // self.shards, d_out // self.shards

    def tables(self) -> tuple[Tensor, Tensor]:
        """Numbers of the shards of A and of B, int32 ``[layers, r, shards]``.

        Within a matrix no shard comes twice; those of different layers may coincide but for the
        private ones.
        """
        draw = torch.Generator(device="cpu").manual_seed(self.seed)
        a, b = [], []
        for layer in range(self.layers):
            a.append(self._matrix(layer, draw))
            b.append(self._matrix(layer, draw) if self.dissociate else a[-1])
        return torch.stack(a), torch.stack(b)

    def _matrix(self, layer: int, draw: torch.Generator) -> Tensor:
        """The shards of one matrix ``[r, shards]``: the shared ones, then the layer's own."""
        l, p = self.shards, self.private_rank
        shared = (self.equivalent_rank - p) * self.layers * l
        chosen = torch.randperm(shared, generator=draw, device="cpu")[: (self.r - p) * l]
        first = shared + layer * p * l
        own = torch.arange(first, first + p * l, device="cpu")
        return torch.cat([chosen, own]).to(torch.int32).reshape(self.r, l)


def check_ranks(r: int, e: int, p: int, shards: int, layers: int | None = None) -> None:
    """Raise unless a plan can be made of these numbers, see :class:`ShardPlan`.

    Without ``layers`` what depends on them is left out.
    """
    sizes = {"r": r, "equivalent_rank": e, "shards": shards, "private_rank": p}
    if layers is not None:
        sizes["layers"] = layers
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
        least = 0 if name == "private_rank" else 1
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if p > e or p > r:
        raise ValueError(
            f"private_rank must not exceed equivalent_rank or r: got private_rank {p}, "
            f"equivalent_rank {e}, r {r}"
        )
    if p == e and r != e:
        raise ValueError(
            f"private_rank = equivalent_rank = {e} leaves no shared shards, so r must be {e}, too: "
            f"got {r}; lower private_rank to share"
        )
    if layers is not None and r - p > (e - p) * layers:
        raise ValueError(
            "r - private_rank must not exceed (equivalent_rank - private_rank) * layers: "
            f"{r} - {p} = {r - p} > ({e} - {p}) * {layers} = {(e - p) * layers}; lower r or raise "
            "equivalent_rank"
        )
