"""moe_mlp on Triton: grouped products whose gathers, activations and gates happen in the tiles.

Forward is a plan of row tiles, the up projection (token rows gathered as they are read, the
activation on the tile), the down projection (weighted, stored to each pair's own slot) and a sum
over a token's slots in their order. Backward computes ``dy W_down`` once, takes from it and h all
that needs no further product, and is left with one product for dx and one for each weight. No
atomics, no copy of x in the experts' order, nothing that the host would have to wait for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from weightshare_kernels import _triton
from weightshare_kernels._triton import Tile
from weightshare_kernels.ops.moe_mlp.triton_routes import (
    FEW,
    Routes,
    described,
    parts,
    programs_for,
    routes,
    rows_tile,
    sums_tile,
    tma_serves,
)
from weightshare_kernels.ops.moe_mlp.triton_rows import (
    _hidden_grad_kernel,
    _spread_kernel,
    _up_kernel,
)
from weightshare_kernels.ops.moe_mlp.triton_sums import (
    _combine_kernel,
    _gate_grad_kernel,
    _weight_grad_kernel,
)

# -- Launches --------------------------------------------------------------------------------------


def _launch_rows(
    kernel, r: Routes, like: Tensor, tile: Tile, columns: int, tma: bool, arguments: tuple,
    constants: tuple,
) -> None:  # fmt: skip
    """Launch a product over rows with ``columns`` columns.

    A program that has tiles to come fetches the next while it stores the last. The compiler does
    that where TMA fetches the weights; else there are as many programs as there may be tiles.
    """
    tiles = r.plan(tile.m)[1] * triton.cdiv(columns, tile.n)
    programs = programs_for(tiles, tile, like) if tma else tiles
    lasting = programs < tiles
    _triton.launch(
        kernel,
        (programs,),
        (*arguments, *constants, tma, lasting, tile.m, tile.n, tile.k, tile.group,
         _triton.precision(like), _triton.triton_dtype(_triton.sum_dtype(like))),
        tile,
    )  # fmt: skip


def _up(x: Tensor, gate_up: Tensor, r: Routes, save: bool) -> tuple[Tensor | None, Tensor]:
    """Pre-activations ``[pairs, blocks * width]`` if saved, hidden units ``[pairs, width]``."""
    w = gate_up.unflatten(1, (r.blocks, -1))[:, :, : r.width]
    tma = tma_serves(r, w)
    tile = rows_tile("moe_up", r, x, tma)
    tile = replace(tile, n=tile.n // r.blocks)
    table, slots = r.plan(tile.m)
    h = x.new_empty(r.pairs, r.blocks * r.width) if save else None
    hidden = x.new_empty(r.pairs, r.width)
    _launch_rows(
        _up_kernel, r, x, tile, r.width, tma,
        (x, described(w, 1, r.blocks, tile.n, tile.k) if tma else w, h, hidden, table, r.tokens,
         r.widths, slots, r.width, x.shape[1], *x.stride(), *w.stride()),
        (r.activation, r.blocks, parts(tile, r.width)),
    )  # fmt: skip
    return h, hidden


def _spread(
    a: Tensor, w: Tensor, gates: Tensor | None, out: Tensor, k_major: bool, r: Routes
) -> None:
    """``out[pair] = a[row] W (* gate)``; a ``[pairs, blocks, width]`` in the experts' order.

    w is ``[experts, 1, d, width]`` (k_major) or ``[experts, blocks, width, d]``.
    """
    tma = tma_serves(r, a, w)
    tile = rows_tile("moe_down" if k_major else "moe_grad_x", r, a, tma)
    table, slots = r.plan(tile.m)
    operands = a, w
    if tma:
        box = (tile.n, tile.k) if k_major else (tile.k, tile.n)
        operands = described(a.transpose(0, 1), 1, tile.m, tile.k), described(w, 1, 1, *box)
    w_e, w_b, *inner = w.stride()
    strides = (w_e, inner[0], w_b, inner[1]) if k_major else (w_e, inner[1], w_b, inner[0])
    _launch_rows(
        _spread_kernel, r, a, tile, out.shape[1], tma,
        (*operands, out, gates, table, r.permutation, r.widths, slots, r.pairs, r.width,
         out.shape[1], *a.stride()[:2], *strides),
        (a.shape[1], k_major),
    )  # fmt: skip


def _hidden_grad(
    grad: Tensor, down: Tensor, h: Tensor, r: Routes, wants_dh: bool, wants_weighted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradient of h, hidden units times gates, shares of the gates' gradient ``[.., pairs]``."""
    w = down.unsqueeze(1)[..., : r.width]
    tma = tma_serves(r, w)
    tile = rows_tile("moe_hidden_grad", r, grad, tma)
    table, slots = r.plan(tile.m)
    dh = torch.empty_like(h) if wants_dh else None
    weighted = h.new_empty(r.pairs, r.width) if wants_weighted else None
    strips = triton.cdiv(r.width, tile.n)
    sums = h.new_empty(strips, r.pairs, dtype=_triton.sum_dtype(h))
    _launch_rows(
        _hidden_grad_kernel, r, grad, tile, r.width, tma,
        (grad, described(w, 1, 1, tile.k, tile.n) if tma else w, h, dh, weighted, sums, r.gates,
         table, r.tokens, r.permutation, r.widths, slots, r.pairs, r.width, grad.shape[1],
         *grad.stride(), w.stride(0), w.stride(3), w.stride(2)),
        (r.activation, r.blocks, parts(tile, r.width)),
    )  # fmt: skip
    return dh, weighted, sums


