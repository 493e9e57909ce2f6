"""Architecture optimizers: mixture weights of a search space, learnt, sampled and made discrete.

Each optimizer holds one tensor of logits per dim and turns it into mixture weights alpha, which
:meth:`ArchOptimizer.mix` puts into the space; the elastic layers then run the mixture. They
differ only in how alpha comes from the logits. :class:`weightshare.supernet.Bilevel` trains them
together with the shared weights.

Random draws depend on the seed and on the number of draws made before, both in the state dict:
every rank of a distributed search mixes the same, and a resumed search goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from weightshare.sizes import Dim
from weightshare.space import ArchConfig, SearchSpace

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """The same value throughout."""
    return lambda progress: value


def linear(start: float, end: float) -> Schedule:
    """From ``start`` at progress 0 to ``end`` at progress 1, along a line."""
    return lambda progress: start + (end - start) * progress


def cosine(start: float, end: float) -> Schedule:
    """From ``start`` at progress 0 to ``end`` at progress 1, along half a cosine."""
    return lambda progress: end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class ArchOptimizer(nn.Module):
    """Base: one tensor of logits ``[K]`` per dim; subclasses say how they become alpha.

    Narrowing a dim (``space.restrict``) takes effect at once: alpha of what is not allowed is 0.

    Args:
        space: the search space.
        dims: names of the dims to search; all if not given. The others keep their active choice.
        seed: of the first logits and of all draws.

    Attributes:
        progress: share of the search that is done, 0 to 1; schedules read it.

    Raises:
        ValueError: a name in ``dims`` is no dim of the space.
    """

    def __init__(self, space: SearchSpace, dims: Sequence[str] | None = None, *, seed: int = 0):
        super().__init__()
        for name in dims or ():
            if name not in space.dims:
                known = ", ".join(space.dims)
                raise ValueError(f"{name}: no such dimension; the space has {known}")
        self.space, self.seed = space, seed
        self.names = tuple(space.dims if dims is None else dims)
        self.progress, self.draws = 0.0, 0
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.ParameterDict(
            {
                _key(name): 1e-3 * torch.randn(len(space.dims[name].choices), generator=generator)
                for name in self.names
            }
        )

    def weights(self) -> dict[str, Tensor]:
        """Mixture weights of every dim, dim name -> alpha ``[K]``; a new draw where random."""
        generator = self._generator()
        return self._each(lambda logits: self._alpha(logits, generator))

    @torch.no_grad()
    def probabilities(self) -> dict[str, list[float]]:
        """Expected mixture weights of every dim: what there is to see of the search."""
        return {name: p.tolist() for name, p in self._each(self._expected).items()}

    def entropy(self) -> Tensor:
        """Entropy of the expected mixture weights in nats, summed over the dims.

        A rising price on it makes a mixture become one architecture.
        """
        expected = self._each(self._expected).values()
        return torch.stack([torch.special.entr(p).sum() for p in expected]).sum()

    def penalty(self) -> Tensor | None:
        """Term that the method itself adds to the validation loss, if it has one."""
        return None

    def mix(self, grad: bool = True) -> dict[str, Tensor]:
        """Put new mixture weights into the space: layers run the mixture from now on.

        Args:
            grad: whether alpha wants a gradient. If so it comes as leaves, cut off the logits, so
                that several losses may be derived by one draw; :meth:`backward` carries on.

        Returns:
            The weights that the layers use, dim name -> alpha ``[K]``.
        """
        with torch.set_grad_enabled(grad):
            drawn = self.weights()
        if grad:
            self._drawn = drawn
        leaves = {name: alpha.detach().requires_grad_(grad) for name, alpha in drawn.items()}
        self.space.mix(leaves)
        return leaves

    def backward(self, grads: Sequence[Tensor]) -> None:
        """Add to the gradients of the logits, given those of the alphas of the last :meth:`mix`.

        Raises:
            RuntimeError: there was no mix, or its gradient was taken already.
        """
        drawn = self.__dict__.pop("_drawn", None)
        if drawn is None:
            raise RuntimeError("backward: call mix() first; each mix can be derived once")
        torch.autograd.backward(list(drawn.values()), list(grads))

    def discretise(self) -> ArchConfig:
        """The architecture of the greatest expected weights; the smaller choice where two tie."""
        found = dict(self.space.active)
        for name, weights in self.probabilities().items():
            best = max(range(len(weights)), key=weights.__getitem__)
            found[name] = self.space.dims[name].choices[best]
        return self.space.arch(found)

    def get_extra_state(self) -> dict[str, Any]:
        """What the state dict keeps beside the logits."""
        return {"draws": self.draws, "progress": self.progress, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it over again."""
        self.draws, self.progress, self.seed = state["draws"], state["progress"], state["seed"]

    def extra_repr(self) -> str:
        """Expected weights of every dim."""
        return "\n".join(
            f"{n}: {[round(p, 3) for p in w]}" for n, w in self.probabilities().items()
        )

    def _alpha(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Mixture weights ``[A]`` of the allowed choices, of logits ``[A]``."""
        raise NotImplementedError

    def _expected(self, logits: Tensor) -> Tensor:
        """Their mean over draws."""
        return logits.softmax(0)

    def _allowed(self) -> list[tuple[Dim, Tensor, Tensor | None]]:
        """Each dim, its logits of the allowed choices ``[A]``, and which these are (None: all)."""
        found = []
        for dim in (self.space.dims[name] for name in self.names):
            logits, index = self.logits[_key(dim.name)], None
            if len(dim.allowed) < len(dim.choices):
                index = torch.tensor([dim.index(v) for v in dim.allowed], device=logits.device)
                logits = logits[index]
            found.append((dim, logits, index))
        return found

    def _each(self, compute: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """A result ``[A]`` per dim, spread over all choices ``[K]``: zero where not allowed."""
        results = {}
        for dim, logits, index in self._allowed():
            result = compute(logits)
            if index is not None:
                result = result.new_zeros(len(dim.choices)).index_copy(0, index, result)
            results[dim.name] = result
        return results

    def _generator(self) -> torch.Generator:
        """For the next draw, the same on every rank. Draws are made on the CPU."""
        self.draws += 1
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.draws) % 2**63)


class DARTS(ArchOptimizer):
    """The softmax of the logits.

    Source: DARTS (Liu et al., 2019, arXiv 1806.09055), on one entangled weight as TangleNAS
    (Sukthanker et al., 2023, arXiv 2312.10440). First or second order: see ``Bilevel``.
    """

    def _alpha(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        return logits.softmax(0)


class DrNAS(ArchOptimizer):
    """A draw from ``Dirichlet(elu(logits) + 1)``, derived through the draw.

    Args:
        space: as the base class; so are ``dims`` and ``seed``.
        dims: see there.
        seed: see there.
        anchor: weight of the distance (Kullback-Leibler) to the even Dirichlet in the loss, which
            keeps the draws from concentrating too early.

    Source: DrNAS (Chen et al., 2021, arXiv 2006.10355).
    """

    def __init__(
        self,
        space: SearchSpace,
        dims: Sequence[str] | None = None,
        *,
        seed: int = 0,
        anchor: float = 1e-3,
    ):
        super().__init__(space, dims, seed=seed)
        self.anchor = anchor

    def penalty(self) -> Tensor | None:
        """Weighted distance of the distributions to the even one."""
        if not self.anchor:
            return None
        terms = []
        for _, logits, _ in self._allowed():
            found = _concentration(logits)
            terms.append(kl_divergence(Dirichlet(found), Dirichlet(torch.ones_like(found))))
        return self.anchor * torch.stack(terms).sum()

    def _alpha(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        # PyTorch's Dirichlet takes no generator: lend it the global one, seeded by ours.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_integer(generator))
            return Dirichlet(_concentration(logits).cpu()).rsample().to(logits.device)

    def _expected(self, logits: Tensor) -> Tensor:
        found = _concentration(logits)
        return found / found.sum()


class GDAS(ArchOptimizer):
    """A hard draw by Gumbel-softmax: forward the drawn choice alone, backward as if soft.

    The gradient of every alpha is exact at the drawn one-hot mixture, for the choices that were
    not drawn, too; it goes on to the logits through the softmax at the temperature ``tau``.

    Without gradient, :meth:`mix` activates the drawn subnet, which is what the mixture computes
    but at the cost of the subnet.

    Args:
        space: as the base class; so are ``dims`` and ``seed``.
        dims: see there.
        seed: see there.
        tau: temperature over the progress of the search.

    Source: GDAS (Dong and Yang, 2019, arXiv 1910.04465).
    """

    def __init__(
        self,
        space: SearchSpace,
        dims: Sequence[str] | None = None,
        *,
        seed: int = 0,
        tau: Schedule = linear(10.0, 0.1),  # noqa: B008 (a schedule has no state)
    ):
        super().__init__(space, dims, seed=seed)
        self.tau = tau

    def mix(self, grad: bool = True) -> dict[str, Tensor]:
        """As the base class; without ``grad`` the drawn subnet becomes the active one."""
        return super().mix() if grad else _activate(self)

    def _alpha(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
        tau = self.tau(self.progress)
        soft = ((logits.log_softmax(0) + noise.to(logits)) / tau).softmax(0)
        hard = torch.zeros_like(soft).index_fill_(0, soft.detach().argmax(0), 1)
        return hard + (soft - soft.detach())  # in this order exactly one-hot


class SPOS(ArchOptimizer):
    """One uniform choice per dim and step: trains the weights, learns no alpha.

    Which architecture is best, a search over the trained weights tells
    (:func:`weightshare.supernet.search`).

    Source: SPOS (Guo et al., 2020, arXiv 1904.00420).
    """

    def __init__(self, space: SearchSpace, dims: Sequence[str] | None = None, *, seed: int = 0):
        super().__init__(space, dims, seed=seed)
        self.logits.requires_grad_(False)

    def mix(self, grad: bool = True) -> dict[str, Tensor]:
        """Activate a uniformly drawn subnet; there is no gradient to ask for."""
        return _activate(self)

    def discretise(self) -> ArchConfig:
        """Refuse: nothing was learnt about architectures."""
        raise TypeError("SPOS learns weights only; find the best subnet with supernet.search()")

    def _alpha(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(logits), (), generator=generator).to(logits.device)
        return torch.zeros_like(logits).index_fill_(0, pick, 1)

    def _expected(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, 1 / len(logits))


def _activate(arch: ArchOptimizer) -> dict[str, Tensor]:
    """Draw one-hot weights and activate the subnet they stand for."""
    with torch.no_grad():
        drawn = arch.weights()
    dims = arch.space.dims
    picks = {name: dims[name].choices[int(alpha.argmax())] for name, alpha in drawn.items()}
    arch.space.activate({**arch.space.active, **picks})
    return drawn


def _concentration(logits: Tensor) -> Tensor:
    """Of the Dirichlet; kept off 0, where a draw is not a number."""
    return (nn.functional.elu(logits) + 1).clamp_min(1e-3)


def _integer(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _key(name: str) -> str:
    """Name of a dim as a parameter may be called."""
    return name.replace(".", "-")
