"""The three trainings of the demo, each able to stop after any step and go on from there."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.demo.data import CLASSES, FEATURES, Digits, Split, batch
from weightshare.demo.model import EagerLinear, Subnet, Supernet
from weightshare.demo.plain import Network
from weightshare.demo.settings import Settings
from weightshare.nn import EntangledLinear


class Phase:
    """A training of ``total`` steps; ``position`` of them are done.

    Everything that a later step depends on is in ``state_dict``; all randomness comes from
    generators seeded by the settings, never from the global one.
    """

    name: str
    title: str

    def __init__(self, settings: Settings, digits: Digits):
        self.settings, self.digits = settings, digits
        self.position, self.total, self.seconds = 0, settings.steps, 0.0
        self.status = ""

    def advance(self) -> None:
        """Do one step."""
        start = time.perf_counter()
        self.step()
        self.position += 1
        self.seconds += time.perf_counter() - start

    def step(self) -> None:
        """The work of step ``position``."""
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        """What later phases and the report need, once all steps are done."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State to go on from: tensors, numbers, lists and dicts only."""
        return {"position": self.position, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.position, self.seconds = state["position"], state["seconds"]

    def minibatch(self, number: int, split: Split | None = None) -> Split:
        """A minibatch, of the training images if not said otherwise."""
        split = self.digits.train if split is None else split
        return batch(split, number, self.settings.batch, self.settings.seed)


class Shared(Phase):
    """One set of weights for all subnets: the sandwich rule with in-place distillation.

    Sources: Universally Slimmable Networks (Yu & Huang, 2019, arXiv 1903.05134) for both.
    """

    name, title = "shared", "one network for all subnets"

    def __init__(self, settings: Settings, digits: Digits):
        super().__init__(settings, digits)
        self.model = new_supernet(settings)
        self.optimizer = new_optimizer(self.model, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []

    def step(self) -> None:
        """Largest, smallest and two random subnets; one backward pass of their summed loss."""
        subnets = sandwich(self.model, 2, self.generator)
        loss = sandwich_loss(self.model, subnets, *self.minibatch(self.position))
        descend(loss, self.optimizer, self.settings.lr * cosine(self.position, self.total))
        if self.position % 10 == 0:
            self.losses.append(loss.item() / len(subnets))
            self.status = f"loss {self.losses[-1]:.3f}"

    def result(self) -> dict[str, Any]:
        """The weights, and the mean loss of the subnets of every tenth step."""
        state = {"model": self.model.state_dict(), "losses": self.losses, "seconds": self.seconds}
        return state

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Phase.state_dict`."""
        return super().state_dict() | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`Phase.load_state_dict`."""
        super().load_state_dict(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])


class Alone(Phase):
    """Every subnet by itself: a plain network, the same batches, steps and learning rate."""

    name, title = "alone", "each subnet trained alone"

    def __init__(self, settings: Settings, digits: Digits):
        super().__init__(settings, digits)
        self.subnets = new_supernet(settings).subnets
        self.total = settings.steps * len(self.subnets)
        self.scores: list[list[float]] = []
        self._start()

    def _start(self) -> None:
        """Make the network that the step at ``position`` trains."""
        number = min(self.position // self.settings.steps, len(self.subnets) - 1)
        subnet = self.subnets[number]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 1000 + number)
            self.model = Network(FEATURES, CLASSES, *subnet)
        self.optimizer = new_optimizer(self.model, self.settings)
        self.status = f"width {subnet.width}, depth {subnet.depth}"

    def step(self) -> None:
        """One ordinary step of one subnet."""
        step = self.position % self.settings.steps
        if step == 0:
            self._start()
        x, y = self.minibatch(step)
        loss = F.cross_entropy(self.model(x), y)
        descend(loss, self.optimizer, self.settings.lr * cosine(step, self.settings.steps))
        if step == self.settings.steps - 1:
            self.scores.append([accuracy(self.model, s) for s in self.digits[1:]])

    def result(self) -> dict[str, Any]:
        """Validation and test accuracy of every subnet."""
        return {"scores": self.scores, "seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Phase.state_dict`."""
        return super().state_dict() | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scores": self.scores,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`Phase.load_state_dict`."""
        super().load_state_dict(state)
        if self.position % self.settings.steps:  # else the next step makes its own network
            self._start()
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scores = [list(pair) for pair in state["scores"]]


class Search(Phase):
    """Width and depth by gradient: DARTS on entangled weights.

    First-order DARTS (Liu et al., 2019, arXiv 1806.09055) on one set of weights (TangleNAS,
    Sukthanker et al., 2023, arXiv 2312.10440): alpha descends the loss on validation images plus
    the expected share of parameters, the weights descend the loss on training images. A rising
    price on the entropy of alpha makes the mixture become one subnet.
    """

    name, title = "search", "architecture search by gradient"

    def __init__(self, settings: Settings, digits: Digits, weights: dict[str, Tensor]):
        super().__init__(settings, digits)
        self.total = settings.search_steps
        self.model = new_supernet(settings)
        self.model.load_state_dict(weights)
        self.logits = nn.ParameterList(
            torch.zeros(len(axis)) for axis in (self.model.widths, self.model.depths)
        )
        self.optimizer = new_optimizer(self.model, settings)
        self.alpha_optimizer = torch.optim.Adam(self.logits, lr=settings.alpha_lr)
        counts = self.model.parameter_counts()
        self.share = counts / counts.max()
        self.history: list[list[list[float]]] = []

    def alpha(self) -> list[Tensor]:
        """Mixture coefficients of the widths and of the depths."""
        return [logits.softmax(0) for logits in self.logits]

    def step(self) -> None:
        """One step of alpha on validation images, one of the weights on training images."""
        x, y = self.minibatch(self.position, self.digits.val)
        widths, depths = self.alpha()
        loss = F.cross_entropy(self.model.mix(x, widths, depths), y)
        loss = loss + self.settings.cost * (widths @ self.share @ depths)
        undecided = torch.special.entr(widths).sum() + torch.special.entr(depths).sum()
        loss = loss + self.settings.entropy * self.position / self.total * undecided
        # inputs= keeps this backward pass from adding to the gradients of the weights.
        self.alpha_optimizer.zero_grad()
        loss.backward(inputs=list(self.logits))
        self.alpha_optimizer.step()

        x, y = self.minibatch(self.position)
        widths, depths = (a.detach() for a in self.alpha())
        rate = self.settings.lr * 0.5 * cosine(self.position, self.total)
        descend(F.cross_entropy(self.model.mix(x, widths, depths), y), self.optimizer, rate)
        if self.position % 5 == 0 or self.position == self.total - 1:
            self.history.append([widths.tolist(), depths.tolist()])
        found = self.found()
        self.status = f"width {found.width}, depth {found.depth}"

    def found(self) -> Subnet:
        """The subnet of the largest coefficients."""
        width, depth = (int(logits.argmax()) for logits in self.logits)
        return Subnet(self.model.widths[width], self.model.depths[depth])

    def result(self) -> dict[str, Any]:
        """The subnet found, the weights trained along, and alpha over time."""
        return {
            "model": self.model.state_dict(),
            "found": list(self.found()),
            "history": self.history,
            "seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Phase.state_dict`."""
        return super().state_dict() | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "logits": self.logits.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`Phase.load_state_dict`."""
        super().load_state_dict(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.logits.load_state_dict(state["logits"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.history = list(state["history"])


def sandwich(model: Supernet, count: int, generator: torch.Generator) -> list[Subnet]:
    """Largest, smallest and ``count`` random subnets."""
    subnets = model.subnets
    picks = torch.randint(len(subnets), (count,), generator=generator)
    return [model.largest, model.smallest, *(subnets[i] for i in picks.tolist())]


def sandwich_loss(model: Supernet, subnets: Sequence[Subnet], x: Tensor, y: Tensor) -> Tensor:
    """Summed loss: the first subnet learns the labels, the others what the first predicts.

    Args:
        model: the supernet.
        subnets: the largest one first.
        x: images ``[n, features]``.
        y: labels ``[n]``.
    """
    teacher = model.set_active(subnets[0])(x)
    loss = F.cross_entropy(teacher, y)
    soft = teacher.detach().softmax(-1)
    for subnet in subnets[1:]:
        loss = loss + F.cross_entropy(model.set_active(subnet)(x), soft)
    return loss


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One backward pass and one optimizer step at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def cosine(step: int, steps: int) -> float:
    """Cosine decay from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of images classified right."""
    with torch.no_grad():
        return (model(split.x).argmax(-1) == split.y).float().mean().item()


def new_supernet(settings: Settings, eager: bool = False) -> Supernet:
    """The supernet with its initial weights, the same for the same seed."""
    linear = EagerLinear if eager else EntangledLinear
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Supernet(FEATURES, CLASSES, settings.widths, settings.depths, linear)


def new_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, the same for every training."""
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, fused=True)
