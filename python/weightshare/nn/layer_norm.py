"""Layer norm and root-mean-square norm whose width follows a search space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.nn._mixed_norm import mixed_norm
from weightshare.nn._norm import ElasticNorm, check_channels, check_kind
from weightshare.nn.elastic import Axis, total


class _OverChannels(ElasticNorm):
    """What layer norm and root-mean-square norm share."""

    _centred: bool
    eps: float | None

    def _bind_statistics(self, size: Axis, statistics: str | int) -> None:
        self._bind(size)
        if statistics not in ("slice", "max") and not isinstance(statistics, int):
            raise ValueError(f"statistics: expected 'slice' or 'max', got {statistics!r}")
        if isinstance(statistics, int) and statistics < total(size):
            raise ValueError(f"statistics: over {statistics} elements, but size is {total(size)}")
        self.statistics = statistics
        # Number of elements that statistics are over, if it is not that of the slice.
        named = {"slice": None, "max": total(size)}
        self._whole = statistics if isinstance(statistics, int) else named[statistics]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x ``[..., size]`` over its last dimension."""
        if self._joint.mixed:
            return self._mixture(x)
        weight, bias = self._affine(x)
        if self._whole is None:
            return self._normalise(x, self.active_size, weight, bias)
        return _as_padded(x, weight, bias, self._whole, self._eps(x), self._centred)

    def _mixture(self, x: Tensor) -> Tensor:
        if self._whole is not None:
            return self._normalise(x, total(self.size), *self._affine(x))
        choices, alpha = self._joint.mixture()
        sizes = [n for (n,) in choices]
        bias = self._parameters.get("bias")
        return mixed_norm(
            x, self._parameters["weight"], bias, sizes, alpha, self._eps(x), self._centred
        )

    def _normalise(self, x: Tensor, n: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _eps(self, x: Tensor) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps

    def extra_repr(self) -> str:
        """Sizes and statistics."""
        return f"{super().extra_repr()}, statistics={self.statistics!r}"


class LayerNorm(_OverChannels, nn.LayerNorm):
    """Layer norm over the active channels.

    Parameters and state dict are those of ``nn.LayerNorm`` of the largest size. While a dim of
    its size carries mixture weights it computes, at full width, the mixture of the norms of all
    choices: ``sum_k alpha_k Pad(LN(x[:n_k]) w[:n_k] + b[:n_k])``.

    Args:
        size: number of channels; an int is a fixed one.
        eps: added to the variance.
        elementwise_affine: whether to scale (and shift) by learned weights.
        bias: whether to shift.
        device: where the parameters live.
        dtype: of the parameters.
        statistics: ``"slice"`` takes mean and variance over the active channels. ``"max"`` takes
            them over the largest size, as if x were padded with zeros: ``m = sum(x) / D``,
            ``v = (sum((x - m)^2) + (D - n) m^2) / D``; mixed, the weights alone are mixed then.
            An int is that ``D``: what ``export`` makes of ``"max"``.

    Raises:
        TypeError, ValueError: the size is made of blocks, or the statistics are unknown.

    Shape:
        ``[..., size]`` -> the same: the active size, the largest when mixed.

    Source: ``"slice"`` as AutoFormer (Chen et al., 2021), ``"max"`` as the code of TangleNAS
    (Sukthanker et al., 2023).

    Example::

        space = SearchSpace(embed=[384, 768])
        norm = LayerNorm(space["embed"])
        space.activate({"embed": 384})
        y = norm(torch.randn(8, 384))
    """

    _centred = True
    eps: float

    def __init__(
        self,
        size: Axis,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        statistics: str | int = "slice",
    ):
        super().__init__(total(size), eps, elementwise_affine, bias, device, dtype)
        self._bind_statistics(size, statistics)

    @classmethod
    def from_layer_norm(
        cls, norm: nn.LayerNorm, size: Axis, statistics: str | int = "slice"
    ) -> LayerNorm:
        """Make this layer out of an ``nn.LayerNorm``, taking over its parameters.

        Raises:
            TypeError: it is no ``nn.LayerNorm``.
            ValueError: it is over several dimensions, or its size is not the largest of ``size``.
        """
        check_kind("norm", norm, nn.LayerNorm)
        check_channels(size, *norm.normalized_shape)
        affine = norm.elementwise_affine, norm.bias is not None
        layer = cls(size, norm.eps, *affine, device="meta", statistics=statistics)
        return layer._take_over(norm)

    def export(self) -> nn.LayerNorm:
        """Copy the active part into a plain ``nn.LayerNorm`` that shares nothing with this one.

        With statistics over more than the active channels no plain one computes the same; it is
        this class then, its sizes fixed.
        """
        n = self.active_size
        arguments = n, self.eps, self.elementwise_affine, self.bias is not None, "meta"
        if self._whole in (None, n):
            return self._export_to(nn.LayerNorm(*arguments))  # type: ignore[return-value]
        return self._export_to(LayerNorm(*arguments, statistics=self._whole))  # type: ignore

    def _normalise(self, x: Tensor, n: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, (n,), weight, bias, self.eps)


class RMSNorm(_OverChannels, nn.RMSNorm):
    """Root-mean-square norm over the active channels; all else as :class:`LayerNorm`.

    Args:
        size: number of channels; an int is a fixed one.
        eps: added to the mean square; None is the machine precision of x.
        elementwise_affine: whether to scale by a learned weight.
        device: where the parameters live.
        dtype: of the parameters.
        statistics: ``"slice"``, or ``"max"``: ``sum(x^2)`` over the largest size.
    """

    _centred = False

    def __init__(
        self,
        size: Axis,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        statistics: str | int = "slice",
    ):
        super().__init__(total(size), eps, elementwise_affine, device, dtype)
        self._bind_statistics(size, statistics)

    @classmethod
    def from_rms_norm(cls, norm: nn.Module, size: Axis, statistics: str | int = "slice") -> RMSNorm:
        """Make this layer out of an ``nn.RMSNorm``, taking over its parameter.

        A norm of another class will do if it has ``weight`` and ``eps`` (or ``variance_epsilon``)
        of the same meaning, as the Llama-style models' have.

        Raises:
            TypeError: it has none.
            ValueError: it is over several dimensions, or its size is not the largest of ``size``.
        """
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", NotImplemented))
        if eps is NotImplemented or not hasattr(norm, "weight"):
            raise TypeError(f"norm: expected an nn.RMSNorm, got {type(norm).__name__}")
        shape = norm.normalized_shape if norm.weight is None else norm.weight.shape
        check_channels(size, *shape)  # type: ignore[misc]
        affine = norm.weight is not None
        layer = cls(size, eps, affine, device="meta", statistics=statistics)  # type: ignore
        return layer._take_over(norm)

    def export(self) -> nn.RMSNorm:
        """Copy the active part into a plain ``nn.RMSNorm``, as :meth:`LayerNorm.export`."""
        n = self.active_size
        arguments = n, self.eps, self.elementwise_affine, "meta"
        if self._whole in (None, n):
            return self._export_to(nn.RMSNorm(*arguments))  # type: ignore[return-value]
        return self._export_to(RMSNorm(*arguments, statistics=self._whole))  # type: ignore

    def _normalise(self, x: Tensor, n: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, (n,), weight, self.eps)


def _as_padded(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, whole: int, eps: float, centred: bool
) -> Tensor:
    """Norm of x as if zeros padded it to ``whole`` elements; nothing is padded."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if centred:
        mean = y.sum(-1, keepdim=True) / whole
        y = y - mean
        zeros = (whole - x.shape[-1]) * mean.square()  # (0 - mean)^2 of each element not there
        variance = (y.square().sum(-1, keepdim=True) + zeros) / whole
    else:
        variance = y.square().sum(-1, keepdim=True) / whole
    y = y * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)
