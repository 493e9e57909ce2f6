"""Expert mixture on Triton: experts are scaled and summed where they are read.

For few rows inside the product: a step of the sum over k loads the tile of every expert, scales it
by its rows' coefficients, adds, and multiplies once, so that M experts cost M reads and one
product. More rows would mix every tile again for each tile of rows (512 rows of 768 -> 3072 took an
H100 37 us), so there one pass makes the mixed weight, for the call, and the GPU's own library
multiplies (5 us and 6). The gradient is the other way round: one product per tile, from which every
expert's gradient and its share of d mix are written.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightshare_kernels import _products, _triton
from weightshare_kernels._products import _INTERPRETED, _through, _tile_of


@triton.jit
def _mixed_tile(
    edge, mix, ok, across, n_ok, mix_m, w_m,
    COUNT: tl.constexpr, ROWS_ARE_K: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``sum over experts of mix * tile``; ``across`` are the elements of mix along its rows."""
    acc = tl.zeros(edge.shape, SUM)
    for m in tl.static_range(COUNT):
        tile = tl.load(edge + tl.cast(m, tl.int64) * w_m, mask=ok, other=0.0).to(SUM)
        factor = tl.load(mix + m * mix_m + across, mask=n_ok, other=0.0)
        acc += tile * (factor[:, None] if ROWS_ARE_K else factor[None, :])
    return acc


