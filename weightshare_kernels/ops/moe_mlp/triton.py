"""moe_mlp on Triton: grouped products whose gathers, activations and gates happen in the tiles.

Forward is a plan of row tiles, the up projection (token rows gathered as they are read, the
activation on the tile), the down projection (weighted, stored to each pair's own slot) and a sum
over a token's slots in their order. Backward computes ``dy W_down`` once, takes from it and h all
that needs no further product, and is left with one product for dx and one for each weight. No
atomics, no copy of x in the experts' order, nothing that the host would have to wait for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from weightshare_kernels import _triton
from weightshare_kernels._triton import Tile
from weightshare_kernels.ops.moe_mlp import reference
from weightshare_kernels.ops.moe_mlp.triton_rows import (
    _hidden_grad_kernel,
    _plan_kernel,
    _spread_kernel,
    _up_kernel,
)
from weightshare_kernels.ops.moe_mlp.triton_sums import (
    _combine_kernel,
    _gate_grad_kernel,
    _weight_grad_kernel,
)

_FEW = 16  # rows per expert up to which reading the weights is all the work


@dataclass
class _Routes:
    """The routing as kernels take it, and the hidden units in use."""

    gates: Tensor  # [pairs]
    offsets: Tensor  # [experts + 1]
    permutation: Tensor  # [pairs]
    inverse: Tensor  # [pairs]
    widths: Tensor | None  # [experts]
    width: int
    activation: str
    k: int
    plans: dict[int, tuple[Tensor, Tensor, int]]  # by height of a tile

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

    def plan(self, height: int) -> tuple[Tensor, Tensor, int]:
        """Row tiles of a height, the token of each row, and most tiles there can be.

        Every expert with rows leaves at most one tile unfilled; the true number is on the device.
        """
        if height not in self.plans:
            slots = self.pairs // height + min(self.experts, self.pairs)
            table = torch.empty(1 + 3 * slots, dtype=torch.int32, device=self.offsets.device)
            tokens = torch.empty(self.pairs, dtype=torch.int32, device=self.offsets.device)
            block = 1024
            _triton.launch(
                _plan_kernel,
                (max(self.experts, triton.cdiv(self.pairs, block)),),
                (self.offsets, self.permutation, table, tokens, self.experts, self.pairs, slots,
                 self.k, height, triton.next_power_of_2(self.experts), block),
                Tile(1, block, 1, stages=1),
            )  # fmt: skip
            self.plans[height] = table, tokens, slots
        return self.plans[height]


def _routes(gates, offsets, permutation, inverse, widths, width, activation) -> _Routes:
    tables = (t.contiguous() for t in (offsets, permutation, inverse))
    widths = None if widths is None else widths.contiguous()
    return _Routes(
        gates.contiguous().view(-1), *tables, widths, width, activation, gates.shape[1], {}
    )


# -- Launch configurations -------------------------------------------------------------------------


def _rows_tile(kernel: str, r: _Routes, like: Tensor) -> Tile:
    """Tile of a product over rows: tuned for this GPU if known, else by rule.

    128 x 256 asks least of the L2 cache per operation, which bounds these products on Hopper; with
    few rows to an expert most of that would be empty, and with a handful the weights are merely
    read. Elements of 4 bytes and more run on the plain cores and take twice the room.
    """
    mean = r.pairs / max(r.experts, 1)
    if _triton.interpreted():
        return Tile(16 if mean <= _FEW else 64, 256, 128, stages=1)
    size = like.element_size()
    if size == 8:
        return Tile(32, 32, 16, stages=2)
    if size == 4:
        return Tile(16, 32, 64) if mean <= _FEW else Tile(64, 64, 32)
    if mean <= _FEW:
        return _triton.tuned(f"{kernel}_few", like) or Tile(16, 64, 128, stages=4)
    if mean <= 4 * _FEW:
        return _triton.tuned(f"{kernel}_some", like) or Tile(64, 128, 64)
    tile = _triton.tuned(kernel, like)
    if tile is None and _triton.capability(like) < 90:
        tile = Tile(128, 128, 64, warps=8)
    elif tile is None:
        tile = Tile(128, 256, 64, warps=8, stages=4)
        if kernel == "moe_hidden_grad":  # its epilogue wants the registers
            tile = replace(tile, n=128)
    return tile


def _parts(tile: Tile) -> int:
    """Parts in which a tile's columns go through the epilogue of ``_hidden_grad_kernel``.

    It holds some seven values to an element; 16 elements a thread leave room for the sum itself.
    """
    if _triton.interpreted():
        return 2
    return max(1, min(4, tile.m * tile.n // (16 * 32 * tile.warps)))


def _sums_tile(kernel: str, r: _Routes, like: Tensor) -> Tile:
    """Tile of a weight's gradient, likewise; its sum runs over an expert's rows."""
    if _triton.interpreted():
        return Tile(64, 256, 128, stages=1)
    size = like.element_size()
    if size > 2:
        return Tile(32, 32, 16, stages=2) if size == 8 else Tile(64, 64, 32)
    tile = _triton.tuned(kernel, like)
    if tile is None:
        large = _triton.capability(like) >= 90
        tile = Tile(128, 256 if large else 128, 64, warps=8, stages=7 if large else 4)
    return tile


# -- Launches --------------------------------------------------------------------------------------


def _descriptors(r: _Routes, like: Tensor, *views: tuple[Tensor, list[int]]) -> list | None:
    """TMA descriptors of tensors, each with the shape of a tile, if all of them allow it.

    Not for a width per expert: a descriptor's bounds are the host's.
    """
    modern = _triton.interpreted() or (_triton.capability(like) >= 90 and like.itemsize == 2)
    few = r.pairs <= _FEW * r.experts and not _triton.interpreted()
    if not modern or few or r.widths is not None:
        return None
    for view, _ in views:
        steps = [stride * view.itemsize for stride in view.stride()[:-1]]
        if view.stride(-1) != 1 or view.data_ptr() % 16 or any(s % 16 or s <= 0 for s in steps):
            return None
    return [TensorDescriptor(v, list(v.shape), list(v.stride()), box) for v, box in views]


def _launch_rows(
    kernel, r: _Routes, like: Tensor, tile: Tile, columns: int, tma: bool, arguments: tuple,
    constants: tuple,
) -> None:  # fmt: skip
    """Launch a product over rows, ``columns`` of its result to a tile's width.

    Where a tile fills a multiprocessor there is one program for each, which fetches its next tile
    while it ends the last; else there are as many as there may be tiles.
    """
    lasting = tma and tile.m * tile.n >= 128 * 128
    programs = r.plan(tile.m)[2] * triton.cdiv(columns, tile.n)
    if lasting or _triton.interpreted():
        most = 3 if _triton.interpreted() else _triton.multiprocessors(like)
        programs = min(programs, most)
    _triton.launch(
        kernel,
        (programs,),
        (*arguments, *constants, tma, lasting, tile.m, tile.n, tile.k, tile.group,
         _triton.precision(like), _triton.triton_dtype(_triton.sum_dtype(like))),
        tile,
    )  # fmt: skip


def _up(x: Tensor, gate_up: Tensor, r: _Routes, save: bool) -> tuple[Tensor | None, Tensor]:
    """Pre-activations ``[pairs, blocks * width]`` if saved, hidden units ``[pairs, width]``."""
    tile = _rows_tile("moe_up", r, x)
    tile = replace(tile, n=tile.n // r.blocks)
    table, tokens, slots = r.plan(tile.m)
    w = gate_up.unflatten(1, (r.blocks, -1))[:, :, : r.width]
    made = _descriptors(r, x, (w, [1, r.blocks, tile.n, tile.k]))
    h = x.new_empty(r.pairs, r.blocks * r.width) if save else None
    hidden = x.new_empty(r.pairs, r.width)
    _launch_rows(
        _up_kernel, r, x, tile, r.width, made is not None,
        (x, made[0] if made else w, h, hidden, table, tokens, r.widths, slots, r.width, x.shape[1],
         *x.stride(), *w.stride()),
        (r.activation, r.blocks),
    )  # fmt: skip
    return h, hidden


def _spread(
    a: Tensor, w: Tensor, gates: Tensor | None, out: Tensor, k_major: bool, r: _Routes
) -> None:
    """``out[pair] = a[row] W (* gate)``; a ``[pairs, blocks, width]`` in the experts' order.

    w is ``[experts, 1, d, width]`` (k_major) or ``[experts, blocks, width, d]``.
    """
    tile = _rows_tile("moe_down" if k_major else "moe_grad_x", r, a)
    table, _, slots = r.plan(tile.m)
    box = [1, 1, tile.n, tile.k] if k_major else [1, 1, tile.k, tile.n]
    made = _descriptors(r, a, (a, [tile.m, 1, tile.k]), (w, box))
    w_e, w_b, *inner = w.stride()
    strides = (w_e, inner[0], w_b, inner[1]) if k_major else (w_e, inner[1], w_b, inner[0])
    _launch_rows(
        _spread_kernel, r, a, tile, out.shape[1], made is not None,
        (*(made or (a, w)), out, gates, table, r.permutation, r.widths, slots, r.pairs, r.width,
         out.shape[1], *a.stride()[:2], *strides),
        (a.shape[1], k_major),
    )  # fmt: skip


def _hidden_grad(
    grad: Tensor, down: Tensor, h: Tensor, r: _Routes, wants_dh: bool, wants_weighted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradient of h, hidden units times gates, shares of the gates' gradient ``[.., pairs]``."""
    tile = _rows_tile("moe_hidden_grad", r, grad)
    table, tokens, slots = r.plan(tile.m)
    w = down.unsqueeze(1)[..., : r.width]
    made = _descriptors(r, grad, (w, [1, 1, tile.k, tile.n]))
    dh = torch.empty_like(h) if wants_dh else None
    weighted = h.new_empty(r.pairs, r.width) if wants_weighted else None
    strips = triton.cdiv(r.width, tile.n)
    sums = h.new_empty(strips, r.pairs, dtype=_triton.sum_dtype(h))
    _launch_rows(
        _hidden_grad_kernel, r, grad, tile, r.width, made is not None,
        (grad, made[0] if made else w, h, dh, weighted, sums, r.gates, table, tokens,
         r.permutation, r.widths, slots, r.pairs, r.width, grad.shape[1], *grad.stride(),
         w.stride(0), w.stride(3), w.stride(2)),
        (r.activation, r.blocks, _parts(tile)),
    )  # fmt: skip
    return dh, weighted, sums


