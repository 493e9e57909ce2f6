"""Linear layers that run on a slice, or on a mixture of slices, of one shared weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from weightshare.nn.elastic import narrow, selection, total, widen
from weightshare.sizes import Joint, Size, dims_of
from weightshare_kernels import (
    _grid,
    entangled_linear,
    entangled_linear_independent,
    sliced_linear,
)
from weightshare_kernels._select import Axis, Selection, select, view

Self = TypeVar("Self", bound="SlicedLinear")


class Active(NamedTuple):
    """Selected rows and columns of a shared weight; ``None`` is all of them."""

    out: Selection
    in_: Selection


class SlicedLinear(nn.Linear):
    """A linear layer that runs on selected rows and columns of its weight.

    Constructor, parameters and state dict are those of ``nn.Linear``; with nothing selected it
    computes what ``nn.Linear`` does. The selection is no state: it is not in the state dict, but
    it is copied and pickled with the module.

    Under ``torch.compile`` a new prefix compiles anew, because PyTorch treats integers held by a
    module as constants; after :func:`weightshare.one_graph` one graph serves all prefixes.

    Args:
        in_features: columns of the whole weight.
        out_features: rows of the whole weight.
        bias: whether to add a learned bias.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        Input ``[..., in]``, ``in`` being the number of selected columns; output ``[..., out]``.

    Example::

        layer = SlicedLinear(768, 3072)
        y = layer.set_active(out=1536, in_=384)(torch.randn(8, 384))  # [8, 1536]
        small = layer.export()  # nn.Linear(384, 1536) with weights of its own
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._active = Active(None, None)

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear) -> Self:
        """Make this layer out of an ``nn.Linear``.

        The parameters are taken over, not copied: both layers hold the same objects, so an
        optimizer made before goes on working, and tied weights stay tied. Training mode is kept;
        hooks stay with the old layer.

        Args:
            linear: layer to replace.

        Raises:
            TypeError: it is no ``nn.Linear``, or its weight is computed by a parametrization.
        """
        _check_linear(linear)
        shape = linear.in_features, linear.out_features
        layer = cls(*shape, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def set_active(self: Self, out: Selection = None, in_: Selection = None) -> Self:
        """Select the rows and columns that :meth:`forward` and :meth:`export` use.

        Args:
            out: rows: ``None`` (all), an int (prefix), a slice, a sequence of slices (joined in
                their order) or a 1-D index tensor without repeats.
            in_: columns, likewise.

        Returns:
            The layer itself.

        Raises:
            TypeError: a selection is of no known kind.
            ValueError: it is out of range or selects an element twice.
        """
        out = _checked("out", out, self.out_features)
        self._active = Active(out, _checked("in_", in_, self.in_features))
        return self

    @property
    def active(self) -> Active:
        """The selections in force, as ``(out, in_)``."""
        return self._active

    @property
    def active_out_features(self) -> int:
        """Number of selected rows: the width of the output."""
        return self._axes()[0].length

    @property
    def active_in_features(self) -> int:
        """Number of selected columns: the width of the input."""
        return self._axes()[1].length

    def forward(self, x: Tensor) -> Tensor:
        """Linear layer of the selected part: x ``[..., in]`` -> ``[..., out]``."""
        return sliced_linear(x, self.weight, self.bias, out=self._active.out, in_=self._active.in_)

    def export(self) -> nn.Linear:
        """Copy the selected part into a plain ``nn.Linear`` that shares nothing with this layer.

        dtype, device, ``requires_grad`` and training mode are kept. The weights are the selected
        ones bit for bit, and so are the outputs where the same kernel runs. Two things run
        another one, which may add up in another order and so differ in the last bits:
        ``nn.Linear`` itself, which is PyTorch's own kernel, and a selection by index table, which
        takes other paths than a span does.
        """
        rows, cols = self._axes()
        bias = self.bias is not None
        size = self.in_features, self.out_features
        linear = nn.Linear(*size, bias, device="meta", dtype=self.weight.dtype)
        linear.in_features, linear.out_features = cols.length, rows.length
        part = _copy(_copy(self.weight.detach(), 1, cols), 0, rows)
        linear.weight = nn.Parameter(part.contiguous(), self.weight.requires_grad)
        if bias:
            part = _copy(self.bias.detach(), 0, rows)
            linear.bias = nn.Parameter(part, self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes of the layer and what part of it is active."""
        text = super().extra_repr()
        for name, spec, size in zip(
            ("out", "in_"), self.active, (self.out_features, self.in_features), strict=True
        ):
            if spec is not None:
                text += f", {name}={_describe(spec, size)}"
        return text

    def _axes(self) -> tuple[Axis, Axis]:
        device = self.weight.device
        return (
            select("out", self.active.out, self.out_features, device),
            select("in_", self.active.in_, self.in_features, device),
        )


class EntangledLinear(SlicedLinear):
    """A linear layer that mixes nested slices of its weight, for architecture search.

    Called with ``alpha`` it computes the layer of ``sum_k alpha_k Pad(W[:o_k, :i_k])``, the bias
    likewise, without making a padded copy. Called without, it is a :class:`SlicedLinear`: after
    the search, :meth:`set_choice` activates the chosen slice and ``export()`` copies it out. At a
    one-hot alpha both agree on the chosen slice; the mixture is zero beyond it.

    Args:
        in_features: columns of the whole weight.
        out_features: rows of the whole weight.
        bias: whether to add a learned bias.
        device: where the parameters live.
        dtype: of the parameters.
        choices: K pairs ``(out, in)`` of prefix sizes; the whole layer alone if not given.

    Shape:
        With alpha ``[K]``: input ``[..., in_features]``, output ``[..., out_features]``. Without:
        as :class:`SlicedLinear`.

    Source: TangleNAS (Sukthanker et al., 2023, arXiv 2312.10440).

    Example::

        layer = EntangledLinear(768, 3072, choices=[(1536, 384), (3072, 768)])
        y = layer(x, logits.softmax(0))  # x [..., 768] -> [..., 3072]
        found = layer.set_choice(int(logits.argmax())).export()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        choices: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.choices = choices if choices is not None else [(out_features, in_features)]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, choices: Sequence[tuple[int, int]] | None = None
    ) -> EntangledLinear:
        """Make this layer out of an ``nn.Linear``, as :meth:`SlicedLinear.from_linear`.

        Args:
            linear: layer to replace; its parameters are taken over.
            choices: K pairs ``(out, in)`` of prefix sizes.
        """
        layer = super().from_linear(linear)
        if choices is not None:
            layer.choices = choices
        return layer

    @property
    def choices(self) -> tuple[tuple[int, int], ...]:
        """The K pairs ``(out, in)`` that are mixed."""
        return self._choices

    @choices.setter
    def choices(self, choices: Sequence[tuple[int, int]]) -> None:
        alpha = torch.ones(len(choices)) if isinstance(choices, Sequence) else None
        size = self.out_features, self.in_features
        _grid.check_choices(choices, alpha, size, ("out", "in"))
        self._choices = tuple((out, in_) for out, in_ in choices)

    def set_choice(self, number: int) -> EntangledLinear:
        """Activate the slice of one choice, for use without alpha.

        Args:
            number: which of the choices, 0..K-1.

        Returns:
            The layer itself.

        Raises:
            TypeError: ``number`` is no int.
            ValueError: it is out of range.
        """
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"number: expected an int, got {number!r}; use int(alpha.argmax())")
        if not 0 <= number < len(self._choices):
            raise ValueError(f"number: is {number}, outside 0..{len(self._choices) - 1}")
        return self.set_active(*self._choices[number])

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Mixture of all choices by alpha ``[K]``, or the active slice if there is no alpha."""
        if alpha is None:
            return super().forward(x)
        return entangled_linear(x, self.weight, self.bias, self._choices, alpha)

    def extra_repr(self) -> str:
        """Sizes of the layer, its active part and the number of choices."""
        return f"{super().extra_repr()}, choices={len(self._choices)}"


class Linear(SlicedLinear):
    """A linear layer whose sizes are dims of a search space: sliced, or mixed.

    It reads the active sizes; while a dim carries mixture weights (``SearchSpace.mix``) it
    computes the mixture of all choices on inputs and outputs of full size. Parameters and state
    dict are those of ``nn.Linear`` of the largest size.

    Args:
        in_features: a size, or an int where it is fixed.
        out_features: likewise.
        bias: whether to add a learned bias.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        Input ``[..., in]``, output ``[..., out]``: the active sizes, the whole ones when mixed.

    Source: slicing as Once-for-All (Cai et al., 2020); mixture as TangleNAS (2023).

    Example::

        space = SearchSpace(embed=[384, 768], ratio=[2, 4])
        fc1 = Linear(space["embed"], space["embed"] * space["ratio"])
        space.activate(space.smallest())
        y = fc1(torch.randn(8, 384))  # [8, 768]
    """

    def __init__(
        self,
        in_features: Size | int,
        out_features: Size | int,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(total(in_features), total(out_features), bias, device, dtype)
        self._bind(in_features, out_features)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Linear, in_features: Size | int, out_features: Size | int
    ) -> Linear:
        """Make this layer out of an ``nn.Linear``, as :meth:`SlicedLinear.from_linear`.

        Args:
            linear: layer to replace; its parameters are taken over.
            in_features: size of its columns; at most what it has.
            out_features: size of its rows.

        Raises:
            ValueError: a size can grow beyond the layer's.
        """
        for name, size, whole in (
            ("in_features", in_features, linear.in_features),
            ("out_features", out_features, linear.out_features),
        ):
            if total(size) > whole:
                raise ValueError(f"{name}: up to {total(size)}, but the layer has {whole}")
        layer = super().from_linear(linear)
        layer._bind(in_features, out_features)
        return layer

    def _bind(self, in_features: Size | int, out_features: Size | int) -> None:
        self.rows, self.cols = out_features, in_features
        self._joint = Joint(out_features, in_features)
        shared = set(dims_of(out_features)) & set(dims_of(in_features))
        self._independent = None if shared else (Joint(out_features), Joint(in_features))

    def set_active(self, out: Selection = None, in_: Selection = None) -> Linear:
        """Refuse: the search space says what is active."""
        raise TypeError("Linear: its sizes belong to a search space; use SearchSpace.activate")

    @property
    def active(self) -> Active:
        """The selections in force, as ``(out, in_)``."""
        return Active(selection(self.rows), selection(self.cols))

    def forward(self, x: Tensor) -> Tensor:
        """Linear layer of the active part, or of the mixture."""
        return self._linear(x, self.bias)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self._joint.mixed:
            rows, cols = selection(self.rows), selection(self.cols)
            return sliced_linear(x, self.weight, bias, out=rows, in_=cols)
        # The ops mix whole weights: an axis that is not mixed may be narrower, so it is padded.
        x = widen(x, self.cols, self.in_features)
        return narrow(self._mixed(x, bias), -1, self.rows)

    def _mixed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._independent and all(axis.mixed for axis in self._independent):
            (outs, alpha_out), (ins, alpha_in) = (a.mixture() for a in self._independent)
            return entangled_linear_independent(
                x, self.weight, bias, [o for (o,) in outs], alpha_out,
                [i for (i,) in ins], alpha_in,
            )  # fmt: skip
        choices, alpha = self._joint.mixture()
        return entangled_linear(x, self.weight, bias, choices, alpha)


def _check_linear(linear: nn.Linear) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
    if not isinstance(linear.weight, nn.Parameter):
        raise TypeError(
            "linear: its weight is computed by a parametrization or by weight_norm; remove that "
            "first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


def _checked(name: str, spec: Selection, size: int) -> Selection:
    """A selection, checked against its axis; tables and lists are copied from the caller's."""
    device = spec.device if isinstance(spec, Tensor) else torch.device("cpu")
    select(name, spec, size, device)
    if isinstance(spec, Tensor):
        return spec.detach().clone()
    return tuple(spec) if isinstance(spec, Sequence) else spec


def _copy(tensor: Tensor, dim: int, axis: Axis) -> Tensor:
    """The selected part of one dimension, in memory of its own."""
    if axis.index is not None:
        return tensor.index_select(dim, axis.index)
    return view(tensor, dim, axis).clone()


def _describe(spec: Selection, size: int) -> str:
    """A selection in a few characters, for ``repr``."""
    if isinstance(spec, Tensor):
        return f"{spec.numel()} indices of {size}"
    pieces = spec if isinstance(spec, tuple) else (spec,)
    words = []
    for piece in pieces:
        if isinstance(piece, int):
            return f"{piece} of {size}"
        bounds = ["" if b is None else str(b) for b in (piece.start, piece.stop, piece.step)]
        words.append(":".join(bounds if bounds[2] else bounds[:2]))
    return f"[{', '.join(words)}] of {size}"
