"""Depth as a choice: containers of which a subnet runs some layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function

from weightshare.sizes import Dim, Joint, Size, points


class Layers(nn.ModuleList):
    """A list of layers of which the active ones run; or a mixture of depths.

    Iteration, ``len``, indexing and slicing show the active layers alone, so a loop such as
    ``for layer in model.layers: x = layer(x)`` in code that knows no search space runs the
    subnet. Called, it is an ``nn.Sequential`` whose further arguments go to every layer.
    ``children``, ``parameters`` and the state dict hold all layers under their usual keys.

    While ``depth`` carries mixture weights the outputs of the depths are mixed,
    ``sum_k alpha_k h_(d_k)``, in one pass through the deepest; a mixed ``skip`` dim makes
    ``alpha_0 x + alpha_1 layer(x)`` of its layer. Only a call can compute that, a loop cannot.

    Args:
        modules: the layers, or an ``nn.ModuleList`` or ``nn.Sequential`` of them.
        depth: how many layers run, from the first on; None is all.
        skip: one dim per layer with the choices 0 (skip) and 1 (keep); None keeps all. With a
            depth as well, a layer runs if both let it.
        zero_grads: a call gives the parameters of layers that do not run gradients of zero, where
            they would have none: for DistributedDataParallel, which waits for a gradient of each.

    Raises:
        TypeError, ValueError: the depth can exceed the layers, or skip does not fit them.

    Source: prefix depth as Once-for-All (Cai et al., 2020), mixed outputs as TangleNAS
    (Sukthanker et al., 2023).

    Example::

        space = SearchSpace(depth=[2, 3, 4])
        layers = Layers([nn.Linear(8, 8) for _ in range(4)], space["depth"])
        space.activate({"depth": 2})
        y = layers(torch.randn(1, 8))  # two layers
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        depth: Size | int | None = None,
        *,
        skip: Sequence[Dim] | None = None,
        zero_grads: bool = False,
    ):
        super().__init__()
        self._sequential = not isinstance(modules, nn.ModuleList)  # as what it is exported
        if isinstance(modules, nn.Module):
            self.train(modules.training)
            layers = dict(modules._modules)  # not named_children: a layer may occur twice
        else:
            layers = {str(number): module for number, module in enumerate(modules)}
        for name, module in layers.items():
            self.add_module(name, module)
        self.depth, self.skip = depth, None if skip is None else tuple(skip)
        self.zero_grads = zero_grads
        _check_depth(depth, len(self._modules))
        _check_skip(self.skip, len(self._modules))

    @property
    def active(self) -> list[nn.Module]:
        """The layers that run, mixtures aside."""
        return [
            module for number, module in enumerate(self._modules.values()) if self._runs(number)
        ]  # type: ignore[misc]

    @property
    def mixed(self) -> bool:
        """Whether the depth, or whether a layer runs, carries mixture weights."""
        sizes = (self.depth, *(self.skip or ()))
        return any(isinstance(size, Size) and size.mixed for size in sizes)

    def _runs(self, number: int) -> bool:
        depth = self.depth.value if isinstance(self.depth, Size) else self.depth
        if depth is not None and number >= depth:
            return False
        return self.skip is None or self.skip[number].value != 0

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Run x through the active layers, or the mixture; each is called with the arguments."""
        if self.mixed:
            return self._mixture(x, *args, **kwargs)
        idle: list[nn.Module] = []
        for number, layer in enumerate(self._modules.values()):
            if self._runs(number):
                x = layer(x, *args, **kwargs)  # type: ignore[misc]
            elif self.zero_grads:
                idle.append(layer)  # type: ignore[arg-type]
        return touch(x, (p for layer in idle for p in layer.parameters())) if idle else x

    def _mixture(self, x: Tensor, *args, **kwargs) -> Tensor:
        ends = self._ends()
        out, none = None, []
        for number, layer in enumerate(self._modules.values()):
            if number in ends:  # the mixture so far: no list of outputs is kept
                out = _add(out, x, ends[number])
            if number >= max(ends):
                none.append(layer)
                continue
            keep = self.skip[number] if self.skip is not None else None
            if keep is None or (keep.alpha is None and keep.value):
                x = layer(x, *args, **kwargs)  # type: ignore[misc]
            elif keep.alpha is not None:
                x = self._either(keep, layer, x, *args, **kwargs)  # type: ignore[arg-type]
            else:
                none.append(layer)
        last = len(self._modules)
        out = _add(out, x, ends[last]) if last in ends else out
        if self.zero_grads and none:
            out = touch(out, (p for layer in none for p in layer.parameters()))  # type: ignore
        return out  # type: ignore[return-value]

    def _ends(self) -> dict[int, Tensor | None]:
        """Depths that are mixed and their weights; one depth of weight None if only skips are."""
        if not (isinstance(self.depth, Size) and self.depth.mixed):
            depth = self.depth.value if isinstance(self.depth, Size) else self.depth
            return {len(self._modules) if depth is None else depth: None}
        choices, alpha = Joint(self.depth).mixture()
        ends: dict[int, Tensor | None] = {}
        for (depth,), weight in zip(choices, alpha.unbind(), strict=True):
            before = ends.get(depth)
            ends[depth] = weight if before is None else before + weight
        return ends

    @staticmethod
    def _either(keep: Dim, layer: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        out = None
        for value, weight in zip(keep.choices, keep.alpha.unbind(), strict=True):  # type: ignore[union-attr]
            out = _add(out, layer(x, *args, **kwargs) if value else x, weight)
        return out  # type: ignore[return-value]

    def export(self) -> nn.ModuleList | nn.Sequential:
        """The active layers, exported, in a plain container of the kind this was made from.

        A list becomes an ``nn.Sequential``, which can be called as this can.
        """
        from weightshare.export import export  # it exports every kind of module: a cycle

        names = [name for number, name in enumerate(self._modules) if self._runs(number)]
        layers = [export(layer) for layer in self.active]
        if not self._sequential:
            return nn.ModuleList(layers).train(self.training)
        if all(name.isdigit() for name in names):
            return nn.Sequential(*layers).train(self.training)
        pairs = OrderedDict(zip(names, layers, strict=True))
        return nn.Sequential(pairs).train(self.training)

    def __len__(self) -> int:
        return len(self._modules) if self.mixed else len(self.active)

    def __iter__(self) -> Iterator[nn.Module]:
        self._refuse_mixture()
        return iter(self.active)

    def __getitem__(self, index):
        self._refuse_mixture()
        found = self.active[index]
        return nn.ModuleList(found) if isinstance(index, slice) else found

    def __setitem__(self, index: int, module: nn.Module) -> None:  # type: ignore[override]
        """Replace one of the active layers."""
        names = [name for number, name in enumerate(self._modules) if self._runs(number)]
        self._modules[names[index]] = module

    def _refuse_mixture(self) -> None:
        if self.mixed:
            raise RuntimeError(
                "Layers: the depth is mixed, which a loop over the layers cannot compute; call the "
                "container instead, layers(x), or end the mixture with space.mix(None); to see "
                "all layers use .children()"
            )

    def _refuse(self, *_args, **_kwargs) -> NoReturn:
        """Refuse: the number of layers belongs to the search space."""
        raise TypeError("Layers: their number is fixed; make a new Layers of the layers wanted")

    append = extend = insert = pop = __delitem__ = __add__ = __iadd__ = _refuse  # type: ignore
    __repr__ = nn.Module.__repr__  # all layers, not the active ones alone

    def extra_repr(self) -> str:
        """What decides which layers run."""
        return f"depth={self.depth}" + ("" if self.skip is None else f", skip={list(self.skip)}")


def touch(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return x, and give parameters that its computation left out gradients of zero.

    DistributedDataParallel without ``find_unused_parameters`` waits for a gradient of every
    parameter; the zeros take no part in the computation and no memory until they are summed.

    Args:
        x: what the loss depends on, the loss itself for instance.
        parameters: what else is to have a gradient; frozen ones are left alone.
    """
    wanting = [p for p in parameters if p.requires_grad]
    return _Touch.apply(x, *wanting) if wanting and torch.is_grad_enabled() else x


