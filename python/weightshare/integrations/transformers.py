"""Weightshare's routing and experts inside models of transformers.

:func:`patch` replaces them in a model that exists, module by module, and :func:`unpatch` puts
them back. :func:`register` (called when this module is imported) makes the experts known to
transformers as an implementation of its own:
``from_pretrained(name, experts_implementation="weightshare")``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightshare.integrations.gates import ARGUMENT, GATES, Gate, gate_of
from weightshare_kernels import moe_mlp, route, routing_of

NAME = "weightshare"


class Patched(NamedTuple):
    """What :func:`patch` did.

    Attributes:
        gates: number of gates that route through this package.
        experts: number of experts modules that compute through it.
        skipped: path of a gate or experts module -> why it was left as it is.
    """

    gates: int
    experts: int
    skipped: dict[str, str]


def patch(model: nn.Module) -> Patched:
    """Let the MoE blocks of a transformers model run on this package's kernels, in place.

    Gates and experts get another ``forward``; everything else (shared experts, the block's own
    arithmetic, recorded router logits, hooks) stays. Parameters are the very same objects under the
    same keys, so optimizers and checkpoints do not notice. A gate computes what it did, in the same
    dtypes: score function, normalisation, scale, groups, correction bias; of equal scores it takes
    the lowest id.

    Known gates are listed in ``weightshare.integrations.gates``; one that is not among them, or
    whose code is another in this version of transformers, stays, and its experts are served all the
    same. Experts are served wherever transformers'
    ``use_experts_implementation`` describes them, as far as they have no bias, no transposed or
    interleaved weights and an activation that the kernels know: SiLU with a gate, or ReLU^2 or
    exact GELU without.

    Args:
        model: a model of transformers, a part of one, or one block. Calling it twice does no harm.

    Returns:
        How many gates and experts there are now, and what was left out and why.

    Raises:
        ImportError: transformers is missing or too old.
        TypeError: it is no module, or another library has replaced a ``forward``.
        ValueError: nothing in the model is known; says what is.

    Example::

        from weightshare.integrations.transformers import patch

        patch(model)  # Patched(gates=48, experts=48, skipped={})
    """
    _transformers()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    found: list[tuple[str, nn.Module, Gate | str]] = []
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        replacement, reason = _replacement_of(module), None
        if replacement is None and (row := gate_of(module)) is not None:
            replacement, reason = row, row.doubt(module)
        elif replacement is None and _is_experts(module):
            replacement, reason = _EXPERTS, unserved(module)
        if reason is not None:
            skipped[path] = reason
        elif replacement is not None:
            found.append((path, module, replacement))
    if not found:
        raise ValueError(_nothing(model, skipped))
    new = [entry for entry in found if _replacement_of(entry[1]) is None]
    for path, module, _ in new:
        _check_forward(path, module)
    for _, module, replacement in new:
        _swap(module, _replaced(type(module), replacement))  # type: ignore[arg-type]
    gates = sum(isinstance(replacement, Gate) for _, _, replacement in found)
    return Patched(gates, len(found) - gates, skipped)


def unpatch(model: nn.Module) -> int:
    """Undo :func:`patch`.

    Args:
        model: what was patched, or a part of it.

    Returns:
        The number of gates and experts that are transformers' own again.

    Raises:
        TypeError: a patched module was given another class since (as FSDP does).
    """
    found = [(p, m) for p, m in model.named_modules() if _replacement_of(m) is not None]
    for path, module in found:
        if "_replacement" not in vars(type(module)):
            raise TypeError(
                f"{path}: is a {type(module).__name__} that something made of the patched one; "
                "undo that first"
            )
    for _, module in found:
        _swap(module, type(module).__bases__[0])
    return len(found)


def register() -> None:
    """Make the experts known to transformers as the implementation ``"weightshare"``.

    Then ``from_pretrained(..., experts_implementation="weightshare")`` and
    ``model.set_experts_implementation("weightshare")`` use them, also under transformers' expert
    parallelism; gates stay transformers' own. A model whose experts are not served raises
    NotImplementedError in its first forward pass, which says why.

    Raises:
        ImportError: transformers is missing or too old.
    """
    _transformers().ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts as transformers calls an implementation.

    Args:
        self: the experts module.
        hidden_states: tokens ``[T, d]``.
        top_k_index: ids ``[T, k]``; one of ``num_experts`` or more is an expert on another rank
            and adds nothing.
        top_k_weights: weights ``[T, k]``.

    Returns:
        ``[T, d]``, in the tokens' dtype.

    Raises:
        NotImplementedError: this kind of experts is not served; says why.
    """
    reason = unserved(self)
    if reason is not None:
        raise NotImplementedError(
            f"experts_implementation={NAME!r}: {type(self).__name__} {reason}; use 'grouped_mm' or "
            "'eager' for this model"
        )
    return _compute_experts(self, hidden_states, top_k_index, top_k_weights)


def unserved(experts: nn.Module) -> str | None:
    """Why the kernels cannot compute an experts module of transformers; None if they can."""
    module: Any = experts
    if module.has_bias:
        return "adds biases, which the kernels do not"
    if module.is_transposed:
        return "stores its weights transposed, [E, in, out]; the kernels read [E, out, in]"
    if getattr(module, "has_post_expert_norm", False):
        return "normalises each expert's output, which the kernels do not"
    if module.has_gate and not module.is_concatenated:
        return "interleaves rows of gate and up projection; the kernels read one after the other"
    if module.has_gate and type(module)._apply_gate.__module__ != _HERE:
        return "applies a gate of its own (clamped or scaled), which the kernels do not"
    if _activation(module) is None:
        name = getattr(module.act_fn, "__name__", type(module.act_fn).__name__)
        known = "SiLU" if module.has_gate else "ReLU^2 and exact GELU"
        gate = "with" if module.has_gate else "without"
        return f"has the activation {name}; {gate} a gate the kernels know {known}"
    return None


