"""Multi-head attention whose width and number of heads are sizes of a search space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.nn.elastic import Axis, total, widen
from weightshare.nn.linear import Linear
from weightshare.sizes import Blocks, Dim, Interleaved, Joint, Product, Size, Value, dims_of, points

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class QKV(Linear):
    """Fused projection to queries, keys and values, each cut to its active heads.

    The output is ``[q; k; v]`` of the active heads, however the rows lie. Parameters and state
    dict are those of ``nn.Linear(embed, (heads + 2 * kv_heads) * head_dim)``.

    Args:
        in_features: size of the input, a size or an int.
        heads: number of query heads, likewise.
        head_dim: features per head.
        kv_heads: number of key and value heads, each of which serves ``heads / kv_heads`` query
            heads (grouped queries; 1 is multi-query); None: one for each query head.
        bias: whether to add a learned bias.
        layout: ``"blocks"``: rows of q, then k, then v, each cut to its first heads (where groups
            get smaller, q to the first heads of each group). ``"interleaved"``: row ``3 j + i`` is
            feature j of block i, and the bias is one plain prefix in the order of the outputs;
            AutoFormer's checkpoints are so.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        Input ``[..., in]``, output ``[..., (heads + 2 * kv_heads) * head_dim]``: the active sizes,
        the whole ones when mixed, where each block is padded by itself.

    Raises:
        ValueError: heads do not divide into groups, or the layout does not fit.

    Source: head-wise slicing as AutoFormer (Chen et al., 2021); grouped queries (Ainslie et al.,
    2023).
    """

    def __init__(
        self,
        in_features: Axis,
        heads: Axis,
        head_dim: int,
        kv_heads: Axis | None = None,
        bias: bool = True,
        layout: str = "blocks",
        device=None,
        dtype=None,
    ):
        rows = _rows(heads, head_dim, kv_heads, layout)
        super().__init__(in_features, rows, bias, device, dtype)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Linear,
        in_features: Axis,
        heads: Axis,
        head_dim: int,
        kv_heads: Axis | None = None,
        layout: str = "blocks",
    ) -> QKV:
        """Make this layer out of an ``nn.Linear``, whose parameters it takes over.

        Raises:
            TypeError: it is no ``nn.Linear``.
            ValueError: it has another number of rows than the most heads make.
        """
        layer = cls(
            in_features, heads, head_dim, kv_heads, linear.bias is not None, layout,
            device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
        if layer.out_features != linear.out_features:
            raise ValueError(
                f"heads: the most of them make {layer.out_features} rows, but the layer has "
                f"{linear.out_features}"
            )
        plain = Linear.from_linear(linear, in_features, layer.rows)  # checks the rest
        layer.in_features, layer.weight, layer.bias = plain.in_features, plain.weight, plain.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[q; k; v]`` of the active heads, or of the mixture."""
        if not isinstance(self.rows, Interleaved):
            return super().forward(x)
        y = self._linear(x, None)
        if self.rows.mixed:  # rows of a mixture come as they lie
            y = y.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)
        return y if self.bias is None else y + self._interleaved_bias().to(y.dtype)

    def _interleaved_bias(self) -> Tensor:
        """The bias in the order of the outputs; a mixture pads each choice's blocks."""
        if not self._heads.mixed:
            return self.bias[: _value(self.rows)]
        sizes, alpha = self._heads.mixture()
        parts = torch.stack([self._padded_bias(rows[-1].stop) for (rows,) in sizes])
        return (alpha[:, None] * parts).sum(0)

    def _padded_bias(self, rows: int) -> Tensor:
        """A prefix of the bias, in three blocks of which each is padded to its whole size."""
        blocks = self.bias[:rows].unflatten(0, (3, -1))
        return F.pad(blocks, (0, (self.out_features - rows) // 3)).flatten()

    def export(self) -> nn.Linear:
        """Plain ``nn.Linear`` of the active part, its rows ``[q; k; v]`` in any layout."""
        linear = super().export()
        if isinstance(self.rows, Interleaved) and self.bias is not None:
            bias = self.bias.detach()[: _value(self.rows)].clone()
            linear.bias = nn.Parameter(bias, self.bias.requires_grad)
        return linear

    def _bind(self, in_features: Axis, out_features: Axis) -> None:
        super()._bind(in_features, out_features)
        self._heads = Joint(out_features)


class MultiheadAttention(nn.Module):
    """Self-attention over the active heads, or over all of them with mixed projections.

    With all sizes ints it is a plain module; :meth:`export` makes that of the active subnet.
    State dict: ``qkv`` and ``proj``, as in vision transformers; with ``fused=False`` ``q_proj``,
    ``k_proj``, ``v_proj`` and ``o_proj``, as in language models.

    Args:
        embed: size of input and output, a size or an int.
        heads: number of query heads, likewise.
        head_dim: features per head.
        kv_heads: number of key and value heads; None: one for each query head. See :class:`QKV`.
        bias: whether the projections to q, k and v add a learned bias.
        proj_bias: the same of the output's projection.
        dropout: probability that an attention weight is dropped in training.
        fused: one projection to q, k and v, or three.
        layout: of the fused projection's rows, see :class:`QKV`.
        qk_norm: makes a norm of ``head_dim`` features, one for the queries and one for the keys.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        ``[..., tokens, embed]`` in and out, the active size, the whole one when mixed.

    Raises:
        ValueError: heads do not divide into groups, or the layout does not fit.

    Example::

        space = SearchSpace(embed=[320, 384, 448], heads=[5, 6, 7])
        attention = MultiheadAttention(space["embed"], space["heads"], 64)
        space.activate(space.smallest())
        y = attention(torch.randn(8, 197, 320))
    """

    def __init__(
        self,
        embed: Axis,
        heads: Axis,
        head_dim: int,
        kv_heads: Axis | None = None,
        bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        *,
        fused: bool = True,
        layout: str = "blocks",
        qk_norm: Callable[[int], nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.embed, self.heads, self.kv_heads, self.head_dim = embed, heads, kv_heads, head_dim
        self.dropout, self.fused, self.layout = dropout, fused, layout
        self._heads = Joint(heads, heads if kv_heads is None else kv_heads)
        width = query_rows(heads, head_dim, kv_heads)
        kind = {"device": device, "dtype": dtype}
        if fused:
            self.qkv = QKV(embed, heads, head_dim, kv_heads, bias, layout, **kind)
            self.proj = Linear(width, embed, proj_bias, **kind)
        elif layout != "blocks":
            raise ValueError(f"layout: is {layout!r}, which needs fused=True")
        else:
            kv_width = width if kv_heads is None else kv_heads * head_dim
            self.q_proj = Linear(embed, width, bias, **kind)
            self.k_proj = Linear(embed, kv_width, bias, **kind)
            self.v_proj = Linear(embed, kv_width, bias, **kind)
            self.o_proj = Linear(width, embed, proj_bias, **kind)
        self.q_norm = qk_norm(head_dim) if qk_norm else None
        self.k_norm = qk_norm(head_dim) if qk_norm else None

    @classmethod
    def from_linears(
        cls,
        linears: Mapping[str, nn.Linear],
        embed: Axis,
        heads: Axis,
        head_dim: int,
        kv_heads: Axis | None = None,
        **options,
    ) -> MultiheadAttention:
        """Make an attention of existing projections, whose parameters it takes over.

        Args:
            linears: ``qkv`` and ``proj``, or ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
            embed: as in the constructor, and so are the others.
            heads: number of query heads.
            head_dim: features per head.
            kv_heads: number of key and value heads.
            options: ``dropout``, ``layout``, ``qk_norm``.

        Raises:
            ValueError: other names, or sizes that do not fit.
        """
        fused = "qkv" in linears
        layer = cls(embed, heads, head_dim, kv_heads, fused=fused, device="meta", **options)
        names = [name for name, child in layer.named_children() if isinstance(child, Linear)]
        if sorted(names) != sorted(linears):
            raise ValueError(f"linears: expected {', '.join(names)}, got {', '.join(linears)}")
        for name, linear in linears.items():
            old = getattr(layer, name)
            if isinstance(old, QKV):
                new: Linear = QKV.from_linear(
                    linear, embed, heads, head_dim, kv_heads, layer.layout
                )
            else:
                new = Linear.from_linear(linear, old.cols, old.rows)
            setattr(layer, name, new)
        return layer.train(linear.training)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend within x ``[..., tokens, embed]``.

        Args:
            x: input.
            attn_mask: as ``F.scaled_dot_product_attention`` takes it.
            is_causal: whether a token sees only those before it.
            rotary: turns ``(q, k)``, each ``[..., heads, tokens, head_dim]``, by position.
        """
        if self.fused:
            q, k, v = self._by_head(self.qkv(x)).split(self._counts(), -3)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            if self._heads.mixed:  # heads of q in all groups, of k and v perhaps in some
                k, v = (widen(t, self.k_proj.rows, self.k_proj.out_features) for t in (k, v))
            q, k, v = self._by_head(q), self._by_head(k), self._by_head(v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q, k)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask, self.dropout if self.training else 0.0, is_causal,
            enable_gqa=self.kv_heads is not None,
        )  # fmt: skip
        return (self.proj if self.fused else self.o_proj)(y.transpose(-2, -3).flatten(-2))

    def _by_head(self, y: Tensor) -> Tensor:
        """``[..., tokens, heads * head_dim]`` as ``[..., heads, tokens, head_dim]``."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def _counts(self) -> tuple[int, int, int]:
        """Heads of q, k and v; all of them while one of their numbers is mixed."""
        value = total if self._heads.mixed else _value
        heads = value(self.heads)
        kv_heads = heads if self.kv_heads is None else value(self.kv_heads)
        return heads, kv_heads, kv_heads

    def export(self) -> MultiheadAttention:
        """The active subnet as a module of its own, on ints and plain layers."""
        plain = type(self)(
            _value(self.embed), _value(self.heads), self.head_dim,
            None if self.kv_heads is None else _value(self.kv_heads),
            dropout=self.dropout, fused=self.fused, device="meta",
        )  # fmt: skip
        for name, child in self.named_children():
            new = child.export() if isinstance(child, Linear) else copy.deepcopy(child)
            setattr(plain, name, new)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        kv = "" if self.kv_heads is None else f", kv_heads={self.kv_heads}"
        return f"embed={self.embed}, heads={self.heads}, head_dim={self.head_dim}{kv}"


class _Group(Size):
    """Rows of the query heads of one key-value head: none while that head is not active."""

    def __init__(self, number: int, heads: Axis, head_dim: int, kv_heads: Axis):
        self.number, self.heads, self.head_dim, self.kv_heads = number, heads, head_dim, kv_heads
        super().__init__(axis for axis in (heads, kv_heads) if isinstance(axis, Size))

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Rows where the dims have these values."""
        kv_heads = _at(self.kv_heads, values)
        if self.number >= kv_heads:
            return 0
        return _at(self.heads, values) // kv_heads * self.head_dim


def query_rows(heads: Axis, head_dim: int, kv_heads: Axis | None = None) -> Axis:
    """Rows of the active query heads, which are the columns of the output's projection, too.

    In every subnet a query head keeps its key-value head: where groups get smaller, each is cut
    to its first heads.

    Args:
        heads: number of query heads.
        head_dim: features per head.
        kv_heads: number of key and value heads; None: one for each query head.

    Raises:
        ValueError: in some subnet the heads do not divide into groups, or a group is larger than
            in the largest subnet, so that its last heads would need another key-value head.
    """
    if kv_heads is None:
        return heads * head_dim
    groups, per_group = total(kv_heads), total(heads) // max(1, total(kv_heads))
    sizes = set()
    for point in points(dims_of(heads, kv_heads)):
        h, kv = _at(heads, point), _at(kv_heads, point)
        if kv < 1 or h % kv or h // kv > per_group:
            most = per_group * kv
            where = ", ".join(f"{dim.name}={value}" for dim, value in point.items())
            raise ValueError(
                f"heads: {h} do not fit {kv} kv_heads"
                + (f" ({where})" if where else "")
                + (f"; allowed: {list(range(kv, most + 1, kv))}, the same number of heads, at "
                   f"most {per_group}, for each" if kv > 0 else "; at least 1 is needed")
            )  # fmt: skip
        sizes.add(h // kv)
    if sizes == {per_group}:
        return heads * head_dim
    parts = [_Group(g, heads, head_dim, kv_heads) for g in range(groups)]
    return Blocks(parts, [per_group * head_dim] * groups)


def _rows(heads: Axis, head_dim: int, kv_heads: Axis | None, layout: str) -> Size:
    """Rows of the fused projection."""
    if layout == "interleaved":
        if kv_heads is not None:
            raise ValueError("layout: 'interleaved' has as many kv_heads as heads; pass None")
        return Interleaved(Product((heads, head_dim)), 3)
    if layout != "blocks":
        raise ValueError(f"layout: is {layout!r}, not 'blocks' or 'interleaved'")
    q = query_rows(heads, head_dim, kv_heads)
    parts, totals = (q.parts, q.totals) if isinstance(q, Blocks) else ((q,), (total(q),))
    kv = q if kv_heads is None else kv_heads * head_dim
    return Blocks((*parts, kv, kv), (*totals, total(kv), total(kv)))


def _at(axis: Axis, values: Mapping[Dim, Value]) -> int:
    return axis.at(values) if isinstance(axis, Size) else axis


def _value(axis: Axis) -> int:
    return axis.value if isinstance(axis, Size) else axis
