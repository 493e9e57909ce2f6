"""The kernel of a pool's gradient: products summed over rows, added where their shards lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from weightshare_kernels._products import _INTERPRETED
from weightshare_kernels.ops.moe_mlp.triton_rows import _rounded
from weightshare_kernels.ops.shard_lora.triton_products import _bound, _factor, _row_at

_repeated: dict[tuple, tuple[StorageWeakRef, bool]] = {}


def repeats(index: Tensor, count: int) -> bool:
    """Tell whether a table names a shard ``0..count - 1`` more than once, over all adapters.

    Looked up once per table, which waits for the GPU, and kept as long as its memory and version;
    looking for repeats in the kernel instead costs a tile the whole table: 9 ms for 32 adapters
    of rank 64. True where it cannot be known: in a CUDA graph's capture, and in inference mode,
    whose tensors have no version.
    """
    if index.is_meta:
        return False
    if index.is_inference():
        return True
    storage = index.untyped_storage()
    place = index.storage_offset(), index.shape, index.stride(), index._version
    key = (storage._cdata, *place, count)
    hit = _repeated.get(key)
    if hit is not None and not hit[0].expired():
        return hit[1]
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    names = index[(index >= 0) & (index < count)]
    found = names.unique().numel() < names.numel()
    for old in [k for k, (owner, _) in tuple(_repeated.items()) if owner.expired()]:
        _repeated.pop(old, None)
    _repeated[key] = StorageWeakRef(storage), found
    return found


@triton.jit
def _rows_of(offsets, adapter, n):
    """First position of an adapter's rows, and the one after the last."""
    if offsets is None:
        return 0, n
    else:
        start = _bound(offsets, adapter, True, n)
        return start, tl.maximum(_bound(offsets, adapter + 1, True, n), start)


