"""Routing of a sparse mixture of experts: from the gate's logits to sorted tokens, in one op."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect
from weightshare_kernels._register import define, lean
from weightshare_kernels.ops.route import reference

_TRITON = "weightshare_kernels.ops.route.triton"
_TABLES = "Tensor counts, Tensor offsets, Tensor permutation, Tensor inverse"
SCORE_FNS = ("sigmoid", "softmax", "sqrt_softplus")
GROUP_SCORES = ("top2", "topk")


class Routing(NamedTuple):
    """Which experts each of T tokens goes to, and the tokens sorted by expert.

    A pair ``p = t * k + j`` is the j-th expert of token t.

    Attributes:
        experts: ``[T, k]`` int64, best first.
        gates: ``[T, k]`` float32 (float64 for float64 scores), differentiable.
        counts: ``[E]`` int64, pairs of each expert; padding is not counted.
        offsets: ``[E + 1]`` int64, the counts' prefix sum: expert e has the pairs
            ``permutation[offsets[e]:offsets[e + 1]]``.
        permutation: ``[T * k]`` int64, the pairs sorted by expert, in order within each; those of
            padding come last, behind ``offsets[E]``.
        inverse: ``[T * k]`` int64, ``permutation[inverse[p]] == p``.
    """

    experts: Tensor
    gates: Tensor
    counts: Tensor
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor


def _fake_tables(experts: Tensor, padding, num_experts) -> tuple[Tensor, ...]:
    pairs = experts.shape[0] * experts.shape[1]
    return tuple(
        experts.new_empty((size,)) for size in (num_experts, num_experts + 1, pairs, pairs)
    )


def _fake(scores, bias, padding, k, *rest):
    rows = scores.shape[0]
    experts = scores.new_empty((rows, k), dtype=torch.int64)
    gates = scores.new_empty((rows, k), dtype=_checks.accumulate_dtype(scores.dtype))
    return experts, gates, *_fake_tables(experts, padding, scores.shape[1])


_forward = define(
    "route(Tensor scores, Tensor? bias, Tensor? padding, SymInt k, str score_fn, SymInt groups, "
    "SymInt topk_groups, SymInt group_top, bool normalize, float scale) -> "
    f"(Tensor experts, Tensor gates, {_TABLES})",
    reference=reference.forward,
    fake=_fake,
    triton=f"{_TRITON}:forward",
)
_backward = define(
    "route_grad(Tensor grad_gates, Tensor scores, Tensor experts, Tensor? padding, str score_fn, "
    "bool normalize, float scale) -> Tensor",
    reference=reference.backward,
    fake=lambda grad_gates, scores, *rest: scores.new_empty(scores.shape),
    triton=f"{_TRITON}:backward",
)
_tables = define(
    f"route_tables(Tensor experts, Tensor? padding, SymInt num_experts) -> ({_TABLES})",
    reference=reference.tables,
    fake=_fake_tables,
    triton=f"{_TRITON}:tables",
)


def route(
    scores: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    score_fn: str = "sigmoid",
    groups: int = 1,
    topk_groups: int | None = None,
    group_score: str = "top2",
    normalize: bool = True,
    scale: float = 1,  # not 1.0: the compiler would make a graph input of it, and trace twice
    padding_mask: Tensor | None = None,
) -> Routing:
    """Choose k of E experts for each token, and sort the tokens by expert.

    With ``s = score_fn(scores)``, computed in float32 (float64 for float64), a token takes the k
    experts of largest ``s + bias``; of equals the one of lowest id. Its gates are the *unbiased*
    ``s`` of those. A NaN counts as minus infinity in the choice, so that ids are always in range,
    and goes into the gates as arithmetic has it. Counts, offsets and the stable permutation come
    with it in the same call, without a host synchronisation.

    Args:
        scores: the gate's logits ``[T, E]``.
        k: experts of a token, 1 to E.
        bias: balance bias ``[E]``, float32 or float64, for the choice alone; it gets no gradient.
        score_fn: ``"sigmoid"``, ``"softmax"`` (over all E) or ``"sqrt_softplus"``.
        groups: number of groups of E / groups neighbouring experts.
        topk_groups: groups that a token may choose from, those of largest score; needed where
            groups > 1.
        group_score: a group's score is the sum of its 2 best ``s + bias`` (``"top2"``: DeepSeek,
            transformers) or of its k // topk_groups best (``"topk"``: Megatron).
        normalize: divide a token's gates by their sum (plus 1e-20).
        scale: factor of the gates, after that.
        padding_mask: ``[T]`` bool, True for padding. Such a token gets the experts 0..k-1 with
            gates 0, is not counted, comes last in the permutation and sends no gradient.

    Returns:
        A :class:`Routing`; its gates are differentiable in the scores.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a size or shape does not fit, a name is unknown, or devices differ.

    Source: auxiliary-loss-free balancing (Wang et al., 2024, arXiv 2408.15664) and group-limited
    routing of DeepSeek-V3 (2024, arXiv 2412.19437).
    """
    _check_scores(scores, k, bias, padding_mask)
    topk_groups, group_top = _check_groups(scores.shape[1], k, groups, topk_groups, group_score)
    if score_fn not in SCORE_FNS:
        raise ValueError(f"score_fn: expected one of {', '.join(SCORE_FNS)}, got {score_fn!r}")
    if isinstance(scale, bool) or not isinstance(scale, float | int | torch.SymFloat):
        raise TypeError(f"scale: expected a number, got {scale!r} of type {type(scale).__name__}")
    if not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if bias is not None:
        bias = bias.detach().to(_checks.accumulate_dtype(scores.dtype))
    options = (k, score_fn, groups, topk_groups, group_top, bool(normalize), float(scale))
    if not _collect.plain():
        return Routing(*_Route.apply(scores, bias, padding_mask, *options))
    if torch.is_grad_enabled() and scores.requires_grad:
        return Routing(*_lean(scores, bias, padding_mask, *options))
    return Routing(*_forward(scores, bias, padding_mask, *options))


def routing_of(
    experts: Tensor, gates: Tensor, num_experts: int, padding_mask: Tensor | None = None
) -> Routing:
    """The tables of a choice made elsewhere, say by a model's own gate.

    Args:
        experts: ids ``[T, k]``, int64 (other integers are converted). A pair whose id is outside
            ``0..num_experts - 1`` is treated like padding, as some models mark dropped pairs so.
        gates: ``[T, k]``; converted to float32, or left in float64.
        num_experts: E.
        padding_mask: ``[T]`` bool, True for padding: gates 0, not counted, last in order.

    Returns:
        A :class:`Routing` with the ids as given; its gates are differentiable in ``gates``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes or devices do not fit.
    """
    _checks.tensor("gates", gates, 2)
    if not isinstance(experts, Tensor):
        raise TypeError(f"experts: expected a tensor, got {type(experts).__name__}")
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise TypeError(f"experts: expected integer ids, got {experts.dtype}")
    if experts.shape != gates.shape:
        raise ValueError(
            f"experts: has shape {tuple(experts.shape)}, but gates has {tuple(gates.shape)}; give "
            "one id [T, k] per gate"
        )
    _checks.same_device("experts", experts, "gates", gates)
    _check_int("num_experts", num_experts)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    _check_padding(padding_mask, gates.shape[0], "gates", gates)
    experts = experts.to(torch.int64)
    gates = gates.to(_checks.accumulate_dtype(gates.dtype))
    if padding_mask is not None:
        gates = torch.where(padding_mask[:, None], 0.0, gates)
    return Routing(experts, gates, *_tables(experts, padding_mask, num_experts))


def _check_int(name: str, value) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")


def _check_scores(scores, k, bias, padding) -> None:
    """Check the tensors against each other, and k against the number of experts."""
    _checks.tensor("scores", scores, 2)
    rows, experts = scores.shape
    _check_int("k", k)
    if not 1 <= k <= experts:
        raise ValueError(f"k: {k} is outside 1..{experts}, the number of experts (columns)")
    if bias is not None:
        _checks.tensor("bias", bias, 1)
        if bias.dtype.itemsize < 4:
            raise TypeError(
                f"bias: is {bias.dtype}, in which an update of 1e-3 is lost; keep it in float32"
            )
        if bias.shape[0] != experts:
            raise ValueError(f"bias: has {bias.shape[0]} elements, but scores {experts} columns")
        _checks.same_device("bias", bias, "scores", scores)
    _check_padding(padding, rows, "scores", scores)


def _check_padding(padding, rows: int, like_name: str, like: Tensor) -> None:
    if padding is None:
        return
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
        kind = padding.dtype if isinstance(padding, Tensor) else type(padding).__name__
        raise TypeError(
            f"padding_mask: expected a bool tensor, True for padding, got {kind}; an attention "
            "mask is turned into one by mask == 0"
        )
    if padding.dim() != 1 or padding.shape[0] != rows:
        raise ValueError(
            f"padding_mask: expected shape ({rows},), one flag per token, got "
            f"{tuple(padding.shape)}; flatten it like the tokens"
        )
    _checks.same_device("padding_mask", padding, like_name, like)


def _check_groups(experts: int, k: int, groups, topk_groups, group_score) -> tuple[int, int]:
    """Check the groups; returns how many a token chooses from and experts in a group's score."""
    _check_int("groups", groups)
    if groups < 1 or experts % groups:
        raise ValueError(
            f"groups: {groups} does not divide the {experts} experts (columns of scores)"
        )
    if group_score not in GROUP_SCORES:
        raise ValueError(
            f"group_score: expected one of {', '.join(GROUP_SCORES)}, got {group_score!r}"
        )
    if topk_groups is None:
        if groups > 1:
            raise ValueError(
                f"topk_groups: is None, but there are {groups} groups; say how many of them a "
                "token may choose from"
            )
        topk_groups = 1
    _check_int("topk_groups", topk_groups)
    if not 1 <= topk_groups <= groups:
        raise ValueError(f"topk_groups: {topk_groups} is outside 1..{groups}, the number of groups")
    size = experts // groups
    if k > topk_groups * size:
        raise ValueError(
            f"k: {k} is more than the {topk_groups * size} experts of {topk_groups} groups of "
            f"{size}; raise topk_groups"
        )
    if groups == 1 or group_score == "top2":
        return topk_groups, min(2, size)
    if k % topk_groups:
        raise ValueError(
            f'group_score: "topk" needs k divisible by topk_groups, got {k} and {topk_groups}; '
            'use "top2"'
        )
    return topk_groups, k // topk_groups


class _Route(Function):
    """Autograd of :func:`route`; saves the logits and the chosen ids."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores, bias, padding, k, score_fn, groups, kept, group_top, normalize, scale):
        # Arguments one by one: the compiler mistakes a starred parameter for the context.
        return _forward(
            scores, bias, padding, k, score_fn, groups, kept, group_top, normalize, scale
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        scores, _, padding, _, score_fn, *_, normalize, scale = inputs
        experts, _, *tables = output
        ctx.mark_non_differentiable(experts, *tables)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, experts, padding)
        ctx.options = (score_fn, normalize, scale)

    @staticmethod
    def backward(ctx, _, grad, *__):
        if grad is None:
            return (None,) * 10
        scores, experts, padding = ctx.saved_tensors
        # Differentiable in terms of PyTorch where a gradient of the gradient is wanted.
        compute = reference.backward if torch.is_grad_enabled() else _backward
        return compute(grad, scores, experts, padding, *ctx.options), *((None,) * 9)


_lean = lean(_Route)
