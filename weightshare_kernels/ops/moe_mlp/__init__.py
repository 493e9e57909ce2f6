"""The experts of a sparse mixture-of-experts layer, computed where the tokens lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from weightshare_kernels import _checks, _collect
from weightshare_kernels._register import define, lean
from weightshare_kernels._select import lasting, temporary
from weightshare_kernels.ops.moe_mlp import reference

_TRITON = "weightshare_kernels.ops.moe_mlp.triton"
_ROUTES = (
    "Tensor gates, Tensor offsets, Tensor permutation, Tensor inverse, Tensor? widths, "
    "SymInt width, str activation"
)


def _fake_forward(x, gate_up, down, gates, offsets, permutation, inverse, widths, width, act, save):
    blocks = 2 if reference.GATED[act] else 1
    h = x.new_empty((permutation.shape[0], blocks * width)) if save else x.new_empty((0,))
    return torch.empty_like(x, memory_format=torch.contiguous_format), h


def _fake_backward(gate_up_buffer, down_buffer, grad, x, gate_up, down, h, gates, *rest):
    dx = grad.new_empty(grad.shape if rest[-1] else (0,))
    return dx, torch.empty_like(gates, memory_format=torch.contiguous_format)


_forward = define(
    f"moe_mlp(Tensor x, Tensor gate_up, Tensor down, {_ROUTES}, bool save) -> (Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:forward",
)
_backward_ = define(
    "moe_mlp_backward_(Tensor(a!)? gate_up_buffer, Tensor(b!)? down_buffer, Tensor grad, Tensor x, "
    f"Tensor gate_up, Tensor down, Tensor h, {_ROUTES}, bool add_gate_up, bool add_down, "
    "bool wants_x) -> (Tensor, Tensor)",
    reference=reference.backward_,
    fake=_fake_backward,
    triton=f"{_TRITON}:backward_",
)


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing,
    *,
    activation: str = "swiglu",
    width: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Feed-forward experts of a sparse MoE: ``y_t = sum_j gate_tj * down_e act(gate_up_e x_t)``.

    Tokens are gathered while the first product reads them, the activation is applied to its tile,
    and the second product's rows are weighted and added where they belong: no permuted copy of x,
    no padding to a capacity. Backward keeps x and the pre-activations ``h`` alone (in bf16
    ``2 T d + 4 T k f`` bytes); the gates' gradient is ``<d act, act>``, so that no expert's output
    is kept. All gradients are deterministic.

    Args:
        x: tokens ``[..., d]``, T of them.
        gate_up: ``[E, 2f, d]``: rows ``0..f`` of an expert are its gate, ``f..2f`` its up
            projection. ``[E, f, d]`` where the activation is not gated.
        down: ``[E, d, f]``.
        routing: a ``Routing`` of these T tokens over E experts, from ``route`` or ``routing_of``.
        activation: ``"swiglu"`` (``silu(gate) * up``), ``"gelu"`` (exact, not gated) or
            ``"relu2"`` (``relu(h)^2``, not gated).
        width: hidden units that each expert uses, a prefix of gate, up and down, read by strides
            (elastic experts): None: all f; an int; or one per expert, ints or an integer tensor
            ``[E]``. A tensor on a GPU is not read by the host: kernels clamp it to ``0..f``.

    Returns:
        ``[..., d]``, in x's dtype (autocast's under autocast). Padded tokens give zero.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes, devices or widths do not fit; the message names the argument and what
            was wanted.

    Source: the gather and scatter fused into the products follow ScatterMoE (Tan et al., 2024,
    arXiv 2403.08245), what is saved for backward SonicMoE (Guo et al., 2025, arXiv 2512.14080);
    prefixes of experts as in MatFormer (Devvrit et al., 2024).
    """
    _check(x, gate_up, down, routing, activation)
    most, widths = _widths(width, down)
    gates, tables = routing.gates, (routing.offsets, routing.permutation, routing.inverse)
    x = _checks.autocast(x)
    # Gradients are written in the weights' dtype or in fp32: another low one is cast before.
    gate_up, down = (w if w.dtype.itemsize >= 4 else _cast(w, x.dtype) for w in (gate_up, down))
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    arguments = (rows, gate_up, down, gates, *tables, widths, most, activation)
    if not _collect.plain():
        y = _MoEMLP.apply(*arguments, None, None)[0]
    elif torch.is_grad_enabled() and any(t.requires_grad for t in arguments[:4]):
        y = _lean(*arguments, _collect.collect(gate_up), _collect.collect(down))[0]
    else:
        y = _compute(*arguments, False)[0]
    return y if x.dim() == 2 else y.view(x.shape)


