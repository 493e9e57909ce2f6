"""Feed-forward blocks whose width and hidden size are sizes of a search space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.nn.elastic import Axis, total
from weightshare.nn.linear import Linear
from weightshare.sizes import Blocks, Size

Activation = Callable[[Tensor], Tensor]
Self = TypeVar("Self", bound="_FeedForward")


class _FeedForward(nn.Module):
    """What the blocks share: layers that can be taken over, and export."""

    embed: Axis
    hidden: Axis
    activation: Activation
    _options: dict[str, Any]  # the constructor's others

    def __init__(self, embed: Axis, hidden: Axis, **options: Any):
        super().__init__()
        self.embed, self.hidden, self.activation = embed, hidden, options.pop("activation")
        self._options = options

    @classmethod
    def from_linears(
        cls: type[Self], linears: Mapping[str, nn.Linear], embed: Axis, hidden: Axis, **options
    ) -> Self:
        """Make the block of existing layers, whose parameters it takes over.

        Args:
            linears: its layers, by the names of the block's own.
            embed: as in the constructor, and so are the others.
            hidden: hidden size.
            options: ``activation``, ``fused``.

        Raises:
            TypeError: one is no ``nn.Linear``.
            ValueError: other names, or sizes that do not fit.
        """
        block = cls(embed, hidden, device="meta", **options)  # type: ignore[call-arg]
        names = [name for name, child in block.named_children() if isinstance(child, Linear)]
        if sorted(names) != sorted(linears):
            raise ValueError(f"linears: expected {', '.join(names)}, got {', '.join(linears)}")
        for name, linear in linears.items():
            old = getattr(block, name)
            new = Linear.from_linear(linear, old.cols, old.rows)
            if isinstance(old.rows, Blocks) and new.out_features != old.out_features:
                raise ValueError(
                    f"hidden: up to {total(hidden)}, but {name} has {new.out_features} rows, "
                    f"not {old.out_features}"
                )
            setattr(block, name, new)
        return block.train(linear.training)

    def export(self: Self) -> Self:
        """The active subnet as a block of its own, on ints and plain layers."""
        sizes = [a.value if isinstance(a, Size) else a for a in (self.embed, self.hidden)]
        activation = copy.deepcopy(self.activation)
        plain = type(self)(*sizes, activation=activation, device="meta", **self._options)
        for name, child in self.named_children():
            if isinstance(child, Linear):
                setattr(plain, name, child.export())
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"embed={self.embed}, hidden={self.hidden}"


class MLP(_FeedForward):
    """Two linear layers: ``fc2(dropout(activation(fc1(x))))``.

    Args:
        embed: size of input and output, a size or an int.
        hidden: size in between, likewise, such as ``embed * ratio``.
        activation: function or module; GELU if not given.
        bias: whether the layers add a learned bias.
        dropout: probability that a hidden feature is dropped in training.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        ``[..., embed]`` in and out, the active size, the whole one when mixed.
    """

    def __init__(
        self,
        embed: Axis,
        hidden: Axis,
        activation: Activation = F.gelu,
        bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(embed, hidden, activation=activation, dropout=dropout)
        self.fc1 = Linear(embed, hidden, bias, device, dtype)
        self.fc2 = Linear(hidden, embed, bias, device, dtype)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Feed x ``[..., embed]`` through both layers."""
        x = self.activation(self.fc1(x))
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return self.fc2(x)


class GatedMLP(_FeedForward):
    """A gated feed-forward block: ``down(activation(gate(x)) * up(x))``.

    State dict: ``gate_up_proj`` (rows of the gate, then of up; each is cut to a prefix) and
    ``down_proj``; with ``fused=False`` ``gate_proj``, ``up_proj`` and ``down_proj``.

    Args:
        embed: size of input and output, a size or an int.
        hidden: size in between, likewise.
        activation: function or module; SiLU if not given.
        bias: whether the layers add a learned bias.
        fused: one layer for gate and up, or two.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        ``[..., embed]`` in and out, the active size, the whole one when mixed.

    Source: GLU Variants Improve Transformer (Shazeer, 2020); nested as in MatFormer (Devvrit et
    al., 2023).
    """

    def __init__(
        self,
        embed: Axis,
        hidden: Axis,
        activation: Activation = F.silu,
        bias: bool = False,
        fused: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(embed, hidden, activation=activation, fused=fused)
        self.fused = fused
        if fused:
            both = Blocks((hidden, hidden), (total(hidden),) * 2)
            self.gate_up_proj = Linear(embed, both, bias, device, dtype)
        else:
            self.gate_proj = Linear(embed, hidden, bias, device, dtype)
            self.up_proj = Linear(embed, hidden, bias, device, dtype)
        self.down_proj = Linear(hidden, embed, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Feed x ``[..., embed]`` through the block."""
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.activation(gate) * up)
