"""Auxiliary-loss-free load balancing of the experts of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightshare.moe import _balanced_layers
from weightshare.moe._counting import count_, state
from weightshare.moe.balance_rules import (
    DEFAULT_RATES,
    check_rule,
    max_violation,
    sequence_balance_loss,
    sum_over,
    update_balance_bias_,
)

__all__ = [
    "DEFAULT_RATES",
    "LoadBalancer",
    "count_",
    "max_violation",
    "sequence_balance_loss",
    "update_balance_bias_",
]


class LoadBalancer:
    """Keeps the experts of a model evenly used by moving the bias of each layer's choice.

    It finds the layers of ``weightshare.moe`` and, as they are, the models of transformers that
    hold such a bias (``e_score_correction_bias``) and never update it::

        balancer = LoadBalancer(model, rule="sign")
        balancer.attach(optimizer)  # or call balancer.step() after each optimizer.step()

    Training forward passes count; evaluation, and recomputation by activation checkpointing, do
    not. Passes that accumulate gradients add up. A step that a ``GradScaler`` skips is not a
    step: the bias stays, and its tokens count in the next one. Padding is not counted: our layers
    are told, transformers' models show it in their two-dimensional ``attention_mask``.

    Make it before the model is compiled. ``step`` can be captured in a CUDA graph together with
    the training step; do the warm-up in :meth:`paused`.

    Args:
        model: with at least one such layer. Layers that see no token are left as they are; ours
            without a bias are only measured.
        rule: see :func:`update_balance_bias_`.
        rate: of the rule, its default for None; a function of the step's number (from 1), where 0
            freezes the bias; or a tensor without dimensions, to be changed in place.
        process_group: processes whose counts are summed. None is the default group where
            ``torch.distributed`` is initialized, False no group. Under pipeline parallelism give
            the group of the processes that hold the same layers.
        recentre: see :func:`update_balance_bias_`.
        until: number of the last step that moves the bias; None moves it always.

    Attributes:
        names: of the layers.

    Raises:
        ValueError: for a model without such a layer, an unknown rule, a rate <= 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rule: str = "sign",
        rate: float | Tensor | Callable[[int], float] | None = None,
        process_group: Any = None,
        recentre: bool = True,
        until: int | None = None,
    ):
        check_rule(rule)
        self.rule, self.recentre, self.until = rule, recentre, until
        self.rate = DEFAULT_RATES[rule] if rate is None else rate
        if isinstance(self.rate, float | int) and not self.rate > 0:
            raise ValueError(f"rate: expected a positive number, got {rate}")
        self.process_group = process_group
        self._layers, self._take_off = _balanced_layers.find(_balanced_layers.unwrap(model))
        self.names = tuple(layer.name for layer in self._layers)
        self._sizes = [layer.counts.shape[0] for layer in self._layers]
        device = self._layers[0].counts.device
        self._steps = 0  # done here; those of a CUDA graph's replays are only in _number
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._last = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._all = torch.zeros_like(self._last)
        self._seen = state.calls
        self._attached: Any = None

    @torch.no_grad()
    def step(self, skipped: Tensor | None = None) -> None:
        """Update all biases from what was counted since the last step; once per optimizer step.

        One all-reduce and one update serve all layers. Nothing is read back from a GPU.

        Args:
            skipped: without dimensions; nonzero if the optimizer left the weights as they are, so
                that this is no step: the biases stay, too, and the counts wait for the next one.
                Only what a function ``rate`` is called with goes on.

        Raises:
            RuntimeError: if nothing was counted since the last step (on a GPU this is seen only
                with one process, and not once a CUDA graph counts); or if the processes of the
                group do not all take part before its timeout, in which case nothing changed.
                (NCCL ends a process that waits too long by itself.)
        """
        _balanced_layers.keep_precision(self._layers)
        self._follow()
        biases = [layer.bias for layer in self._layers]
        rate = self._current_rate()
        group = self._group()
        counts = torch.cat([layer.counts.to(self._last.device) for layer in self._layers])
        counts = sum_over(counts, group)
        self._require_new(counts, group)
        self._steps += 1
        taken = torch.ones_like(self._number) if skipped is None else skipped.to(counts.device) == 0
        self._number += taken
        if rate is not None:
            self._update(biases, counts, rate, taken.bool())
        self._last.copy_(torch.where(taken.bool(), counts, self._last))
        self._all += counts * taken
        for layer in self._layers:
            layer.counts.mul_(taken.logical_not())

    def attach(self, optimizer: torch.optim.Optimizer) -> LoadBalancer:
        """Call :meth:`step` after each step of the optimizer; returns the balancer.

        Of several optimizers, attach the one that steps last. A ``GradScaler`` leaves the question
        whether to skip a step to fused optimizers: they are asked, on the device.
        """
        if self._attached is not None:
            raise RuntimeError(
                "balancer: is attached to an optimizer already, and one step of the bias belongs "
                "to one step of training; attach it to the optimizer that steps last"
            )
        self._attached = optimizer.register_step_post_hook(
            lambda stepped, *_: self.step(getattr(stepped, "found_inf", None))
        )
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forget what is counted inside: warm-up before a capture, evaluation in training mode."""
        calls = state.calls
        counts = [layer.counts.clone() for layer in self._layers]
        try:
            yield
        finally:
            for layer, count in zip(self._layers, counts, strict=True):
                layer.counts.copy_(count)
            self._seen += state.calls - calls

    def max_violation(self) -> Tensor:
        """``max / mean - 1`` of the tokens of each layer's experts, in the last step.

        Returns:
            ``[layers]`` float32, in the order of ``names``; 0 before the first step.
        """
        return self._violations(self._last)

    def metrics(self) -> dict[str, Tensor]:
        """Tensors ``[layers]`` on the device, in the order of ``names``.

        ``max_violation`` is of the last step, ``max_violation_global`` of all tokens since the
        balancer was made (of the state it loaded, if any).
        """
        return {
            "max_violation": self._violations(self._last),
            "max_violation_global": self._violations(self._all),
        }

    def state_dict(self) -> dict[str, Any]:
        """Rule, number of steps, and the counts: pending ones are this process's own.

        The bias itself is in the model's state.
        """
        return {
            "rule": self.rule,
            "step": int(self._number),
            "pending": {layer.name: layer.counts.cpu().clone() for layer in self._layers},
            "last": self._by_name(self._last),
            "all": self._by_name(self._all),
        }

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: for a state of another rule or of other layers.
        """
        if loaded["rule"] != self.rule:
            raise ValueError(
                f"state: is of rule {loaded['rule']!r}, but this balancer's is {self.rule!r}; "
                "make it with that rule, or begin without a state"
            )
        sizes = dict(zip(self.names, self._sizes, strict=True))
        if {name: counts.shape[0] for name, counts in loaded["pending"].items()} != sizes:
            raise ValueError(
                f"state: is of layers {list(loaded['pending'])}, but the model has "
                f"{list(self.names)}, of {self._sizes} experts; load the state of this model"
            )
        self._steps = loaded["step"]
        self._number.fill_(loaded["step"])
        for layer in self._layers:
            layer.counts.copy_(loaded["pending"][layer.name])
        for mine, key in ((self._last, "last"), (self._all, "all")):
            mine.copy_(torch.cat([loaded[key][name] for name in self.names]))

    def remove(self) -> None:
        """Take all hooks off the model and the optimizer."""
        self._take_off()
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def __enter__(self) -> LoadBalancer:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _update(
        self, biases: list[Tensor | None], counts: Tensor, rate: float | Tensor, taken: Tensor
    ) -> None:
        """One update for each number of experts, of all layers that have it, if it is taken."""
        rows = list(zip(self._layers, biases, counts.split(self._sizes), strict=True))
        for size in sorted(set(self._sizes)):
            group = [row for row in rows if len(row[2]) == size and row[1] is not None]
            if not group:
                continue
            layers, old, parts = zip(*group, strict=True)
            before = torch.stack([bias.to(counts.device) for bias in old])
            new = update_balance_bias_(
                before.clone(),
                torch.stack(parts),
                rule=self.rule,
                rate=rate,
                step=self._number.clamp(min=1),  # 0 where the first step is skipped
                recentre=self.recentre,
            )
            new = torch.where(taken, new, before)
            torch._foreach_copy_(old, list(new.unbind()))
            for layer, kept in zip(layers, new.unbind(), strict=True):
                layer.kept = kept

    def _current_rate(self) -> float | Tensor | None:
        """What the step that begins moves by; None if not at all."""
        rate = self.rate
        if callable(rate) and not isinstance(rate, Tensor):
            if self._number.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "rate: a function would be called once and its value kept by the CUDA graph; "
                    "give a tensor, and fill it before each replay"
                )
            rate = rate(self._steps + 1)
            if rate == 0:
                return None
            if not rate > 0:
                raise ValueError(f"rate: the function gave {rate} for step {self._steps + 1}")
        if self.until is not None:
            # The number is on the device, and so is the question whether it is the last.
            moves = self._number < self.until
            rate = torch.where(moves, rate, torch.zeros((), device=moves.device))
        return rate

    def _group(self) -> Any:
        group = self.process_group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        return None if group is None or group is False or dist.get_world_size(group) == 1 else group

    def _require_new(self, counts: Tensor, group: Any) -> None:
        if counts.device.type == "cpu":
            stale = state.calls == self._seen and not counts.any()
        else:
            stale = state.calls == self._seen and not state.captured and group is None
        if stale:
            raise RuntimeError(
                "balancer: no token was counted since the last step, so its counts would be those "
                "of another step. Call step() once after each optimizer step, by hand or through "
                "attach(), not both; and train in training mode: model.train()"
            )
        self._seen = state.calls

    def _follow(self) -> None:
        """Go where the model is."""
        device = self._layers[0].counts.device
        if self._last.device != device:
            self._number, self._last, self._all = (
                kept.to(device) for kept in (self._number, self._last, self._all)
            )

    def _violations(self, counts: Tensor) -> Tensor:
        parts = counts.split(self._sizes)
        found: dict[int, Tensor] = {}
        for size in set(self._sizes):
            members = [number for number, of in enumerate(self._sizes) if of == size]
            of_each = max_violation(torch.stack([parts[number] for number in members]))
            found.update(zip(members, of_each.unbind(), strict=True))
        return torch.stack([found[number] for number in range(len(parts))])

    def _by_name(self, counts: Tensor) -> dict[str, Tensor]:
        parts = counts.cpu().split(self._sizes)
        return {name: part.clone() for name, part in zip(self.names, parts, strict=True)}