def _check(x, gate_up, down, routing, activation) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all fit together."""
    if activation not in reference.GATED:
        raise ValueError(
            f"activation: {activation!r} is unknown; expected one of {', '.join(reference.GATED)}"
        )
    _checks.tensor("x", x)
    _checks.tensor("gate_up", gate_up, 3)
    _checks.tensor("down", down, 3)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension [..., d], got a scalar")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        _checks.same_kind(name, weight, "x", x)
    experts, d, f = down.shape
    blocks = 2 if reference.GATED[activation] else 1
    if gate_up.shape != (experts, blocks * f, d):
        raise ValueError(
            f"gate_up: expected shape {(experts, blocks * f, d)} for {activation} with down "
            f"{tuple(down.shape)} [E, d, f], got {tuple(gate_up.shape)}"
            + ("; gate and up rows lie below each other" if blocks == 2 else "")
        )
    if x.shape[-1] != d:
        raise ValueError(f"x: last dimension is {x.shape[-1]}, but the experts take {d}")
    _check_routing(routing, x, experts)


def _check_routing(routing, x: Tensor, experts: int) -> None:
    """Check a routing's shapes, dtypes and device; its values come from ``route``."""
    names = ("gates", "offsets", "permutation", "inverse")
    if not all(isinstance(getattr(routing, name, None), Tensor) for name in names):
        raise TypeError(
            f"routing: expected a Routing, from route() or routing_of(), got "
            f"{type(routing).__name__}"
        )
    gates, offsets, tokens = routing.gates, routing.offsets, x.shape[:-1].numel()
    if gates.dim() != 2 or gates.shape[0] != tokens:
        raise ValueError(
            f"routing: has gates {tuple(gates.shape)}, but x has {tokens} tokens; route the same "
            "tokens, flattened to [T, E] scores"
        )
    if not gates.is_floating_point():
        raise TypeError(f"routing.gates: expected a floating-point tensor, got {gates.dtype}")
    if offsets.shape != (experts + 1,):
        raise ValueError(
            f"routing: is over {offsets.shape[0] - 1} experts, but gate_up and down have {experts}"
        )
    for name in names:
        tensor = getattr(routing, name)
        _checks.same_device(f"routing.{name}", tensor, "x", x)
        if name != "gates" and tensor.dtype != torch.int64:
            raise TypeError(f"routing.{name}: expected int64, got {tensor.dtype}")
        if name in ("permutation", "inverse") and tensor.shape != (gates.numel(),):
            raise ValueError(
                f"routing.{name}: expected shape ({gates.numel()},), one per token and slot, got "
                f"{tuple(tensor.shape)}"
            )


def _widths(width, down: Tensor) -> tuple[int | torch.SymInt, Tensor | None]:
    """The largest width and, where experts differ, a tensor of all of them."""
    experts, _, f = down.shape
    if width is None:
        return f, None
    if isinstance(width, int | torch.SymInt) and not isinstance(width, bool):
        if not 0 <= width <= f:
            raise ValueError(f"width: {width} is outside 0..{f}, the hidden units of an expert")
        return width, None
    if isinstance(width, Tensor):
        if width.is_floating_point() or width.dtype == torch.bool or width.shape != (experts,):
            raise ValueError(
                f"width: expected integers of shape ({experts},), one per expert, got "
                f"{width.dtype} {tuple(width.shape)}"
            )
        if width.device.type != "cpu" or torch.compiler.is_compiling():
            return f, width.to(down.device, torch.int64)
        width = width.tolist()
    if not isinstance(width, Sequence) or isinstance(width, str | bytes):
        raise TypeError(
            f"width: expected None, an int, or an int per expert, got {type(width).__name__}"
        )
    if len(width) != experts:
        raise ValueError(f"width: has {len(width)} widths, but there are {experts} experts")
    for number, value in enumerate(width):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"width[{number}]: expected an int, got {value!r}")
        if not 0 <= value <= f:
            raise ValueError(f"width[{number}]: {value} is outside 0..{f}")
    if len(set(width)) <= 1:
        return (width[0] if width else f), None
    if torch.compiler.is_compiling() or temporary() or down.device.type == "cpu":
        return max(width), torch.tensor(width, device=down.device)
    key = (*width, down.device)
    found = _width_tensors.get(key)
    if found is None:  # kept, as a copy to a GPU waits and cannot be captured in a graph
        if len(_width_tensors) >= 1024:
            _width_tensors.clear()
        with lasting():
            found = _width_tensors[key] = torch.tensor(width, device=down.device)
    return max(width), found


