"""Search for architectures by trying them: NSGA-II and others, through Optuna.

Several processes, on several machines, may share one search through a journal file; a search
that is interrupted, however roughly, goes on where it was. See :func:`search`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightshare.space import ArchConfig, SearchSpace
from weightshare.supernet.pareto import pareto_front

if TYPE_CHECKING:
    import optuna

    from weightshare.supernet._journal import Worker

Direction = Literal["minimize", "maximize"]
Values = float | Sequence[float] | None
Constraint = Callable[[ArchConfig], bool]

_ATTEMPTS = 3  # for an architecture whose trial dies each time, such as one out of memory
_REJECTIONS = 1000  # in a row, before the constraint is called unsatisfiable


@dataclass(frozen=True)
class Trial:
    """One architecture that was tried.

    Attributes:
        arch: the architecture.
        values: one per objective; None if it is infeasible.
    """

    arch: ArchConfig
    values: tuple[float, ...] | None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        trials: all finished trials, in the order they were started.
        directions: ``"minimize"`` or ``"maximize"``, one per objective.
    """

    trials: tuple[Trial, ...]
    directions: tuple[str, ...]

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials that none beats in all objectives, by the first objective, ascending."""
        tried = [(t.values, t) for t in self.trials if t.values is not None]
        best = pareto_front([values for values, _ in tried], self.directions)
        return tuple(t for _, t in sorted((tried[i] for i in best), key=lambda pair: pair[0]))

    @property
    def best(self) -> Trial:
        """Best trial of a search with one objective; the first where several tie.

        Raises:
            ValueError: there are several objectives (see ``front``), or nothing was feasible.
        """
        if len(self.directions) > 1:
            raise ValueError("there is no best of several objectives; see front")
        if not self.front:
            raise ValueError("no trial was feasible")
        return self.front[0]


def search(
    space: SearchSpace,
    evaluate: Callable[[ArchConfig], Values],
    trials: int,
    *,
    directions: Sequence[Direction] = ("minimize",),
    storage: str | PathLike | None = None,
    sampler: str = "nsga2",
    population: int = 50,
    seed: int = 0,
    constraint: Constraint | None = None,
) -> SearchResult:
    """Try architectures until ``trials`` of them are finished, each choice led by those before.

    Run it again with the same ``storage`` to go on after an interruption, or at the same time in
    other processes, or on other machines that see the file, to share the work: ``trials`` counts
    all finished ones together, and each caller returns when they are complete. A trial whose
    process died is tried again, twice at most. An architecture that comes up again is not
    evaluated again.

    Args:
        space: the search space; choices that are not allowed are not tried.
        evaluate: gives an architecture's objectives, a number or one number per direction; None
            (or not a number) says that it is infeasible. What it raises ends this caller's
            search; that trial does not count.
        trials: finished trials to reach, those of earlier runs and other processes included.
        directions: ``"minimize"`` or ``"maximize"``, one per objective.
        storage: journal file, made if absent; in memory if not given.
        sampler: ``"nsga2"`` (Deb et al., 2002), ``"tpe"`` or ``"random"``.
        population: architectures per generation of NSGA-II.
        seed: of all draws. One process alone draws the same again for the same seed.
        constraint: architectures that it refuses are not evaluated and not counted.

    Returns:
        All finished trials and the Pareto front.

    Raises:
        ValueError: an argument is out of range, the objectives do not fit the directions, the
            storage holds another search (names the field), or the constraint refuses everything.
        ImportError: Optuna is not installed.
    """
    _check(trials, directions, sampler, population)
    with _opened(space, tuple(directions), storage) as desk:
        desk.drawing = sampler, population, seed
        while (taken := desk.next(trials, constraint)) is not None:
            trial, arch = taken
            try:
                values = _objectives(evaluate(arch), len(directions))
            except Exception:
                desk.fail(trial)
                raise
            desk.finish(trial, values)
        return desk.result()


class _Desk:
    """Hands out trials and takes their results, to one process at a time."""

    drawing: tuple[str, int, int]

    def __init__(self, study: optuna.Study, space: SearchSpace, lock, worker: Worker | None):
        self.study, self.lock, self.worker = study, lock, worker
        self.allowed = {name: dim.allowed for name, dim in space.dims.items()}

    def next(self, trials: int, constraint: Constraint | None) -> tuple[Any, ArchConfig] | None:
        """A trial to evaluate; None when all are finished, which may have to be waited for."""
        wait = 0.01
        while True:
            with self.lock:
                done = self._finished()
                if len(done) >= trials:
                    return None
                if len(done) + self._running() < trials:
                    trial, arch = self._ask(constraint)
                    known = [t for t in done if t.params == trial.params]
                    if not known:
                        return trial, arch
                    self.finish(trial, known[0].values)
                    continue
            time.sleep(wait)  # the last ones are under way elsewhere, and may yet die
            wait = min(2 * wait, 1.0)

    def finish(self, trial, values: Sequence[float] | None) -> None:
        """Note what a trial gave; None: it is infeasible."""
        with self.lock:
            if values is None:
                self.study.tell(trial, state=_state().PRUNED)
            else:
                self.study.tell(trial, list(values))

    def fail(self, trial) -> None:
        """Note that a trial gave nothing; it does not count."""
        with self.lock:
            self.study.tell(trial, state=_state().FAIL)

    def result(self) -> SearchResult:
        """All finished trials."""
        with self.lock:
            done = self._finished()
        trials = (Trial(self._arch(t.params), _tuple(t.values)) for t in done)
        directions = (direction.name.lower() for direction in self.study.directions)
        return SearchResult(tuple(trials), tuple(directions))

    def _finished(self) -> list:
        states = _state().COMPLETE, _state().PRUNED
        trials = self.study.get_trials(deepcopy=False, states=states)
        return [t for t in trials if not t.user_attrs.get("refused")]

    def _running(self) -> int:
        """Number of trials under way; those whose worker died are put in line again."""
        running = self.study.get_trials(deepcopy=False, states=(_state().RUNNING,))
        alive = 0
        for trial in running:
            worker = trial.user_attrs.get("worker")
            if worker and self.worker and self.worker.lives(worker):
                alive += 1
                continue
            attempt = trial.user_attrs.get("attempt", 1)
            if len(trial.params) == len(self.allowed) and attempt < _ATTEMPTS:
                # First in line again, then failed: a kill in between repeats it twice, never not.
                self.study.enqueue_trial(trial.params, {"attempt": attempt + 1})
            self.study.tell(trial.number, state=_state().FAIL)
        return alive

    def _ask(self, constraint: Constraint | None) -> tuple[Any, ArchConfig]:
        """A new trial, noted as this worker's, whose architecture the constraint takes."""
        from optuna.distributions import BaseDistribution, IntDistribution

        axes: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(v) - 1) for name, v in self.allowed.items()
        }
        for _ in range(_REJECTIONS):
            # Each trial draws anew from the seed and its number: a resumed search, or another
            # process, does not repeat the draws that were made before.
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = _sampler(*self.drawing, number)
            trial = self.study.ask(axes)
            arch = self._arch(trial.params)
            if constraint is None or constraint(arch):
                if self.worker:
                    trial.set_user_attr("worker", self.worker.name)
                return trial, arch
            trial.set_user_attr("refused", True)
            self.finish(trial, None)
        raise ValueError(f"constraint: refused {_REJECTIONS} architectures in a row")

    def _arch(self, params: dict[str, int]) -> ArchConfig:
        return ArchConfig({name: v[params[name]] for name, v in self.allowed.items()})


