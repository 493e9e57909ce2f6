"""Search: finds the best, resumes after any interruption, shares one journal."""

import collections
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from weightshare.space import ArchConfig, PerLayer, SearchSpace

optuna = pytest.importorskip("optuna", reason="the extra [search] is not installed")

from weightshare.supernet import pareto_front, pareto_plot, search  # noqa: E402
from weightshare.supernet.search import SearchResult, Trial  # noqa: E402

FIELDS = {"embed": [1, 2, 3, 4], "ratio": PerLayer([1, 2, 3], 3)}
BOTH = ("maximize", "minimize")


def new_space():
    return SearchSpace(**FIELDS)


def distance(arch):
    """Zero at embed 3 and ratios 2 alone."""
    return abs(arch["embed"] - 3) + sum(abs(arch[f"ratio.{i}"] - 2) for i in range(3))


def two(arch):
    return sum(arch.values()), distance(arch)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_finds_the_best_and_repeats_itself(sampler):
    space = new_space()
    result = search(space, distance, 120, sampler=sampler, population=15)
    assert len(result.trials) == 120
    assert result.best.values[0] <= 1
    assert result == search(space, distance, 120, sampler=sampler, population=15)
    other = search(space, distance, 120, sampler=sampler, population=15, seed=1)
    assert other.trials != result.trials


def test_nsga2_beats_random_search():
    """On a space of 4096 with a known front, at the same number of trials."""
    space = SearchSpace(bit=PerLayer([0, 1, 2, 3], 6))

    def evaluate(arch):
        values = list(arch.values())
        return sum(v * v for v in values), sum((v - 3) ** 2 for v in values)

    def area(result):
        """Dominated part of a 54 x 54 box."""
        covered, last = 0.0, 54.0
        for trial in result.front:  # first value ascending, second descending
            covered += (54 - trial.values[0]) * (last - trial.values[1])
            last = trial.values[1]
        return covered

    directions = ("minimize", "minimize")
    got = {
        name: sum(
            area(search(space, evaluate, 150, directions=directions, sampler=name,
                        population=20, seed=seed))
            for seed in range(3)
        )
        for name in ("nsga2", "random")
    }  # fmt: skip
    assert got["nsga2"] > got["random"]


def test_front_is_optunas(tmp_path):
    result = search(new_space(), two, 60, directions=BOTH, storage=tmp_path / "s")
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "s"))
    storage = optuna.storages.JournalStorage(journal)
    study = optuna.load_study(study_name="search", storage=storage)
    assert {t.values for t in result.front} == {tuple(t.values) for t in study.best_trials}
    firsts = [t.values[0] for t in result.front]
    assert firsts == sorted(firsts) and len(firsts) > 1
    for trial in result.trials:
        assert trial.values == two(trial.arch)
        new_space().arch(trial.arch)


def test_front_of_random_points():
    """Against the definition, ties and equal points included."""
    draw = random.Random(0)
    for _ in range(50):
        points = [tuple(draw.randrange(5) for _ in range(3)) for _ in range(20)]
        directions = [draw.choice(["minimize", "maximize"]) for _ in range(3)]
        signs = [1 if d == "minimize" else -1 for d in directions]

        def beats(a, b, signs=signs):
            pairs = [(s * x, s * y) for s, x, y in zip(signs, a, b, strict=True)]
            return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

        best = {p for p in points if not any(beats(q, p) for q in points)}
        front = pareto_front(points, directions)
        assert {points[i] for i in front} == best and len(front) == len(best)
        assert all(points.index(points[i]) == i for i in front)


def test_an_architecture_is_evaluated_once():
    space, calls = SearchSpace(embed=[1, 2, 3]), collections.Counter()

    def evaluate(arch):
        calls[arch] += 1
        return arch["embed"]

    result = search(space, evaluate, 30)
    assert len(result.trials) == 30 and set(calls.values()) == {1}


def test_infeasible_and_refused():
    tried = []

    def evaluate(arch):
        tried.append(arch)
        if arch["ratio.0"] == 1:
            return None
        return float("nan") if arch["ratio.0"] == 2 else distance(arch)

    for sampler in ("nsga2", "tpe", "random"):
        result = search(
            new_space(), evaluate, 40, sampler=sampler, constraint=lambda a: a["embed"] != 3
        )
        assert len(result.trials) == 40  # the refused do not count
        assert all(t.arch["embed"] != 3 for t in result.trials)
        assert all((t.values is None) == (t.arch["ratio.0"] < 3) for t in result.trials)
        assert result.best.values[0] >= 2
    assert all(arch["embed"] != 3 for arch in tried)
    with pytest.raises(ValueError, match="constraint: refused 1000"):
        search(SearchSpace(embed=[1, 2]), evaluate, 1, constraint=lambda arch: False)


