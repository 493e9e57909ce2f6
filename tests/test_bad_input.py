"""Every public op refuses what does not fit: exact type, the argument's name, nothing half-done."""

import pytest
import torch

import weightshare_kernels
from weightshare_kernels import (
    AdapterGroups,
    Routing,
    entangle,
    entangled_linear,
    entangled_linear_independent,
    expert_mixture_linear,
    group_by_adapter,
    grouped_sliced_linear,
    moe_mlp,
    route,
    routing_of,
    shard_index,
    shard_lora,
    shard_lora_group,
    sliced_linear,
    sliced_weight,
)

ROWS, COLS = 12, 10


def linear_tensors():
    return {
        "x": torch.randn(3, COLS, requires_grad=True),
        "weight": torch.randn(ROWS, COLS, requires_grad=True),
        "bias": torch.randn(ROWS, requires_grad=True),
    }


GOOD = {
    sliced_linear: lambda: {**linear_tensors(), "out": 5, "in_": None},
    entangled_linear: lambda: {
        **linear_tensors(),
        "choices": [(4, 10), (12, 6)],
        "alpha": torch.rand(2, requires_grad=True),
    },
    entangled_linear_independent: lambda: {
        **linear_tensors(),
        "outs": (4, 12),
        "alpha_out": torch.rand(2, requires_grad=True),
        "ins": (3, 6, 10),
        "alpha_in": torch.rand(3, requires_grad=True),
    },
    entangle: lambda: {
        "weight": torch.randn(6, 4, 5, 5, requires_grad=True),
        "choices": [(6, 4, 3, 3), (3, 2, 5, 5)],
        "alpha": torch.rand(2, requires_grad=True),
    },
}
GOOD |= {
    expert_mixture_linear: lambda: {
        "x": torch.randn(3, COLS, requires_grad=True),
        "experts": torch.randn(2, ROWS, COLS, requires_grad=True),
        "bias": torch.randn(2, ROWS, requires_grad=True),
        "mix": torch.rand(2, requires_grad=True),
        "out": 5,
        "in_": None,
    },
    grouped_sliced_linear: lambda: {
        **linear_tensors(),
        "sizes": [2, 1],
        "outs": [5, 12],
        "ins": [10, 3],
    },
}
# Selections are positional: tests/test_sliced_weight.py; a Routing is what test_route.py and
# test_moe_mlp.py are about, pools and tables test_shard_lora.py.
ELSEWHERE = {sliced_weight, Routing, route, routing_of, moe_mlp}
ELSEWHERE |= {AdapterGroups, group_by_adapter, shard_index, shard_lora, shard_lora_group}
LINEAR = (sliced_linear, entangled_linear, entangled_linear_independent)
MIXING = (entangled_linear, entangle)

