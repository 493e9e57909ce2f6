"""Embeddings whose width is a size of a search space, and output heads that share their table."""

from __future__ import annotations

from torch import Tensor, nn

from weightshare.nn.elastic import Axis, copy, narrow, take, total
from weightshare.nn.linear import Linear
from weightshare.sizes import Joint


class Embedding(nn.Embedding):
    """A lookup table of which the active columns are read, or their mixture.

    Rows are looked up first and cut then, so that neither pass makes a table-sized copy but the
    gradient itself. Constructor options, parameters and state dict are those of ``nn.Embedding``
    of the largest size.

    Args:
        num_embeddings: rows of the table.
        embed: size of a row, a size or an int.
        padding_idx: row that gets no gradient; it starts as zeros.
        options: ``scale_grad_by_freq``, ``sparse``, ``device`` and ``dtype`` of ``nn.Embedding``.

    Shape:
        Input: integers ``[...]``; output ``[..., embed]``, the active size, the whole one when
        mixed.

    Raises:
        ValueError: ``max_norm`` is given: rows of different widths have different norms.

    Source: slicing as AutoFormer (Chen et al., 2021); mixture as TangleNAS (2023).
    """

    def __init__(self, num_embeddings: int, embed: Axis, padding_idx: int | None = None, **options):
        if options.get("max_norm") is not None:
            raise ValueError("max_norm: rows that are cut have a norm for each width; pass None")
        super().__init__(num_embeddings, total(embed), padding_idx, **options)
        self._bind(embed)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, embed: Axis) -> Embedding:
        """Make this module out of an ``nn.Embedding``, whose table it takes over.

        Args:
            embedding: module to replace.
            embed: size of a row; at most what it has.

        Raises:
            TypeError: it is no ``nn.Embedding``.
            ValueError: the size can grow beyond the table, or rows are renormalised.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected an nn.Embedding, got {type(embedding).__name__}")
        if total(embed) > embedding.embedding_dim:
            raise ValueError(
                f"embed: up to {total(embed)}, but the table has {embedding.embedding_dim} columns"
            )
        new = cls(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx,
            max_norm=embedding.max_norm, scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse, device="meta",
        )  # fmt: skip
        new.weight = embedding.weight
        new._bind(embed)
        return new.train(embedding.training)

    def _bind(self, embed: Axis) -> None:
        self.embed = embed
        self._joint = Joint(embed)

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows: input ``[...]`` -> ``[..., embed]``."""
        rows = super().forward(input)
        if self._joint.mixed:
            # One factor per column: how much of the mixture reaches it.
            rows = rows * take(rows.new_ones(self.embedding_dim), self._joint)
        return narrow(rows, -1, self.embed)

    def export(self) -> nn.Embedding:
        """Copy the active columns into a plain ``nn.Embedding`` that shares nothing with this."""
        columns = Joint(self.num_embeddings, self.embed)
        weight = nn.Parameter(copy(self.weight, columns), self.weight.requires_grad)
        return nn.Embedding(
            self.num_embeddings, weight.shape[1], self.padding_idx, None, 2.0,
            self.scale_grad_by_freq, self.sparse, _weight=weight, _freeze=not weight.requires_grad,
        ).train(self.training)  # fmt: skip


class TiedHead(Linear):
    """An output layer whose weight is an embedding's very table: scores of all its rows.

    Args:
        embedding: its table becomes the weight, the same Parameter.
        bias: whether to add a learned bias.

    Shape:
        Input ``[..., embed]``, output ``[..., num_embeddings]``.
    """

    def __init__(self, embedding: Embedding, bias: bool = False):
        table = embedding.weight
        super().__init__(
            embedding.embedding_dim, embedding.num_embeddings, bias, table.device, table.dtype
        )
        self.weight = table
        self._bind(embedding.embed, embedding.num_embeddings)

    def export(self, embedding: nn.Embedding | None = None) -> nn.Linear:
        """Plain ``nn.Linear`` of the active part.

        Args:
            embedding: an exported embedding whose table to share; a copy of its own if None.
        """
        linear = super().export()
        if embedding is not None:
            if embedding.weight.shape != linear.weight.shape:
                raise ValueError(
                    f"embedding: its table is {tuple(embedding.weight.shape)}, the active part "
                    f"{tuple(linear.weight.shape)}"
                )
            linear.weight = embedding.weight
        return linear
