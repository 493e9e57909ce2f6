"""Every case of every op: values, gradients, contract. A new op is tested by its folder."""

import pytest
import torch

from weightshare_kernels._cases import Maker, all_cases, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(case, id=f"{op}-{case.name}")
    for op, cases in all_cases("test").items()
    for case in cases
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def run(function, inputs, dtype=torch.float32, seed=1):
    """Outputs and gradients of a function, under one random output gradient exact in dtype."""
    wanted = leaves(inputs)
    y = function(**inputs)
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [y, *torch.autograd.grad(y, wanted, g.to(y), materialize_grads=True)]


def cast(inputs, dtype):
    """The same inputs in another floating dtype."""
    return {
        k: v.detach().to(dtype).requires_grad_() if torch.is_tensor(v) and v.requires_grad else v
        for k, v in inputs.items()
    }


def error(got, wanted):
    """Largest deviation, relative to the largest wanted value."""
    if not got.numel():
        return 0.0
    scale = max(wanted.abs().max().item(), 1e-30)
    return (got.double() - wanted).abs().max().item() / scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, dtype):
    """Our error against float64 is at most twice that of PyTorch in the same dtype."""
    inputs = case.inputs(Maker(dtype, DEVICE))
    exact = run(case.reference, cast(inputs, torch.float64), dtype)
    torchs = run(case.reference, inputs, dtype)
    ours = run(case.call, inputs, dtype)
    names = ["output", *[k for k, v in inputs.items() if torch.is_tensor(v) and v.requires_grad]]
    for name, o, t, e in zip(names, ours, torchs, exact, strict=True):
        assert o.shape == t.shape and o.dtype == t.dtype, name
        assert torch.isfinite(o).all(), name
        # A few roundings are allowed even where torch is exact by luck (sums over a whole layer
        # cancel, so their error is large against their value); float64 has no better judge than
        # itself.
        floor = {torch.float64: 1e-13, torch.float32: 8 * EPS[torch.float32]}.get(dtype, EPS[dtype])
        allowed = max(2 * error(t, e), floor)
        assert error(o, e) <= allowed, f"{name}: {error(o, e):.2e} > {allowed:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    inputs = case.inputs(Maker(torch.float64, DEVICE))
    names = [k for k, v in inputs.items() if torch.is_tensor(v) and v.requires_grad]
    fixed = {k: v for k, v in inputs.items() if k not in names}

    def function(*values):
        return case.call(**dict(zip(names, values, strict=True)), **fixed)

    values = [inputs[k] for k in names]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_repeats_bitwise(case):
    inputs = case.inputs(Maker(torch.float32, DEVICE))
    for first, second in zip(run(case.call, inputs), run(case.call, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE != "cuda", reason="without a GPU there is nothing to wait for")
@pytest.mark.parametrize("case", CASES)
def test_host_does_not_wait(case):
    """From the second call on, so that CUDA graphs can hold it and launches run ahead."""
    inputs = case.inputs(Maker(torch.float32, DEVICE))

    def step():
        y = case.call(**inputs)
        torch.autograd.grad(y, leaves(inputs), torch.ones_like(y), materialize_grads=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded_grad"])
@pytest.mark.parametrize("case", CASES)
def test_awkward_strides(case, layout):
    inputs = case.inputs(Maker(torch.float32, DEVICE))
    tensors = [k for k, v in inputs.items() if torch.is_tensor(v) and v.requires_grad]
    changed = dict(inputs)
    for k in tensors:
        value = inputs[k].detach()
        if layout == "strided" and value.dim():
            wide = value.new_full([2 * n + 1 for n in value.shape], float("nan"))
            view = wide[tuple(slice(1, None, 2) for _ in value.shape)]
            view.copy_(value)
            value = view
        elif layout == "transposed":
            value = value.transpose(0, -1).contiguous().transpose(0, -1)
        changed[k] = value.requires_grad_()
    plain = case.call(**inputs)
    other = case.call(**changed)
    torch.testing.assert_close(other, plain)
    g = torch.ones_like(plain)
    if layout == "expanded_grad":
        g = torch.ones((), device=plain.device).expand(plain.shape)
    wanted = torch.autograd.grad(plain, leaves(inputs), torch.ones_like(plain))
    got = torch.autograd.grad(other, leaves(changed), g)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
