"""shard_lora beyond its cases: any table, shared pools, threads, memory, compilers, errors."""

import gc
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare_kernels import (
    _register,
    group_by_adapter,
    shard_index,
    shard_lora,
    shard_lora_group,
)
from weightshare_kernels.ops.shard_lora import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.weightshare
on_cpu = pytest.mark.skipif(
    _register.backend_of("shard_lora", DEVICE) != "cpu", reason="a promise of the CPU's kernels"
)


def randn(g, *shape, dtype=torch.float64, grad=True):
    value = torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    return value.requires_grad_(grad)


def problem(
    rows=10, la=2, ca=8, lb=3, cb=5, r=4, shards=24, adapters=0, dtype=torch.float64, seed=0
):
    """x, base, pools and tables by name; with adapters an id per row, too."""
    g = torch.Generator().manual_seed(seed)
    lead = (adapters, r) if adapters else (r,)

    def table(pieces):
        return torch.randint(shards, (*lead, pieces), generator=g).to(DEVICE, torch.int32)

    made = {
        "x": randn(g, rows, la * ca, dtype=dtype),
        "base_out": randn(g, rows, lb * cb, dtype=dtype),
        "a_pool": randn(g, shards, ca, dtype=dtype),
        "b_pool": randn(g, shards, cb, dtype=dtype),
        "a_index": table(la),
        "b_index": table(lb),
        "scale": 0.5,
    }
    if adapters:
        made["adapters"] = torch.randint(-1, adapters, (rows,), generator=g).to(DEVICE)
    return made


def defined(x, base_out, a_pool, b_pool, a_index, b_index, scale=1.0, adapters=None):
    """The definition, row by row in float64: nothing shared with the kernels or the reference."""
    rows, index_a, index_b = [], a_index.tolist(), b_index.tolist()
    if adapters is None:
        index_a, index_b = [index_a], [index_b]

    def matrix(pool, table):
        zero = pool.new_zeros(pool.shape[1])
        lines = [[pool[n] if 0 <= n < len(pool) else zero for n in line] for line in table]
        return torch.stack([torch.cat(line) for line in lines])

    for row in range(len(x)):
        adapter = 0 if adapters is None else int(adapters[row])
        y = base_out[row]
        if 0 <= adapter < len(index_a):
            factor = float(scale[adapter]) if torch.is_tensor(scale) else scale
            a, b = matrix(a_pool, index_a[adapter]), matrix(b_pool, index_b[adapter])
            y = y + factor * ((a @ x[row]) @ b)
        rows.append(y)
    return torch.stack(rows)


def leaves(made):
    return [v for v in made.values() if torch.is_tensor(v) and v.requires_grad]


def gradients(y, wanted, g=None):
    g = torch.ones_like(y) if g is None else g
    return torch.autograd.grad(y, wanted, g, materialize_grads=True)