_width_tensors: dict[tuple, Tensor] = {}


def _compute(
    x, gate_up, down, gates, offsets, permutation, inverse, widths, width, activation, save
):
    weights = [_cast(gate_up, x.dtype), _cast(down, x.dtype)]
    tables = offsets, permutation, inverse
    return _forward(x, *weights, gates, *tables, widths, width, activation, save)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


class _MoEMLP(Function):
    """Autograd of :func:`moe_mlp`; saves x, h, the weights and the small tables."""

    generate_vmap_rule = True

    # Every parameter has a name: without gradients, Dynamo passes a context along with *arguments.
    @staticmethod
    def forward(
        x, gate_up, down, gates, offsets, permutation, inverse, widths, width, activation,
        gate_up_collector, down_collector,
    ):  # fmt: skip
        tables = offsets, permutation, inverse
        return _compute(x, gate_up, down, gates, *tables, widths, width, activation, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, width, activation, gate_up_collector, down_collector = inputs
        h = output[1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, h)
        ctx.settings = width, activation
        # For their shapes and their .grad; the values come from what is saved.
        ctx.weights = tensors[1], tensors[2]
        ctx.collectors = gate_up_collector, down_collector
        for collector in ctx.collectors:
            if collector is not None:
                collector.join(ctx)

    @staticmethod
    def backward(ctx, grad, _):
        none = (None,) * 8
        if grad is None:
            return (None,) * 4 + none
        x, gate_up, down, gates, *tables, widths, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, grad, x, gate_up, down, gates), *none
        opened = [_open(ctx, number) for number in (0, 1)]
        weights = [_cast(gate_up, x.dtype), _cast(down, x.dtype)]
        dx, dgates = _backward_(
            *[buffer for buffer, _ in opened], grad, x, *weights, h, gates, *tables, widths,
            *ctx.settings, *[add for _, add in opened], ctx.needs_input_grad[0],
        )  # fmt: skip
        dw = []
        for number, collector in enumerate(ctx.collectors):
            dw.append(opened.pop(0)[0])
            if collector is not None and dw[-1] is not None:
                dw[-1] = None  # autograd takes a gradient over as it is only from its sole owner
                dw[-1] = collector.close(ctx.weights[number].dtype)
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, *dw, dgates if ctx.needs_input_grad[3] else None, *none


_lean = lean(_MoEMLP)


def _open(ctx, number: int) -> tuple[Tensor | None, bool]:
    """Buffer for the gradient of gate_up (0) or down (1), and whether to add to what is there."""
    weight, collector = ctx.weights[number], ctx.collectors[number]
    if not ctx.needs_input_grad[1 + number]:
        return None, False
    if collector is None:
        return torch.empty_like(weight, memory_format=torch.contiguous_format), False
    accumulator = ctx.next_functions[1 + number][0]
    if not _collect.wanted(accumulator):
        return None, False
    return collector.open(weight, accumulator)


def _differentiable_gradients(ctx, grad, x, gate_up, down, gates):
    """Gradients in terms of differentiable PyTorch, for double backward."""
    offsets, permutation, _, widths, _ = ctx.saved_tensors[4:]
    width, activation = ctx.settings
    tables, needs = (offsets, permutation, widths), ctx.needs_input_grad[:4]
    with torch.enable_grad():
        tensors = x, gate_up, down, gates = _collect.alone([x, gate_up, down, gates], needs)
        wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
        y, _ = reference.define(x, gate_up, down, gates, *tables, width, activation)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs]
