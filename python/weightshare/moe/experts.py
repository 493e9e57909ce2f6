"""Experts of a sparse mixture, of elastic width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightshare.moe import plain
from weightshare.moe.router import check_sizes, moved
from weightshare.nn.elastic import Axis, total
from weightshare.sizes import Blocks, Interleaved, Size
from weightshare_kernels import Routing, moe_mlp
from weightshare_kernels.ops.moe_mlp import _widths

Width = int | Sequence[int] | Tensor | None
Self = TypeVar("Self", bound=nn.Module)


class Experts(nn.Module):
    """E feed-forward experts whose hidden width can be cut to a prefix at run time.

    Parameters, as transformers lays them out: ``gate_up [E, 2f, d]`` (rows of the gate, then of up;
    ``[E, f, d]`` where the activation is not gated) and ``down [E, d, f]``.

    Args:
        num_experts: number of experts E.
        dim: width d of a token.
        hidden: hidden width f of an expert, an int, or a size of a search space that then says
            which prefix is active.
        activation: ``"swiglu"``, or without a gate ``"gelu"`` (exact) or ``"relu2"``.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        Tokens ``[T, d]`` and their routing -> ``[T, d]``.

    Source: MegaBlocks (Gale et al., 2022) for experts without a capacity; nested widths as in
    MatFormer (Devvrit et al., 2023).
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: Axis,
        *,
        activation: str = "swiglu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_hidden("hidden", hidden)
        check_sizes(num_experts=num_experts, dim=dim)
        if activation not in plain.GATED:
            raise ValueError(
                f"activation: {activation!r} is unknown; expected one of {', '.join(plain.GATED)}"
            )
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.activation = activation
        f, options = total(hidden), {"device": device, "dtype": dtype}
        rows = 2 * f if plain.GATED[activation] else f
        self.gate_up = nn.Parameter(torch.empty(num_experts, rows, dim, **options))
        self.down = nn.Parameter(torch.empty(num_experts, dim, f, **options))
        self._active: int | Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert's matrices as ``nn.Linear`` draws its weight."""
        for weight in (self.gate_up, self.down):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def set_active(self: Self, width: Width = None) -> Self:
        """Select the hidden units that :meth:`forward` and ``export`` use.

        Args:
            width: None (all), a number of units, or one per expert: ints or an int tensor ``[E]``.
                A tensor on a GPU is not read by the host; kernels clamp it to ``0..f``.

        Returns:
            The module itself.

        Raises:
            TypeError: it is of another kind, or the width belongs to a search space.
            ValueError: it is out of range, or not one per expert.
        """
        experts: Any = self
        if isinstance(experts.hidden, Size):
            raise TypeError(
                "width: belongs to a search space (hidden is a size); use SearchSpace.activate"
            )
        _widths(width, experts.down)  # the op's own checks
        if width is None or isinstance(width, int):
            experts._active = width
        else:
            # One tensor where the weights are, so that no forward pass copies it there; weights
            # without values (meta) are yet to come there.
            device = "cpu" if experts.down.is_meta else experts.down.device
            tensor = torch.as_tensor(width, dtype=torch.int64, device=device)
            experts._active = tensor.clone()
        return self

    @property
    def width(self) -> int | Tensor | None:
        """Hidden units in force: None (all), an int, or a tensor ``[E]``."""
        if not isinstance(self.hidden, Size):
            return self._active
        if self.hidden.mixed:
            raise RuntimeError(
                "Experts: the hidden size carries mixture weights, which experts do not support; "
                "activate one choice (SearchSpace.activate)"
            )
        return self.hidden.value

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Gated sum of the chosen experts: x ``[T, d]`` -> ``[T, d]``."""
        settings: Any = {"activation": self.activation, "width": self.width}
        return moe_mlp(x, self.gate_up, self.down, routing, **settings)

    def export(self) -> plain.Experts:
        """Copy the active part into a plain module of its own, which loops over the experts.

        Where experts have widths of their own, the copy is as wide as the widest, and zero beyond
        each one's width, which changes no output.
        """
        f, width = total(self.hidden), self.width
        whole = f if width is None else width
        widths = whole.clamp(0, f).tolist() if isinstance(whole, Tensor) else [whole]
        most, each = max(widths), widths * (self.num_experts if len(widths) == 1 else 1)
        copy = plain.Experts(
            self.num_experts, self.dim, most, activation=self.activation, device="meta"
        )
        with torch.no_grad():
            gate_up = self.gate_up.detach().unflatten(1, (-1, f))[:, :, :most].clone()
            down = self.down.detach()[:, :, :most].clone()
            for expert, used in enumerate(each):
                gate_up[expert, :, used:] = 0
                down[expert, :, used:] = 0
        copy.gate_up = nn.Parameter(gate_up.flatten(1, 2), self.gate_up.requires_grad)
        copy.down = nn.Parameter(down, self.down.requires_grad)
        return copy.train(self.training)

    def _apply(self, fn: Callable, recurse: bool = True):
        super()._apply(fn, recurse)
        if isinstance(self._active, Tensor):
            self._active = moved(self._active, fn)
        return self

    def extra_repr(self) -> str:
        """Sizes and the active width."""
        text = f"{self.num_experts}, dim={self.dim}, hidden={self.hidden}"
        width = self._active.tolist() if isinstance(self._active, Tensor) else self._active
        text += f", activation={self.activation!r}"
        return text if width is None else f"{text}, width={width}"


def check_hidden(name: str, hidden: Axis) -> None:
    """Require a hidden width that a prefix can cut, and that is positive."""
    if isinstance(hidden, Blocks | Interleaved):
        raise TypeError(f"{name}: experts are cut to a prefix; pass an int or a plain size")
    check_sizes(**{name: total(hidden)})
