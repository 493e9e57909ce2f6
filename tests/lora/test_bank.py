"""AdapterBank: what it computes, and what it holds while adapters come and go."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from weightshare.lora import AdapterBank
from weightshare.lora.bank import CapacityError
from weightshare.lora.bank_layer import BankLinear

sys.path.insert(0, str(Path(__file__).parent))
from bank_nets import TYPES, Net, dense, dense_lora, lora, mos, net, paths_of


def bank_of(model, **options):
    settings = dict(max_adapters=4, max_rank=6, shards=2) | options
    return AdapterBank(model, TYPES, **settings)


def outputs(model, bank, names, x, **how):
    with torch.no_grad(), bank.batch(names, **how):
        return model(x)


def check(got, exact, like, factor=4):
    """Error against float64 at most that of the same computation in got's dtype, about."""
    error, allowed = (got.double() - exact).abs().max(), (like.double() - exact).abs().max()
    floor = torch.finfo(got.dtype).eps * exact.abs().max()
    assert error <= factor * torch.maximum(allowed, floor), (error, allowed)


def by_row(adapters, model, names, x, dtype):
    """Each sequence alone through a copy of the model with its adapter in the weights."""
    with torch.no_grad():
        rows = [
            dense(model, adapters.get(name), dtype)(x[n : n + 1].to(dtype))
            for n, name in enumerate(names)
        ]
    return torch.cat(rows)