def test_only_allowed_choices_are_tried():
    space = new_space()
    space.restrict("embed", [2, 4])
    assert {t.arch["embed"] for t in search(space, distance, 30).trials} == {2, 4}


def test_an_error_ends_the_search_and_loses_nothing(tmp_path):
    broken = True

    def evaluate(arch):
        if broken and arch["embed"] == 2:
            raise RuntimeError("out of memory")
        return distance(arch)

    with pytest.raises(RuntimeError, match="out of memory"):
        search(new_space(), evaluate, 40, storage=tmp_path / "s")
    broken = False
    assert len(search(new_space(), evaluate, 40, storage=tmp_path / "s").trials) == 40
    assert os.listdir(tmp_path) == ["s"]


def test_resuming_draws_on(tmp_path):
    """In pieces or in one go: the same trials."""
    whole = search(new_space(), two, 40, directions=BOTH, population=10)
    for trials in (7, 20, 20, 40):
        part = search(
            new_space(), two, trials, directions=BOTH, population=10, storage=tmp_path / "s"
        )
        assert part.trials == whole.trials[:trials]


def test_another_search_is_refused(tmp_path):
    path = tmp_path / "s"
    search(new_space(), two, 3, directions=BOTH, storage=path)
    other = SearchSpace(embed=[1, 2, 3, 5], ratio=FIELDS["ratio"])
    with pytest.raises(ValueError, match=r"another space: embed is .*4.* there and .*5.* here"):
        search(other, two, 4, directions=BOTH, storage=path)
    narrow = new_space()
    narrow.restrict("ratio.1", [1, 2])
    with pytest.raises(ValueError, match=r"ratio.1 allowed \[1, 2, 3\] when .*\[1, 2\] now"):
        search(narrow, two, 4, directions=BOTH, storage=path)
    with pytest.raises(ValueError, match="directions"):
        search(new_space(), distance, 4, storage=path)
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trials": 0}, "trials: expected a positive int"),
        ({"trials": 2.5}, "trials: expected a positive int"),
        ({"directions": "minimize"}, "directions"),
        ({"directions": ["down"]}, "directions"),
        ({"directions": []}, "directions"),
        ({"sampler": "grid"}, "sampler: 'grid' is none of"),
        ({"population": 1}, "population"),
        ({"directions": BOTH}, "gave 1 objectives, the search has 2"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        search(new_space(), distance, **{"trials": 3} | wrong)


def job_space():
    return SearchSpace(embed=list(range(1, 41)), ratio=PerLayer(list(range(1, 21)), 3))


def job(folder, trials):
    """A process that searches; notes what it evaluates, and at the end the number of trials."""

    def evaluate(arch):
        time.sleep(0.004)
        with (folder / "log").open("a") as file:
            file.write(arch.to_json() + "\n")
        return arch["embed"], sum(arch.values())

    result = search(
        job_space(), evaluate, trials, directions=BOTH, storage=folder / "s", population=10
    )
    (folder / f"count.{os.getpid()}").write_text(str(len(result.trials)))


def stuck_job(folder, trials):
    """As a process that a very slow first trial holds up."""

    def evaluate(arch):
        (folder / "stuck").write_text(arch.to_json())
        time.sleep(600)

    search(job_space(), evaluate, trials, directions=BOTH, storage=folder / "s", population=10)


def deadly_job(folder):
    def evaluate(arch):
        if arch["embed"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return arch["embed"]

    search(SearchSpace(embed=[1, 2]), evaluate, 2, storage=folder / "s", seed=0)


@pytest.fixture(name="start")
def _start(tmp_path):
    """Start a process for a job; it is gone when the test ends."""
    context = multiprocessing.get_context("forkserver")  # imports PyTorch once, not per process
    context.set_forkserver_preload(["weightshare.supernet", "optuna"])
    started = []

    def start(target, *args):
        process = context.Process(target=target, args=(tmp_path, *args))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "ended before it was killed"


def complete(process, folder):
    """Wait for a process; the number of trials that it saw at the end."""
    process.join(60)
    assert process.exitcode == 0
    count = folder / f"count.{process.pid}"
    number = int(count.read_text())
    count.unlink()
    return number


def finished(path: Path):
    """Finished trials as the journal's lines tell: number -> values, and how often each."""
    ended = collections.Counter()
    values = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        entry = json.loads(line)
        if entry["op_code"] == 6 and entry["state"] == 1:  # SET_TRIAL_STATE_VALUES, COMPLETE
            ended[entry["trial_id"]] += 1
            values[entry["trial_id"]] = tuple(entry["values"])
    return ended, values


def test_killed_again_and_again(start, tmp_path):
    """kill -9 at random moments: every finished trial is kept, once; the count is exact."""
    journal, kept, draw = tmp_path / "s", {}, random.Random(0)
    for _ in range(6):
        size = journal.stat().st_size if journal.exists() else 0
        process = start(job, 120)
        while not journal.exists() or journal.stat().st_size < size + 8000:
            time.sleep(0.001)
            assert process.is_alive(), "ended before it was killed"
        time.sleep(draw.uniform(0, 0.05))
        kill(process)
        ended, values = finished(journal)
        assert values.items() >= kept.items() and len(values) > len(kept)
        kept = values
    assert len(kept) < 120
    with journal.open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"op_code":6,"worker_id":"x","trial')
    assert complete(start(job, 120), tmp_path) == 120
    ended, values = finished(journal)
    assert len(ended) == 120 and set(ended.values()) == {1}
    assert values.items() >= kept.items()
    assert sorted(os.listdir(tmp_path)) == ["log", "s"]


@pytest.mark.parametrize("shared", [False, True], ids=["resumed", "taken over"])
def test_what_ran_when_killed_is_tried_again(start, tmp_path, shared):
    """By the next process, or by one that waited for the last trial to end."""
    stuck = start(stuck_job, 10)
    while not (tmp_path / "stuck").exists() or not (tmp_path / "stuck").read_text():
        time.sleep(0.001)
    if not shared:
        kill(stuck)
    other = start(job, 10)
    if shared:
        while not (tmp_path / "s").exists() or len(finished(tmp_path / "s")[0]) < 9:
            time.sleep(0.001)
        other.join(0.3)
        assert other.is_alive(), "did not wait"
        kill(stuck)
    assert complete(other, tmp_path) == 10
    trials = load(tmp_path / "s").trials
    assert [t.state.name for t in trials if t.state.name != "COMPLETE"] == ["FAIL"]
    assert trials[0].state.name == "FAIL"
    wanted = job_space().from_json((tmp_path / "stuck").read_text())
    repeated = [t for t in trials if t.user_attrs.get("attempt") == 2]
    assert len(repeated) == 1 and repeated[0].params == trials[0].params
    assert repeated[0].values == [wanted["embed"], sum(wanted.values())]
    assert sorted(os.listdir(tmp_path)) == ["log", "s", "stuck"]


def test_several_processes_share_a_search(start, tmp_path):
    """Three at once, one of them killed: the others take over its trial; the count is exact."""
    processes = [start(job, 100) for _ in range(3)]
    while not (tmp_path / "log").exists():
        time.sleep(0.001)
    time.sleep(0.1)
    kill(processes[0])
    assert [complete(p, tmp_path) for p in processes[1:]] == [100, 100]
    ended, _ = finished(tmp_path / "s")
    assert len(ended) == 100 and set(ended.values()) == {1}
    assert sorted(os.listdir(tmp_path)) == ["log", "s"]
    trials = load(tmp_path / "s").trials
    states = collections.Counter(t.state.name for t in trials)
    assert states["RUNNING"] == states["WAITING"] == 0
    workers = {t.user_attrs["worker"] for t in trials if t.state.name == "COMPLETE"}
    assert len(workers) >= 2, "nothing was shared"


def test_gives_up_what_dies_each_time(start, tmp_path):
    """An architecture that always takes its process along is tried three times, not for ever."""
    codes = []
    for _ in range(4):
        process = start(deadly_job)
        process.join(60)
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * 3 + [0]
    trials = load(tmp_path / "s").trials
    failed = [t.user_attrs.get("attempt", 1) for t in trials if t.state.name == "FAIL"]
    assert failed == [1, 2, 3]
    assert [t.values for t in trials if t.state.name == "COMPLETE"] == [[1.0], [1.0]]


def load(journal):
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="search", storage=storage)


def test_plot(tmp_path):
    points = [((1.0, 2.0), True), ((2.0, 5.0), True), ((3.0, 4.0), False), ((0.5, 1.0), True)]
    trials = [Trial(ArchConfig({"embed": i}), p) for i, (p, _) in enumerate(points)]
    result = SearchResult(
        (*trials, Trial(ArchConfig({"embed": 9}), None)), ("minimize", "maximize")
    )
    assert [t.values for t in result.front] == [(0.5, 1.0), (1.0, 2.0), (2.0, 5.0)]
    pareto_plot(
        result, tmp_path / "front.svg", labels=["parameters (millions)", "accuracy (%)"],
        references={"largest": (3.5, 5.5)},
    )  # fmt: skip
    assert (tmp_path / "front.svg").stat().st_size > 5000
    with pytest.raises(ValueError, match="2 objectives"):
        pareto_plot(result, tmp_path / "x.png", labels=["a", "b"], axes=(0, 2))
    empty = SearchResult((), ("minimize", "maximize"))
    with pytest.raises(ValueError, match="no feasible"):
        pareto_plot(empty, tmp_path / "x.png", labels=["a", "b"])
    with pytest.raises(ValueError, match="no best of several"):
        _ = result.best
    with pytest.raises(ValueError, match="no trial was feasible"):
        _ = SearchResult((), ("minimize",)).best