@triton.jit(do_not_specialize=["m"])
def _mixture_product_kernel(
    a,  # [m, k]
    w,  # experts as [COUNT, k, n] after tables
    mix,  # [COUNT, rows of the weight], contiguous: rows are k or n
    c,  # [m, n], or [split, m, n] partial sums
    bias,  # [n] | None
    k_table, n_table,  # int64 | None
    m, n, k, k_size, n_size,  # sizes of the product, and of w before tables
    a_m, a_k, w_m, w_k, w_n, mix_m,  # strides
    COUNT: tl.constexpr, ROWS_ARE_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``c = a (sum over experts of mix * w) (+ bias)``."""
    rows, cols = _tile_of(m, n, BM, BN, GROUP)
    m_ok, n_ok = rows < m, cols < n
    at, n_in = _through(cols, n_ok, n_table, n_size)
    a_edge = a + rows.to(tl.int64) * a_m
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(k, BK), SPLIT) * BK
    last = tl.minimum(split * share + share, k)
    acc = tl.zeros((BM, BN), SUM)
    for first in range(split * share, last, BK):
        j = first + tl.arange(0, BK)
        k_ok = j < last
        a_tile = tl.load(
            a_edge[:, None] + j.to(tl.int64)[None, :] * a_k,
            mask=m_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        kb, kb_ok = _through(j, k_ok, k_table, k_size)
        edge = w + kb[:, None] * w_k + at[None, :] * w_n
        ok = kb_ok[:, None] & n_in[None, :]
        if ROWS_ARE_K:
            b_tile = _mixed_tile(edge, mix, ok, j, k_ok, mix_m, w_m, COUNT, True, SUM)
        else:
            b_tile = _mixed_tile(edge, mix, ok, cols, n_ok, mix_m, w_m, COUNT, False, SUM)
        if _INTERPRETED:
            a_tile = a_tile.to(SUM)
        else:
            b_tile = b_tile.to(w.dtype.element_ty)  # what the tensor core multiplies
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=SUM)
    if bias is not None:
        acc += tl.load(bias + cols, mask=n_ok, other=0.0).to(SUM)[None, :]
    line = split.to(tl.int64) * m + rows
    tl.store(
        c + line[:, None] * n + cols[None, :],
        acc.to(c.dtype.element_ty),
        mask=m_ok[:, None] & n_ok[None, :],
    )


@triton.jit(do_not_specialize=["k"])
def _mixture_outer_kernel(
    g, x, target,  # [k, m], [k, n], [COUNT, m, n] after tables
    w, mix,  # [COUNT, m, n] after tables, [COUNT, m] contiguous
    sums,  # [tiles of n, COUNT, m]
    rows, cols,  # int64 | None: where in w and target
    m, n, k, m_size, n_size,
    g_k, g_m, x_k, x_n, t_e, t_m, t_n, w_e, w_m, w_n,  # strides
    COUNT: tl.constexpr, ACCUMULATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``target[e] (+)= mix[e] * g^T x`` and ``sums[e] = rows' sums of w[e] * g^T x``."""
    i, j = _tile_of(m, n, BM, BN, GROUP)
    m_ok, n_ok = i < m, j < n
    acc = tl.zeros((BM, BN), SUM)
    acc = _products._long_dot(
        acc, g + i.to(tl.int64) * g_m, x + j.to(tl.int64) * x_n, m_ok, n_ok, 0, k, g_k, x_k,
        BK, PRECISION,
    )  # fmt: skip
    at_i, i_in = _through(i, m_ok, rows, m_size)
    at_j, j_in = _through(j, n_ok, cols, n_size)
    ok = i_in[:, None] & j_in[None, :]
    weight = w + at_i[:, None] * w_m + at_j[None, :] * w_n
    where = target + at_i[:, None] * t_m + at_j[None, :] * t_n
    strip = tl.min(j, 0) // BN
    for e in range(COUNT):
        part = tl.load(weight + tl.cast(e, tl.int64) * w_e, mask=ok, other=0.0).to(SUM)
        here = sums + (strip.to(tl.int64) * COUNT + e) * m
        tl.store(here + i, tl.sum(acc * part, 1), mask=m_ok)
        value = acc * tl.load(mix + e * m + i, mask=m_ok, other=0.0)[:, None]
        to = where + tl.cast(e, tl.int64) * t_e
        if ACCUMULATE:
            value += tl.load(to, mask=ok, other=0.0).to(SUM)
        tl.store(to, value.to(target.dtype.element_ty), mask=ok)


@triton.jit
def _mix_kernel(
    w,  # experts as [COUNT, m, n] after tables
    mix,  # [COUNT, m], contiguous
    out,  # [m, n]
    rows, cols,  # int64 | None
    m, n, m_size, n_size,
    w_e, w_m, w_n, mix_m,  # strides
    COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """``out = sum over experts of mix * w``."""
    i, j = _tile_of(m, n, BM, BN, 1)
    m_ok, n_ok = i < m, j < n
    at_i, i_in = _through(i, m_ok, rows, m_size)
    at_j, j_in = _through(j, n_ok, cols, n_size)
    edge = w + at_i[:, None] * w_m + at_j[None, :] * w_n
    ok = i_in[:, None] & j_in[None, :]
    acc = _mixed_tile(edge, mix, ok, i, m_ok, mix_m, w_e, COUNT, True, SUM)
    to = out + i.to(tl.int64)[:, None] * n + j[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


def _mixed(experts: Tensor, mix: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """The mixed weight of a slice, ``[out, in]``."""
    m = mix.shape[1]
    n = experts.shape[2] if cols is None else cols.shape[0]
    out = experts.new_empty(m, n)
    tile = _triton.Tile(8, 256, 1, stages=1)
    _triton.launch(
        _mix_kernel,
        (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),),
        (experts, mix, out, rows, cols, m, n, *experts.shape[1:], *experts.stride(), mix.shape[1],
         mix.shape[0], tile.m, tile.n, _triton.triton_dtype(_triton.sum_dtype(experts))),
        tile,
    )  # fmt: skip
    return out


def _few(x: Tensor) -> bool:
    return x.numel() <= _products.FEW_ROWS * x.shape[-1]


def _product(
    a: Tensor,
    w: Tensor,  # [M, k, n] after tables
    mix: Tensor,
    bias: Tensor | None,
    k_table: Tensor | None,
    n_table: Tensor | None,
    rows_are_k: bool,
) -> Tensor:
    """``a [..., k] (mixed w) [k, n] (+ bias [n])``, any strides."""
    lead = a.shape[:-1]
    a = _products.matrix(a)
    m, k = a.shape
    n = w.shape[2] if n_table is None else n_table.shape[0]
    c = a.new_empty(m, n)
    if not c.numel():
        return c.view(*lead, n)
    tile = _tile(m, n, k, a, mix.shape[0], k_table is not None)
    sums, split = _triton.sum_dtype(a), tile.split
    out, inner = (c, bias) if split == 1 else (a.new_empty(split, m, n, dtype=sums), None)
    _triton.launch(
        _mixture_product_kernel,
        (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), split),
        (a, w, mix, out, inner, k_table, n_table, m, n, k, *w.shape[1:], *a.stride(), *w.stride(),
         mix.shape[1], mix.shape[0], rows_are_k, tile.m, tile.n, tile.k, split, tile.group,
         _triton.precision(a), _triton.triton_dtype(sums)),
        tile,
    )  # fmt: skip
    if split > 1:
        _products.add_parts(out, bias, c)
    return c.view(*lead, n)


def _tile(m: int, n: int, k: int, like: Tensor, count: int, gathered: bool) -> _triton.Tile:
    """The product's tile, with less in flight where the experts need the room.

    Every step in flight holds a tile of each expert in shared memory; 96 KiB fit all targets, and
    the larger ones twice.
    """
    size = like.element_size()
    tile = _products.product_tile(m, n, k, like, gathered)
    while (tile.stages - 1) * tile.k * (tile.m + count * tile.n) * size > 96 * 1024:
        if tile.k * size > 64:
            tile = replace(tile, k=tile.k // 2)
        else:  # at the last through registers, without buffers
            tile = replace(tile, stages=tile.stages - 1)
    return tile


def forward(
    x: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    mix: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
) -> Tensor:
    """``y = x W^T + bias``; x ``[..., in]``, mix ``[M, out]``, bias ``[out]`` -> ``[..., out]``."""
    if not _few(x):
        return torch.nn.functional.linear(x, _mixed(experts, mix, rows, cols), bias)
    bias = None if bias is None else bias.contiguous()
    return _product(x, experts.transpose(1, 2), mix, bias, cols, rows, False)


def grad_x(
    grad: Tensor, experts: Tensor, mix: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """``dx = dy W``; grad ``[..., out]`` -> ``[..., in]``."""
    if not _few(grad):
        return grad @ _mixed(experts, mix, rows, cols)
    return _product(grad, experts, mix, None, rows, cols, True)


def grad_weight_(
    target: Tensor,
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mix: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """``target[:, rows][:, :, cols] (+)= mix^m (dy^T x)``, in place; returns ``d mix``."""
    grad, x = _products.matrix(grad), _products.matrix(x)
    m, n, k = grad.shape[1], x.shape[1], grad.shape[0]
    tile = _products.outer_tile(m, n, grad, True)
    strips = triton.cdiv(n, tile.n)
    sums = mix.new_empty(strips, *mix.shape)
    _triton.launch(
        _mixture_outer_kernel,
        (triton.cdiv(m, tile.m) * strips,),
        (grad, x, target, experts, mix, sums, rows, cols, m, n, k, *target.shape[1:],
         *grad.stride(), *x.stride(), *target.stride(), *experts.stride(), mix.shape[0],
         accumulate, tile.m, tile.n, tile.k, tile.group, _triton.precision(grad),
         _triton.triton_dtype(_triton.sum_dtype(grad))),
        tile,
    )  # fmt: skip
    return sums.sum(0)


def examples(dtype: torch.dtype) -> list[_triton.Example]:
    """Launches of real size: 2 experts of BERT, 6 of a translator; 512 and 8 tokens."""
    e, found = dtype.itemsize, []

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    for tokens, count, width in ((512, 2, 768), (4096, 2, 768), (8, 2, 768), (512, 6, 640)):
        height = 3072
        experts, mix = empty(count, height, width), empty(count, height, kind=torch.float32)
        x, g = empty(tokens, width), empty(tokens, height)
        product = 2 * tokens * height * width
        moved = e * (count * height * width + tokens * (height + width))
        few = tokens <= _products.FEW_ROWS
        for name, call in {
            "forward": lambda x=x, w=experts, f=mix: forward(x, w, None, f, None, None),
            "grad_x": lambda g=g, w=experts, f=mix: grad_x(g, w, f, None, None),
            "grad_weight": lambda g=g, x=x, w=experts, f=mix: grad_weight_(
                w, g, x, w, f, None, None, True
            ),
        }.items():
            flops, bound, size = product, "memory" if few else "matrix", moved
            if name == "grad_weight":
                size += 2 * e * count * height * width
            elif not few:  # what is left to the library is not of this launch
                flops, bound, size = (
                    2 * count * height * width, "memory", e * (count + 1) * height * width
                )  # fmt: skip
            label = f"expert_mixture_linear {name}, {tokens} tokens, {count} x {width} -> {height}"
            found.append(_triton.Example(label, call, flops, size, bound))
    return found