@pytest.fixture
def served():
    """A model, its plain copy, a bank with three adapters of different ranks, and those."""
    plain = net()
    model = net()
    adapters = {
        "one": mos(plain, 1),
        "two": mos(plain, 2, r=6, e=3, p=1),
        "three": mos(plain, 3, r=2, e=2, p=2, l=1, types=TYPES[:3]),
    }
    bank = bank_of(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    return model, plain, bank, adapters


@pytest.mark.parametrize("tokens", [1, 5])
def test_each_row_has_its_adapter(served, tokens):
    model, plain, bank, adapters = served
    names = ["two", None, "one", "three", "one"]
    x = torch.randn(len(names), tokens, 16)
    got = outputs(model, bank, names, x)
    exact = by_row(adapters, plain, names, x, torch.float64)
    check(got, exact, by_row(adapters, plain, names, x, torch.float32))
    assert torch.equal(got, outputs(model, bank, names, x))


def test_rows_without_sequences_and_packed_rows(served):
    model, plain, bank, adapters = served
    x = torch.randn(3, 16)
    names = ["three", "one", None]
    exact = by_row(adapters, plain, names, x, torch.float64)
    check(outputs(model, bank, names, x), exact, by_row(adapters, plain, names, x, torch.float32))
    lengths, x = [3, 0, 4], torch.randn(1, 7, 16)
    names = ["one", "two", "three"]
    got = outputs(model, bank, names, x, lengths=lengths)
    wanted = [
        by_row(adapters, plain, [name], part, torch.float64)
        for name, part in zip(names, x.split(lengths, 1), strict=True)
    ]
    assert torch.allclose(got.double(), torch.cat(wanted, 1), atol=1e-5)


def test_expanded_rows(served):
    model, plain, bank, adapters = served
    x = torch.randn(4, 2, 16)
    got = outputs(model, bank, ["one", "two"], x, expand=2)
    exact = by_row(adapters, plain, ["one", "one", "two", "two"], x, torch.float64)
    assert torch.allclose(got.double(), exact, atol=1e-5)
    with pytest.raises(ValueError, match=r"4 rows; where generate.*expand=2"):
        outputs(model, bank, ["one", "two"], x)
    with pytest.raises(ValueError, match=r"3 sequences.*lengths="):
        outputs(model, bank, ["one", "two", "one"], x)
    with pytest.raises(ValueError, match=r"add up to 3 tokens.*has 8"):
        outputs(model, bank, ["one", "two"], x, lengths=[1, 2])
    assert bank.running is None


def test_without_adapters_the_model_is_bitwise_its_own(served):
    model, plain, bank, _ = served
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        exact = plain(x)
        assert torch.equal(model(x), exact)
        assert torch.equal(outputs(model, bank, [None, None], x), exact)
    kept = {name: p.data_ptr() for name, p in model.named_parameters()}
    bank.detach()
    assert not any(isinstance(m, BankLinear) for m in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert sorted(kept.values()) == sorted(p.data_ptr() for p in model.parameters())
    with pytest.raises(RuntimeError, match="detached"), bank.batch(["one"]):
        pass


def test_layers_that_share_an_input_read_it_once(served, monkeypatch):
    model, _, bank, _ = served
    from weightshare.lora import bank_layer

    calls, real = [], bank_layer.infer
    monkeypatch.setattr(bank_layer, "infer", lambda *args: calls.append(args[-1]) or real(*args))
    outputs(model, bank, ["one"], torch.randn(1, 2, 16))
    assert calls == [3, 1, 2, 1] * 3
    calls.clear()
    bank.swap("one", mos(net(), 1, types=("k_proj", "v_proj", "up_proj")))
    outputs(model, bank, ["one", None], torch.randn(2, 2, 16))
    assert calls == [2, 1] * 3
    expect(
        model, net(), bank, {"one": mos(net(), 1, types=("k_proj", "v_proj", "up_proj"))}, ["one"]
    )
    outputs(model, bank, ["one", "two"], torch.randn(2, 2, 16))
    assert calls[12:] == [3, 1, 2, 1] * 3


def test_groups_are_made_once_for_all_layers_and_steps(served, monkeypatch):
    model, _, bank, _ = served
    from weightshare.lora import bank_layer

    calls, real = [], bank_layer.group_by_adapter
    monkeypatch.setattr(
        bank_layer, "group_by_adapter", lambda *args: calls.append(args) or real(*args)
    )
    for _ in range(3):
        outputs(model, bank, ["one", "two"], torch.randn(2, 1, 16))
    assert len(calls) == 1
    outputs(model, bank, ["one", "two"], torch.randn(2, 6, 16))
    assert len(calls) == 2


class Crossed(nn.Module):
    """Cross-attention's projections: keys and values of another input."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = [nn.Linear(8, 8) for _ in range(3)]

    def forward(self, x, memory):
        return self.q_proj(x) + self.k_proj(memory) * self.v_proj(memory)


def test_siblings_of_different_inputs():
    torch.manual_seed(0)
    model = Crossed().eval()
    plain = torch.nn.Sequential()
    plain.add_module("m", model)
    types = ("q_proj", "k_proj", "v_proj")
    adapter = mos(plain, 5, types=types, r=2, e=2, p=2)
    exact = dense(plain, adapter).m
    bank = AdapterBank(model, types, max_adapters=1, max_rank=2, shards=2)
    bank.add("it", adapter)
    for _ in range(3):
        x, memory = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        with torch.no_grad(), bank.batch(["it", "it"]):
            got = model(x, memory)
        wanted = exact(x.double(), memory.double())
        assert torch.allclose(got.double(), wanted, atol=1e-5)
    assert not model.q_proj.siblings.shared


def test_siblings_of_an_input_that_changed():
    """An input that was written to, or gradients that are wanted now, make outputs anew."""
    model = net()
    bank = bank_of(model)
    bank.add("one", mos(net(), 1))
    layer, x = model.layers[0], torch.randn(2, 3, 16)
    with torch.no_grad(), bank.batch(["one", "one"]):
        layer.q_proj(x)
        x.copy_(torch.randn(2, 3, 16))
        got = layer.v_proj(x)
    with torch.no_grad(), bank.batch(["one", "one"]):
        assert torch.equal(got, layer.v_proj(x))
    x.requires_grad_()
    with bank.batch(["one", "one"]):
        with torch.no_grad():
            layer.gate_proj(x)
        assert layer.up_proj(x).requires_grad


@pytest.mark.parametrize(
    ("dtype", "slab"),
    [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float64, None)],
)
def test_dtypes(dtype, slab):
    plain, model = net().to(dtype), net().to(dtype)
    adapter = mos(plain, 1)
    bank = bank_of(model, dtype=slab)
    bank.add("one", adapter)
    assert bank.memory.slabs["q_proj"].a.pool.dtype == (slab or dtype)
    x = torch.randn(2, 3, 16, dtype=dtype)
    got = outputs(model, bank, ["one", None], x)
    exact = by_row({"one": adapter}, plain, ["one", None], x, torch.float64)
    check(got, exact, by_row({"one": adapter}, plain, ["one", None], x, dtype))


def test_slabs_of_a_wrong_dtype_are_refused():
    plain, model = net(), net()
    bank = bank_of(model, dtype=torch.bfloat16)
    bank.add("one", mos(plain, 1))
    with pytest.raises(TypeError, match=r"a_pool.*bfloat16"):
        outputs(model, bank, ["one"], torch.randn(1, 2, 16))


def test_with_and_without_the_ops_checks(served, monkeypatch):
    model, _, bank, _ = served
    from weightshare.lora import bank_layer

    names = ["two", None, "one"]
    inputs = [torch.randn(3, 16), torch.randn(3, 4, 16), torch.randn(4, 3, 16).transpose(0, 1)]
    fast = [outputs(model, bank, names, x) for x in inputs]
    monkeypatch.setattr(bank_layer, "_checked", lambda *_: False)
    for x, y in zip(inputs, fast, strict=True):
        assert torch.equal(outputs(model, bank, names, x), y)


def test_autocast(served):
    model, plain, bank, adapters = served
    x = torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(model, bank, ["one", "two"], x)
    exact = by_row(adapters, plain, ["one", "two"], x, torch.float64)
    check(got, exact, by_row(adapters, plain, ["one", "two"], x, torch.bfloat16))


def test_inference_mode_then_gradients_of_the_input(served):
    model, plain, bank, adapters = served
    x = torch.randn(2, 3, 16)
    with torch.inference_mode(), bank.batch(["one", "two"]):
        got = model(x)
    x.requires_grad_()
    with bank.batch(["one", "two"]):
        (dx,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(got, outputs(model, bank, ["one", "two"], x))
    wide = x.detach().double().requires_grad_()
    exact = torch.cat([dense(plain, adapters[n])(wide[i]) for i, n in enumerate(("one", "two"))])
    assert torch.allclose(dx.double(), torch.autograd.grad(exact.sum(), wide)[0], atol=1e-4)


def test_weights_of_a_layer_are_found_through_it(served):
    model = served[0]
    layer = model.layers[0].q_proj
    assert layer.weight is layer.base.weight and layer.in_features == 16
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018


def test_state_dicts_are_the_models_own(served):
    model, plain, bank, adapters = served
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    other = net(seed=9).state_dict()
    model.load_state_dict(other)
    plain.load_state_dict(other)
    expect(model, plain, bank, adapters, ["one", None])
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj"):
        model.load_state_dict({k: v for k, v in other.items() if "q_proj" not in k})
    with pytest.raises(TypeError, match=r"cannot be copied.*detach\(\)"):
        copy.deepcopy(model)


# -- Coming and going -----------------------------------------------------------------------------


def expect(model, plain, bank, adapters, names, seed=7):
    x = torch.randn(len(names), 2, 16, generator=torch.Generator().manual_seed(seed))
    exact = by_row(adapters, plain, names, x, torch.float64)
    got = outputs(model, bank, names, x)
    assert torch.allclose(got.double(), exact, atol=1e-5)


def test_many_changes_leave_every_adapter_right(served):
    """Rows and slots are reused in any order: nothing may leak from one adapter to another."""
    model, plain, bank, adapters = served
    draw = torch.Generator().manual_seed(3)
    for step in range(25):
        name = ("one", "two", "three", "four")[int(torch.randint(4, (), generator=draw))]
        r, e, p = [(4, 2, 1), (6, 3, 1), (1, 1, 0), (6, 6, 6)][step % 4]
        adapter = mos(plain, step, r=r, e=e, p=p)
        if name not in bank:
            bank.add(name, adapter)
        elif step % 3 and len(bank) < 4:
            bank.swap(name, adapter)
        else:
            bank.remove(name)
            adapters.pop(name)
            continue
        adapters[name] = adapter
        expect(model, plain, bank, adapters, [*bank.names, None])
    for name in bank.names:
        bank.remove(name)
    assert bank.resident_bytes().used == 0
    assert sorted(bank.memory.slots) == [0, 1, 2, 3]
    for slab in bank.memory.slabs.values():
        assert all(side.free.all() for side in slab.sides)


def test_a_running_batch_keeps_the_adapter_that_was_swapped(served):
    model, plain, bank, adapters = served
    x, new = torch.randn(2, 3, 16), mos(plain, 9)
    with torch.no_grad():
        with bank.batch(["one", "two"]):
            before = model(x)
            bank.swap("one", new)
            assert torch.equal(model(x), before)
            used = bank.resident_bytes().used
        assert bank.resident_bytes().used < used
        after = outputs(model, bank, ["one", "two"], x)
    exact = by_row(adapters | {"one": new}, plain, ["one", "two"], x, torch.float64)
    assert torch.allclose(after.double(), exact, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_remove_while_in_use(served):
    _, _, bank, _ = served
    with bank.batch(["one", None]):
        with pytest.raises(RuntimeError, match=r"'one'.*batch that runs uses it"):
            bank.remove("one")
        bank.remove("two")
    bank.remove("one")
    assert bank.names == ("three",)
    with pytest.raises(LookupError, match=r"'one'.*not in the bank.*'three'"), bank.batch(["one"]):
        pass


def test_names_move_without_copies(served):
    model, plain, bank, adapters = served
    pools = [s.pool.clone() for slab in bank.memory.slabs.values() for s in slab.sides]
    tables = [s.table.clone() for slab in bank.memory.slabs.values() for s in slab.sides]
    bank.alias("live", "one")
    used = bank.resident_bytes()
    assert used.adapters["live"] == used.adapters["one"]
    assert used.used == sum(used.adapters[n] for n in ("one", "two", "three"))
    expect(model, plain, bank, adapters | {"live": adapters["one"]}, ["live", "two"])
    bank.alias("live", "two")
    bank.rename("one", "first")
    adapters = adapters | {"live": adapters["two"], "first": adapters["one"]}
    expect(model, plain, bank, adapters, ["live", "two", "first", "three"])
    bank.remove("two")
    expect(model, plain, bank, adapters, ["live", "first"])
    now = [s for slab in bank.memory.slabs.values() for s in slab.sides]
    assert all(torch.equal(s.pool, p) for s, p in zip(now, pools, strict=True))
    assert all(torch.equal(s.table, t) for s, t in zip(now, tables, strict=True))
    bank.alias("live", "live")
    bank.alias("three", "live")
    assert len(bank.memory.slots) == 2  # what "three" stood for is free
    with pytest.raises(ValueError, match=r"'live'.*taken"):
        bank.rename("first", "live")
    with pytest.raises(LookupError, match="'nobody'"):
        bank.alias("live", "nobody")


def test_one_batch_at_a_time(served):
    _, _, bank, _ = served
    with bank.batch(["one"]):
        with pytest.raises(RuntimeError, match="another batch runs"), bank.batch(["two"]):
            pass
        for change in (lambda: bank.grow(max_rank=9), bank.detach):
            with pytest.raises(RuntimeError, match="a batch runs"):
                change()
    with pytest.raises(ValueError, match="name or None per sequence"), bank.batch("one"):
        pass
    with (
        pytest.raises(ValueError, match="2 sequences, but lengths"),
        bank.batch(["one", "two"], lengths=[1]),
    ):
        pass


def test_changes_by_another_thread(served):
    """Adapters come, move and go by the dozen while batches run; each batch computes right."""
    model, plain, bank, adapters = served
    bank.grow(max_adapters=8)
    stop, failures, rounds = threading.Event(), [], []

    def change():
        try:
            for step in range(1000):
                if stop.is_set() and step > 5:
                    break
                adapter = mos(plain, 100 + step)
                if "new" in bank:
                    bank.swap("new", adapter)
                else:
                    bank.add("new", adapter)
                if step % 3 == 2:
                    bank.alias("other", "new")
                    bank.remove("other")
                    bank.remove("new")
                rounds.append(step)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for seed in range(20):
            expect(model, plain, bank, adapters, ["one", "two", None, "three"], seed)
    finally:
        stop.set()
        thread.join()
    assert not failures and len(rounds) > 5


# -- Room ------------------------------------------------------------------------------------------


def snapshot(bank):
    sides = [s for slab in bank.memory.slabs.values() for s in slab.sides]
    tensors = [t.clone() for s in sides for t in (s.pool, s.free, s.table)]
    return tensors, list(bank.memory.slots), bank.names, bank.resident_bytes()


def assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def test_no_slot_and_no_rows_leave_the_bank_whole(served):
    model, plain, _, _ = served
    model = net()
    rows = 2 * 2 * 3 * 2  # two adapters of e = 2, 3 layers, l = 2
    bank = bank_of(model, max_adapters=2, pool_shards=dict.fromkeys(TYPES, rows) | {"v_proj": 13})
    bank.add("one", mos(plain, 1))
    before = snapshot(bank)
    with pytest.raises(CapacityError, match=r"'two'.*v_proj needs 12 shards of A, and 1 of 13"):
        bank.add("two", mos(plain, 2))
    with pytest.raises(CapacityError, match=r"grow\(pool_shards"):
        bank.swap("one", mos(plain, 2))
    assert_same(before, snapshot(bank))
    bank.grow(pool_shards={"v_proj": 24})
    bank.add("two", mos(plain, 2))
    before = snapshot(bank)
    with pytest.raises(CapacityError, match=r"all 2 slots are taken.*grow\(max_adapters"):
        bank.add("three", mos(plain, 3))
    assert_same(before, snapshot(bank))
    bank.grow(max_adapters=3, max_rank=8, pool_shards=1000)
    adapters = {"one": mos(plain, 1), "two": mos(plain, 2), "three": mos(plain, 3, r=8, e=4)}
    bank.add("three", adapters["three"])
    expect(model, plain, bank, adapters, ["three", "one", None, "two"])
    with pytest.raises(ValueError, match="cannot shrink"):
        bank.grow(max_adapters=2)
    with pytest.raises(ValueError, match="max_rank: expected at least 1, got 0"):
        bank.grow(max_rank=0)


def test_capacity_counts_what_waits_for_a_batch(served):
    _, plain, bank, _ = served
    with bank.batch(["one"]):
        bank.swap("one", mos(plain, 4))
        with pytest.raises(CapacityError, match="1 swapped out wait for the batch"):
            bank.add("five", mos(plain, 5))
    bank.add("five", mos(plain, 5))


def test_a_failing_copy_leaves_the_bank_whole(served, monkeypatch):
    _, plain, bank, _ = served
    from weightshare.lora import bank_memory

    before = bank.names, list(bank.memory.slots), bank.resident_bytes()
    real, calls = bank_memory.Side.write, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError("no more")
        real(*args)

    monkeypatch.setattr(bank_memory.Side, "write", failing)
    for change in (lambda: bank.add("new", mos(plain, 4)), lambda: bank.swap("one", mos(plain, 4))):
        calls.clear()
        with pytest.raises(MemoryError):
            change()
        assert before == (bank.names, list(bank.memory.slots), bank.resident_bytes())


def test_resident_bytes(served):
    _, plain, _, _ = served
    bank = bank_of(net(), max_adapters=5, max_rank=6, shards=4, pool_shards=100)
    widths = {k: (plain.get_submodule(p).in_features, plain.get_submodule(p).out_features)
              for k in TYPES for p in paths_of(plain, k)[:1]}  # fmt: skip
    found = bank.resident_bytes()
    assert found.slabs == sum(100 * (i + o) // 4 * 4 for i, o in widths.values())
    assert found.tables == 5 * (7 * 2 * 3 * 6 * 4 * 4 + 4)
    assert (found.adapters, found.used, found.total) == ({}, 0, found.slabs + found.tables)
    bank.add("one", mos(plain, 1, e=2, l=2))
    mine = sum(2 * 3 * (i + o) * 4 for i, o in widths.values()) + found.tables // 5
    assert bank.resident_bytes().adapters == {"one": mine}
    assert bank.resident_bytes().used == mine
    assert bank.resident_bytes().total == found.total


# -- Wrong arguments -------------------------------------------------------------------------------


def test_wrong_banks():
    model = net()
    with pytest.raises(ValueError, match="no layer of Net matches"):
        AdapterBank(model, ["nothing"], max_adapters=1, max_rank=1)
    with pytest.raises(TypeError, match="Block, which has no in_features"):
        AdapterBank(model, r"layers\.\d", max_adapters=1, max_rank=1)
    with pytest.raises(ValueError, match="max_rank: expected at least 1, got 0"):
        bank_of(model, max_rank=0)
    with pytest.raises(TypeError, match="max_adapters: expected an integer"):
        bank_of(model, max_adapters=2.0)
    with pytest.raises(ValueError, match=r"shards must divide in_features of q_proj: 16 / 5"):
        bank_of(model, shards=5)
    with pytest.raises(ValueError, match="pool_shards: expected a number of rows for k_proj"):
        bank_of(model, pool_shards={"q_proj": 10})
    with pytest.raises(TypeError, match=r"out_proj belongs to an nn\.MultiheadAttention"):
        attention = torch.nn.MultiheadAttention(8, 2)
        AdapterBank(attention, ["out_proj"], max_adapters=1, max_rank=1)
    assert not any(isinstance(m, BankLinear) for m in model.modules())
    mixed = Net(1)
    mixed.tower = Net(1, d=32, kv=16)
    with pytest.raises(
        ValueError, match=r"wide \(in, out\), but tower\.layers\.0\.\w+ is .*regular expression"
    ):
        bank_of(mixed)
    bank = AdapterBank(mixed, r"layers\.\d+\.q_proj", max_adapters=1, max_rank=1)
    assert isinstance(mixed.layers[0].q_proj, BankLinear)
    assert not isinstance(mixed.tower.layers[0].q_proj, BankLinear)
    with pytest.raises(ValueError, match="served by a bank already"):
        bank_of(mixed)
    bank.detach()


def test_layers_without_tensors_are_where_the_model_is():
    class Bare(torch.nn.Module):
        in_features = out_features = 8

    model = torch.nn.ModuleDict({"q_proj": Bare()})
    model.register_buffer("there", torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    bank = AdapterBank(model, ["q_proj"], max_adapters=1, max_rank=1)
    pool = bank.memory.slabs["q_proj"].a.pool
    assert pool.is_meta and pool.dtype == torch.bfloat16


def test_wrong_names(served):
    _, plain, bank, _ = served
    before = snapshot(bank)
    with pytest.raises(ValueError, match="'one': is in the bank already; swap"):
        bank.add("one", mos(plain))
    with pytest.raises(TypeError, match="name: expected a str"):
        bank.add(3, mos(plain))
    with pytest.raises(TypeError, match="name: expected a str"):
        bank.alias(None, "one")
    for change in (bank.remove, lambda n: bank.swap(n, mos(plain)), lambda n: bank.rename(n, "x")):
        with pytest.raises(LookupError, match=r"'nobody'.*add\(\) it first"):
            change("nobody")
    assert_same(before, snapshot(bank))


def test_plain_loras_among_mixtures(served):
    model, plain, bank, adapters = served
    ranks = {"layers.0.q_proj": 5, "layers.2.down_proj": 1}
    adapter = lora(plain, 4, ranks=ranks)
    bank.add("lora", adapter)
    x = torch.randn(3, 2, 16)
    got = outputs(model, bank, ["lora", "one", None], x)
    with torch.no_grad():
        exact = by_row(adapters, plain, [None, "one", None], x, torch.float64)
        exact[:1] = dense_lora(plain, adapter)(x[:1].double())
    assert torch.allclose(got.double(), exact, atol=1e-5)