def _weight_grad_(
    target: Tensor, left: Tensor, right: Tensor, gather_left: bool, add: bool, r: _Routes
) -> None:
    """``target [experts, blocks, m, n] (+)= left^T right`` over each expert's rows.

    The side that is gathered has a row per token, the other one per pair: ``[pairs, blocks, m]``
    or ``[pairs, n]``. Not adding, all of the target is written, zeros beyond the width.
    """
    tile = _sums_tile("moe_grad_down" if gather_left else "moe_grad_gate_up", r, left)
    blocks, m, n = target.shape[1:]
    if add:
        m, n = (m, r.width) if gather_left else (r.width, n)
    tokens = r.plan(_rows_tile("moe_hidden_grad", r, left).m)[1]
    l_strides = left.stride() if left.dim() == 3 else (left.stride(0), 0, left.stride(1))
    tiles = r.experts * blocks * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    _triton.launch(
        _weight_grad_kernel,
        (tiles,),
        (left, right, target, r.offsets, tokens, r.widths, r.experts, r.pairs, m, n, r.width,
         *l_strides, *right.stride(), *target.stride(), blocks, gather_left, add, tile.m, tile.n,
         tile.k, tile.group, _triton.precision(left),
         _triton.triton_dtype(_triton.sum_dtype(left))),
        tile,
    )  # fmt: skip


