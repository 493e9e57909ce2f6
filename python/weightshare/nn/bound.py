"""Modules of other libraries whose attributes and parameters follow the active subnet.

A timm ``Attention`` reshapes by ``self.num_heads``; a ViT adds ``self.pos_embed``. Such a module
needs no rewriting, only other values: :func:`bind` swaps its class for a subclass in which these
names are properties. ``_parameters``, the state dict and optimizers keep the whole parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from weightshare.nn.elastic import Axis, Module, copy, copy_parameter, length, take, total
from weightshare.sizes import Dim, Joint, Size, Value, dims_of

Attribute = Axis | tuple[Axis, ...]


class Bindings(NamedTuple):
    """What of a module follows the active subnet."""

    attributes: Mapping[str, Attribute]
    tensors: Mapping[str, Joint]
    config: Mapping[str, Axis]


class Quotient(Size):
    """One size over another, as query heads per key and value head.

    Args:
        over: the size that is divided.
        under: what divides it, without remainder.
    """

    def __init__(self, over: Axis, under: Axis):
        self.over, self.under = over, under
        super().__init__(dims_of(over, under))

    def at(self, values: Mapping[Dim, Value]) -> int:
        """Quotient where the dims have these values."""
        over, under = (
            axis.at(values) if isinstance(axis, Size) else axis for axis in (self.over, self.under)
        )
        return over // under

    @property
    def max(self) -> int:
        """Quotient of the whole sizes (not the greatest one): what a mixture runs with."""
        return total(self.over) // total(self.under)


def bind(
    module: Module,
    attributes: Mapping[str, Attribute] | None = None,
    parameters: Mapping[str, Sequence[Axis]] | None = None,
    config: Mapping[str, Axis] | None = None,
) -> Module:
    """Let attributes and parameters of a module follow the active subnet, in place.

    Reading ``module.num_heads`` gives the active number of heads (all of them while a dim is
    mixed); reading ``module.pos_embed`` its active part or its mixture. ``isinstance`` with the
    module's own class stays true. A buffer (a running mean) is cut, never mixed: its active part
    is a view, so that updates in place reach the whole buffer.

    Args:
        module: any module; its class is swapped.
        attributes: name -> size, or a tuple of sizes.
        parameters: name of a parameter or buffer -> size of each of its axes.
        config: name -> size: fields of ``module.config`` that ``export()`` sets in the copy.

    Returns:
        The module itself.

    Raises:
        AttributeError: the module has no such attribute or parameter.
        ValueError: the axes do not fit a parameter.
        TypeError: the module is bound already.

    Example::

        bind(vit, {"embed_dim": embed}, {"cls_token": (1, 1, embed)})
    """
    return attach(module, bindings(module, attributes, parameters, config))


def bindings(
    module: nn.Module,
    attributes: Mapping[str, Attribute] | None = None,
    parameters: Mapping[str, Sequence[Axis]] | None = None,
    config: Mapping[str, Axis] | None = None,
) -> Bindings:
    """The checks of :func:`bind`, which change nothing; :func:`attach` does the rest."""
    if is_bound(module):
        raise TypeError(f"{type(module).__name__}: is bound already")
    for name in attributes or {}:
        getattr(module, name)
    for name, axes in (parameters or {}).items():
        _check_axes(module, name, axes)
    tensors = {name: Joint(*axes) for name, axes in (parameters or {}).items()}
    return Bindings(dict(attributes or {}), tensors, dict(config or {}))


def attach(module: Module, found: Bindings) -> Module:
    """Swap the class of a module for one with these bindings."""
    for name in found.attributes:
        vars(module).pop(name, None)
    names = tuple(found.attributes), tuple(found.tensors)
    kind = _bound_class(type(module), *names)  # type: ignore[arg-type]
    vars(module)["_bindings"] = found
    object.__setattr__(module, "__class__", kind)
    return module


def is_bound(module: nn.Module) -> bool:
    """Whether :func:`bind` bound this module."""
    return "_bindings" in vars(module)


def unbind(module: nn.Module) -> None:
    """Turn a copy of a bound module into one of its own class, with plain attributes."""
    found: Bindings = vars(module).pop("_bindings")
    object.__setattr__(module, "__class__", type(module).__bases__[0])
    for name, attribute in found.attributes.items():
        setattr(module, name, active_value(attribute))


def active_value(attribute: Attribute) -> Any:
    """Value of an attribute in the active subnet, whether it is mixed or not."""
    if isinstance(attribute, tuple):
        return tuple(map(active_value, attribute))
    return attribute.value if isinstance(attribute, Size) else attribute


def cut(module: nn.Module) -> dict[int, Any]:
    """Copies of the active part of each bound tensor, by the id of the whole one."""
    copies: dict[int, Any] = {}
    for name, joint in vars(module)["_bindings"].tensors.items():
        tensor = _whole(module, name)
        if isinstance(tensor, nn.Parameter):
            copies[id(tensor)] = copy_parameter(tensor, joint)
        elif tensor is not None:
            copies[id(tensor)] = copy(tensor, joint)
    return copies


@functools.cache
def _bound_class(
    base: type[nn.Module], attributes: tuple[str, ...], tensors: tuple[str, ...]
) -> type[nn.Module]:
    members: dict[str, Any] = {name: _attribute(name) for name in attributes}
    members.update((name, _tensor(name)) for name in tensors)
    members.update(export=_export, __reduce_ex__=_reduce)
    members.update(__module__=base.__module__, __doc__=base.__doc__)
    return type(base.__name__, (base,), members)


def _attribute(name: str) -> property:
    def get(self):
        axes = self._bindings.attributes[name]
        return tuple(map(length, axes)) if isinstance(axes, tuple) else length(axes)

    return property(get)


def _tensor(name: str) -> property:
    def get(self):
        tensor = _whole(self, name)
        if tensor is None:
            return None
        joint = self._bindings.tensors[name]
        return tensor if joint.mixed and name in self._buffers else take(tensor, joint)

    return property(get)


def _export(self):
    """Copy the active subnet: :func:`weightshare.export.export` of this module."""
    from weightshare.export import export

    return export(self)


def _reduce(self, protocol):
    # The class was made at run time, so a pickle names what it was made from instead.
    names = tuple(self._bindings.attributes), tuple(self._bindings.tensors)
    return _rebuild, (type(self).__bases__[0], *names), dict(vars(self))


def _whole(module: nn.Module, name: str):
    return module._parameters[name] if name in module._parameters else module._buffers[name]


def _rebuild(base, attributes, tensors):
    kind = _bound_class(base, attributes, tensors)
    return kind.__new__(kind)


def _check_axes(module: nn.Module, name: str, axes: Sequence[Axis]) -> None:
    if name not in module._parameters and name not in module._buffers:
        raise AttributeError(f"{type(module).__name__}: has no parameter or buffer {name}")
    tensor = _whole(module, name)
    if tensor is None:
        return
    if tensor.dim() > 2 and any(isinstance(axis, Size) for axis in axes[:-1]):
        raise ValueError(f"{name}: of {tensor.dim()} axes only the last can vary")
    if tensor.dim() != len(axes) or any(
        total(axis) > size if isinstance(axis, Size) else axis != size
        for axis, size in zip(axes, tensor.shape, strict=True)
    ):
        raise ValueError(
            f"{name}: has shape {tuple(tensor.shape)}, which axes of up to "
            f"{tuple(map(total, axes))} do not fit"
        )
