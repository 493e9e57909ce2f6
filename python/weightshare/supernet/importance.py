"""Sorting of hidden units by importance, so that a prefix of them is the best part.

Which axes of which weights run over the same units follows from the sizes that layers hold. A
size is *produced* (rows of a weight), *kept* (a bias, a norm, a depthwise convolution) and
*consumed* (columns of a weight). Where the layers of a module produce a size first and consume it
last, and those of all modules that use it do so, its units are private to each such module, and
permuting all these axes of a module together changes no output.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from weightshare.nn.bound import is_bound
from weightshare.nn.elastic import Axis
from weightshare.nn.norm import GroupNorm
from weightshare.sizes import Blocks, Dim, Interleaved, Product, Size
from weightshare.supernet.supernet import Supernet

Role = Literal["produced", "kept", "consumed", "fixed"]


class Use(NamedTuple):
    """An axis of a tensor, and what the layer does with its units."""

    tensor: Tensor | None  # None: the layer has no tensor on this axis
    dim: int
    axis: Axis
    role: Role  # "fixed": the layer depends on their order


class Sorted(NamedTuple):
    """Units that were permuted."""

    module: str  # name of the module they are private to
    size: Size
    order: Tensor  # [units]: which old unit each place has now; heads count as one unit


class _Part(NamedTuple):
    """The units of one size on an axis: all of it, or a block."""

    use: Use
    size: Axis
    key: Hashable  # the same for sizes that are always equal
    places: range
    layer: int  # number of its module
    path: tuple[str, ...]


class _Group(NamedTuple):
    """All parts that run over the private units of one module."""

    path: tuple[str, ...]
    size: Size
    parts: tuple[_Part, ...]
    unit: int  # elements that stay together: those of a head


def sort_by_importance(
    supernet: Supernet, keep: Literal["largest", "allowed"] = "largest"
) -> list[Sorted]:
    """Permute hidden units and attention heads so that the most important come first.

    A unit's importance is the L1 norm of the weights that read it. Do it before subnets narrower
    than those trained so far join, and before an optimizer is made (its state is not permuted) or
    FSDP shards the model.

    Covered, wherever the layers know their sizes: hidden units of feed-forward blocks, gated or
    not, fused or not; whole heads of attention with as many key-value as query heads; channels
    inside convolutional blocks, through BatchNorm, depthwise convolutions and squeeze-excite; the
    channels of residual streams, if every layer and parameter on them is elastic. What a layer
    between them takes in order (group norm, grouped convolution or queries, AutoFormer's
    interleaved heads) is left as it is, and so is every size of which some use is not known. The
    functions between the layers must treat each unit alike, as activations and dropout do; layers
    must be registered in the order in which they run.

    Args:
        supernet: whose parameters are permuted in place.
        keep: ``"largest"`` keeps the outputs of the largest subnet; ``"allowed"`` those of all
            subnets that the space allows now, by sorting between their sizes only.

    Returns:
        What was permuted.

    Source: Once-for-All (Cai et al., 2020, arXiv 1908.09791).
    """
    if keep not in ("largest", "allowed"):
        raise ValueError(f"keep: expected 'largest' or 'allowed', got {keep!r}")
    done = []
    for group in _groups(supernet.module):
        n = group.size.max // group.unit
        order = torch.arange(n)
        if group.size.max % group.unit == 0:
            bounds = _allowed(group.size) if keep == "allowed" else {group.size.max}
            cuts = sorted({0, n, *(bound // group.unit for bound in bounds)})
            score = _importance(group)
            for start, end in itertools.pairwise(cuts):
                inside = score[start:end].argsort(descending=True, stable=True)
                order[start:end] = start + inside
        _permute(group, order)
        done.append(Sorted(".".join(group.path), group.size, order))
    return done


@functools.singledispatch
def axes(module: nn.Module) -> Iterable[Use]:
    """Axes of a module's own tensors, in the order of computation; none if it is not known.

    Further kinds of layers are added by ``axes.register(TheirClass)``.
    """
    return ()


@axes.register
def _linear(module: nn.Linear) -> Iterator[Use]:
    rows = getattr(module, "rows", module.out_features)
    # The bias of interleaved rows lies in another order than they do.
    mingled = isinstance(rows, Interleaved) and module.bias is not None
    yield Use(module.weight, 1, getattr(module, "cols", module.in_features), "consumed")
    yield Use(module.weight, 0, rows, "fixed" if mingled else "produced")
    yield Use(module.bias, 0, rows, "kept")


@axes.register
def _conv(module: nn.Conv2d) -> Iterator[Use]:
    rows = getattr(module, "rows", module.out_channels)
    cols = getattr(module, "cols", module.in_channels)
    if module.groups == 1:
        yield Use(module.weight, 1, cols, "consumed")
        yield Use(module.weight, 0, rows, "produced")
    else:
        depthwise = module.groups == module.in_channels == module.out_channels
        yield Use(None, 0, cols, "kept" if depthwise else "fixed")
        yield Use(module.weight, 0, rows, "kept" if depthwise else "fixed")
    yield Use(module.bias, 0, rows, "kept")


@axes.register
def _embedding(module: nn.Embedding) -> Iterator[Use]:
    yield Use(module.weight, 1, getattr(module, "embed", module.embedding_dim), "produced")


@axes.register(nn.LayerNorm)
@axes.register(nn.RMSNorm)
@axes.register(nn.modules.batchnorm._BatchNorm)
def _norm(module: Any) -> Iterator[Use]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.dim() == 1 and hasattr(module, "size"):
            yield Use(tensor, 0, module.size, "kept")


@axes.register
def _group_norm(module: GroupNorm) -> Iterator[Use]:
    yield Use(None, 0, module.size, "fixed")


def _bound(module: nn.Module) -> Iterator[Use]:
    """Those of a module of another library, see ``weightshare.nn.bound``."""
    for name, joint in vars(module)["_bindings"].tensors.items():
        tensor = module._parameters.get(name, module._buffers.get(name))
        for dim, axis in enumerate(joint.axes):
            yield Use(tensor, dim, axis, "kept")


def _groups(model: nn.Module) -> list[_Group]:
    """Private units of all modules, where they can be permuted."""
    parts = list(_parts(model))
    by_size = defaultdict(list)
    for part in parts:
        if isinstance(part.size, Size):
            by_size[part.key].append(part)
    found = []
    for same in by_size.values():
        for scope in _scopes(same) or ():
            group = _group(model, parts, scope)
            if group is not None:
                found.append(group)
    return list(_apart(found))


def _parts(model: nn.Module) -> Iterator[_Part]:
    for number, (name, module) in enumerate(model.named_modules()):
        path = tuple(name.split(".")) if name else ()
        for use in _bound(module) if is_bound(module) else axes(module):
            for size, places in _blocks(use.axis):
                yield _Part(use, size, _key(size), places, number, path)


def _blocks(axis: Axis) -> list[tuple[Axis, range]]:
    """The sizes that an axis is made of, and where their units lie."""
    if isinstance(axis, Blocks):
        spans = zip(axis.parts, axis.starts, strict=True)
        return [(part, range(start, start + _whole(part))) for part, start in spans]
    if isinstance(axis, Interleaved):
        end = _whole(axis.part) * axis.blocks
        return [(axis.part, range(i, end, axis.blocks)) for i in range(axis.blocks)]
    return [(axis, range(_whole(axis)))]


def _scopes(parts: Sequence[_Part], depth: int = 0) -> list[Sequence[_Part]] | None:
    """Uses of a size, split by the smallest modules that it is private to; None if it is not."""
    own = any(len(part.path) == depth for part in parts)
    if not own:
        children = defaultdict(list)
        for part in parts:
            children[part.path[depth]].append(part)
        scopes = [_scopes(child, depth + 1) for child in children.values()]
        if None not in scopes:
            return [scope for some in scopes if some for scope in some]
    roles = [part.use.role for part in parts if part.use.role != "kept"]
    private = roles and roles[0] == "produced" and roles[-1] == "consumed" and "fixed" not in roles
    return [parts] if private else None


def _group(model: nn.Module, parts: Sequence[_Part], scope: Sequence[_Part]) -> _Group | None:
    """The parts of a scope as a group; None if something forbids to permute them."""
    size, path = scope[0].size, _common(part.path for part in scope)
    assert isinstance(size, Size)
    last = max(part.layer for part in scope if part.use.role == "consumed")
    inside = [part for part in parts if part.path[: len(path)] == path]
    for part in inside:  # what else goes on beside it: keys and values of grouped queries
        if part.use.role == "produced" and part.layer < last:
            later = (p for p in inside if p.layer > part.layer and p.use.role == "consumed")
            if all(p.key != part.key for p in later):
                return None
    known = {id(part.use.tensor) for part in parts}
    module = model.get_submodule(".".join(path))
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in known and size.max in tensor.shape:
            return None
    unit = 1
    roles = [part.use.role for part in scope if part.use.role != "kept"]
    if any(set(three) == {"produced"} for three in zip(roles, roles[1:], roles[2:], strict=False)):
        unit = _whole_factor(size)  # queries, keys and values: heads stay whole
    return _Group(path, size, tuple(scope), unit) if unit else None


def _apart(groups: Iterable[_Group]) -> Iterator[_Group]:
    """Groups that share no weight, but for those that are the same because layers are tied."""
    by_places = {frozenset(_places(group)): group for group in groups}
    users = Counter(place for places in by_places for place in places)
    for places, group in by_places.items():
        if all(users[place] == 1 for place in places):
            yield group


def _places(group: _Group) -> dict[tuple[int, int, range], Tensor]:
    """Tensors of a group by identity, axis and place; one that several layers share, once."""
    return {
        (id(part.use.tensor), part.use.dim, part.places): part.use.tensor
        for part in group.parts
        if part.use.tensor is not None
    }


def _importance(group: _Group) -> Tensor:
    """L1 norm of the weights that read each unit."""
    score = torch.zeros(group.size.max, dtype=torch.float64)
    for part in group.parts:
        tensor = part.use.tensor
        if part.use.role == "consumed" and tensor is not None:
            rows = tensor.detach().transpose(0, part.use.dim).flatten(1)
            score += rows[list(part.places)].abs().sum(1, dtype=torch.float64).cpu()
    return score.view(-1, group.unit).sum(1)


@torch.no_grad()
def _permute(group: _Group, order: Tensor) -> None:
    elements = (order[:, None] * group.unit + torch.arange(group.unit)).flatten()
    for (_, dim, span), tensor in _places(group).items():
        places = torch.tensor(span)
        index = torch.arange(tensor.shape[dim])
        index[places] = places[elements]
        tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))


def _allowed(size: Size) -> set[int]:
    """Lengths over all allowed choices of the dims."""
    choices = itertools.product(*(dim.allowed for dim in size.dims))
    return {size.at(dict(zip(size.dims, values, strict=True))) for values in choices}


def _key(size: Axis) -> Hashable:
    """The same for sizes that are always equal, such as a * b and b * a."""
    if not isinstance(size, Product):
        return size if isinstance(size, Dim | int) else id(size)
    sizes, factor = _factors(size)
    return size.divisor, factor, tuple(sorted(map(hash, map(_key, sizes))))


def _factors(product: Product) -> tuple[list[Size], float]:
    """The sizes and the number that a product is made of."""
    sizes: list[Size] = []
    number = 1.0
    for factor in product.factors:
        if isinstance(factor, Product) and factor.divisor == 1:
            more, times = _factors(factor)
            sizes, number = sizes + more, number * times
        elif isinstance(factor, Size):
            sizes.append(factor)
        else:
            number *= factor
    return sizes, number


def _whole_factor(size: Size) -> int:
    """The number that a size is always a multiple of, as heads * 64 is of 64; 0 if not known."""
    if not isinstance(size, Product) or size.divisor != 1:
        return 0
    number = _factors(size)[1]
    return int(number) if number == int(number) else 0


def _common(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest beginning that all have."""
    together = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return tuple(names[0] for names in together)


def _whole(axis: Axis) -> int:
    return axis.max if isinstance(axis, Size) else axis