def _combine(parts: Tensor, y: Tensor, r: _Routes) -> None:
    """``y [tokens, d] =`` sums over the slots of ``parts [pairs, d]``."""
    rows, columns = (64, 256) if _triton.interpreted() else (1, 1024)
    _triton.launch(
        _combine_kernel,
        (triton.cdiv(y.shape[0], rows), triton.cdiv(y.shape[1], columns)),
        (parts, y, r.inverse, r.offsets, r.experts, y.shape[0], r.pairs, y.shape[1], r.k, rows,
         columns, _triton.triton_dtype(_triton.sum_dtype(y))),
        Tile(rows, columns, 1, stages=1),
    )  # fmt: skip


def _gate_grad(sums: Tensor, r: _Routes) -> Tensor:
    """Gradient of the gates ``[pairs]``."""
    dgates, block = torch.empty_like(r.gates), 512
    _triton.launch(
        _gate_grad_kernel,
        (triton.cdiv(r.pairs, block),),
        (sums, dgates, r.inverse, r.offsets, r.experts, r.pairs, sums.shape[0], block),
        Tile(1, block, 1, stages=1),
    )
    return dgates


def _to_tokens(
    a: Tensor, w: Tensor, gates: Tensor | None, like: Tensor, k_major: bool, r: _Routes
) -> Tensor:
    """The product of :func:`_spread`, added up over each token's slots."""
    if r.k == 1:  # a token's only pair is its sum; padded tokens keep their zero
        y = torch.zeros_like(like, memory_format=torch.contiguous_format)
        _spread(a, w, gates, y, k_major, r)
        return y
    parts = like.new_empty(r.pairs, like.shape[1])
    _spread(a, w, gates, parts, k_major, r)
    y = torch.empty_like(like, memory_format=torch.contiguous_format)
    _combine(parts, y, r)
    return y


