"""Batch norm and group norm whose number of channels follows a search space."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.nn._norm import ElasticNorm, check_channels, check_kind, prefix
from weightshare.nn.elastic import Axis, total
from weightshare.sizes import Size, points

Self = TypeVar("Self", bound="_BatchNorm")


class _BatchNorm(ElasticNorm, nn.modules.batchnorm._BatchNorm):
    """Batch norm on a prefix of the channels; running statistics are kept for every channel."""

    _plain: type[nn.modules.batchnorm._BatchNorm]

    def __init__(
        self,
        size: Axis,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(total(size), eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[call-arg]
        self._bind(size)

    @classmethod
    def from_batch_norm(cls: type[Self], norm: nn.modules.batchnorm._BatchNorm, size: Axis) -> Self:
        """Make this layer out of PyTorch's, taking over its parameters and buffers.

        Raises:
            TypeError: it is no such norm, or a subclass that computes something else besides.
            ValueError: its size is not the largest of ``size``.
        """
        plain = cls._plain
        check_kind("norm", norm, plain)
        if type(norm).forward is not plain.forward:  # type: ignore[attr-defined]
            raise TypeError(
                f"norm: {type(norm).__name__} computes more than {plain.__name__}; split it into "
                f"an {plain.__name__} and the rest first"
            )
        check_channels(size, norm.num_features)
        options = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        return cls(size, *options, device="meta")._take_over(norm)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each active channel of x ``[N, size, ...]``; update its running statistics."""
        self._check_input_dim(x)
        weight, bias = self._affine(x)
        mean, var, factor = None, None, self.momentum or 0.0
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain average over all batches
                factor = 1.0 / float(self.num_batches_tracked)
        if not self.training or self.track_running_stats:
            mean, var = self.running_mean, self.running_var
            if isinstance(self.size, Size) and not self._joint.mixed:
                mean, var = prefix(mean, self.size.value), prefix(var, self.size.value)
        batch = self.training or mean is None
        return F.batch_norm(x, mean, var, weight, bias, batch, factor, self.eps)

    def export(self) -> nn.Module:
        """Copy the active part, running statistics too, into PyTorch's own module."""
        options = self.eps, self.momentum, self.affine, self.track_running_stats
        return self._export_to(self._plain(self.active_size, *options, "meta"))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch norm of ``[N, size]`` or ``[N, size, L]``; see :class:`BatchNorm2d`."""

    _plain = nn.BatchNorm1d


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm on the active channels.

    Parameters, buffers and state dict are those of ``nn.BatchNorm2d`` of the largest size. Each
    channel has its own statistics, so a slice updates those of its channels alone, in place; they
    fit one subnet only after they have been calibrated for it. Mixed, weight and bias are mixed,
    which equals the mixture of the norms of all choices.

    Args:
        size: number of channels; an int is a fixed one.
        eps: added to the variance.
        momentum: share of a new batch in the running statistics; None averages all batches.
        affine: whether to scale and shift by learned weights.
        track_running_stats: whether to keep running statistics; if not, every batch is normalised
            by its own.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        ``[N, size, H, W]`` -> the same: the active size, the largest when mixed.

    Source: slicing as Once-for-All (Cai et al., 2020); mixture as TangleNAS (2023).
    """

    _plain = nn.BatchNorm2d


class GroupNorm(ElasticNorm, nn.GroupNorm):
    """Group norm on the active channels, in groups of a fixed number of channels.

    Fewer channels are fewer groups, so that a group has the same statistics in every subnet; and
    mixed, the mixture of weight and bias equals the mixture of the norms of all choices.
    Parameters and state dict are those of ``nn.GroupNorm`` of the largest size.

    Args:
        groups: number of groups of the largest size.
        size: number of channels; an int is a fixed one.
        eps: added to the variance.
        affine: whether to scale and shift by learned weights.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: a choice of the size is no multiple of a group's channels.

    Shape:
        ``[N, size, ...]`` -> the same: the active size, the largest when mixed.
    """

    def __init__(
        self,
        groups: int,
        size: Axis,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        _check_groups(groups, size)
        super().__init__(groups, total(size), eps, affine, device, dtype)
        self._bind(size)
        self.channels = total(size) // groups

    @classmethod
    def from_group_norm(cls, norm: nn.GroupNorm, size: Axis) -> GroupNorm:
        """Make this layer out of an ``nn.GroupNorm``, taking over its parameters.

        Raises:
            TypeError: it is no ``nn.GroupNorm``.
            ValueError: its size is not the largest of ``size``.
        """
        check_kind("norm", norm, nn.GroupNorm)
        check_channels(size, norm.num_channels)
        layer = cls(norm.num_groups, size, norm.eps, norm.affine, device="meta")
        return layer._take_over(norm)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each group of x ``[N, size, ...]``."""
        weight, bias = self._affine(x)
        if not torch.compiler.is_compiling():
            return F.group_norm(x, x.shape[1] // self.channels, weight, bias, self.eps)
        # group_norm takes the number of groups as a constant: a trace would serve one width only.
        groups = x.unflatten(1, (-1, self.channels)).flatten(2)
        y = F.layer_norm(groups, groups.shape[2:], eps=self.eps).view_as(x)
        shape = (-1, *[1] * (x.dim() - 2))
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    def export(self) -> nn.GroupNorm:
        """Copy the active part into a plain ``nn.GroupNorm`` that shares nothing with this one."""
        n = self.active_size
        norm = nn.GroupNorm(n // self.channels, n, self.eps, self.affine, "meta")
        return self._export_to(norm)  # type: ignore[return-value]


def _check_groups(groups: int, size: Axis) -> None:
    whole = total(size)
    if groups < 1 or whole % groups:
        raise ValueError(f"groups: {groups} do not divide {whole} channels")
    each = whole // groups
    for point in points(size.dims) if isinstance(size, Size) else ():
        if size.at(point) % each:  # type: ignore[union-attr]
            field = ", ".join(f"{dim.name}={value}" for dim, value in point.items())
            raise ValueError(
                f"size: {field} makes {size.at(point)} channels, no multiple of {each}, the "  # type: ignore[union-attr]
                f"channels of one of {groups} groups"
            )