# -- any shape and any table -------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_random_shapes(data):
    draw = data.draw
    many = draw(st.booleans())
    made = problem(
        rows=draw(st.integers(1, 40)),
        la=draw(st.integers(1, 4)),
        ca=draw(st.integers(1, 40)),
        lb=draw(st.integers(1, 4)),
        cb=draw(st.integers(1, 40)),
        r=draw(st.integers(1, 14)),
        shards=draw(st.integers(1, 30)),
        adapters=draw(st.integers(1, 5)) if many else 0,
        seed=draw(st.integers(0, 1000)),
    )
    for name in ("a_index", "b_index"):  # some shards of zeros
        table = made[name]
        cut = draw(st.integers(0, table.shape[-2]))
        table[..., cut:, :] = -1
    got, want = shard_lora(**made), defined(**made)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    g = torch.randn(want.shape, dtype=torch.float64).to(DEVICE)
    for a, b in zip(gradients(got, leaves(made), g), gradients(want, leaves(made), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(shard_lora(**made), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("adapters", [0, 3])
def test_absurd_numbers_are_shards_of_zeros(adapters):
    made = problem(adapters=adapters)
    absurd = torch.tensor([-1, -7, 24, 25, 1 << 30, -(1 << 31), (1 << 31) - 1], dtype=torch.int32)
    for name in ("a_index", "b_index"):
        flat = made[name].view(-1)
        flat[::2] = absurd.repeat(flat.numel())[: flat[::2].numel()].to(DEVICE)
    got, want = shard_lora(**made), defined(**made)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, leaves(made)), gradients(want, leaves(made)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(shard_lora(**made), want)


def test_absurd_ids_are_no_adapter():
    made = problem(rows=6, adapters=2)
    made["adapters"] = torch.tensor([0, 1, -1, 2, 1 << 62, -(1 << 63)], device=DEVICE)
    with torch.no_grad():
        y = shard_lora(**made)
    torch.testing.assert_close(y, defined(**made).detach())
    assert torch.equal(y[2:], made["base_out"][2:])
    assert torch.equal(shard_lora(**made)[2:], made["base_out"][2:])


@on_cpu
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("offsets", [0, 3, 2, 6], "offsets: .*ascend"),
        ("offsets", [-5, 0, 2, 6], "offsets: .*ascend"),
        ("offsets", [0, 1, 2, 1 << 40], "offsets: .*ascend"),
        ("permutation", [0, 1, 2, 3, 4, 6], "permutation: .*outside"),
        ("permutation", [0, 1, -1, 3, 4, 5], "permutation: .*outside"),
    ],
)
def test_tables_are_checked_by_the_kernel(name, value, message):
    """A traced graph may be handed tables that nobody saw."""
    made = problem(rows=6, adapters=3)
    groups = group_by_adapter(made["adapters"], 3)
    tables = {"offsets": groups.offsets, "permutation": groups.permutation}
    tables[name] = torch.tensor(value)
    x, base, *rest = [v.detach() for v in made.values() if torch.is_tensor(v)][:6]
    with pytest.raises(RuntimeError, match=message):
        OPS.shard_lora(x, [base], *[[t] for t in rest], *tables.values(), None, 1.0)


def test_no_shards_at_all():
    made = problem()
    made["a_pool"] = made["a_pool"][:0].detach().requires_grad_()
    y = shard_lora(**made)
    assert torch.equal(y, made["base_out"])
    assert not any(g.any() for g in gradients(y, [made["x"], made["b_pool"]]))


# -- strides -----------------------------------------------------------------------------------


def apart(tensor):
    """The same values with gaps between all elements."""
    wide = tensor.new_zeros([2 * n + 1 for n in tensor.shape])
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("how", ["apart", "turned", "of_a_layer"])
@pytest.mark.parametrize("adapters", [0, 3])
def test_tables_with_strides(how, adapters):
    made = problem(adapters=adapters)
    want = shard_lora(**made)
    for name in ("a_index", "b_index"):
        table = made[name]
        if how == "apart":
            made[name] = apart(table)
        elif how == "turned":
            made[name] = table.transpose(-1, -2).contiguous().transpose(-1, -2)
        else:  # [adapters, layers, r, l]
            made[name] = torch.stack([table.flip(0), table], -3).select(-3, 1)
    got = shard_lora(**made)
    assert torch.equal(got, want)
    for a, b in zip(gradients(got, leaves(made)), gradients(want, leaves(made)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("how", ["plain", "columns_apart", "rows_apart"])
def test_outer_into_strided_buffers(how, add):
    made = problem(rows=9, adapters=2)
    groups = group_by_adapter(made["adapters"], 2)
    tables = (groups.offsets, groups.permutation, None, 0.5)
    g = torch.Generator().manual_seed(1)
    left = randn(g, 9, 11, grad=False)[:, 3:7]
    right, pool = made["x"].detach(), made["a_pool"].detach()
    want = pool.clone() if add else torch.full_like(pool, 7.0)
    reference.outer_(want, left, right, made["a_index"], *tables, add)
    buffer = {
        "plain": lambda: pool.clone(),
        "columns_apart": lambda: apart(pool),
        "rows_apart": lambda: torch.cat([pool, pool], 1)[:, : pool.shape[1]],
    }[how]()
    if not add:
        buffer.fill_(float("nan"))
    OPS.shard_outer_(buffer, left, right, made["a_index"], *tables, add)
    torch.testing.assert_close(buffer, want)
    OPS.shard_outer_(buffer, apart(left), apart(right), made["a_index"], *tables, True)
    reference.outer_(want, left, right, made["a_index"], *tables, True)
    torch.testing.assert_close(buffer, want)


# -- pools in several places -------------------------------------------------------------------


def test_one_pool_for_both_sides_and_twice_in_a_call():
    """As VB-LoRA's bank: every vector of every matrix comes from one pool."""
    made = problem(ca=8, cb=8, la=2, lb=3)
    bank = made["a_pool"]
    index = made["a_index"], made["b_index"]
    got = shard_lora(made["x"], made["base_out"], bank, bank, *index, 0.5)
    want = defined(made["x"], made["base_out"], bank, bank, *index, 0.5)
    torch.testing.assert_close(got, want)
    wanted = [made["x"], bank]
    for a, b in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        torch.testing.assert_close(a, b)
    bases = [made["base_out"], made["base_out"] * 2]
    lists = [[bank] * 2, [bank] * 2, [index[0]] * 2, [index[1], index[1].flip(0)]]
    ys = shard_lora_group(made["x"], bases, *lists)
    other = [defined(made["x"], *t) for t in zip(bases, *lists, strict=True)]
    got, want = sum(y.sum() * (n + 1) for n, y in enumerate(ys)), None
    want = sum(y.sum() * (n + 1) for n, y in enumerate(other))
    for a, b in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_output_of_a_group_that_is_not_used():
    made, other = problem(), problem(seed=1)
    lists = [[m[k] for m in (made, other)] for k in ("base_out", "a_pool", "b_pool")]
    tables = [[m[k] for m in (made, other)] for k in ("a_index", "b_index")]
    pools = [*lists[1], *lists[2]]
    y, _ = shard_lora_group(made["x"], *lists, *tables)
    dx, *dpools = gradients(y, [made["x"], *pools])
    alone = shard_lora(**{**made, "scale": 1.0})
    wanted = gradients(alone, [made["x"], made["a_pool"], made["b_pool"]])
    for got, want in zip((dx, dpools[0], dpools[2]), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert not dpools[1].any() and not dpools[3].any()


def test_layers_share_one_gradient():
    """Four layers over one pool: hooks see one gradient, the sum of all."""
    made = problem(shards=40)
    g = torch.Generator().manual_seed(3)
    tables = [
        [torch.randperm(40, generator=g)[:n].view(4, -1).to(DEVICE, torch.int32) for n in (8, 12)]
        for _ in range(4)
    ]
    calls = []
    made["b_pool"].register_hook(lambda grad: calls.append(grad.shape))
    pools = made["a_pool"], made["b_pool"]

    def chain(layer):
        y = made["base_out"]
        for a, b in tables:
            y = layer(made["x"], y, *pools, a, b)
        return y

    got = gradients(chain(shard_lora), leaves(made))
    assert calls == [made["b_pool"].shape]
    for a, b in zip(got, gradients(chain(defined), leaves(made)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", ["x", "base_out", "a_pool", "b_pool"])
def test_each_gradient_alone(wanted):
    made = problem(adapters=3)
    every = dict(zip(made, gradients(shard_lora(**made), leaves(made)), strict=False))
    alone = {
        k: v.detach().requires_grad_(k == wanted) if torch.is_tensor(v) and v.requires_grad else v
        for k, v in made.items()
    }
    torch.testing.assert_close(gradients(shard_lora(**alone), [alone[wanted]])[0], every[wanted])


# -- threads, batches and memory ---------------------------------------------------------------


def large(dtype, rows=70, adapters=5):
    made = problem(rows, 4, 96, 4, 80, 16, 200, adapters, dtype)
    made["a_index"][1, 9:] = made["b_index"][1, 9:] = -1
    return made


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [0, 5])
def test_number_of_threads_changes_nothing(dtype, adapters):
    made = large(dtype) if adapters else problem(300, 4, 96, 4, 80, 16, 200, 0, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = shard_lora(**made)
            with torch.no_grad():
                served = shard_lora(**made)
            results.append([y, served, *gradients(y, leaves(made))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_do_not_depend_on_the_batch(dtype):
    made = large(dtype)
    y, served = shard_lora(**made), None
    with torch.no_grad():
        served = shard_lora(**made)
    dx = gradients(y, [made["x"]])[0]
    assert torch.equal(y, served)
    for rows in ([3], [5, 6, 7, 8], list(range(1, 70, 3)), list(range(69, -1, -1))):
        some = dict(made)
        for name in ("x", "base_out", "adapters"):
            some[name] = made[name].detach()[rows]
        with torch.no_grad():
            assert torch.equal(shard_lora(**some), y[rows])
        some["x"].requires_grad_()
        z = shard_lora(**some)
        assert torch.equal(z, y[rows])
        assert torch.equal(gradients(z, [some["x"]])[0], dx[rows])


def peak_growth(function):
    """Bytes that the process' peak grows by while a function runs; None where that is not told."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) << 10

    try:
        clear.write_text("5")
        before = read("VmRSS")
    except (OSError, TypeError):
        return None
    function()
    return read("VmHWM") - before


@on_cpu
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("low", [False, True])
def test_gradient_of_a_pool_takes_no_memory(low, add):
    """Beside its buffer of 64 MB: the promise is 0 bytes of temporaries of a pool's size."""
    dtype = torch.bfloat16 if low else torch.float32
    made = problem(64, 4, 1024, 4, 1024, 16, 16384, 4, dtype)
    groups = group_by_adapter(made["adapters"], 4)
    x, left = made["x"].detach(), torch.randn(64, 16)
    buffer = torch.zeros(16384, 1024)
    tables = (groups.offsets, groups.permutation, None, 1.0)

    def run():
        OPS.shard_outer_(buffer, left, x, made["a_index"], *tables, add)

    run()
    growth = peak_growth(run)
    if growth is None:
        pytest.skip("the system does not tell the peak of memory")
    assert growth < 4 << 20


@on_cpu
def test_backward_over_layers_holds_one_gradient_per_pool():
    made = problem(16, 4, 1024, 4, 1024, 8, 8192, 0, torch.float32)
    size, y = made["a_pool"].numel() * 4, made["base_out"]
    g = torch.Generator().manual_seed(3)
    for _ in range(4):
        tables = [torch.randperm(8192, generator=g)[:32].view(8, 4).int() for _ in range(2)]
        y = shard_lora(made["x"], y, made["a_pool"], made["b_pool"], *tables)
    gc.collect()
    growth = peak_growth(lambda: y.sum().backward())
    if growth is None:
        pytest.skip("the system does not tell the peak of memory")
    assert made["a_pool"].grad is not None
    assert growth < 2 * size + (8 << 20)


def test_inference_saves_nothing():
    made = problem(adapters=3)
    with torch.inference_mode():
        y = shard_lora(**made)
    torch.testing.assert_close(y.clone(), shard_lora(**made).detach())
    with torch.no_grad():
        assert shard_lora(**made).grad_fn is None


# -- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_pools_get_fp32_gradients(dtype):
    made = problem(adapters=3, dtype=dtype)
    for name in ("a_pool", "b_pool"):
        made[name] = made[name].detach().float().requires_grad_()
    exact = {
        k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.requires_grad else v
        for k, v in made.items()
    }
    y = shard_lora(**made)
    assert y.dtype == dtype
    g = torch.randn(y.shape).to(y)
    want = gradients(defined(**exact), leaves(exact), g.double())
    for got, w in zip(gradients(y, leaves(made), g), want, strict=True):
        assert (got.double() - w).abs().max() <= 2 * torch.finfo(dtype).eps * w.abs().max()
    assert gradients(shard_lora(**made), [made["a_pool"]])[0].dtype == torch.float32


@pytest.mark.parametrize("pools", [(True, False), (False, True)])
def test_pools_of_two_dtypes(pools):
    """One side's pools in fp32, and a target's unlike another's: they meet in the gradient of x."""
    made, other = (problem(dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    for name, wide in zip(("a_pool", "b_pool"), pools, strict=True):
        if wide:
            made[name] = made[name].detach().float().requires_grad_()
    lists = [[m[k] for m in (made, other)] for k in ("base_out", "a_pool", "b_pool")]
    tables = [[m[k] for m in (made, other)] for k in ("a_index", "b_index")]
    ys = shard_lora_group(made["x"], *lists, *tables)
    x = made["x"].detach().double().requires_grad_()
    doubles = [[t.detach().double().requires_grad_() for t in values] for values in lists]
    want = [defined(x, *t) for t in zip(*doubles, *tables, strict=True)]
    wanted, exact = [made["x"], *lists[1], *lists[2]], [x, *doubles[1], *doubles[2]]
    got = gradients(ys[0].sum() + ys[1].sum(), wanted)
    for a, b in zip(got, gradients(want[0].sum() + want[1].sum(), exact), strict=True):
        assert (a.double() - b).abs().max() <= 0.02 * b.abs().max()


def test_autocast():
    made = problem(dtype=torch.float32, adapters=3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = shard_lora(**made)
    assert y.dtype == torch.bfloat16
    low = dict(made)
    for name in ("x", "base_out"):
        low[name] = made[name].detach().bfloat16()
    assert torch.equal(y, shard_lora(**low))
    grads = gradients(y, leaves(made))
    assert [g.dtype for g in grads] == [torch.float32] * 4


# -- tools -------------------------------------------------------------------------------------


def test_group_by_adapter():
    groups = group_by_adapter(torch.tensor([2, -1, 0, 2, 9, 0], device=DEVICE), 3)
    assert groups.offsets.tolist() == [0, 2, 2, 4]
    assert groups.permutation.tolist() == [2, 5, 0, 3, 1, 4]
    assert groups.ids.tolist() == [2, -1, 0, 2, 9, 0]
    sequences = group_by_adapter(torch.tensor([1, 0], dtype=torch.int32, device=DEVICE), 2, 3)
    assert sequences.ids.tolist() == [1, 1, 1, 0, 0, 0]
    assert sequences.permutation.tolist() == [3, 4, 5, 0, 1, 2]
    with pytest.raises(TypeError, match=r"ids: .*float32"):
        group_by_adapter(torch.ones(3), 2)
    with pytest.raises(TypeError, match=r"ids: .*list"):
        group_by_adapter([0, 1], 2)


def test_groups_serve_every_layer():
    made = problem(rows=6, adapters=3)
    ids = made["adapters"]
    groups = group_by_adapter(ids, 3)
    for _ in range(2):
        assert torch.equal(shard_lora(**{**made, "adapters": groups}), shard_lora(**made))
    with torch.no_grad():
        assert torch.equal(shard_lora(**{**made, "adapters": groups}), shard_lora(**made))
    # Rows in sequences: an id per sequence.
    x, base = made["x"].view(2, 3, -1), made["base_out"].view(2, 3, -1)
    per_sequence = {**made, "x": x, "base_out": base, "adapters": ids[:2]}
    per_row = {**made, "adapters": ids[:2].repeat_interleave(3)}
    assert torch.equal(shard_lora(**per_sequence).view(6, -1), shard_lora(**per_row))


def test_shard_index():
    table = shard_index(torch.tensor([[3, -1], [0, 2]]).t(), 4)
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert table.tolist() == [[3, 0], [-1, 2]]
    assert shard_index(torch.empty(0, 2, dtype=torch.int64), 0).shape == (0, 2)
    with pytest.raises(ValueError, match=r"q: shard 4 is outside the pool of 4 \(0\.\.3"):
        shard_index(torch.tensor([[4]]), 4, "q")
    with pytest.raises(ValueError, match="index: shard -2 is outside"):
        shard_index(torch.tensor([[-2]]), 4)
    with pytest.raises(TypeError, match=r"index: .*float32"):
        shard_index(torch.ones(1, 1), 4)
    with pytest.raises(TypeError, match=r"index: .*list"):
        shard_index([[1]], 4)


def test_no_base():
    made = problem()
    zero = {**made, "base_out": torch.zeros_like(made["base_out"])}
    assert torch.equal(shard_lora(**{**made, "base_out": None}), shard_lora(**zero))


# -- compilers and transforms ------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [0, 3])
def test_compiles_whole(adapters):
    made = problem(adapters=adapters, dtype=torch.float32)
    fixed = {k: v for k, v in made.items() if not (torch.is_tensor(v) and v.requires_grad)}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: shard_lora(*tensors, **fixed), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(*leaves(made)), shard_lora(**made)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, leaves(made)), gradients(want, leaves(made)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves(made)), want)
    torch._dynamo.reset()


def test_vmap_and_functional_gradients():
    made = problem()
    rest = {k: v.detach() if torch.is_tensor(v) else v for k, v in made.items()}
    xs, base = torch.stack([rest.pop("x")] * 3), rest.pop("base_out")
    xs = xs * torch.tensor([1.0, 2.0, -1.0], dtype=xs.dtype, device=DEVICE)[:, None, None]
    got = torch.func.vmap(lambda x: shard_lora(x, base, **rest))(xs)
    want = torch.stack([shard_lora(x, base, **rest) for x in xs])
    torch.testing.assert_close(got, want)
    pool = rest.pop("a_pool")

    def loss(pool):
        return shard_lora(xs[1], base, pool, **rest).square().sum()

    leaf = pool.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(pool), gradients(loss(leaf), [leaf])[0])


def test_double_backward_of_a_group():
    made, other = problem(rows=3), problem(rows=3, seed=1)
    tables = [[m[k] for m in (made, other)] for k in ("a_index", "b_index")]

    def function(x, *values):
        lists = [list(values[i : i + 2]) for i in (0, 2, 4)]
        return tuple(shard_lora_group(x, *lists, *tables))

    values = [m[k] for k in ("base_out", "a_pool", "b_pool") for m in (made, other)]
    assert torch.autograd.gradgradcheck(function, [made["x"], *values], fast_mode=True)


# -- bad input ---------------------------------------------------------------------------------