# -- The op ----------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gates: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    widths: Tensor | None,
    width: int,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Output ``[T, d]`` and, if saved, ``h [T*k, blocks*width]`` in the order of the permutation.

    What an expert's width or padding leaves out of h is not written.
    """
    r = _routes(gates, offsets, permutation, inverse, widths, width, activation)
    if not (x.numel() and r.pairs and r.experts and width):
        h = x.new_empty(r.pairs, r.blocks * width) if save else x.new_empty(0)
        return torch.zeros_like(x, memory_format=torch.contiguous_format), h
    h, hidden = _up(x, gate_up, r, save)
    w = down.unsqueeze(1)[..., :width]
    y = _to_tokens(hidden.unsqueeze(1), w, r.gates, x, True, r)
    return y, x.new_empty(0) if h is None else h


def backward_(
    gate_up_buffer: Tensor | None,
    down_buffer: Tensor | None,
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    h: Tensor,
    gates: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    widths: Tensor | None,
    width: int,
    activation: str,
    add_gate_up: bool,
    add_down: bool,
    wants_x: bool,
) -> tuple[Tensor, Tensor]:
    """Adds to (or writes) the weights' gradients in place; returns those of x and the gates."""
    r = _routes(gates, offsets, permutation, inverse, widths, width, activation)
    if not (x.numel() and r.pairs and r.experts and width):
        for buffer, add in ((gate_up_buffer, add_gate_up), (down_buffer, add_down)):
            if buffer is not None and not add:
                buffer.zero_()
        dx = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        none = torch.zeros_like(gates, memory_format=torch.contiguous_format)
        return dx if wants_x else grad.new_empty(0), none
    h = h.contiguous()
    wants_dh = wants_x or gate_up_buffer is not None
    dh, weighted, sums = _hidden_grad(grad, down, h, r, wants_dh, down_buffer is not None)
    dgates = _gate_grad(sums, r).view(gates.shape)
    if down_buffer is not None:
        _weight_grad_(down_buffer.unsqueeze(1), grad, weighted, True, add_down, r)
    dx = grad.new_empty(0)
    if dh is not None:
        dh = dh.unflatten(1, (r.blocks, -1))
        if wants_x:
            w = gate_up.unflatten(1, (r.blocks, -1))[:, :, :width]
            dx = _to_tokens(dh, w, None, grad, False, r)
        if gate_up_buffer is not None:
            target = gate_up_buffer.unflatten(1, (r.blocks, -1))
            _weight_grad_(target, dh, x, False, add_gate_up, r)
    return dx, dgates


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: Qwen3-30B-A3B at 32768 tokens, at widths of its experts, decoding."""
    return [
        *_shape_examples(dtype, 32768, ""),
        *_shape_examples(dtype, 32768, ", a width per expert", ("up", "grad x")),
        *_shape_examples(dtype, 4, "", ("up", "down")),
    ]


def _shape_examples(
    dtype: torch.dtype, tokens: int, note: str, only: tuple[str, ...] | None = None
) -> list[_triton.Example]:
    d, f, experts, k = 2048, 768, 128, 8
    pairs, e = tokens * k, dtype.itemsize
    touched = min(experts, pairs)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    tables = [empty(n, kind=torch.int64) for n in (experts + 1, pairs, pairs)]
    widths = empty(experts, kind=torch.int64) if note else None
    r = _routes(empty(tokens, k, kind=torch.float32), *tables, widths, f, "swiglu")
    table, row = torch.empty(0), torch.empty(0)
    for height in (16, 32, 64, 128):  # the plan's launch is an example of its own
        slots = pairs // height + touched
        table, row = (empty(n, kind=torch.int32) for n in (1 + 3 * slots, pairs))
        r.plans[height] = table, row, slots
    x, y, parts = empty(tokens, d), empty(tokens, d), empty(pairs, d)
    gate_up, down = empty(experts, 2 * f, d), empty(experts, d, f)
    h, hidden = empty(pairs, 2 * f), empty(pairs, f)
    split, deep = h.view(pairs, 2, f), gate_up.view(experts, 2, f, d)
    product = 2 * pairs * d * f
    matrix = e * touched * d * f  # bytes of one of the experts' three matrices
    at_x, at_y, at_f = e * tokens * d, e * pairs * d, e * pairs * f
    bound = "matrix" if pairs > _FEW * experts else "memory"
    listed = {
        "up": (lambda: _up(x, gate_up, r, True), 2, 2 * matrix + at_x + 3 * at_f, bound),
        "down": (
            lambda: _spread(hidden.unsqueeze(1), down.unsqueeze(1), r.gates, parts, True, r),
            1, matrix + at_f + at_y, bound,
        ),
        "hidden grad": (
            lambda: _hidden_grad(x, down, h, r, True, True), 1, matrix + at_x + 5 * at_f, bound,
        ),
        "grad x": (
            lambda: _spread(split, deep, None, parts, False, r), 2,
            2 * matrix + 2 * at_f + at_y, bound,
        ),
        "grad gate_up": (
            lambda: _weight_grad_(deep, split, x, False, False, r), 2,
            2 * matrix + 2 * at_f + at_x, bound,
        ),
        "grad down": (
            lambda: _weight_grad_(down.unsqueeze(1), x, hidden, True, False, r), 1,
            matrix + at_f + at_x, bound,
        ),
        "combine": (lambda: _combine(parts, y, r), 0, at_x + at_y, "memory"),
    }  # fmt: skip
    return [
        _triton.Example(
            f"moe_mlp {name}, {tokens} tokens, 128 experts of 2048 x 768, top 8{note}",
            call, products * product, moved, kind,
        )
        for name, (call, products, moved, kind) in listed.items()
        if only is None or name in only
    ]  # fmt: skip
