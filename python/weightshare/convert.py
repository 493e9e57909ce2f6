"""Make a supernet of an existing model, in place, by a table of layer types."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from weightshare import nn as elastic
from weightshare.export import is_elastic, move_hooks
from weightshare.nn.attention import query_rows
from weightshare.nn.bound import Quotient, attach, bindings
from weightshare.nn.depth import Layers
from weightshare.nn.elastic import Axis, total
from weightshare.nn.norm import BatchNorm2d, LayerNorm, RMSNorm
from weightshare.rules import RATIOS, RULES, Role, Rule, read
from weightshare.sizes import Blocks, Dim, Size, Value
from weightshare.space import PerLayer, SearchSpace

if TYPE_CHECKING:
    from weightshare.supernet import Supernet

Choices = Mapping[str, Sequence[Value] | PerLayer]


def convert(model: nn.Module, space: SearchSpace | Choices, rules: Iterable[Rule] = ()) -> Supernet:
    """Make a supernet of a model, in place.

    Layers are replaced by elastic ones or bound to the space; the parameters are the very same
    objects under the same keys, so optimizers and checkpoints go on working, and the largest
    subnet computes what the model did. Known types: vision transformers and MobileNetV3 or
    EfficientNet of timm, Llama and models built like it of transformers; see ``weightshare.rules``.

    Roles that the space can name, as far as the model has them: ``embed``, ``depth``, ``heads``,
    ``kv_heads``, ``ffn`` or ``mlp_ratio`` (a multiple of ``embed``), ``hidden`` or ``expand`` (of
    a convolution block: channels, or a multiple of its input's, rounded to 8), ``kernel``. A role
    that it does not name stays as it is, but that the heads of keys and values follow ``heads``
    where each query head has its own, and ``heads`` follow ``kv_heads``.
    ``name=PerLayer(choices, n)`` gives each layer its own choice (each stage, for ``depth``), and
    ``{"name.3": choices}`` gives one to layer 3 alone. The largest choice of a width is the
    model's own size; ``space.restrict`` keeps samplers from taking it.

    Args:
        model: what to convert; a module around a known one will do as long as rules know all of
            its parameters.
        space: a search space, or its fields as a dict.
        rules: more rules; they come before the built-in ones.

    Returns:
        The handle ``Supernet(model, space)``, the largest subnet active.

    Raises:
        ValueError: the model cannot take the space, or no rule knows a layer; names the field and
            the allowed values. Nothing is changed then.
        TypeError: a layer is converted already or of a kind that cannot be.

    Example::

        supernet = convert(vit, {"embed": [320, 384], "mlp_ratio": PerLayer([3, 4], 12)})
    """
    from weightshare.supernet import Supernet

    if not isinstance(space, SearchSpace):
        space = SearchSpace(**space)
    known = {dim: len(dim.dependents) for dim in space.dims.values()}
    try:
        steps = _Plan(model, space, (*rules, *RULES)).steps
    except (ValueError, TypeError):
        for dim, count in known.items():  # sizes of the failed attempt
            del dim.dependents[count:]
        raise
    for step in steps:
        step()
    space.activate(space.largest())
    return Supernet(model, space)


class _Plan:
    """Everything that a conversion will do, checked but not done."""

    def __init__(self, model: nn.Module, space: SearchSpace, rules: Sequence[Rule]):
        self.space = space
        self.steps: list[Callable[[], Any]] = []
        self.roles: set[str] = set()
        self.used: set[str] = set()
        self.covered: set[int] = set()
        found = list(_matches(model, rules))
        self.layer_of, self.layers, self.stages = _positions(found)
        for path, module, rule in found:
            self._add(path, module, rule)
        self._check_complete(model)

    def _add(self, path: str, module: nn.Module, rule: Rule) -> None:
        sizes = self._sizes(path, module, rule)
        for name, axes in rule.layers.items():
            self._add_layer(f"{path}.{name}", module, name, [_axis(a, sizes) for a in axes])
        for name in rule.fixed:
            self._cover(read(module, name))
        tensors = {}
        for name, axes in rule.tensors.items():
            tensor = module._parameters.get(name, module._buffers.get(name))
            if tensor is not None:
                found = [_axis(role, sizes) for role in axes]
                tensors[name] = [
                    n if a is None else a for a, n in zip(found, tensor.shape, strict=True)
                ]
                self.covered.add(id(tensor))
        attributes = {n: sizes[r] for n, r in rule.attributes.items() if hasattr(module, n)}
        config = {n: sizes[r] for n, r in rule.config.items() if r in sizes}
        if any(isinstance(v, Size) for v in (*attributes.values(), *config.values())) or any(
            isinstance(axis, Size) for axes in tensors.values() for axis in axes
        ):
            bound = bindings(module, attributes, tensors, config)
            self.steps.append(functools.partial(attach, module, bound))

    # ---- sizes of roles

    def _sizes(self, path: str, module: nn.Module, rule: Rule) -> dict[str, Axis]:
        """Every role of a module: a size of the space, or an int."""
        wholes = {role: int(read(module, where)) for role, where in rule.sizes.items()}
        position = self.layer_of.get(path)
        sizes: dict[str, Axis] = dict(wholes)
        for role, whole in wholes.items():
            if not role.startswith("_"):
                sizes[role] = self._size(path, role, whole, position, sizes)
        if "heads" in sizes:
            sizes.update(_attention(sizes, wholes))
        for stage in rule.containers(module):
            depth = self._add_depth(*stage)
            if depth is not None:
                sizes["depth"] = depth
        return sizes

    def _size(
        self, path: str, role: str, whole: int, position: int | None, sizes: Mapping[str, Axis]
    ) -> Axis:
        dim = self._field(path, role, position, self.layers)
        ratio, base, divisor = RATIOS.get(role, (None, "", 1))
        multiple = self._field(path, ratio, position, self.layers) if ratio else None
        if multiple is None:
            if dim is None:
                return whole
            _check_whole_numbers(dim)
            step = 2 if role == "kernel" else 1  # kernels of all sizes share the centre
            fits = dim.choices[-1] == whole and all((whole - v) % step == 0 for v in dim.choices)
            words = "by steps of 2 " if step == 2 else ""
            _check(dim, path, fits, f"1 to {whole} {words}with {whole} itself among them")
            return dim
        if dim is not None:
            raise ValueError(f"{role}: the space names {ratio} as well; give one of them")
        size: Size = multiple * sizes[base]
        size = size.rounded(divisor) if divisor > 1 else size
        most = whole / total(sizes[base])
        _check(multiple, path, size.max == whole, f"up to {most:g} with {most:g} itself among them")
        return size

    def _field(self, path: str, name: str, position: int | None, count: int) -> Dim | None:
        """The dim that a space has for a role at a position."""
        self.roles.add(name)
        field = self.space.get(name)
        if isinstance(field, tuple):
            if position is None:
                raise ValueError(
                    f"{name}: {path or 'the model'} needs one size for all layers, not PerLayer"
                )
            if len(field) != count:
                raise ValueError(f"{name}: {len(field)} layers, but the model has {count}")
            self.used.add(name)
            return field[position]
        if field is None and position is not None:
            name = f"{name}.{position}"
            field = self.space.get(name)
        if field is not None:
            self.used.add(name)
        return field  # type: ignore[return-value]

    # ---- what replaces what

    def _add_layer(self, path: str, owner: nn.Module, name: str, axes: list[Axis | None]) -> None:
        old = read(owner, name)
        shape = _shape(old)
        if not shape:
            return
        self._cover(old)
        pairs = list(zip(axes, shape, strict=False))  # a kernel is square: one axis for both
        if any(isinstance(axis, int) and axis != size for axis, size in pairs):
            raise ValueError(f"{path}: its weight {tuple(shape)} is not what the rule says")
        if not any(isinstance(axis, Size) for axis in axes):
            return
        if is_elastic(old):
            raise TypeError(f"{path}: is converted already")
        full = [size if axis is None else axis for axis, size in pairs]
        new = _replace(old, full)
        if new is not None:
            self.steps.append(functools.partial(_put, owner, name, old, new))
            return
        every = {"normalized_shape": tuple(full), "num_features": full[0]}
        attributes = {n: value for n, value in every.items() if hasattr(old, n)}
        bound = bindings(old, attributes, {n: full for n, t in _tensors(old) if t.shape == shape})
        self.steps.append(functools.partial(attach, old, bound))

    def _add_depth(self, parent: nn.Module, name: str, container: nn.Module) -> Dim | None:
        number = self.stages[id(container)]
        dim = self._field(name, "depth", number, len(self.stages))
        if dim is None:
            return None
        _check_whole_numbers(dim)
        count = len(container._modules)
        _check(dim, name, dim.choices[-1] <= count, f"1 to {count}")
        layers = Layers(container, dim)  # type: ignore[arg-type]
        self.steps.append(functools.partial(_put, parent, name, container, layers))
        return dim

    # ---- nothing left out

    def _cover(self, module: nn.Module | None) -> None:
        if module is not None:
            self.covered.update(map(id, module.parameters()))

    def _check_complete(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if id(parameter) not in self.covered:
                owner = model.get_submodule(name.rpartition(".")[0])
                raise ValueError(
                    f"{name}: no rule knows this parameter, of a {type(owner).__module__}."
                    f"{type(owner).__qualname__}; give one, convert(..., rules=[Rule(...)])"
                )
        for name in self.space:
            if name not in self.used:
                raise ValueError(
                    f"{name}: the model has no such role; allowed: {', '.join(sorted(self.roles))}"
                    f", and the same with a layer's number, 0..{self.layers - 1}, as in ffn.0"
                )


def _matches(model: nn.Module, rules: Sequence[Rule]) -> Iterator[tuple[str, nn.Module, Rule]]:
    for path, module in model.named_modules():
        rule = next((rule for rule in rules if rule.matches(module)), None)
        if rule is not None:
            yield path, module, rule


def _positions(found) -> tuple[dict[str, int], int, dict[int, int]]:
    """Layer that each path lies in, number of layers, and the number of each container."""
    starts: dict[str, int] = {}
    stages: dict[int, int] = {}
    for path, module, rule in found:
        if not rule.depth:
            continue
        names = {id(child): name for name, child in module.named_modules(prefix=path)}
        for _, _, container in rule.containers(module):
            stages[id(container)] = len(stages)
            for child in container._modules:
                starts[f"{names[id(container)]}.{child}"] = len(starts)
    layers = {}
    for path, _, _ in found:
        parts = path.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        inside = [starts[head] for head in heads if head in starts]
        if inside:
            layers[path] = inside[0]
    return layers, len(starts), stages


def _axis(role: Role | list[str], sizes: Mapping[str, Axis]) -> Axis | None:
    if role is None:
        return None
    if isinstance(role, str):
        return sizes[role]
    parts = [sizes[name] for name in role]
    if all(isinstance(part, int) for part in parts):
        return sum(parts)  # type: ignore[arg-type]
    return Blocks(parts, [total(part) for part in parts])


def _attention(sizes: Mapping[str, Axis], wholes: Mapping[str, int]) -> dict[str, Axis]:
    """Sizes that follow from those of attention heads."""
    heads, kv_heads, width = sizes["heads"], sizes.get("kv_heads"), wholes["_head_dim"]
    if kv_heads is None:
        return {"queries": query_rows(heads, width, None)}
    if isinstance(kv_heads, int) and wholes["heads"] == kv_heads:
        kv_heads = heads
    if isinstance(heads, int) and isinstance(kv_heads, Size):
        heads = kv_heads * (heads // wholes["kv_heads"])
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "queries": query_rows(heads, width, kv_heads),
        "keys": kv_heads * width,
        "groups": Quotient(heads, kv_heads),
    }


def _replace(old: nn.Module, axes: list[Axis]) -> nn.Module | None:
    """The elastic layer for one of PyTorch's; None for a type that is bound instead."""
    if isinstance(old, nn.Linear):
        out, in_ = axes
        return elastic.Linear.from_linear(old, in_, out)
    if isinstance(old, nn.Embedding):
        return elastic.Embedding.from_embedding(old, axes[1])
    if isinstance(old, nn.Conv2d):
        out, in_, kernel = axes
        if old.groups > 1:  # the weight has the input channels of one group
            in_ = out if old.groups == old.out_channels else old.in_channels
        size = kernel if isinstance(kernel, Size) else None
        return elastic.Conv2d.from_conv2d(old, in_, out, size)
    if type(old) is nn.LayerNorm or _is_plain_timm_norm(old):
        return LayerNorm.from_layer_norm(old, axes[0])  # type: ignore[arg-type]
    if type(old) is nn.RMSNorm:
        return RMSNorm.from_rms_norm(old, axes[0])
    if type(old) is nn.BatchNorm2d:
        return BatchNorm2d.from_batch_norm(old, axes[0])
    return None


def _is_plain_timm_norm(module: nn.Module) -> bool:
    """Whether it is timm's layer norm without its low-precision path: PyTorch's own then."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return kind == "timm.layers.norm.LayerNorm" and not module._fast_norm


def _shape(module: nn.Module | None) -> tuple[int, ...]:
    """Shape of a layer's weight, or of what a norm without a weight normalises."""
    weight = getattr(module, "weight", None)
    return tuple(getattr(module, "normalized_shape", ()) if weight is None else weight.shape)


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    both = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in both if tensor is not None]


def _put(owner: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    *parents, last = name.split(".")
    parent = owner.get_submodule(".".join(parents))
    move_hooks(old, new)
    parent._modules[last] = new


def _check_whole_numbers(dim: Dim) -> None:
    for value in dim.choices:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{dim.name}: {value!r} is no whole number of at least 1")


def _check(dim: Dim, path: str, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(
            f"{dim.name}: {list(dim.choices)} do not fit {path or 'the model'}; allowed: {allowed}"
        )
