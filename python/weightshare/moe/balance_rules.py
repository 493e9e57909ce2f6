"""Load balancing without an auxiliary loss: the rules as functions, and the loss beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weightshare.moe.plain import SCORES
from weightshare_kernels import _checks

DEFAULT_RATES = {"sign": 1e-3, "proportional": 1e-2, "inverse": 1e-1, "inverse_sqrt": 1e-1}
_POWERS = {"sign": 0.0, "proportional": 0.0, "inverse": 1.0, "inverse_sqrt": 0.5}


@torch.no_grad()
def update_balance_bias_(
    bias: Tensor,
    counts: Tensor,
    *,
    rule: str = "sign",
    rate: float | Tensor | None = None,
    step: int | Tensor | None = None,
    recentre: bool = True,
    process_group: Any = None,
) -> Tensor:
    """One update of the bias that is added to the scores when experts are chosen, in place.

    With ``count`` the tokens of an expert since the last update, ``mean`` their mean over the
    experts of a layer, and ``n`` the step::

        sign:          b += rate * sign(mean - count)
        proportional:  b += rate * (1 - count / mean)
        inverse:       b += rate / n * (1 - count / mean)
        inverse_sqrt:  b += rate / sqrt(n) * (1 - count / mean)

    The relative violation ``1 - count / mean`` does not change with the number of tokens or
    experts. It is ``E / K`` times the theory's ``K / E - count / T``, so that
    ``eps_n = rate * E / K`` there. ``sign`` is what DeepSeek-V3 trained with; ``inverse`` settles
    but no longer follows scores that drift, ``inverse_sqrt`` does both.

    Nothing is read back from the device. A layer without any count stays exactly as it is.

    Args:
        bias: ``[experts]``, or stacked ``[layers, experts]``, float32 or float64.
        counts: tokens of each expert, of the bias's shape, integers or floating point.
        rule: one of the four above.
        rate: size of an update, in units of the scores; by default 1e-3 for ``sign``, 1e-2 for
            ``proportional`` and 1e-1 for the others. A tensor without dimensions may change
            between replays of a CUDA graph; where it is not above 0, nothing changes.
        step: number of this update, from 1; an int, or a tensor without dimensions, which a CUDA
            graph reads anew if it is on the device. Required by ``inverse``, ``inverse_sqrt``.
        recentre: subtract the mean over experts afterwards. Experts are chosen the same, and the
            fixed point becomes unique.
        process_group: processes whose counts are summed first, in a copy; None sums nothing.

    Returns:
        ``bias``.

    Raises:
        ValueError: for an unknown rule, shapes or devices that differ, rate <= 0, step < 1.
        TypeError: for a bias of less precision than float32, or not floating point.
        RuntimeError: if the processes of the group do not all take part in time.

    Source: Wang et al., 2024 (arXiv 2408.15664), for ``sign``; Han and Zhong, 2025
        (arXiv 2512.03915), for the primal-dual method that the four rules are steps of.
    """
    _check_bias(bias, counts)
    rate = _checked_rate(rate, rule)
    scale = rate * _decay(step, _POWERS[rule], bias)
    counts = sum_over(counts, process_group)
    # Integers stay integers up to the sign: exact however many tokens there are.
    counts = counts.double() if counts.is_floating_point() else counts.long()
    total = counts.sum(-1, keepdim=True)
    missing = total - counts.shape[-1] * counts  # experts * (mean - count)
    active = (total > 0) & total.isfinite()
    if rule == "sign":
        move = missing.sign().to(bias.dtype)
    else:
        move = missing.to(bias.dtype) / total.where(active, 1).to(bias.dtype)
    new = bias + scale * move
    if recentre:
        new = new - new.mean(-1, keepdim=True)
    if isinstance(rate, Tensor):
        active = active & (rate > 0)
    return bias.copy_(torch.where(active, new, bias))


def max_violation(counts: Tensor) -> Tensor:
    """How much more than its share the busiest expert of each layer got: ``max / mean - 1``.

    Args:
        counts: tokens of each expert, ``[..., experts]``.

    Returns:
        ``[...]``, 0 if balanced, experts - 1 at most; 0 where nothing was counted. float32, or
        float64 for float64 counts.

    Source: MaxVio of Wang et al., 2024 (arXiv 2408.15664).
    """
    dtype = torch.float64 if counts.dtype == torch.float64 else torch.float32
    if counts.shape[-1] == 0:
        return counts.new_zeros(counts.shape[:-1], dtype=dtype)
    total, most = counts.sum(-1), counts.amax(-1)
    ratio = most.to(dtype) * counts.shape[-1] / total.where(total > 0, 1).to(dtype) - 1
    return ratio.where(total > 0, 0)


def sequence_balance_loss(
    scores: Tensor,
    k: int,
    *,
    alpha: float,
    sequences: int | Sequence[int] = 1,
    padding_mask: Tensor | None = None,
    score_fn: str | None = None,
) -> Tensor:
    """The loss that keeps single sequences from extreme imbalance, beside the bias.

    ``alpha * sum_i f_i P_i`` for each sequence, averaged over the sequences that have a token:
    ``f_i`` is the share of the sequence's tokens whose top k, without bias, hold expert i, over
    its balanced value ``k / experts``; ``P_i`` is the mean of its scores after each token's are
    divided by their sum. It is ``alpha`` where all is even. The gradient flows through ``P``.

    Args:
        scores: ``[tokens, experts]``, what the score function gave, >= 0; or the gate's logits if
            ``score_fn`` is given. The tokens of a sequence lie together.
        k: experts of a token.
        alpha: weight of the loss; DeepSeek-V3 used 1e-4.
        sequences: number of sequences of equal length, or the length of each.
        padding_mask: bool ``[tokens]``, True for padding, which counts nowhere.
        score_fn: that of the router, ``"sigmoid"``, ``"softmax"`` or ``"sqrt_softplus"``, to apply
            here; None for scores that it was applied to.

    Returns:
        A scalar of the scores' dtype, float32 for lower ones.

    Raises:
        ValueError: for shapes, lengths, a k or a score function that do not fit.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), equations 17 to 20.
    """
    _checks.tensor("scores", scores, 2)
    tokens, experts = scores.shape
    if not 1 <= k <= experts:
        raise ValueError(f"k: expected 1 to {experts}, the number of experts, got {k}")
    if score_fn is not None and score_fn not in SCORES:
        raise ValueError(f"score_fn: expected one of {', '.join(SCORES)}, got {score_fn!r}")
    lengths = _lengths(sequences, tokens)
    if padding_mask is not None and (
        padding_mask.dtype != torch.bool or padding_mask.shape != (tokens,)
    ):
        raise ValueError(
            f"padding_mask: expected bool [{tokens}], True for padding, got "
            f"{padding_mask.dtype} {list(padding_mask.shape)}"
        )
    scores = scores.to(_checks.accumulate_dtype(scores.dtype))
    real = torch.ones_like(scores[:, :1])
    if padding_mask is not None:
        # Before anything is computed: what padding holds may be NaN.
        scores = scores.masked_fill(padding_mask[:, None], 0)
        real = real.masked_fill(padding_mask[:, None], 0)
    if score_fn is not None:
        scores = SCORES[score_fn](scores)
    chosen = torch.zeros_like(scores).scatter_(1, scores.detach().topk(k, -1).indices, 1) * real
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    size = _sums(real, lengths)  # [sequences, 1]
    f = _sums(chosen, lengths) * (experts / k)
    loss = (f * _sums(share * real, lengths)).sum(-1, keepdim=True) / size.clamp(min=1).square()
    return alpha * loss.sum() / (size > 0).sum().clamp(min=1)


def sum_over(counts: Tensor, process_group: Any) -> Tensor:
    """Counts summed over the processes of a group, in a copy; as they are for None.

    Raises:
        RuntimeError: if a process does not take part before the group's timeout.
    """
    if process_group is None:
        return counts
    counts = counts.clone()
    try:
        dist.all_reduce(counts, group=process_group)
    except RuntimeError as error:
        raise RuntimeError(
            "balance: summing the counts over the process group failed, so the bias was not "
            "updated. Check that every rank of the group is alive and updates once per optimizer "
            "step, one without tokens too, with the same layers; then the group's timeout "
            f"(init_process_group(timeout=...)). The group said: {error}"
        ) from error
    return counts


def check_rule(rule: str) -> None:
    """Require one of the rules."""
    if rule not in DEFAULT_RATES:
        raise ValueError(f"rule: expected one of {', '.join(DEFAULT_RATES)}, got {rule!r}")


def _checked_rate(rate: float | Tensor | None, rule: str) -> float | Tensor:
    check_rule(rule)
    if rate is None:
        return DEFAULT_RATES[rule]
    if isinstance(rate, Tensor):
        if rate.dim() > 0:
            raise ValueError(f"rate: expected one number, got shape {list(rate.shape)}")
        return rate
    if not 0 < rate < math.inf:
        raise ValueError(f"rate: expected a positive number, got {rate}; to freeze, do not update")
    return rate


def _check_bias(bias: Tensor, counts: Tensor) -> None:
    _checks.tensor("bias", bias)
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"bias: is {bias.dtype}, which loses updates of 1e-3 once it reaches 0.5; keep it in "
            "float32, also in a model of lower precision: bias = bias.float()"
        )
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: expected a tensor, got {type(counts).__name__}")
    if bias.dim() not in (1, 2) or bias.shape != counts.shape:
        raise ValueError(
            "bias, counts: expected the same shape, [experts] or [layers, experts], got "
            f"{list(bias.shape)} and {list(counts.shape)}"
        )
    if counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts: expected integers or floating point, got {counts.dtype}")
    _checks.same_device("counts", counts, "bias", bias)


def _decay(step: int | Tensor | None, power: float, bias: Tensor) -> float | Tensor:
    """``1 / step ** power``: a number, or a tensor beside the bias if the step is a tensor."""
    if step is None:
        if power:
            raise ValueError("step: this rule needs the number of the update, from 1")
        return 1.0
    if isinstance(step, Tensor):
        if step.dim() > 0:
            raise ValueError(f"step: expected one number, got shape {list(step.shape)}")
        if step.device.type != "cpu":
            # Its value is on the device, and stays there.
            return step.to(bias).clamp(min=1) ** -power if power else 1.0
        step = int(step)
    if step < 1:
        raise ValueError(f"step: expected the number of the update, from 1, got {step}")
    return step**-power


def _lengths(sequences: int | Sequence[int], tokens: int) -> int | list[int]:
    """The number of equal sequences, or the list of their lengths, checked."""
    if isinstance(sequences, int):
        if sequences < 1 or tokens % sequences:
            raise ValueError(
                f"sequences: {tokens} tokens are not {sequences} sequences of equal length; "
                "give the length of each"
            )
        return sequences
    lengths = list(sequences)
    if sum(lengths) != tokens or min(lengths, default=-1) < 0:
        raise ValueError(f"sequences: lengths {lengths} do not add up to {tokens} tokens")
    return lengths


def _sums(values: Tensor, sequences: int | list[int]) -> Tensor:
    """Sums over each sequence ``[sequences, columns]``, in a fixed order on every device."""
    if isinstance(sequences, int):
        return values.view(sequences, -1, values.shape[1]).sum(1)
    return torch.stack([part.sum(0) for part in values.split(sequences)])
