"""Sparse mixtures of experts: a router, experts of elastic width, and the layer of both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.moe import plain
from weightshare.moe._counting import count_
from weightshare.nn.elastic import Axis, total
from weightshare.nn.mlp import MLP, GatedMLP
from weightshare.sizes import Blocks, Interleaved, Size
from weightshare_kernels import Routing, _checks, moe_mlp, route
from weightshare_kernels.ops.moe_mlp import _widths

Width = int | Sequence[int] | Tensor | None
Self = TypeVar("Self", bound=nn.Module)


class MoEOutput(NamedTuple):
    """What :class:`MoE` returns with ``return_routing=True``."""

    output: Tensor
    routing: Routing
    logits: Tensor


class Router(nn.Module):
    """Chooses k of E experts for every token and weighs them, by one linear layer.

    ``balance_bias [E]`` decides with the scores who is chosen but never enters a gate; nothing but
    a :class:`~weightshare.moe.LoadBalancer` changes it. It is in the state dict and stays float32
    whatever the module is cast to, since bfloat16 has no room for its steps of 1e-3.

    ``expert_counts [E]`` (int64) grows in training by the tokens of each expert, once per forward
    pass and not again when activation checkpointing repeats it; padding does not count. It is no
    buffer, because DistributedDataParallel overwrites buffers with those of rank 0.

    Args:
        dim: width d of a token.
        num_experts: number of experts E.
        k: experts per token.
        score_fn: ``"sigmoid"``, ``"softmax"`` or ``"sqrt_softplus"``, of the logits.
        bias: whether to have ``balance_bias``; else it is None.
        groups: contiguous groups of experts, of which the best ``topk_groups`` take part.
        topk_groups: as said; required with more than one group.
        group_score: a group's score is the sum of its ``"top2"`` or of its k // topk_groups best
            (``"topk"``).
        normalize: whether a token's gates are divided by their sum.
        scale: factor of the gates.
        device: where the parameters live.
        dtype: of the weight.

    Raises:
        ValueError: the options do not fit together.

    Shape:
        Tokens ``[T, d]`` -> a ``Routing`` and logits ``[T, E]`` (float32, also under autocast).

    Source: DeepSeek-V3 (2024, arXiv 2412.19437) for scores and groups; loss-free balancing by a
    bias (Wang et al., 2024, arXiv 2408.15664); the small first weights of Switch Transformers
    (Fedus et al., 2021, section 2.4).
    """

    balance_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score_fn: str = "sigmoid",
        bias: bool = True,
        groups: int = 1,
        topk_groups: int | None = None,
        group_score: str = "top2",
        normalize: bool = True,
        scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_sizes(dim=dim, num_experts=num_experts)
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.score_fn, self.normalize, self.scale = score_fn, normalize, scale
        self.groups, self.topk_groups, self.group_score = groups, topk_groups, group_score
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        offset = torch.zeros(num_experts, device=device, dtype=torch.float32) if bias else None
        self.register_buffer("balance_bias", offset)
        self.expert_counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.route(torch.empty(0, num_experts, device="cpu"), None)  # checks the options
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; zero the balance bias and the counts."""
        std = (0.1 / self.dim) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():
            self.expert_counts.zero_()
            if self.balance_bias is not None:
                self.balance_bias.zero_()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route tokens.

        Args:
            x: tokens ``[T, d]``.
            padding_mask: bool ``[T]``, True where a token is padding: it goes to no expert.

        Returns:
            The routing, and the logits ``[T, E]``.
        """
        with _exact(x.device.type):
            kind = _checks.accumulate_dtype(x.dtype)
            logits = F.linear(x.to(kind), self.weight.to(kind))
        routing = self.route(logits, self.balance_bias, padding_mask)
        if self.training:
            if self.expert_counts.device != logits.device:  # a module moved without _apply (FSDP)
                self.expert_counts = self.expert_counts.to(logits.device)
            count_(self.expert_counts, routing.counts)
        return routing, logits

    def route(
        self, logits: Tensor, bias: Tensor | None, padding_mask: Tensor | None = None
    ) -> Routing:
        """Routing of logits ``[T, E]`` under these options, by a bias ``[E]``; counts nothing."""
        return route(
            logits,
            self.k,
            bias=bias,
            score_fn=self.score_fn,
            groups=self.groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            normalize=self.normalize,
            scale=self.scale,
            padding_mask=padding_mask,
        )

    def _apply(self, fn: Callable, recurse: bool = True):
        bias = self.balance_bias
        super()._apply(fn, recurse)
        self.expert_counts = fn(self.expert_counts)
        self._keep_float32(bias)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_float32(None)  # `assign=True` takes over what the checkpoint holds

    def _keep_float32(self, exact: Tensor | None) -> None:
        """Undo a cast of the balance bias; ``exact`` is what it was before."""
        bias = self.balance_bias
        if bias is not None and bias.dtype != torch.float32:
            self.balance_bias = (bias if exact is None else exact).to(bias.device, torch.float32)

    def extra_repr(self) -> str:
        """Sizes and options."""
        text = f"{self.dim}, num_experts={self.num_experts}, k={self.k}, score_fn={self.score_fn!r}"
        if self.groups > 1:
            text += f", groups={self.groups}, topk_groups={self.topk_groups}"
            text += f", group_score={self.group_score!r}"
        return f"{text}, normalize={self.normalize}, scale={self.scale}"


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
        _check_hidden("hidden", hidden)
        _check_sizes(num_experts=num_experts, dim=dim, hidden=total(hidden))
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
            # One tensor where the weights are, so that no forward pass copies it there.
            tensor = torch.as_tensor(width, dtype=torch.int64, device=experts.down.device)
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
            self._active = fn(self._active)
        return self

    def extra_repr(self) -> str:
        """Sizes and the active width."""
        text = f"{self.num_experts}, dim={self.dim}, hidden={self.hidden}"
        width = self._active.tolist() if isinstance(self._active, Tensor) else self._active
        text += f", activation={self.activation!r}"
        return text if width is None else f"{text}, width={width}"


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
            _check_hidden("shared_hidden", shared_hidden)
            _check_sizes(shared_hidden=total(shared_hidden))
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


def _exact(device: str):
    """Switch autocast off, where a device type has it: the router's product is float32."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def _check_hidden(name: str, hidden: Axis) -> None:
    if isinstance(hidden, Blocks | Interleaved):
        raise TypeError(f"{name}: experts are cut to a prefix; pass an int or a plain size")
