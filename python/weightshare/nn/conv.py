"""Convolutions whose channels and kernel sizes are dims of a search space."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from weightshare.nn.elastic import Axis, copy_parameter, length, selection, take, total
from weightshare.sizes import Joint, Size, dims_of, points
from weightshare_kernels import entangle, sliced_weight

Pair = int | tuple[int, ...]
Mode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2d(nn.Conv2d):
    """A 2-D convolution on a slice, or on a mixture of slices, of one shared weight.

    Smaller kernels are the centre of the whole one, and the padding shrinks with them, so that
    every kernel size gives an image of the same size. Groups keep their channels: with fewer
    channels active there are fewer groups, so a depthwise convolution (``groups`` = whole number
    of channels) stays depthwise. While a dim carries mixture weights (``SearchSpace.mix``) one
    pass builds the mixed weight, and one convolution of full size runs on it.

    Parameters and state dict are those of ``nn.Conv2d`` of the largest size; ``transforms=True``
    adds Once-for-All's matrices, ``7to5_matrix`` and so on.

    Args:
        in_channels: a size, or an int where it is fixed.
        out_channels: likewise.
        kernel_size: likewise, the sizes odd; or a pair ``(height, width)`` of ints.
        stride, padding_mode: as of ``nn.Conv2d``.
        padding: as of ``nn.Conv2d``, that of the whole kernel; ``"auto"`` keeps the image's size
            at stride 1: ``(kernel - 1) // 2 * dilation``.
        dilation: as of ``nn.Conv2d``.
        groups: number of groups of the whole layer; a size counts with its maximum.
        bias: whether to add a learned bias.
        device: where the parameters live.
        dtype: of the parameters.
        transforms: whether a smaller kernel is the next larger one's centre times a learned
            matrix ``[k*k, k*k]``, the identity at first.

    Raises:
        ValueError: sizes do not fit the groups, an elastic kernel is even or has less padding
            than the smaller ones need, or ``transforms`` has no elastic kernel to act on.

    Shape:
        Input ``[N, in, H, W]``, output ``[N, out, H', W']``: the active channels, all when mixed.

    Source: elastic kernels and transforms of Once-for-All (Cai et al., 2020); mixture as
        TangleNAS (Sukthanker et al., 2023).

    Example::

        space = SearchSpace(width=[480, 640, 960], kernel=[3, 5, 7])
        width = space["width"]
        depthwise = Conv2d(width, width, space["kernel"], padding="auto", groups=width)
    """

    def __init__(
        self,
        in_channels: Axis,
        out_channels: Axis,
        kernel_size: Axis | tuple[int, ...],
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: Axis = 1,
        bias: bool = True,
        padding_mode: Mode = "zeros",
        device=None,
        dtype=None,
        *,
        transforms: bool = False,
    ):
        whole = kernel_size if isinstance(kernel_size, tuple) else total(kernel_size)
        if padding == "auto":
            sides = zip(_pair(whole), _pair(dilation), strict=True)
            padding = tuple((k - 1) // 2 * d for k, d in sides)
        super().__init__(
            total(in_channels), total(out_channels), whole, stride, padding, dilation,  # type: ignore
            total(groups), bias, padding_mode, device, dtype,
        )  # fmt: skip
        self._bind(out_channels, in_channels, kernel_size)
        if transforms:
            self._add_transforms(self.weight.device)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        in_channels: Axis | None = None,
        out_channels: Axis | None = None,
        kernel_size: Axis | None = None,
        *,
        transforms: bool = False,
    ) -> Conv2d:
        """Make this layer out of an ``nn.Conv2d``.

        The parameters are taken over, not copied: both layers hold the same objects. Training
        mode is kept; hooks stay with the old layer.

        Args:
            conv: layer to replace.
            in_channels: size of its input, with the layer's as its maximum; fixed by default.
            out_channels: likewise of its output.
            kernel_size: likewise of its kernel.
            transforms: as of the constructor.

        Raises:
            TypeError: it is no ``nn.Conv2d``, computes something else in its forward, or its
                weight is computed by a parametrization.
            ValueError: the maxima of the sizes are not the layer's.
        """
        if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        if not isinstance(conv.weight, nn.Parameter):
            raise TypeError("conv: its weight is computed by a parametrization; remove that first")
        sizes = (
            conv.in_channels if in_channels is None else in_channels,
            conv.out_channels if out_channels is None else out_channels,
            conv.kernel_size if kernel_size is None else kernel_size,
        )
        layer = cls(
            *sizes, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None,
            conv.padding_mode, "meta", conv.weight.dtype,
        )  # fmt: skip
        if layer.weight.shape != conv.weight.shape:
            raise ValueError(
                f"conv: its weight is {tuple(conv.weight.shape)}, but the sizes make one of "
                f"{tuple(layer.weight.shape)}"
            )
        layer.weight, layer.bias = conv.weight, conv.bias
        if transforms:
            layer._add_transforms(conv.weight.device)
        return layer.train(conv.training)

    def _bind(self, rows: Axis, cols: Axis, kernel: Axis | tuple[int, ...]) -> None:
        self.rows, self.cols = rows, cols
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        inner = cols if self.groups == 1 else self.in_channels // self.groups
        self._axes: tuple[Axis, ...] = (rows, inner, *sides)
        self._joint, self._bias_joint = Joint(*self._axes), Joint(rows)
        self._kernels = _sizes(sides[0])
        self._steps = tuple(itertools.pairwise(self._kernels))
        self.transforms = False
        _check_groups(self)
        _check_kernel(self)

    def _add_transforms(self, device: torch.device) -> None:
        if not self._steps:
            raise ValueError("transforms: kernel_size has one value only; give a Dim of several")
        for large, small in self._steps:
            matrix = torch.eye(small**2, device=device, dtype=self.weight.dtype)
            self.register_parameter(f"{large}to{small}_matrix", nn.Parameter(matrix))
        self.transforms = True

    def forward(self, x: Tensor) -> Tensor:
        """Convolution with the active part of the weight, or with the mixture."""
        weight, bias = self.effective(x.shape[-3])
        groups = 1 if self.groups == 1 else x.shape[-3] // weight.shape[1]
        padding = self._padding(weight)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._rim(weight), mode=self.padding_mode), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def effective(self, channels: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that forward uses: the active part, or the mixture at full size.

        Args:
            channels: of the input.

        Raises:
            ValueError: another number of channels is active.
        """
        wanted = length(self.cols)
        if channels != wanted:
            raise ValueError(
                f"x: has {channels} channels, but {wanted} of {self.in_channels} are active"
            )
        weight = self._mixture() if self._joint.mixed else self._part()
        return weight, None if self.bias is None else take(self.bias, self._bias_joint)

    def _part(self) -> Tensor:
        """Active part of the weight, whether or not a mixture runs."""
        if not self.transforms:
            return sliced_weight(self.weight, *map(selection, self._axes))
        part = sliced_weight(self.weight, *map(selection, self._axes[:2]))
        return self._shrink(part, _active(self._axes[-1]))

    def _mixture(self) -> Tensor:
        """``sum_k alpha_k Pad(W[choice_k])``; axes that are not mixed are cut, not padded."""
        choices, alpha = self._joint.mixture()
        if self.transforms:
            weight = self._transformed_mixture(choices, alpha)
        else:
            weight = entangle(self.weight, choices, alpha)
        cut = [isinstance(axis, Size) and not axis.mixed for axis in self._axes]
        return sliced_weight(
            weight, *(selection(a) if c else None for a, c in zip(self._axes, cut, strict=True))
        )

    def _transformed_mixture(self, choices: Sequence[tuple], alpha: Tensor) -> Tensor:
        """Mixtures of channels, one per kernel size, each padded to the next larger kernel."""
        sizes = sorted({choice[-1] for choice in choices})
        mix = self.weight.new_zeros(1, 1, sizes[0], sizes[0])
        for kernel in sizes:
            here = [n for n, choice in enumerate(choices) if choice[-1] == kernel]
            whole = self._shrink(self.weight, kernel)
            part = entangle(whole, [choices[n] for n in here], alpha[here])
            mix = part + F.pad(mix, [(kernel - mix.shape[-1]) // 2] * 4)
        return mix

    def _shrink(self, weight: Tensor, kernel: int) -> Tensor:
        """Kernel of a smaller size: the centre times a matrix, from size to size."""
        for large, small in self._steps:
            if large <= kernel:
                break
            centre = F.pad(weight, [(small - large) // 2] * 4).flatten(2)
            matrix = self.get_parameter(f"{large}to{small}_matrix")
            weight = F.linear(centre, matrix).unflatten(2, (small, small))
        return weight

    def _padding(self, weight: Tensor) -> str | tuple[int, ...]:
        """Padding beside this weight: that of the whole kernel, less what the kernel lacks."""
        if isinstance(self.padding, str):
            return self.padding  # "same" follows by itself, "valid" has nothing to follow
        return tuple(p - less for p, less in zip(self.padding, self._less(weight), strict=True))

    def _rim(self, weight: Tensor) -> list[int]:
        """The same as ``F.pad`` takes it, for padding that is not zeros."""
        height, width = self._less(weight)
        rim = self._reversed_padding_repeated_twice
        return [p - less for p, less in zip(rim, (width, width, height, height), strict=True)]

    def _less(self, weight: Tensor) -> list[int]:
        sides = zip(self.kernel_size, weight.shape[2:], self.dilation, strict=True)
        return [(whole - side) // 2 * d for whole, side, d in sides]

    def export(self) -> nn.Conv2d:
        """Copy the active part, transforms applied, into a plain ``nn.Conv2d`` that shares nothing.

        dtype, device, memory format, ``requires_grad`` and training mode are kept.
        """
        with torch.no_grad():
            weight = self._part().to(self.weight.dtype).clone()
        width, padding = _active(self.cols), self._padding(weight)
        conv = nn.Conv2d(
            width, weight.shape[0], tuple(weight.shape[2:]), self.stride, padding,  # type: ignore
            self.dilation, width // weight.shape[1], self.bias is not None,  # type: ignore
            self.padding_mode, "meta", weight.dtype,
        )  # fmt: skip
        conv.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = copy_parameter(self.bias, self._bias_joint)  # type: ignore[arg-type]
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Sizes of the layer and what part of it is active."""
        if not any(isinstance(axis, Size) for axis in self._axes):
            return super().extra_repr()
        now = _active(self.cols), _active(self.rows), _active(self._axes[-1])
        return f"{super().extra_repr()}, active={now[0]}->{now[1]}, kernel {now[2]}"


def _active(axis: Axis) -> int:
    """Active size of an axis, whether or not it is mixed."""
    return axis.value if isinstance(axis, Size) else axis


def _sizes(axis: Axis) -> tuple[int, ...]:
    """All sizes that an axis can have, the largest first."""
    if not isinstance(axis, Size):
        return (axis,)
    return tuple(sorted({axis.at(point) for point in points(axis.dims)}, reverse=True))


def _check_kernel(layer: Conv2d) -> None:
    sizes, padding = layer._kernels, layer.padding
    if len(sizes) == 1:
        return
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"kernel_size: sizes {list(sizes)} must be odd, to have one centre")
    least = tuple((sizes[0] - sizes[-1]) // 2 * d for d in layer.dilation)
    pads = (0, 0) if padding == "valid" else padding
    if not isinstance(pads, str) and any(p < n for p, n in zip(pads, least, strict=True)):
        raise ValueError(
            f"padding: is {padding}, but a {sizes[-1]}x{sizes[-1]} kernel in the place of a "
            f"{sizes[0]}x{sizes[0]} one needs at least {least}; use padding='auto'"
        )


def _check_groups(layer: Conv2d) -> None:
    """Require that what is active of input and output is whole groups, and the same ones."""
    if layer.groups == 1:
        return
    per_out, per_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for point in points(dims_of(layer.rows, layer.cols)):
        outs, ins = _groups(layer.rows, point, per_out), _groups(layer.cols, point, per_in)
        if outs is None or outs != ins:
            at = {dim.name: value for dim, value in point.items()}
            raise ValueError(
                f"groups: {layer.groups} groups of {per_in} -> {per_out} channels; at {at} the "
                "active channels are not the same whole groups on both sides"
            )


def _groups(axis: Axis, point, size: int) -> list[tuple[int, int, int]] | None:
    """Active part of an axis in groups of some size; None where it cuts a group."""
    chosen = axis.selection_at(point) if isinstance(axis, Size) else axis
    spans = [slice(chosen)] if isinstance(chosen, int) else chosen
    bounds = [(s.start or 0, s.stop, s.step or 1) for s in spans]
    if size > 1 and any(a % size or b % size or step > 1 for a, b, step in bounds):
        return None
    return [(a // size, b // size, step) for a, b, step in bounds]