class _Touch(Function):
    """Identity of the first argument; the others get gradients of zero."""

    @staticmethod
    def forward(x, *parameters):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return grad, *(p.new_zeros(()).expand(p.shape) for p in ctx.saved_tensors)


def _add(out: Tensor | None, x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight.to(x.dtype)
    return x if out is None else out + x


def _check_depth(depth: Size | int | None, layers: int) -> None:
    if isinstance(depth, Size):
        values: list = [depth.at(point) for point in points(depth.dims)]
    else:
        values = [] if depth is None else [depth]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"depth: expected whole numbers of layers, got {value!r}")
        if not 0 <= value <= layers:
            raise ValueError(f"depth: {value} is outside 0..{layers}, the number of layers")


def _check_skip(skip: Sequence[Dim] | None, layers: int) -> None:
    if skip is None:
        return
    if len(skip) != layers:
        raise ValueError(f"skip: {len(skip)} dims for {layers} layers; one for each is needed")
    for dim in skip:
        if not isinstance(dim, Dim):
            raise TypeError(f"skip: expected a Dim for each layer, got {dim!r}")
        if not set(dim.choices) <= {0, 1}:
            raise ValueError(
                f"skip: {dim.name} has the choices {list(dim.choices)}; only 0 (skip) and 1 (keep) "
                "can be"
            )
