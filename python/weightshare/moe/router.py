"""The router of a sparse mixture of experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.moe._counting import count_
from weightshare_kernels import Routing, _checks, route


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
        check_sizes(dim=dim, num_experts=num_experts)
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
        self.expert_counts = moved(self.expert_counts, fn)
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


def moved(tensor: Tensor, fn: Callable) -> Tensor:
    """What ``Module._apply`` does to integers that no checkpoint holds, dtype and values kept.

    ``to_empty`` leaves the filling of new memory to a checkpoint, which would not come, and
    ``type`` casts whatever there is.
    """
    new = fn(tensor).to(tensor.dtype)
    if new.is_meta:
        return tensor
    return torch.zeros_like(new) if tensor.is_meta else new.copy_(tensor)


def _exact(device: str):
    """Switch autocast off, where a device type has it: the router's product is float32."""
    if _checks.has_autocast(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def check_sizes(**sizes: int) -> None:
    """Require positive ints."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
