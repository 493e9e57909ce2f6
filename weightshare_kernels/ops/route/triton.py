"""Routing on Triton: five launches, as Triton has no barrier of the whole grid.

The choice is one kernel over blocks of tokens. The stable sort by expert is four: counts of each
block of pairs, their sums over the blocks before, offsets, and the places. Every sum whose order
varies is of integers, so repeats are bitwise equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightshare_kernels import _triton

_PAIRS = 128  # pairs of a program of the sort
_BINS = 64  # experts that a program counts or sums at once


@triton.jit
def _exponential_scores(x, SCORE: tl.constexpr):
    """Sigmoid or sqrt(softplus) of logits."""
    if SCORE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u  # log1p by Kahan's correction of what 1 + u has rounded off
    log = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.sqrt(tl.where(x > 0, x, 0.0) + log)


@triton.jit
def _best(choice, open_, at, none):
    """Largest open value of each row of [.., groups, size] and its lowest id."""
    top = tl.max(tl.max(tl.where(open_, choice, float("-inf")), 2), 1)
    here = open_ & (choice == top[:, None, None])
    return tl.min(tl.min(tl.where(here, at, none), 2), 1)


@triton.jit
def _open_groups(
    choice, valid, i, groups, topk_groups, group_top, BT: tl.constexpr, GP: tl.constexpr
):
    """Whether a token may use a group, [tokens, groups], by the sum of the group's best."""
    g = tl.arange(0, GP)[None, :]
    open_ = valid
    total = tl.zeros((BT, GP), choice.dtype)
    for _ in range(group_top):
        top = tl.max(tl.where(open_, choice, float("-inf")), 2)
        here = open_ & (choice == top[:, :, None])
        first = tl.min(tl.where(here, i, 1 << 30), 2)
        open_ = open_ & (i != first[:, :, None])
        total += top
    total = tl.where(total == total, total, float("-inf"))
    left = (total == total) & (g < groups)  # a tensor of true and of the groups that exist
    used = left & (g < 0)
    for _ in range(topk_groups):
        top = tl.max(tl.where(left, total, float("-inf")), 1)
        here = left & (total == top[:, None])
        first = tl.min(tl.where(here, g, GP), 1)[:, None]
        left = left & (g != first)
        used = used | (g == first)
    return used


