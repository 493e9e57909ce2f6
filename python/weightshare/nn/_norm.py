"""What elastic norms share: the active part of weight, bias and running statistics."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from weightshare.nn.elastic import Axis, copy, copy_parameter, take, total
from weightshare.sizes import Blocks, Interleaved, Joint, Size

Norm = TypeVar("Norm", bound="ElasticNorm")


class ElasticNorm(nn.Module):
    """A norm on a prefix of its channels."""

    def _bind(self, size: Axis) -> None:
        if isinstance(size, Blocks | Interleaved):
            raise TypeError(f"size: a norm takes a prefix of its channels, got {size!r}")
        self.size = size
        self._joint = Joint(size)

    @property
    def active_size(self) -> int:
        """Number of channels in use, mixtures aside."""
        return self.size.value if isinstance(self.size, Size) else self.size

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Active part of weight and bias, or their mixture: never without a weight, then."""
        weight, bias = (self._parameters.get(name) for name in ("weight", "bias"))
        if not isinstance(self.size, Size):
            return weight, bias
        if self._joint.mixed:
            mixed = x.new_ones(total(self.size)) if weight is None else weight
            return take(mixed, self._joint), None if bias is None else take(bias, self._joint)
        n = self.size.value
        return prefix(weight, n), prefix(bias, n)

    def _take_over(self: Norm, norm: nn.Module) -> Norm:
        """Hold the parameters and buffers of another norm from now on."""
        for name in self._parameters:
            self._parameters[name] = norm._parameters[name]
        for name in self._buffers:
            self._buffers[name] = norm._buffers[name]
        return self.train(norm.training)

    def _export_to(self, norm: nn.Module) -> nn.Module:
        """Copy the active part of parameters and buffers into a norm made on the meta device."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                setattr(norm, name, copy_parameter(parameter, self._joint))
        for name, buffer in self._buffers.items():
            if buffer is not None:
                joint = self._joint if buffer.dim() else Joint()
                setattr(norm, name, copy(buffer, joint))
        return norm.train(self.training)


def prefix(tensor: Tensor | None, n: int) -> Tensor | None:
    """First n elements; nothing stays nothing."""
    return None if tensor is None else tensor.narrow(0, 0, n)


def check_kind(name: str, module: nn.Module, wanted: type[nn.Module]) -> None:
    """Require a module of a class."""
    if not isinstance(module, wanted):
        raise TypeError(f"{name}: expected an nn.{wanted.__name__}, got {type(module).__name__}")


def check_channels(size: Axis, *shape: int) -> None:
    """Require one dimension, as large as a size can become."""
    if len(shape) != 1:
        raise ValueError(f"norm: is over {len(shape)} dimensions {shape}; only one can be elastic")
    if total(size) != shape[0]:
        raise ValueError(f"size: up to {total(size)}, but the norm has {shape[0]} channels")