@contextlib.contextmanager
def _opened(
    space: SearchSpace, directions: tuple[Direction, ...], storage: str | PathLike | None
) -> Iterator[_Desk]:
    """A study, new or found in the storage, of this space and these directions."""
    try:
        import optuna
        from optuna.storages import InMemoryStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ImportError("search needs Optuna: pip install weightshare-kernels[search]") from error
    from weightshare.supernet._journal import FileLock, Worker

    if storage is None:
        with _quiet():
            study = optuna.create_study(storage=InMemoryStorage(), directions=directions)
        yield _Desk(study, space, contextlib.nullcontext(), None)
        return
    path = Path(storage).absolute()
    path.touch()
    lock = FileLock(path)
    with lock, _quiet():
        backend = JournalFileBackend(str(path), lock_obj=lock)  # type: ignore[arg-type]
        study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name="search",
            directions=directions,
            load_if_exists=True,
        )
        _claim(study, space, directions, path)
        worker = Worker(path)
    try:
        yield _Desk(study, space, lock, worker)
    finally:
        with lock:
            worker.leave()


def _claim(
    study: optuna.Study, space: SearchSpace, directions: tuple[Direction, ...], path: Path
) -> None:
    """Note in a new study what is searched; require of an old one that it is the same."""
    allowed = {name: list(dim.allowed) for name, dim in space.dims.items()}
    if "space" not in study.user_attrs:
        study.set_user_attr("allowed", allowed)
        study.set_user_attr("space", space.to_dict())
    try:
        space.check_same(study.user_attrs["space"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, values in study.user_attrs["allowed"].items():
        if values != allowed[name]:
            raise ValueError(
                f"{path}: {name} allowed {values} when the search began, {allowed[name]} now"
            )
    found = tuple(direction.name.lower() for direction in study.directions)
    if found != directions:
        raise ValueError(f"{path}: directions are {found} there and {directions} here")


def _sampler(name: str, population: int, seed: int, number: int):
    """A fresh sampler: what it knows of earlier trials it reads from the study."""
    from numpy.random import SeedSequence
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    draw = int(SeedSequence((seed, number)).generate_state(1)[0])
    if name == "nsga2":
        return NSGAIISampler(population_size=population, seed=draw)
    return TPESampler(seed=draw) if name == "tpe" else RandomSampler(seed=draw)


def _check(trials: int, directions: Sequence[str], sampler: str, population: int) -> None:
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials: expected a positive int, got {trials!r}")
    wrong = [d for d in directions if d not in ("minimize", "maximize")]
    if isinstance(directions, str) or not directions or wrong:
        raise ValueError(
            f"directions: expected a sequence of 'minimize' and 'maximize', got {directions!r}"
        )
    if sampler not in ("nsga2", "tpe", "random"):
        raise ValueError(f"sampler: {sampler!r} is none of 'nsga2', 'tpe', 'random'")
    if population < 2:
        raise ValueError(f"population: {population} is less than 2")


def _objectives(values: Values, count: int) -> tuple[float, ...] | None:
    """What ``evaluate`` gave as floats; None if it is infeasible."""
    if values is None:
        return None
    found = tuple(float(v) for v in (values if isinstance(values, Sequence) else (values,)))
    if len(found) != count:
        raise ValueError(f"evaluate: gave {len(found)} objectives, the search has {count}")
    return None if any(math.isnan(v) for v in found) else found


def _tuple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _state():
    from optuna.trial import TrialState

    return TrialState


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's note that it made a study."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
