"""Search spaces: named discrete dimensions, architectures in them, and which one is active."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from weightshare.sizes import Dim, Value


class PerLayer(NamedTuple):
    """The same choices for each of several layers, chosen for each apart.

    ``SearchSpace(ratio=PerLayer([3, 4], 12))`` has the dims ``ratio.0`` .. ``ratio.11``.
    """

    choices: Sequence[Value]
    layers: int


class ArchConfig(Mapping[str, Value]):
    """One architecture: a value for every dim of a space. Immutable and hashable."""

    def __init__(self, values: Mapping[str, Value]):
        self._values = dict(values)
        self._hash = hash(tuple(sorted(self._values.items())))

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"ArchConfig({self._values})"

    def replace(self, **values: Value) -> ArchConfig:
        """The same architecture but for these values."""
        return ArchConfig({**self._values, **values})

    def to_json(self) -> str:
        """One line of JSON, from which ``SearchSpace.from_json`` reads it."""
        return json.dumps(self._values)


class SearchSpace(Mapping[str, "Dim | tuple[Dim, ...]"]):
    """Named dimensions, each with its choices.

    Args:
        choices: name -> choices (a sequence of numbers), or :class:`PerLayer` for one dim per
            layer; ``space["ratio"]`` is then a tuple of dims.

    Attributes:
        dims: every dim by its own name, such as ``ratio.3``.

    Raises:
        TypeError, ValueError: choices are empty, repeat, or are no numbers; names the field.

    Example::

        space = SearchSpace(embed=[192, 216, 240], ratio=PerLayer([3.5, 4], 12))
        arch = space.sample()
        space.activate(arch)
    """

    def __init__(self, **choices: Sequence[Value] | PerLayer):
        self._fields: dict[str, Dim | tuple[Dim, ...]] = {}
        for name, field in choices.items():
            if isinstance(field, PerLayer):
                names = [f"{name}.{layer}" for layer in range(field.layers)]
                self._fields[name] = tuple(Dim(n, field.choices) for n in names)
            else:
                self._fields[name] = Dim(name, field)
        flat = (f if isinstance(f, tuple) else (f,) for f in self._fields.values())
        self.dims: dict[str, Dim] = {dim.name: dim for dims in flat for dim in dims}

    def __getitem__(self, name: str) -> Dim | tuple[Dim, ...]:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def count(self) -> int:
        """Number of architectures that the allowed choices make."""
        return math.prod(len(dim.allowed) for dim in self.dims.values())

    def arch(
        self, values: Mapping[str, Value | Sequence[Value]] | None = None, **more
    ) -> ArchConfig:
        """Check values and make an architecture of them.

        Args:
            values: name -> value; the name of a :class:`PerLayer` field takes a sequence (one
                value per layer) or one value for all layers. What is not named is the largest.
            more: the same as keywords.

        Raises:
            ValueError: a name is unknown or a value is not allowed; says which are.
        """
        found = {name: dim.allowed[-1] for name, dim in self.dims.items()}
        for name, value in {**(values or {}), **more}.items():
            found.update(self._values_of(name, value))
        for name, value in found.items():
            dim = self.dims[name]
            if dim.choices[dim.index(value)] not in dim.allowed:
                raise ValueError(f"{name}: {value!r} is not allowed, only {list(dim.allowed)}")
        return ArchConfig(found)

    def _values_of(self, name: str, value) -> dict[str, Value]:
        dims = self.dims
        if name in dims:
            return {name: dims[name].choices[dims[name].index(value)]}
        field = self._fields.get(name)
        if not isinstance(field, tuple):
            raise ValueError(f"{name}: no such dimension; the space has {', '.join(self._fields)}")
        each = [value] * len(field) if isinstance(value, int | float) else list(value)
        if len(each) != len(field):
            raise ValueError(f"{name}: {len(each)} values for {len(field)} layers")
        return {d.name: d.choices[d.index(v)] for d, v in zip(field, each, strict=True)}

    def largest(self) -> ArchConfig:
        """Architecture of the largest allowed choices."""
        return ArchConfig({name: dim.allowed[-1] for name, dim in self.dims.items()})

    def smallest(self) -> ArchConfig:
        """Architecture of the smallest allowed choices."""
        return ArchConfig({name: dim.allowed[0] for name, dim in self.dims.items()})

    def sample(self, generator: random.Random | None = None) -> ArchConfig:
        """Architecture drawn uniformly and independently in every dim."""
        draw = generator or random
        return ArchConfig({name: draw.choice(dim.allowed) for name, dim in self.dims.items()})

    def activate(self, arch: Mapping[str, Value]) -> None:
        """Make an architecture the active one: layers run its sizes, not a mixture.

        Raises:
            ValueError: a name is unknown or a value is not allowed; nothing is changed then.
        """
        checked = self.arch(arch)
        for name, dim in self.dims.items():
            dim.alpha = None
            dim.set(checked[name])

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """On leaving, what is active or mixed now is so again."""
        before = [(dim, dim.value, dim.alpha) for dim in self.dims.values()]
        try:
            yield
        finally:
            for dim, value, alpha in before:
                dim.set(value)
                dim.alpha = alpha

    @property
    def active(self) -> ArchConfig:
        """The active architecture."""
        return ArchConfig({name: dim.value for name, dim in self.dims.items()})

    def mix(self, alphas: Mapping[str, Tensor] | None) -> None:
        """Run the mixture of all choices of these dims; the others keep their active choice.

        Args:
            alphas: dim name -> mixture weights ``[K]``, one per choice; None ends the mixture.

        Raises:
            ValueError: a name is unknown or the weights do not fit the choices.
        """
        dims = self.dims
        for name, alpha in (alphas or {}).items():
            if name not in dims:
                raise ValueError(f"{name}: no such dimension; the space has {', '.join(dims)}")
            if tuple(alpha.shape) != (len(dims[name].choices),):
                raise ValueError(
                    f"{name}: expected one weight for each of {list(dims[name].choices)}, got "
                    f"shape {tuple(alpha.shape)}"
                )
        for name, dim in dims.items():
            dim.alpha = (alphas or {}).get(name)

    def restrict(self, name: str, allowed: Sequence[Value]) -> None:
        """Narrow what samplers may take of one dim, as a supernet splitter does.

        Args:
            name: a dim, or a :class:`PerLayer` field: all its dims.
            allowed: the choices that are left.

        Raises:
            ValueError: the name is unknown, or the list is empty or holds no choice of it.
        """
        field = self._fields.get(name, self.dims.get(name))
        if field is None:
            raise ValueError(f"{name}: no such dimension; the space has {', '.join(self.dims)}")
        for dim in field if isinstance(field, tuple) else (field,):
            keep = {dim.index(value) for value in allowed}
            if not keep:
                raise ValueError(f"{name}: nothing is left of {list(dim.choices)}")
            dim.allowed = tuple(dim.choices[i] for i in sorted(keep))

    def to_dict(self) -> dict:
        """Fields and choices as plain data, for a checkpoint."""
        return {
            name: {"choices": list(field[0].choices), "layers": len(field)}
            if isinstance(field, tuple)
            else {"choices": list(field.choices)}
            for name, field in self._fields.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping]) -> SearchSpace:
        """The space that :meth:`to_dict` described."""
        fields = {
            name: PerLayer(d["choices"], d["layers"]) if "layers" in d else d["choices"]
            for name, d in data.items()
        }
        return cls(**fields)

    def check_same(self, data: Mapping[str, Mapping]) -> None:
        """Require that a checkpoint's space is this one.

        Raises:
            ValueError: names the first field that differs and both its values.
        """
        ours = self.to_dict()
        for name in {**ours, **data}:
            if ours.get(name) != data.get(name):
                raise ValueError(
                    f"checkpoint of another space: {name} is {data.get(name)} there and "
                    f"{ours.get(name)} here"
                )

    def from_json(self, text: str) -> ArchConfig:
        """Architecture from :meth:`ArchConfig.to_json`, checked against this space."""
        return self.arch(json.loads(text))

    def __repr__(self) -> str:
        fields = ", ".join(f"{n}={d}" for n, d in self.to_dict().items())
        return f"SearchSpace({fields})"