def _weight_grad_(
    target: Tensor, left: Tensor, right: Tensor, gather_left: bool, add: bool, r: Routes
) -> None:
    """``target [experts, blocks, m, n] (+)= left^T right`` over each expert's rows.

    The side that is gathered has a row per token, the other one per pair: ``[pairs, blocks, m]``
    or ``[pairs, n]``. Not adding, all of the target is written, zeros beyond the width.
    """
    tile = sums_tile("moe_grad_down" if gather_left else "moe_grad_gate_up", left, right)
    blocks, m, n = target.shape[1:]
    if add:
        m, n = (m, r.width) if gather_left else (r.width, n)
    l_strides = left.stride() if left.dim() == 3 else (left.stride(0), 0, left.stride(1))
    tiles = r.experts * blocks * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    _triton.launch(
        _weight_grad_kernel,
        (programs_for(tiles, tile, left),),
        (left, right, target, r.offsets, r.tokens, r.widths, tiles, r.pairs, m, n, r.width,
         *l_strides, *right.stride(), *target.stride(), blocks, gather_left, add,
         parts(tile, n), tile.m, tile.n, tile.k, tile.group, _triton.precision(left),
         _triton.triton_dtype(_triton.sum_dtype(left))),
        tile,
    )  # fmt: skip


def _combine(apart: Tensor, y: Tensor, r: Routes) -> None:
    """``y [tokens, d] =`` sums over the slots of ``apart [pairs, d]``."""
    rows, columns = (64, 256) if _triton.interpreted() else (1, 1024)
    _triton.launch(
        _combine_kernel,
        (triton.cdiv(y.shape[0], rows), triton.cdiv(y.shape[1], columns)),
        (apart, y, r.inverse, r.offsets, r.experts, y.shape[0], r.pairs, y.shape[1], r.k, rows,
         columns, _triton.triton_dtype(_triton.sum_dtype(y))),
        Tile(rows, columns, 1, stages=1),
    )  # fmt: skip


def _gate_grad(sums: Tensor, r: Routes) -> Tensor:
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
    a: Tensor, w: Tensor, gates: Tensor | None, like: Tensor, k_major: bool, r: Routes
) -> Tensor:
    """The product of :func:`_spread`, added up over each token's slots."""
    if r.k == 1:  # a token's only pair is its sum; padded tokens keep their zero
        y = torch.zeros_like(like, memory_format=torch.contiguous_format)
        _spread(a, w, gates, y, k_major, r)
        return y
    apart = like.new_empty(r.pairs, like.shape[1])
    _spread(a, w, gates, apart, k_major, r)
    y = torch.empty_like(like, memory_format=torch.contiguous_format)
    _combine(apart, y, r)
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
    r = routes(gates, offsets, permutation, inverse, widths, width, activation)
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
    r = routes(gates, offsets, permutation, inverse, widths, width, activation)
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
    r = routes(empty(tokens, k, kind=torch.float32), *tables, widths, f, "swiglu")
    for height in (16, 64, 128):  # no launch of a plan among those of the examples
        slots = pairs // height + touched
        r.plans[height] = empty(1 + 3 * slots, kind=torch.int32), slots
    x, y, apart = empty(tokens, d), empty(tokens, d), empty(pairs, d)
    gate_up, down = empty(experts, 2 * f, d), empty(experts, d, f)
    h, hidden = empty(pairs, 2 * f), empty(pairs, f)
    split, deep = h.view(pairs, 2, f), gate_up.view(experts, 2, f, d)
    product = 2 * pairs * d * f
    matrix = e * touched * d * f  # bytes of one of the experts' three matrices
    at_x, at_y, at_f = e * tokens * d, e * pairs * d, e * pairs * f
    bound = "matrix" if pairs > FEW * experts else "memory"
    listed = {
        "up": (lambda: _up(x, gate_up, r, True), 2, 2 * matrix + at_x + 3 * at_f, bound),
        "down": (
            lambda: _spread(hidden.unsqueeze(1), down.unsqueeze(1), r.gates, apart, True, r),
            1, matrix + at_f + at_y, bound,
        ),
        "hidden grad": (
            lambda: _hidden_grad(x, down, h, r, True, True), 1, matrix + at_x + 5 * at_f, bound,
        ),
        "grad x": (
            lambda: _spread(split, deep, None, apart, False, r), 2,
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
        "combine": (lambda: _combine(apart, y, r), 0, at_x + at_y, "memory"),
    }  # fmt: skip
    return [
        _triton.Example(
            f"moe_mlp {name}, {tokens} tokens, 128 experts of 2048 x 768, top 8{note}",
            call, products * product, moved, kind,
        )
        for name, (call, products, moved, kind) in listed.items()
        if only is None or name in only
    ]  # fmt: skip