@triton.jit(do_not_specialize=["rows"])
def _route_kernel(
    scores,  # [rows, experts]
    bias,  # [experts] | None
    padding,  # [rows] uint8 | None
    ids, gates,  # [rows, k]
    rows, experts, k, groups, size, topk_groups, group_top,
    scale: tl.constexpr, NORMALIZE: tl.constexpr, SCORE: tl.constexpr, LIMITED: tl.constexpr,
    BT: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Experts and gates of a block of tokens; experts lie as [groups, size]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t_ok = t < rows
    t64 = t.to(tl.int64)
    g = tl.arange(0, GP)[None, :, None]
    i = tl.arange(0, SP)[None, None, :]
    e = g * size + i
    inside = (g < groups) & (i < size)
    valid = inside & (t >= 0)[:, None, None]
    row = tl.minimum(t64, rows - 1)  # behind the last, that one again: no arithmetic on nothing
    at = scores + row[:, None, None] * experts + e
    x = tl.load(at, mask=valid, other=float("-inf")).to(SUM)
    if SCORE == "softmax":
        top = tl.max(tl.max(x, 2), 1)
        s = tl.exp(x - top[:, None, None])
        s = s / tl.sum(tl.sum(s, 2), 1)[:, None, None]
    else:
        s = _exponential_scores(x, SCORE)
    choice = s
    if bias is not None:
        choice = s + tl.load(bias + e, mask=inside, other=0.0).to(SUM)
    choice = tl.where(choice == choice, choice, float("-inf"))
    left = valid
    if LIMITED:
        used = _open_groups(choice, valid, i, groups, topk_groups, group_top, BT, GP)
        left = left & used[:, :, None]
    cols = tl.arange(0, KP)[None, :]
    chosen = tl.zeros((BT, KP), tl.int32)
    kept = tl.zeros((BT, KP), SUM)
    for j in range(k):
        best = _best(choice, left, e, 1 << 30)
        here = e == best[:, None, None]
        left = left & (here == 0)
        value = tl.sum(tl.sum(tl.where(here & inside, s, 0.0), 2), 1)
        chosen = tl.where(cols == j, best[:, None], chosen)
        kept = tl.where(cols == j, value[:, None], kept)
    if NORMALIZE:
        kept = kept / (tl.sum(kept, 1) + 1e-20)[:, None]
    kept = kept * scale
    if padding is not None:
        padded = (tl.load(padding + t, mask=t_ok, other=0) != 0)[:, None]
        chosen = tl.where(padded, cols, chosen)
        kept = tl.where(padded, 0.0, kept)
    to = t64[:, None] * k + cols
    ok = t_ok[:, None] & (cols < k)
    tl.store(ids + to, chosen.to(tl.int64), mask=ok)
    tl.store(gates + to, kept, mask=ok)


@triton.jit
def _bins_of(ids, padding, p, pairs, k, experts):
    """Bin of each pair: its expert, ``experts`` for padding and ids of none, -1 beyond the end."""
    id_ = tl.load(ids + p, mask=p < pairs, other=0)
    bin_ = tl.where((id_ >= 0) & (id_ < experts), id_, experts).to(tl.int32)
    if padding is not None:
        padded = tl.load(padding + p // k, mask=p < pairs, other=0) != 0
        bin_ = tl.where(padded, experts, bin_)
    return tl.where(p < pairs, bin_, -1)


@triton.jit(do_not_specialize=["pairs"])
def _route_count_kernel(
    ids, padding, counts, pairs, k, experts, BP: tl.constexpr, BE: tl.constexpr
):
    """counts[program, e] = pairs of the program's block in bin e."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    bin_ = _bins_of(ids, padding, p, pairs, k, experts)
    to = counts + tl.program_id(0).to(tl.int64) * (experts + 1)
    for start in range(0, experts + 1, BE):
        e = start + tl.arange(0, BE)
        number = tl.sum((bin_[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(to + e, number, mask=e <= experts)


@triton.jit(do_not_specialize=["blocks"])
def _route_before_kernel(counts, totals, blocks, experts, BB: tl.constexpr, BE: tl.constexpr):
    """In place, the sum of each bin over the blocks before; and over all of them."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    ok = e <= experts
    before = tl.zeros((BE,), tl.int64)
    for start in range(0, blocks, BB):
        b = start + tl.arange(0, BB)
        at = counts + b.to(tl.int64)[:, None] * (experts + 1) + e[None, :]
        here = (b < blocks)[:, None] & ok[None, :]
        number = tl.load(at, mask=here, other=0)
        tl.store(at, (before[None, :] + tl.cumsum(number, 0) - number).to(tl.int32), mask=here)
        before += tl.sum(number, 0)
    tl.store(totals + e, before, mask=ok)


@triton.jit
def _route_offsets_kernel(totals, counts, offsets, experts, BE: tl.constexpr):
    """Counts, and their exclusive prefix sum."""
    carry = tl.zeros((1,), tl.int64)
    for start in range(0, experts + 1, BE):
        e = start + tl.arange(0, BE)
        number = tl.load(totals + e, mask=e <= experts, other=0)
        tl.store(counts + e, number, mask=e < experts)
        tl.store(offsets + e, carry + tl.cumsum(number, 0) - number, mask=e <= experts)
        carry += tl.sum(number, 0)


@triton.jit(do_not_specialize=["pairs"])
def _route_place_kernel(
    ids, padding, before, offsets, permutation, inverse, pairs, k, experts, BP: tl.constexpr
):
    """Place of each pair: its bin's offset, the blocks before, the block's own before it."""
    n = tl.arange(0, BP)
    p = tl.program_id(0).to(tl.int64) * BP + n
    ok = p < pairs
    bin_ = _bins_of(ids, padding, p, pairs, k, experts)
    earlier = (bin_[:, None] == bin_[None, :]) & (n[:, None] > n[None, :])
    rank = tl.sum(earlier.to(tl.int32), 1)
    row = before + tl.program_id(0).to(tl.int64) * (experts + 1)
    place = tl.load(offsets + bin_, mask=ok, other=0) + tl.load(row + bin_, mask=ok, other=0)
    place += rank
    tl.store(permutation + place, p, mask=ok)
    tl.store(inverse + p, place, mask=ok)


@triton.jit(do_not_specialize=["rows"])
def _route_grad_kernel(
    grad,  # [rows, k], of the gates
    scores, to,  # [rows, experts]
    ids,  # [rows, k]
    padding,  # [rows] uint8 | None
    rows, experts, k, scale: tl.constexpr, NORMALIZE: tl.constexpr, SCORE: tl.constexpr,
    BT: tl.constexpr, EP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """With s the chosen scores and t their sum: d s_j = (d_j - sum_i d_i s_i / t) / t."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t_ok = t < rows
    t64 = t.to(tl.int64)
    real = t_ok
    if padding is not None:
        real = real & (tl.load(padding + t, mask=t_ok, other=1) == 0)
    e = tl.arange(0, EP)[None, :]
    at = t64[:, None] * experts + e
    ok = t_ok[:, None] & (e < experts)
    out = tl.zeros((BT, EP), SUM)
    top = tl.zeros((BT,), SUM)
    norm = top + 1.0
    if SCORE == "softmax":
        row = tl.load(scores + at, mask=ok & real[:, None], other=float("-inf")).to(SUM)
        top = tl.where(real, tl.max(row, 1), 0.0)
        out = tl.exp(row - top[:, None])
        norm = tl.where(real, tl.sum(out, 1), 1.0)
        out = out / norm[:, None]
    total = tl.zeros((BT,), SUM)
    along = tl.zeros((BT,), SUM)
    for j in range(k):
        s, _, d, _ = _chosen(grad, scores, ids, t64, j, k, experts, real, top, norm, SCORE, SUM)
        total += s
        along += d * scale * s
    divisor = tl.zeros((BT,), SUM) + 1.0
    mean = tl.zeros((BT,), SUM)
    if NORMALIZE:
        divisor = total + 1e-20
        mean = along / divisor
    product = (along - mean * total) / divisor  # of d s with s, which a softmax subtracts
    if SCORE == "softmax":
        out = out * -product[:, None]
    for j in range(k):
        s, x, d, id_ = _chosen(grad, scores, ids, t64, j, k, experts, real, top, norm, SCORE, SUM)
        d = (d * scale - mean) / divisor
        if SCORE == "softmax":
            value = s * (d - product)
        elif SCORE == "sigmoid":
            value = d * s * (1.0 - s)
        else:  # where sqrt(softplus) vanishes, so does its slope
            safe = tl.where(s > 0, s, 1.0)
            value = d * tl.where(s > 0, (1.0 / (1.0 + tl.exp(-x))) / (2.0 * safe), s)
        out = tl.where(e == id_[:, None], value[:, None], out)
    out = tl.where(real[:, None], out, 0.0)
    tl.store(to + at, out.to(to.dtype.element_ty), mask=ok)


@triton.jit
def _chosen(
    grad, scores, ids, t, j, k, experts, real, top, norm, SCORE: tl.constexpr, SUM: tl.constexpr
):
    """Score, logit, gate gradient and id of each token's j-th expert; zeros for padding."""
    id_ = tl.load(ids + t * k + j, mask=real, other=0)
    ok = real & (id_ >= 0) & (id_ < experts)
    d = tl.load(grad + t * k + j, mask=real, other=0.0).to(SUM)
    x = tl.load(scores + t * experts + id_, mask=ok, other=0.0).to(SUM)
    s = tl.exp(x - top) / norm if SCORE == "softmax" else _exponential_scores(x, SCORE)
    return s, x, d, id_


def forward(
    scores: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    k: int,
    score_fn: str,
    groups: int,
    topk_groups: int,
    group_top: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Experts and gates ``[T, k]``, counts, offsets, permutation and its inverse."""
    rows, experts = scores.shape
    scores, padding = scores.contiguous(), _flags(padding)
    ids = scores.new_empty((rows, k), dtype=torch.int64)
    gates = scores.new_empty((rows, k), dtype=_triton.sum_dtype(scores))
    limited = topk_groups < groups
    if not limited:
        groups, topk_groups, group_top = 1, 1, 1
    size = experts // groups
    padded_groups, padded_size = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    tile = _tile(padded_groups * padded_size)
    _triton.launch(
        _route_kernel,
        (triton.cdiv(rows, tile.m),),
        (scores, None if bias is None else bias.contiguous(), padding, ids, gates,
         rows, experts, k, groups, size, topk_groups, group_top,
         float(scale), normalize, score_fn, limited, tile.m, padded_groups, padded_size,
         triton.next_power_of_2(k), _triton.triton_dtype(gates.dtype)),
        tile,
    )  # fmt: skip
    return ids, gates, *_sort(ids, padding, experts)


def tables(
    experts: Tensor, padding: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts ``[E]``, offsets ``[E + 1]``, permutation and its inverse ``[T * k]``."""
    return _sort(experts.contiguous(), _flags(padding), num_experts)


def backward(
    grad: Tensor,
    scores: Tensor,
    experts: Tensor,
    padding: Tensor | None,
    score_fn: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Gradient of the logits ``[T, E]``."""
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    width = triton.next_power_of_2(scores.shape[1])
    tile = _tile(width)
    _triton.launch(
        _route_grad_kernel,
        (triton.cdiv(scores.shape[0], tile.m),),
        (grad.contiguous(), scores, out, experts.contiguous(), _flags(padding), *scores.shape,
         experts.shape[1], float(scale), normalize, score_fn, tile.m, width,
         _triton.triton_dtype(_triton.sum_dtype(scores))),
        tile,
    )  # fmt: skip
    return out


def _flags(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else padding.contiguous().view(torch.uint8)


def _sort(ids: Tensor, padding: Tensor | None, experts: int) -> tuple[Tensor, ...]:
    """The tables of contiguous ids ``[T, k]``."""
    pairs, k = ids.numel(), ids.shape[1]
    counts, offsets = ids.new_empty(experts), ids.new_empty(experts + 1)
    permutation, inverse = ids.new_empty(pairs), ids.new_empty(pairs)
    blocks = triton.cdiv(pairs, _PAIRS)
    before = ids.new_empty((blocks, experts + 1), dtype=torch.int32)
    totals = torch.empty_like(offsets)
    tile = _triton.Tile(_PAIRS, _BINS, 1, warps=4, stages=1)
    given = (ids, padding)
    _triton.launch(
        _route_count_kernel, (blocks,), (*given, before, pairs, k, experts, _PAIRS, _BINS), tile
    )
    _triton.launch(
        _route_before_kernel,
        (triton.cdiv(experts + 1, _BINS),),
        (before, totals, blocks, experts, 16, _BINS),
        tile,
    )
    _triton.launch(_route_offsets_kernel, (1,), (totals, counts, offsets, experts, 1024), tile)
    _triton.launch(
        _route_place_kernel,
        (blocks,),
        (*given, before, offsets, permutation, inverse, pairs, k, experts, _PAIRS),
        _triton.Tile(_PAIRS, _PAIRS, 1, warps=8, stages=1),
    )
    return counts, offsets, permutation, inverse


def _tile(width: int) -> _triton.Tile:
    """Tokens of a program: 2048 elements, or one token of more; a warp per 512 elements."""
    if _triton.interpreted():
        return _triton.Tile(32, width, 1)
    rows = min(max(2048 // width, 1), 16)
    return _triton.Tile(rows, width, 1, warps=min(max(rows * width // 512, 1), 8), stages=1)


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: 4096 tokens to 8 of 256 experts, plain and as DeepSeek-V3 groups."""
    rows, experts, k = 4096, 256, 8
    scores = torch.empty(rows, experts, dtype=dtype, device="meta")
    bias = torch.empty(experts, device="meta")
    gates = torch.empty(rows, k, device="meta")
    ids = torch.empty(rows, k, dtype=torch.int64, device="meta")
    size, small = scores.numel() * dtype.itemsize, rows * k * (4 + 3 * 8)
    count = 4 * scores.numel()

    def call(groups: int, topk_groups: int):
        options = (k, "sigmoid", groups, topk_groups, 2, True, 2.5)
        return lambda: forward(scores, bias, None, *options)

    def grad():
        return backward(gates, scores, ids, None, "softmax", True, 1.0)

    name = "route {}, 4096 tokens, 8 of 256 experts"
    return [
        _triton.Example(name.format("forward"), call(1, 1), count, size + small, "memory"),
        _triton.Example(name.format("grouped"), call(8, 4), count, size + small, "memory"),
        _triton.Example(name.format("backward"), grad, count, 2 * size + small, "memory"),
    ]
