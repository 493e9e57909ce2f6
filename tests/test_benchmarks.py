"""The benchmarks' own machinery, with a stand-in for the GPU where it needs one."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu as on_gpu
import graphs
import run

from weightshare_kernels import _cases
from weightshare_kernels.ops.sliced_linear import sliced_linear
from weightshare_kernels.ops.sliced_linear.cases import dense, eager


class FakeGraph:
    """Replays what ran while it was captured."""

    def replay(self):
        self.run()


class FakeEvent:
    """Host time in place of the GPU's."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)

    def synchronize(self):
        pass


def waits(inputs):
    """A baseline that cannot be captured."""

    def forward():
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    return _cases.Workload(forward, [])


@pytest.fixture
def gpu(monkeypatch):
    """Captures by keeping the function."""

    def capture(function):
        function()
        graph = FakeGraph()
        graph.run = function
        return graph

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(graphs, "LEAST_SAMPLE", 0.0)
    maker = graphs.Maker
    monkeypatch.setattr(graphs, "Maker", lambda dtype, device, seed: maker(dtype, "cpu", seed))


def case(**baselines):
    def inputs(m):
        made = {"x": m.randn(7, 12), "weight": m.randn(20, 16), "bias": m.randn(20)}
        return {**made, "out": 10, "in_": 12}

    bars = {name: 0.0 for name in baselines}
    return _cases.Case(
        "small", inputs, sliced_linear, eager, baselines, bars=bars, tier="bench",
        flops=7 * 10 * 12 * 2, bytes=lambda itemsize: 100 * itemsize,
    )  # fmt: skip


def test_times_of_the_gpu_alone(gpu):
    subject = case(dense=dense, waits=waits)
    inputs = subject.inputs(_cases.Maker(torch.float32))
    found = graphs.measure(subject, inputs, torch.float32, 4, time.monotonic() + 60, run.summary)
    assert found["copies"] == graphs.MOST_COPIES
    assert set(found["variants"]) == {"ours", "dense"}
    assert found["failed"] == {"waits": "operation not permitted when stream is capturing"}
    assert found["variants"]["ours"]["both"]["median"] > found["variants"]["ours"]["forward"]["p20"]
    assert set(found["ratios"]["dense"]) == {"forward", "backward", "both"}
    assert all(leaf.grad is None for leaf in _cases.leaves(inputs))


def test_large_inputs_are_captured_once():
    large = {"x": torch.empty(graphs.COLD // 4)}
    assert graphs.copies_for(large) == 1
    assert graphs.copies_for({"x": torch.empty(graphs.COLD // 8)}) == 2


def test_bars_are_judged_on_the_gpus_times():
    subject = case(dense=dense, waits=waits)
    both = {"both": {"of_medians": 0.25}}
    record = {
        "ratios": {"dense": both, "waits": both},
        "graph": {"ratios": {"dense": {"both": 2.0}}},
        "variants": {},
    }
    verdicts = run.judge(subject, record)
    assert verdicts["dense"]["got"] == 2.0 and verdicts["waits"]["got"] == 0.25
    del record["graph"]
    assert run.judge(subject, record)["dense"]["got"] == 0.25


def test_a_run_writes_what_it_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "every_case", lambda: {"sliced_linear": [case(dense=dense)]})
    assert run.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/sliced_linear.json")
    record = json.loads(path.read_text())["cases"]["small"]
    assert set(record["variants"]) == {"ours", "dense"} and "graph" not in record
    assert record["variants"]["ours"]["saved_bytes"] > 0


# ---- make gpu -----------------------------------------------------------------------------------


def test_a_fault_takes_its_own_part_alone(tmp_path):
    def part(name, code, seconds=60.0):
        return on_gpu.Part(name, [sys.executable, "-c", code], seconds)

    fault = (
        "import faulthandler, os; faulthandler.enable(); print('tested', flush=True); os.abort()"
    )
    parts = [
        part("good", "print('3 passed')"),
        part("fault", fault),
        part("slow", "import time; print('begun', flush=True); time.sleep(60)", 2.0),
        part("bad", "print('1 failed'); raise SystemExit(1)"),
        on_gpu.Part("absent", ["none"], 9.0, missing="there is none"),
    ]
    outcomes = on_gpu.run(parts, 2, 60.0, tmp_path)
    assert list(outcomes) and set(outcomes) == {p.name for p in parts}
    assert outcomes["good"].startswith("ok") and outcomes["good"].endswith("3 passed")
    assert "died of SIGABRT" in outcomes["fault"]
    assert "Fatal Python error: Aborted" in outcomes["fault"]
    assert "stopped after" in outcomes["slow"] and "begun" in outcomes["slow"]
    assert "exit status 1" in outcomes["bad"] and outcomes["bad"].endswith("1 failed")
    assert outcomes["absent"] == "left out: there is none"
    assert "tested" in (tmp_path / "fault.log").read_text()


def test_the_plan_is_of_the_chosen_ops(tmp_path):
    todo = on_gpu.plan(["route"], "90a", tmp_path)
    names = [p.name for p in todo.tests]
    assert names[:3] == ["tests, route", "tests, route, triton", "tests, route, more"]
    assert [p.name for p in todo.benchmarks] == [
        f"benchmarks, route, {d}" for d in ("bf16", "fp32")
    ]
    whole = on_gpu.plan(on_gpu.known_ops(), "90a", tmp_path)
    seconds = sum(p.seconds - 15 for p in whole.benchmarks)
    assert on_gpu.TESTS + seconds <= on_gpu.TOTAL, "measurements of all ops outlast the whole"
    assert "benchmarks, blocks, bf16" in [p.name for p in whole.benchmarks]
    assert not any(p.missing for p in whole.tests if "sanitizer" not in p.name)