T, V = TypeError, ValueError
META = torch.device("meta")
# (ops, argument, bad value, exception, what the message must say)
TABLE = [
    (LINEAR, "x", [[1.0] * COLS], T, "x: .*tensor.*list"),
    (LINEAR, "x", torch.ones(3, COLS, dtype=torch.int64), T, "x: .*floating.*int64"),
    (LINEAR, "x", torch.ones(3, COLS, dtype=torch.complex64), T, "x: .*floating.*complex64"),
    ((grouped_sliced_linear,), "sizes", [2, 2], V, "sizes: add up to 4, but x has 3 rows"),
    ((expert_mixture_linear,), "mix", torch.rand(3), V, r"mix: .*\(2,\).*\(3,\)"),
    (LINEAR, "x", torch.tensor(1.0), V, "x: .*scalar"),
    (LINEAR, "x", torch.randn(3, COLS + 1), V, "x: .*11.*10"),
    (LINEAR, "x", torch.randn(COLS, 3), V, "x: .*3.*10"),
    (LINEAR, "x", torch.randn(3, COLS, dtype=torch.float64), T, "weight: .*float32.*x.*float64"),
    (LINEAR, "x", torch.randn(3, COLS, device=META), V, "weight: .*cpu.*x.*meta"),
    (LINEAR, "x", None, T, "x: .*NoneType"),
    (LINEAR, "weight", None, T, "weight: .*NoneType"),
    (LINEAR, "weight", torch.randn(ROWS), V, r"weight: .*2 dimensions.*\(12,\)"),
    (LINEAR, "weight", torch.randn(2, ROWS, COLS), V, r"weight: .*2 dim.*\(2, 12, 10\)"),
    (LINEAR, "weight", torch.ones(ROWS, COLS, dtype=torch.int8), T, "weight: .*floating.*int8"),
    (LINEAR, "weight", torch.randn(ROWS, COLS).half(), T, "weight: .*float16.*float32"),
    (LINEAR, "weight", torch.randn(ROWS, COLS, device=META), V, "weight: .*meta.*cpu"),
    (LINEAR, "bias", 0.0, T, "bias: .*float"),
    (LINEAR, "bias", torch.randn(5), V, "bias: .*5.*12"),
    (LINEAR, "bias", torch.randn(ROWS, 1), V, r"bias: .*1 dim.*\(12, 1\)"),
    (LINEAR, "bias", torch.ones(ROWS, dtype=torch.int32), T, "bias: .*floating.*int32"),
    (LINEAR, "bias", torch.randn(ROWS).double(), T, "bias: .*float64.*float32"),
    (LINEAR, "bias", torch.randn(ROWS, device=META), V, "bias: .*meta.*cpu"),
    ((sliced_linear,), "out", 13, V, r"out: prefix 13 .*0\.\.12"),
    ((sliced_linear,), "out", torch.tensor([0, 12]), V, r"out: .*0\.\.11"),
    ((sliced_linear,), "out", torch.tensor([3, 3]), V, "out: 1 repeated"),
    ((sliced_linear,), "out", torch.ones(ROWS).bool(), T, "out: .*bool"),
    ((sliced_linear,), "out", slice(0, 4.0), T, "out: .*float"),
    ((sliced_linear,), "in_", 11, V, r"in_: prefix 11 .*0\.\.10"),
    ((sliced_linear,), "in_", 9, V, "x: .*10.*in_=9.*9 of 10"),
    ((sliced_linear,), "in_", 3.5, T, "in_: .*float"),
    ((sliced_linear,), "in_", [slice(0, 9), slice(8, 9)], V, "in_: .*(repeat|twice|overlap)"),
    ((entangle,), "weight", None, T, "weight: .*NoneType"),
    ((entangle,), "weight", torch.tensor(1.0), V, "weight: .*scalar"),
    ((entangle,), "weight", torch.ones(6, 4, 5, 5).int(), T, "weight: .*floating.*int32"),
    ((entangle,), "weight", torch.randn(6, 4, 5), V, r"choices\[0\]: .*\(6, 4, 3, 3\)"),
    ((entangle,), "weight", torch.randn(5, 4, 5, 5), V, r"choices\[0\]: .*axis 0.* 6.*0\.\.5"),
    (MIXING, "choices", None, T, "choices: .*None"),
    (MIXING, "choices", "ab", T, "choices: .*'ab'"),
    (MIXING, "choices", torch.tensor([[4, 6]]), T, "choices: .*tensor"),
    (MIXING, "choices", [], V, "choices: .*empty"),
    (MIXING, "choices", [4, 12], T, r"choices\[0\]: .*4"),
    (MIXING, "choices", ["ab", "cd"], T, r"choices\[0\]: .*'ab'"),
    (MIXING, "choices", [(4,), (12,)], V, r"choices\[0\]: .*\(4,\)"),
    ((entangled_linear,), "choices", [(4, 10), (13, 6)], V, r"choices\[1\]: out.*13.*0\.\.12"),
    ((entangled_linear,), "choices", [(4, 11), (12, 6)], V, r"choices\[0\]: in.*11.*0\.\.10"),
    ((entangled_linear,), "choices", [(4, 10), (12, -1)], V, r"choices\[1\]: in.*-1"),
    ((entangled_linear,), "choices", [(4, 10), (12, 6.0)], T, r"choices\[1\]: in.*6\.0"),
    ((entangled_linear,), "choices", [(True, 10), (12, 6)], T, r"choices\[0\]: out.*True"),
    ((entangled_linear,), "choices", [(4, 10)], V, r"alpha: .*\(1,\).*\(2,\)"),
    ((entangle,), "choices", [(6, 4, 3, 3), (6, 4, 5, 6)], V, r"choices\[1\]: .*axis 3.*6"),
    (MIXING, "alpha", [0.5, 0.5], T, r"alpha: .*\[2\]"),
    (MIXING, "alpha", torch.rand(3), V, r"alpha: .*\(2,\).*\(3,\)"),
    (MIXING, "alpha", torch.rand(2, 1), V, r"alpha: .*\(2,\).*\(2, 1\)"),
    (MIXING, "alpha", torch.tensor(0.5), V, r"alpha: .*\(2,\).*\(\)"),
    (MIXING, "alpha", torch.ones(2).int(), T, "alpha: .*floating"),
    (MIXING, "alpha", torch.rand(2, device=META), V, "alpha: .*meta.*cpu"),
    ((entangled_linear_independent,), "outs", 12, T, "outs: .*12"),
    ((entangled_linear_independent,), "outs", (), V, "outs: .*empty"),
    ((entangled_linear_independent,), "outs", (4, 13), V, r"outs\[1\]: .*13.*0\.\.12"),
    ((entangled_linear_independent,), "outs", (4, "x"), T, r"outs\[1\]: .*'x'"),
    ((entangled_linear_independent,), "outs", (4,), V, r"alpha_out: .*\(1,\).*\(2,\)"),
    ((entangled_linear_independent,), "ins", (3, 6, 11), V, r"ins\[2\]: .*11.*0\.\.10"),
    ((entangled_linear_independent,), "ins", (3, True, 6), T, r"ins\[1\]: .*True"),
    ((entangled_linear_independent,), "alpha_in", torch.rand(2), V, r"alpha_in: .*\(3,\)"),
    ((entangled_linear_independent,), "alpha_in", torch.rand(3, device=META), V, "alpha_in.*meta"),
    ((entangled_linear_independent,), "alpha_out", None, T, "alpha_out: .*None"),
]
BAD = [
    pytest.param(op, *row[1:], id=f"{op.__name__}-{row[1]}-{number}")
    for number, row in enumerate(TABLE)
    for op in row[0]
]