# -- What replaces what ------------------------------------------------------------------------


_EXPERTS = "experts"  # the replacement of an experts module; that of a gate is its row
_CURE = 'pip install -U "transformers>=5.8"'
_HERE = "transformers.integrations.moe"
_GATED = {"torch.nn.SiLU": "swiglu", "transformers.activations.SiLUActivation": "swiglu"}
_UNGATED = {
    "torch.nn.GELU": "gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}


def _compute_experts(self: Any, hidden_states, top_k_index, top_k_weights):
    routing = routing_of(top_k_index, top_k_weights, self.num_experts)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    activation: Any = _activation(self)
    y = moe_mlp(hidden_states, up, self.down_proj, routing, activation=activation)
    return y.to(hidden_states.dtype)


def _compute_gate(self: Any, hidden_states, e_score_correction_bias=None):
    row: Gate = self._replacement
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    weight = self.weight
    if row.product == "float32":
        x, weight = x.float(), weight.float()
    elif row.product == "weight":
        x = x.to(weight.dtype)
    logits = F.linear(x, weight)
    bias = e_score_correction_bias
    if row.bias is not None and row.bias != ARGUMENT:
        bias = getattr(self, row.bias)
    groups, topk_groups = (getattr(self, name) for name in row.groups) if row.groups else (1, 1)
    routing = route(
        logits.float(),
        self.top_k,
        bias=None if bias is None else bias.float(),
        score_fn=row.score_fn,
        groups=groups,
        topk_groups=topk_groups,
        normalize=_option(self, row.normalize),
        scale=_option(self, row.scale),
    )
    kinds = {"float32": torch.float32, "logits": logits.dtype, "input": hidden_states.dtype}
    returned = logits if row.logits is None else logits.to(kinds[row.logits])
    return returned, routing.gates.to(kinds[row.weights]), routing.experts


def _option(module: nn.Module, option):
    return getattr(module, option) if isinstance(option, str) else option


def _activation(module: Any) -> str | None:
    """Name that ``moe_mlp`` has for the activation of an experts module, if it has one."""
    act, known = module.act_fn, _GATED if module.has_gate else _UNGATED
    if act is F.silu:
        return known.get("torch.nn.SiLU")
    if getattr(act, "approximate", "none") != "none":
        return None
    kind = type(act)
    return known.get(f"{kind.__module__}.{kind.__qualname__}".replace(".modules.activation", ""))


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` describes the module."""
    names = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj", "num_experts")
    return all(hasattr(module, name) for name in names)


def _replacement_of(module: nn.Module) -> Any:
    return getattr(type(module), "_replacement", None)


def _check_forward(path: str, module: nn.Module) -> None:
    """Refuse a module whose forward is its own attribute: swapping the class would do nothing."""
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise TypeError(
            f"{path}: its forward has been replaced (tensor or expert parallelism does that); load "
            f"the model with experts_implementation={NAME!r} instead"
        )


def _swap(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)
    if "_old_forward" in vars(module):  # accelerate's hooks call this one
        vars(module)["_old_forward"] = types.MethodType(kind.forward, module)


@functools.cache
def _replaced(base: Any, replacement: Gate | str) -> type[nn.Module]:
    forward = _compute_gate if isinstance(replacement, Gate) else _compute_experts
    members: dict[str, Any] = {
        "forward": forward,
        "_replacement": replacement,
        "extra_repr": _extra_repr,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _extra_repr(self):
    before = super(_class_of(self), self).extra_repr()
    return f"{before}, by {NAME}" if before else f"by {NAME}"


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class that :func:`patch` gave a module, which may have been subclassed since."""
    return next(kind for kind in type(module).__mro__ if "_replacement" in vars(kind))


def _reduce(self, protocol):
    # The class was made at run time, so a pickle names what it was made from instead.
    return _rebuild, (_class_of(self).__bases__[0], self._replacement), dict(vars(self))


def _rebuild(base, replacement):
    kind = _replaced(base, replacement)
    return kind.__new__(kind)


# -- transformers itself -----------------------------------------------------------------------


def _transformers():
    """``transformers.integrations.moe``, or an ImportError that says what to install."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers is not installed; {_CURE}") from error
    try:
        from transformers.integrations import moe

        options = inspect.signature(moe.use_experts_implementation).parameters
        if "is_concatenated" in options and hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
            return moe
    except ImportError:
        pass
    raise ImportError(
        f"transformers {transformers.__version__} is too old: its experts do not say how they lay "
        f"out their weights; {_CURE}"
    )


def _nothing(model: nn.Module, skipped: dict[str, str]) -> str:
    reasons = "".join(f"\n  {path or type(model).__name__}: {why}" for path, why in skipped.items())
    models = sorted({kind.split(".")[0] for row in GATES for kind in row.kinds})
    return (
        f"model: {type(model).__name__} has no MoE block that is known"
        + (f"; found were{reasons}\n" if reasons else "; ")
        + f"known are gates of {', '.join(models)}, and experts of every model of transformers "
        "whose weights are neither transposed nor biased and whose activation the kernels know"
    )


with contextlib.suppress(ImportError):  # raised again, with the cure, by whatever is called here
    register()
