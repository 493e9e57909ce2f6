"""Sparse mixture of experts: a router, its experts and shared ones in one layer."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from weightshare.moe import plain
from weightshare.moe.experts import Experts, Width, check_hidden
from weightshare.moe.router import Router
from weightshare.nn.elastic import Axis
from weightshare.nn.mlp import MLP, GatedMLP
from weightshare_kernels import Routing

__all__ = ["Experts", "MoE", "MoEOutput", "Router"]

Self = TypeVar("Self", bound=nn.Module)


class MoEOutput(NamedTuple):
    """What :class:`MoE` returns with ``return_routing=True``."""

    output: Tensor
    routing: Routing
    logits: Tensor


class MoE(nn.Module):
    """Sparse mixture of experts: k of E experts for every token, and optionally shared ones.

    ``y = sum_j gate_j expert_j(x) + sigmoid(x w) * shared(x)``, the last factor only with
    ``shared_gate``. No token is dropped and none is padded to a capacity; nothing of the size of
    the gathered tokens is kept for backward but the experts' pre-activations.

    Args:
        dim: width d of a token.
        hidden: hidden width f of an expert, an int or a size of a search space.
        num_experts: number of experts E.
        k: experts per token.
        activation: ``"swiglu"``, ``"gelu"`` or ``"relu2"``, of the shared experts as well.
        shared_hidden: hidden width of the shared experts, which are one dense feed-forward block
            that every token passes; 0 for none.
        shared_gate: whether the shared part is weighed by a sigmoid of its own (as Qwen2-MoE).
        device: where the parameters live.
        dtype: of the parameters; ``router.balance_bias`` is float32 always.
        router: options of :class:`Router`: ``score_fn``, ``bias``, ``groups``, ``topk_groups``,
            ``group_score``, ``normalize``, ``scale``.

    Raises:
        ValueError: sizes or options do not fit together.

    Shape:
        ``[..., d]`` in and out.

    Source: DeepSeekMoE (Dai et al., 2024, arXiv 2401.06066).

    Example::

        moe = MoE(1024, 384, num_experts=64, k=8, shared_hidden=384)
        y = moe(x)  # [batch, sequence, 1024]
        small = moe.set_active(width=192).export()  # plain PyTorch, half as wide
    """

    def __init__(
        self,
        dim: int,
        hidden: Axis,
        num_experts: int,
        k: int,
        *,
        activation: str = "swiglu",
        shared_hidden: Axis = 0,
        shared_gate: bool = False,
        device=None,
        dtype=None,
        **router: Any,
    ):
        super().__init__()
        if shared_gate and not shared_hidden:
            raise ValueError("shared_gate: there is no shared expert to weigh; set shared_hidden")
        options = {"device": device, "dtype": dtype}
        self.dim = dim
        self.router = Router(dim, num_experts, k, **options, **router)
        self.experts = Experts(num_experts, dim, hidden, activation=activation, **options)
        self.shared: GatedMLP | MLP | None = None
        if shared_hidden:
            check_hidden("shared_hidden", shared_hidden)
            function, gated = plain.ACTIVATIONS[activation], plain.GATED[activation]
            block: Any = GatedMLP if gated else MLP
            self.shared = block(dim, shared_hidden, function, bias=False, **options)
        self.shared_gate = nn.Linear(dim, 1, bias=False, **options) if shared_gate else None

    def set_active(self: Self, width: Width = None) -> Self:
        """Select the hidden units of the routed experts, as :meth:`Experts.set_active`."""
        self.experts.set_active(width)  # type: ignore[union-attr, operator]
        return self

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, return_routing: bool = False
    ) -> Tensor | MoEOutput:
        """Send tokens through their experts.

        Args:
            x: tokens ``[..., d]``.
            padding_mask: bool ``[...]``, True where a token is padding: no expert takes it, and it
                does not count. The shared part is computed all the same.
            return_routing: whether to return ``(output, routing, logits)``, for losses and metrics.

        Raises:
            ValueError: the mask has not the shape of the tokens.
        """
        flat = x.reshape(-1, x.shape[-1])
        if padding_mask is not None:
            if padding_mask.shape != x.shape[:-1]:
                raise ValueError(
                    f"padding_mask: expected shape {tuple(x.shape[:-1])}, one per token of x, got "
                    f"{tuple(padding_mask.shape)}"
                )
            padding_mask = padding_mask.reshape(-1)
        routing, logits = self.router(flat, padding_mask)
        y = self.experts(flat, routing).view(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        return MoEOutput(y, routing, logits) if return_routing else y

    def export(self) -> plain.MoE:
        """Copy the active part into plain PyTorch that shares nothing with this layer.

        The copy loops over its experts and needs no module of this package but
        ``weightshare.moe.plain``, which needs torch alone; its state dict has the keys of a
        :class:`MoE` of the active width. dtype, device, ``requires_grad`` and training mode are
        kept.
        """
        router = self.router
        shared = self.shared.export() if self.shared is not None else None
        copy = plain.MoE(
            self.dim,
            1,
            router.num_experts,
            router.k,
            activation=self.experts.activation,
            shared_hidden=0 if shared is None else int(shared.hidden),  # type: ignore[arg-type]
            shared_gate=self.shared_gate is not None,
            device="meta",
            **{name: getattr(router, name) for name in plain.OPTIONS},
            bias=router.balance_bias is not None,
        )
        copy.experts = self.experts.export()
        with torch.no_grad():
            _adopt(copy.router, router)
            for part, mine in ((copy.shared, shared), (copy.shared_gate, self.shared_gate)):
                if part is not None:
                    _adopt(part, mine)  # type: ignore[arg-type]
        return copy.train(self.training)

    def extra_repr(self) -> str:
        """Width of a token; the parts tell the rest."""
        return f"dim={self.dim}"


def _adopt(plain_module: nn.Module, module: nn.Module) -> None:
    """Copy parameters and buffers into a plain module of the same structure."""
    for name, parameter in module.named_parameters():
        path, _, last = name.rpartition(".")
        copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        setattr(plain_module.get_submodule(path), last, copy)
    for name, buffer in module.named_buffers():
        plain_module.register_buffer(name, buffer.detach().clone())