@triton.jit
def _vector(
    left, right, place, stop, permutation, n, l_m, r_m, cols, c_ok, r_n,
    BK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``sum over rows of left[row] right[row, cols]``."""
    acc = tl.zeros(cols.shape, SUM)
    for start in range(place, stop, BK):
        at = start + tl.arange(0, BK)
        row = _row_at(at, at < stop, permutation, n)
        a = tl.load(left + row * l_m, mask=at < stop, other=0.0).to(SUM)
        edge = right + row[:, None] * r_m + cols.to(tl.int64)[None, :] * r_n
        b = tl.load(edge, mask=(at < stop)[:, None] & c_ok[None, :], other=0.0).to(SUM)
        acc += tl.sum(a[:, None] * b, 0)
    return acc


@triton.jit
def _with_repeats(
    acc, name, here, inside, left, right, index, offsets, permutation, scales, scale,
    n, adapters, rank, length, width, l_m, l_k, r_m, r_n, stride, inner, c_ok,
    BK: tl.constexpr, BS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Sums of shards named more than once: the first place of a name has them all, in order.

    Tables of one matrix rarely repeat a name, so what is found is added one by one. Returns acc
    and whether each row is the first of its name.
    """
    mine = inside
    for begin in range(0, adapters * rank * length, BS):
        s = begin + tl.arange(0, BS)
        ok = s < adapters * rank * length
        at = (s // (rank * length)).to(tl.int64) * stride + s % (rank * length)
        other = tl.load(index + at, mask=ok, other=-1)
        same = inside[:, None] & (name[:, None] == other[None, :])
        earlier = tl.max((same & (s[None, :] < here[:, None])).to(tl.int32), 1)
        mine = mine & (earlier == 0)
        later = same & mine[:, None] & (s[None, :] > here[:, None])
        if tl.max(tl.max(later.to(tl.int32), 1), 0) > 0:
            for i in range(begin, tl.minimum(begin + BS, adapters * rank * length)):
                hit = tl.max((later & (s == i)[None, :]).to(tl.int32), 1) > 0
                if tl.max(hit.to(tl.int32), 0) > 0:
                    adapter = i // (rank * length)
                    within = i - adapter * (rank * length)
                    k, shard = within // length, within % length
                    start, stop = _rows_of(offsets, adapter, n)
                    cols = shard * width + inner
                    more = _vector(
                        left + k.to(tl.int64) * l_k, right, start, stop, permutation, n,
                        l_m, r_m, cols, c_ok, r_n, BK, SUM,
                    )  # fmt: skip
                    more *= _factor(scales, adapter, scale, SUM)
                    acc += tl.where(hit[:, None], more[None, :], 0.0)
    return acc, mine


@triton.jit(do_not_specialize=["n", "adapters"])
def _outer_kernel(
    left, right,  # [n, rank], [n, length * width]
    buffer,  # [count, width]
    parts,  # [SPLIT, adapters, rank, length * width] | None
    index,  # int32 [adapters, rank, length]
    offsets, permutation, scales, n, adapters,
    rank, length, width, count, l_m, l_k, r_m, r_n, b_p, b_c, stride,
    scale: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
    REPEATS: tl.constexpr,  # whether a shard may be named twice
    WHERE: tl.constexpr,  # "through": from rows to shards; "to", "from" the parts
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``shards (+)= factor * left^T right`` of every adapter; a tile lies within one shard."""
    tiles_n = (width + BN - 1) // BN
    tile = tl.program_id(0)
    block = tile % tiles_n
    shard = tile // tiles_n % length
    tiles_m = (rank + BM - 1) // BM
    above = tile // (tiles_n * length)
    adapter = above // tiles_m
    k = above % tiles_m * BM + tl.arange(0, BM)
    inner = block * BN + tl.arange(0, BN)
    k_ok, c_ok = k < rank, inner < width
    cols = shard * width + inner
    acc = tl.zeros((BM, BN), SUM)
    line = tl.cast(adapter, tl.int64) * rank + k
    spot = line[:, None] * (length * width) + cols[None, :]
    if WHERE == "from":
        for split in tl.static_range(SPLIT):
            at = parts + tl.cast(split, tl.int64) * adapters * rank * length * width + spot
            acc += tl.load(at, mask=k_ok[:, None] & c_ok[None, :], other=0.0)
    else:
        start, stop = _rows_of(offsets, adapter, n)
        share = ((stop - start + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
        start += tl.program_id(1) * share
        l_edge, r_edge = left + k.to(tl.int64) * l_k, right + cols.to(tl.int64) * r_n
        last = tl.minimum(start + share, stop)
        for place in range(start, last, BK):
            at = place + tl.arange(0, BK)
            ok = at < last
            row = _row_at(at, ok, permutation, n)[:, None]
            a = tl.load(l_edge[None, :] + row * l_m, mask=ok[:, None] & k_ok[None, :], other=0.0)
            b = tl.load(r_edge[None, :] + row * r_m, mask=ok[:, None] & c_ok[None, :], other=0.0)
            a = _rounded(a, b.dtype)
            if _INTERPRETED:
                a, b = a.to(SUM), b.to(SUM)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION, out_dtype=SUM)
    if WHERE == "to":
        to = parts + tl.cast(tl.program_id(1), tl.int64) * adapters * rank * length * width + spot
        tl.store(to, acc, mask=k_ok[:, None] & c_ok[None, :])
    else:
        acc *= _factor(scales, adapter, scale, SUM)
        entry = k * length + shard
        name = tl.load(index + tl.cast(adapter, tl.int64) * stride + entry, mask=k_ok, other=-1)
        inside = (name >= 0) & (name < count)
        mine = inside
        if REPEATS:
            acc, mine = _with_repeats(
                acc, name, adapter * rank * length + entry, inside, left, right, index, offsets,
                permutation, scales, scale, n, adapters, rank, length, width, l_m, l_k, r_m, r_n,
                stride, inner, c_ok, BK, BS, SUM,
            )  # fmt: skip
        to = buffer + name.to(tl.int64)[:, None] * b_p + inner[None, :] * b_c
        mask = mine[:, None] & c_ok[None, :]
        if ADD:
            acc += tl.load(to, mask=mask, other=0.0).to(SUM)
        tl.store(to, _rounded(acc, buffer.dtype.element_ty), mask=mask)
