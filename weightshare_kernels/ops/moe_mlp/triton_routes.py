"""What the launches of moe_mlp go by: the routing as kernels take it, tiles, descriptors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from weightshare_kernels import _triton
from weightshare_kernels._triton import Tile
from weightshare_kernels.ops.moe_mlp import reference
from weightshare_kernels.ops.moe_mlp.triton_rows import _plan_kernel

FEW = 16  # rows per expert up to which reading the weights is all the work


@dataclass
class Routes:
    """The routing as kernels take it, and the hidden units in use."""

    gates: Tensor  # [pairs]
    offsets: Tensor  # [experts + 1]
    permutation: Tensor  # [pairs]
    inverse: Tensor  # [pairs]
    widths: Tensor | None  # [experts]
    width: int
    activation: str
    k: int
    tokens: Tensor  # int32 [pairs]: token of each row, once there is a plan
    plans: dict[int, tuple[Tensor, int]]  # by height of a tile

    @property
    def pairs(self) -> int:
        """Rows of the experts' order, padded tokens included."""
        return self.permutation.shape[0]

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.offsets.shape[0] - 1

    @property
    def blocks(self) -> int:
        """2 where there is a gate beside the up projection."""
        return 2 if reference.GATED[self.activation] else 1

    def plan(self, height: int) -> tuple[Tensor, int]:
        """Row tiles of a height, and the most there can be; fills in ``tokens`` besides.

        Every expert with rows leaves at most one tile unfilled; the true number is on the device.
        """
        if height not in self.plans:
            slots = self.pairs // height + min(self.experts, self.pairs)
            table = torch.empty(1 + 3 * slots, dtype=torch.int32, device=self.offsets.device)
            rows, e = 1024, triton.next_power_of_2(self.experts)
            each = max(1, 4096 // e)  # slots to a program, which compares them with all experts
            _triton.launch(
                _plan_kernel,
                (max(triton.cdiv(self.pairs, rows), triton.cdiv(slots, each)),),
                (self.offsets, self.permutation, table, self.tokens, self.experts,
                 self.pairs, slots, self.k, height, e, rows, each),
                Tile(each, rows, 1, stages=1),
            )  # fmt: skip
            self.plans[height] = table, slots
        return self.plans[height]


def routes(
    gates: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    widths: Tensor | None,
    width: int,
    activation: str,
) -> Routes:
    """The routing of one call; arguments as of the op, gates ``[T, k]``."""
    tokens = torch.empty(permutation.shape, dtype=torch.int32, device=permutation.device)
    return Routes(
        gates.contiguous().view(-1), offsets.contiguous(), permutation.contiguous(),
        inverse.contiguous(), None if widths is None else widths.contiguous(), width, activation,
        gates.shape[1], tokens, {},
    )  # fmt: skip


def rows_tile(kernel: str, r: Routes, like: Tensor, tma: bool) -> Tile:
    """Tile of a product over rows: tuned for this GPU if known, else by rule.

    128 x 256 asks least of the L2 cache per operation, which bounds these products on Hopper; with
    few rows to an expert most of that would be empty, and with a handful the weights are merely
    read. Elements of 4 bytes and more run on the plain cores and take twice the room.
    """
    mean = r.pairs / max(r.experts, 1)
    if _triton.interpreted():
        side = min(128, max(16, triton.next_power_of_2(max(like.shape[-1], r.width))))
        return Tile(16 if mean <= FEW else 64, 2 * side, side, stages=1)
    size = like.element_size()
    if size == 8:
        return Tile(32, 32, 16, stages=2)
    if size == 4:
        return Tile(16, 32, 32) if mean <= FEW else Tile(64, 64, 32, warps=8)
    if mean <= FEW:  # the two blocks of h double what grad_x holds
        rule = Tile(16, 64, 64 if kernel == "moe_grad_x" else 128, stages=4)
        return _triton.tuned(f"{kernel}_few", like) or rule
    # Less where registers hold more than the sum: an epilogue's values, addresses of two operands.
    plain_up = kernel == "moe_up" and (tma or r.widths is not None)
    narrow = kernel == "moe_hidden_grad" or not (tma or plain_up)
    if mean <= 4 * FEW:
        rule, name = Tile(64, 128, 64), f"{kernel}_some"
    elif _triton.capability(like) < 90:
        rule, name = Tile(128, 128, 64, warps=8), kernel
    else:
        rule = Tile(128, 128 if narrow else 256, 64, warps=8, stages=4)
        name = kernel if tma else f"{kernel}_pointers"
    if kernel == "moe_hidden_grad" and r.widths is not None:
        rule = replace(rule, n=64)
    return _triton.tuned(name, like) or rule


def parts(tile: Tile, columns: int) -> int:
    """Parts in which a tile's columns go through an epilogue that holds several values of each.

    16 elements a thread at a time leave room for the sum itself; at most 4 parts are cut.
    """
    if _triton.interpreted():
        return 2 if columns > 128 else 1  # it counts operations, not elements
    return max(1, min(4, tile.m * tile.n // (16 * 32 * tile.warps)))


def sums_tile(kernel: str, left: Tensor, right: Tensor) -> Tile:
    """Tile of a weight's gradient, likewise; its sum runs over an expert's rows."""
    if _triton.interpreted():
        side = min(256, max(16, triton.next_power_of_2(max(left.shape[-1], right.shape[-1]))))
        return Tile(min(side, 64), side, 64, stages=1)
    size = left.element_size()
    if size > 2:
        return Tile(32, 32, 16, stages=2) if size == 8 else Tile(64, 64, 32)
    tile = _triton.tuned(kernel, left)
    if tile is None:
        large = _triton.capability(left) >= 90
        tile = Tile(128, 256 if large else 128, 64, warps=8, stages=5)
    return tile


def programs_for(tiles: int, tile: Tile, like: Tensor) -> int:
    """Programs that walk over the tiles: one per multiprocessor where a tile fills it."""
    if _triton.interpreted():
        return min(tiles, 3)
    fills = tile.m * tile.n >= 128 * 128 and _triton.capability(like) >= 90
    return min(tiles, _triton.multiprocessors(like)) if fills else tiles


def tma_serves(r: Routes, *tensors: Tensor) -> bool:
    """Tell whether descriptors can be made of these tensors, and are worth it.

    Not for a width per expert: a descriptor's bounds are the host's. Not for a handful of rows,
    where nothing is left to hide behind the products.
    """
    if r.widths is not None:
        return False
    if not _triton.interpreted():
        like = tensors[0]
        few = r.pairs <= FEW * r.experts
        if few or like.element_size() != 2 or _triton.capability(like) < 90:
            return False
    return all(
        t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def described(tensor: Tensor, *box: int) -> TensorDescriptor:
    """TMA descriptor of a tensor of any strides, and of what one copy fetches."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box))
