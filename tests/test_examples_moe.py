"""The study of load balancing: its quick mode to the end, its model and its theory."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples draw pictures")
pytest.importorskip("rich", reason="the examples print tables")
pytest.importorskip("scipy", reason="the study solves a linear program")

EXAMPLES = Path(__file__).parent.parent / "examples"
PARTS = ("_text", "balance", *(f"balance.{part}" for part in ("model", "report", "run", "theory")))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("balance.run")
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture
def quick(run):
    return run.parse(["--quick"])


@pytest.fixture
def scores():
    """Of 67 tokens and 8 experts, some of them far more popular."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(67, 8, generator=draw, dtype=torch.float64)
    return (logits + torch.linspace(-1, 1, 8)).sigmoid()


def test_quick_mode(run, tmp_path, capsys):
    run.main(["--quick", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"balance.json", "balance.png"}
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "balance.json").read_text())
    methods = list(run.model.METHODS)
    assert [row["method"] for row in result["runs"]] == methods
    for row in result["runs"]:
        assert len(row["violation"]) == len(row["loss"]) == 10
        assert [test[0] for test in row["tests"]] == [2, 4, 6, 8, 10]
        for bits, violation in (row["code"], row["switch"], row["prose"]):
            assert 4 < bits < 7.5 and 0 < violation <= run.model.EXPERTS / run.model.TOP - 1
        assert ("duals" in row) == (row["method"] in run.model.RULES)
    assert len({row["loss"][0] for row in result["runs"]}) == 1  # the same weights and batch
    assert all(row["gap"] < 1 for row in result["fixed_point"]["last"].values())
    assert max(result["fixed_point"]["checks"][name] for name in ("duality", "rule")) < 1e-9
    printed = capsys.readouterr().out
    assert "proves nothing" in printed and "inverse_sqrt" in printed


def test_processes_change_nothing(run, quick, monkeypatch):
    monkeypatch.setattr(run.model, "METHODS", ("loss 0.01",))
    (here,) = run.train_all(quick)
    quick.jobs = 2
    (there,) = run.train_all(quick)  # in a process of its own
    assert here["loss"] == there["loss"] and here["prose"] == there["prose"]


def test_training_depends_on_seed_alone(run, quick):
    corpus = run.model.read_corpus()
    first, again, other = (run.model.train("sign", seed, corpus, quick) for seed in (0, 0, 1))
    assert first["loss"] == again["loss"] and first["violation"] == again["violation"]
    assert first["loss"] != other["loss"]
    assert all(layer["bias"].abs().max() > 0 for layer in first["routing"])


def test_corpus_is_of_two_kinds(run):
    corpus = run.model.read_corpus()
    assert all(len(part) > 20_000 and int(part.max()) < 128 for part in corpus)
    brackets = [(part == ord("(")).float().mean() for part in corpus]
    assert min(brackets[:2]) > 1.5 * max(brackets[2:])


def test_tests_leave_the_balance_alone(run):
    model = run.model.ByteLM(bias=True)
    router = model.blocks[0].moe.router
    text = run.model.read_corpus().code_unseen
    first = run.model.test(model, text, 8)
    run.model.routing_of(model, text, 50)
    assert model.training and not router.expert_counts.any()
    assert run.model.test(model, text, 8) == first


def test_auxiliary_loss(run):
    model = run.model.ByteLM(bias=False)
    batch = torch.randint(128, (4, run.model.CONTEXT + 1))
    entropy, none = run.model.loss_of(model, batch)
    same, balance = run.model.loss_of(model, batch, alpha=0.01)
    assert none == 0 and same == entropy
    assert 0.01 * run.model.LAYERS < balance < 0.05 * run.model.LAYERS  # equal if all were even
    balance.backward()
    assert all(block.moe.router.weight.grad.any() for block in model.blocks)


def test_learning_rate(run, quick):
    quick.steps = 100
    rates = [run.model.rate_at(step, quick) for step in range(150)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[5] == pytest.approx(1)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100:] == pytest.approx([0.1] * 50)


def test_assignment_by_hand(run):
    """Two experts: by their difference in score, the median of three tokens is split."""
    scores = torch.tensor([[0.9, 0.1], [0.7, 0.4], [0.2, 0.1]], dtype=torch.float64)
    best = run.theory.assign(scores, 1)
    assert best.value == pytest.approx((0.9 + (0.7 + 0.4) / 2 + 0.1) / 3)
    order = (scores[:, 1] - scores[:, 0]).sort().values
    assert (best.bias[0] - best.bias[1]).item() == pytest.approx(order[1].item())
    assert best.unique and best.bias.sum().item() == pytest.approx(0)
    # With two tokens none is split: a whole interval of duals does.
    assert not run.theory.assign(scores[:2], 1).unique


def test_duals_are_the_minimum(run, scores):
    best = run.theory.assign(scores, 3)
    value, counts = run.theory.dual(scores, best.bias, 3)
    assert value == pytest.approx(best.value, rel=1e-9)
    assert counts.sum() == 67 * 3
    draw = torch.Generator().manual_seed(1)
    for size in (1e-4, 1e-2, 1.0):
        move = size * torch.randn(8, generator=draw, dtype=torch.float64)
        assert run.theory.dual(scores, best.bias + move, 3)[0] > value - 1e-12


def test_reading_holds_and_can_fail(run, scores):
    best = run.theory.assign(scores, 3)
    checks = run.theory.check_reading(scores, 3, best, tries=20)
    assert max(checks[name] for name in ("duality", "subgradient", "shift", "rule")) < 1e-9
    assert checks["choice"] == 0 and checks["split_tokens"] == 7
    wrong = run.theory.check_reading(scores, 3, best._replace(bias=-best.bias), tries=1)
    assert wrong["duality"] > 0.01 and wrong["choice"] > 10


def test_rules_reach_the_duals(run, scores):
    best = run.theory.assign(scores, 3)
    for rule in run.model.RULES:
        rows = run.theory.iterate(scores, 3, rule, 1000, best)
        assert min(rows["gap"]) > -1e-12
        assert rows["gap"][-1] < 0.02 and rows["distance"][-1] < 0.05, rule


def test_comparison_of_a_bias_with_duals(run, scores):
    both = torch.cat([scores, scores.flip(0)])  # the same problem twice
    best = run.theory.assign(scores, 3)
    row = run.theory.compare(both, best.bias + 3, 3)
    assert row["distance"] < 1e-9 and row["distance_of_other_half"] < 1e-9
    assert abs(row["gap"]) < 1e-9 and row["correlation"] == pytest.approx(1)
    zero = run.theory.compare(both, torch.linspace(-1e-9, 1e-9, 8, dtype=torch.float64), 3)
    assert zero["gap"] == pytest.approx(1, abs=1e-6)


def test_verdicts_need_evidence(run):
    verdict = importlib.import_module("balance.report").verdict
    assert "proves nothing" in verdict([0.1])
    assert "cannot tell" in verdict([0.1, -0.2, 0.1])
    assert "cannot tell" in verdict([0.1, 0.2])  # t is 3, of one degree of freedom
    # By a table of t: 4.303 for two degrees of freedom; the standard error is 0.01 / sqrt(3).
    assert verdict([0.09, 0.1, 0.11]) == "+0.1000 ± 0.0248"
