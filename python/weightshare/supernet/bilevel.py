"""Bilevel search: alpha descends the validation loss, the shared weights the training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from weightshare.supernet.architect import ArchOptimizer, Schedule, constant

Loss = Callable[[], Tensor]


class Bilevel:
    """One step of a differentiable architecture search.

    Args:
        arch: the architecture optimizer.
        optimizer: of the shared weights.
        arch_optimizer: of ``arch.parameters()``, usually Adam; None for :class:`SPOS`, or where
            alpha is not to be learnt.
        steps: length of the search; schedules see ``step / (steps - 1)``.
        warmup: steps at the start that train the weights alone.
        unroll: learning rate of the step that second-order DARTS looks ahead, usually that of the
            weights; 0 is first order.
        arch_rate: factor on the learning rates of ``arch_optimizer`` over the search.
        entropy: price on the entropy of alpha over the search.
        clip: greatest norm of the weights' gradient.

    Attributes:
        step: number of steps done.

    Example::

        arch = DARTS(space)
        search = Bilevel(arch, optimizer, torch.optim.Adam(arch.parameters(), 3e-4), steps=1000)
        for (x, y), (u, v) in zip(train, valid):
            search(lambda: loss(model(x), y), lambda: loss(model(u), v))
        space.activate(arch.discretise())

    Small choices can cheat a price on size: layers whose scale does not matter (ReLU) make up for
    a small alpha by larger weights, so alpha leans to the smallest while a wider one does the
    work. A network with 8 of 32 units best of all had 0.63 on 2 units and 0.35 on 8 until the
    price on entropy rose to 2; then all was on 8. Compare what is found with :func:`search`.

    Under DistributedDataParallel the validation loss calls the module inside the wrapper
    (``ddp.module``): its backward pass reaches alpha alone, which is averaged over the ranks here.

    Source: DARTS (Liu et al., 2019, arXiv 1806.09055), Algorithm 1.
    """

    def __init__(
        self,
        arch: ArchOptimizer,
        optimizer: Optimizer,
        arch_optimizer: Optimizer | None,
        *,
        steps: int,
        warmup: int = 0,
        unroll: float = 0.0,
        arch_rate: Schedule | None = None,
        entropy: Schedule | None = None,
        clip: float | None = None,
    ):
        self.arch, self.optimizer, self.arch_optimizer = arch, optimizer, arch_optimizer
        self.steps, self.warmup, self.unroll, self.clip = steps, warmup, unroll, clip
        self.arch_rate, self.entropy = arch_rate or constant(1.0), entropy or constant(0.0)
        self.step = 0
        for group in arch_optimizer.param_groups if arch_optimizer else ():
            group.setdefault("initial_lr", group["lr"])  # PyTorch's name; saved with the optimizer

    def __call__(self, train_loss: Loss, valid_loss: Loss) -> Tensor:
        """One step of alpha (after the warm-up), then one of the weights.

        Args:
            train_loss: computes the loss on a training batch, with the network as it stands.
            valid_loss: the same on a validation batch. A price on size goes in here: the dims
                of the space hold the alpha in use.

        Returns:
            The training loss, detached.
        """
        self.arch.progress = self.step / max(self.steps - 1, 1)
        if self.arch_optimizer is not None and self.step >= self.warmup:
            self._arch_step(train_loss, valid_loss)
        self.arch.mix(grad=False)
        self.optimizer.zero_grad()
        loss = train_loss()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(_weights(self.optimizer), self.clip)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def state_dict(self) -> dict[str, int]:
        """How far the search is; modules and optimizers have their own."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.step = state["step"]

    def _arch_step(self, train_loss: Loss, valid_loss: Loss) -> None:
        assert self.arch_optimizer is not None
        factor = self.arch_rate(self.arch.progress)
        for group in self.arch_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.arch_optimizer.zero_grad()
        arch_gradient(
            self.arch,
            valid_loss,
            train_loss,
            _weights(self.optimizer),
            unroll=self.unroll,
            entropy=self.entropy(self.arch.progress),
        )
        _average(self.arch)
        self.arch_optimizer.step()


def arch_gradient(
    arch: ArchOptimizer,
    valid_loss: Loss,
    train_loss: Loss | None = None,
    weights: Sequence[nn.Parameter] = (),
    *,
    unroll: float = 0.0,
    entropy: float = 0.0,
) -> None:
    """Add the gradient of the validation loss to that of the logits; weights are left alone.

    Args:
        arch: the architecture optimizer; it draws once.
        valid_loss: computes the validation loss.
        train_loss: computes the training loss (second order only).
        weights: shared weights that the training loss is descended by (second order only).
        unroll: learning rate of one step ahead, ``w' = w - unroll dL_train/dw``; 0: first order.
        entropy: price on the entropy of alpha.
    """
    alphas = list(arch.mix().values())
    if unroll:
        assert train_loss is not None
        grads = _unrolled(alphas, valid_loss, train_loss, weights, unroll)
    else:
        grads = _gradient(valid_loss(), alphas)
    arch.backward(grads)
    extra = [arch.penalty(), entropy * arch.entropy() if entropy else None]
    for term in extra:
        if term is not None:
            term.backward()


def _unrolled(
    alphas: list[Tensor],
    valid_loss: Loss,
    train_loss: Loss,
    weights: Sequence[nn.Parameter],
    rate: float,
) -> list[Tensor]:
    """Gradient of ``L_valid(w - rate dL_train/dw, alpha)`` with respect to alpha.

    The second derivative it contains is a finite difference of ``dL_train/dalpha`` along
    ``dL_valid/dw'``: equations 7 and 8 of DARTS.
    """
    weights = [w for w in weights if w.requires_grad]
    before = [w.detach().clone() for w in weights]
    try:
        _shift(weights, before, _gradient(train_loss(), weights), -rate)
        both = _gradient(valid_loss(), [*alphas, *weights])
        direct, ahead = both[: len(alphas)], both[len(alphas) :]
        norm = torch.stack(torch._foreach_norm(ahead)).norm()
        # In single precision 0.01 / |g|, as published: smaller drowns in rounding.
        step = float(0.01 / norm.clamp_min(1e-12))
        _shift(weights, before, ahead, step)
        plus = _gradient(train_loss(), alphas)
        _shift(weights, before, ahead, -step)
        minus = _gradient(train_loss(), alphas)
    finally:
        _shift(weights, before, before, 0.0)
    return [d - rate * (p - m) / (2 * step) for d, p, m in zip(direct, plus, minus, strict=True)]


def _gradient(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of a loss; zeros where it does not depend on a tensor."""
    return list(torch.autograd.grad(loss, of, materialize_grads=True))


@torch.no_grad()
def _shift(
    weights: Sequence[Tensor], start: Sequence[Tensor], along: Sequence[Tensor], by: float
) -> None:
    """Set the weights to ``start + by * along``."""
    for weight, origin, direction in zip(weights, start, along, strict=True):
        weight.copy_(origin if by == 0 else origin + by * direction)


def _average(arch: ArchOptimizer) -> None:
    """Average the gradient of the logits over the ranks, which saw different data."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for logits in arch.parameters():
            if logits.grad is not None:
                dist.all_reduce(logits.grad)
                logits.grad.div_(dist.get_world_size())


def _weights(optimizer: Optimizer) -> list[nn.Parameter]:
    return [w for group in optimizer.param_groups for w in group["params"]]