def test_every_public_op_is_here():
    from weightshare_kernels.ops import __all__ as public

    assert {op.__name__ for op in GOOD.keys() | ELSEWHERE} == set(public)
    assert {op for row in TABLE for op in row[0]} == set(GOOD)
    assert all(hasattr(weightshare_kernels, name) for name in public)


@pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)
def test_good_input_is_good(op):
    """The rows below change one argument each, so that only that one can be to blame."""
    arguments = GOOD[op]()
    op(**arguments).sum().backward()
    assert all(v.grad is not None for v in arguments.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(("op", "argument", "value", "kind", "message"), BAD)
def test_refused(op, argument, value, kind, message):
    arguments = {**GOOD[op](), argument: value}
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor) and not v.is_meta]
    before = [v.detach().clone() for v in tensors]
    with pytest.raises(kind, match=message) as caught:
        op(**arguments)
    assert caught.type is kind
    for tensor, value_before in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value_before) and tensor.grad is None
    op(**GOOD[op]()).sum().backward()  # and the op is none the worse for it


def test_message_keeps_large_tensors_out():
    """An error about alpha must not print a million numbers."""
    with pytest.raises((TypeError, ValueError)) as caught:
        entangle(torch.randn(4, 4), [(4, 4)], torch.zeros(1_000_000, dtype=torch.int64))
    assert len(str(caught.value)) < 500
