"""A tuning's trials, as Optuna keeps them: in a database, which any number of processes may share, and from which any may go on.

A study says what it is of. It is refused where that is something else, since figures of two experiments tell nothing of each other.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, OptunaError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from pdlab.core.types import UsageError
from pdlab.search.identity import first_difference
from pdlab.search.tune_space import TunedParameter, TuneSpace

_OF, _WORKER, _FAILURE = "pdlab", "worker", "failure"
_STARTUP = 10  # trials at random before TPE has enough to go by
_TRIES, _PAUSE_S = 10, 0.1
_MEANWHILE = ("already exists", "database is locked", "no such table", "does not exist")  # said while another makes the tables
_OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, slots=True)
class FinishedTrial:
    """`values` has one for each objective."""

    number: int
    parameters: Mapping[str, Any]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrialCounts:
    complete: int
    pruned: int
    failed: int

    @property
    def over(self) -> int:
        return self.complete + self.pruned + self.failed


class TuneStudy:
    """`objectives` are 1 where more is better, else -1. With two there is no pruning: a front has no order to prune by."""

    def __init__(self, study: optuna.Study, space: TuneSpace, url: str) -> None:
        self.study, self.space, self.url = study, space, url
        self.name: str = study.study_name
        self.distributions = dict(pair for one in space.parameters for pair in _distributions(one))

    @classmethod
    def open(
        cls,
        url: str,
        name: str,
        space: TuneSpace,
        better: Sequence[int],
        manifest: Mapping[str, Any],
        untuned: Mapping[str, Any],
        seed: int,
    ) -> Self:
        """Made where there is none. `manifest` is what it is of, in plain values; `untuned` is tried first. Raises UsageError."""
        optuna.logging.set_verbosity(logging.ERROR)
        with _told(url):
            study = _opened(url, name, manifest, ["maximize" if sign > 0 else "minimize" for sign in better])
            made = cls(study, space, url)
            made._end_running(_is_dead)
            there = study.get_trials(deepcopy=False)
            others = any(one.state is TrialState.RUNNING for one in there)
            made._search_with(seed + len(there) + others * os.getpid(), len(better) > 1)  # or the first numbers would be drawn again
            if not there and all(one.holds(untuned[one.name]) for one in space.parameters):
                study.enqueue_trial(dict(pair for one in space.parameters for pair in _as_params(one, untuned[one.name])))
        return made

    def _search_with(self, seed: int, several: bool) -> None:
        if several:
            self.study.sampler = optuna.samplers.NSGAIISampler(seed=seed)
            self.study.pruner = optuna.pruners.NopPruner()
        else:
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)
            self.study.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)

    def ask(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """A trial, and the values that it is to try."""
        with _told(self.url):
            trial = self.study.ask(self.distributions)
            trial.set_user_attr(_WORKER, _this_process())
            return trial, self._values(trial.params)

    def rung_ended(self, trial: optuna.Trial, rung: int, value: float) -> bool:
        """Shall it go on to the next rung? The first trial, of the untuned, always does."""
        with _told(self.url):
            trial.report(value, 2**rung)
            if trial.number == 0 or not trial.should_prune():
                return True
            self.study.tell(trial, state=TrialState.PRUNED)
            return False

    def completed(self, trial: optuna.Trial, values: Sequence[float]) -> None:
        with _told(self.url):
            self.study.tell(trial, list(values))

    def failed(self, trial: optuna.Trial, reason: str) -> None:
        with _told(self.url):
            trial.set_user_attr(_FAILURE, reason)
            self.study.tell(trial, state=TrialState.FAIL)

    def give_up(self) -> None:
        """Whatever this process has under way does not count."""
        with _told(self.url):
            self._end_running(lambda worker: worker == _this_process())

    @property
    def begun(self) -> int:
        """Trials that are over or under way, here or in another process."""
        with _told(self.url):
            return sum(one.state is TrialState.RUNNING or _counts(one) for one in self.study.get_trials(deepcopy=False))

    @property
    def counts(self) -> TrialCounts:
        with _told(self.url):
            states = [one.state for one in self.study.get_trials(deepcopy=False) if _counts(one)]
        return TrialCounts(*(states.count(state) for state in _OVER))

    @property
    def failure(self) -> str:
        """Why the last one of those that failed did; empty where none has."""
        found = [one.user_attrs[_FAILURE] for one in self.study.get_trials(deepcopy=False) if _FAILURE in one.user_attrs]
        return found[-1] if found else ""

    @property
    def best(self) -> FinishedTrial | None:
        """Of those that were simulated to the end; of equals the first. None where there is none. For one objective."""
        sign = 1 if self.study.direction is optuna.study.StudyDirection.MAXIMIZE else -1
        return max(self._complete(), key=lambda one: (sign * one.values[0], -one.number), default=None)

    @property
    def front(self) -> list[FinishedTrial]:
        """Those than which no other is better in one objective and as good in the others, each values once, by the first objective."""
        with _told(self.url):
            there = sorted(self.study.best_trials, key=lambda one: one.number)
        distinct = {tuple(one.values): one for one in reversed(there)}
        return [self._finished(distinct[values]) for values in sorted(distinct)]

    def _complete(self) -> list[FinishedTrial]:
        with _told(self.url):
            return [self._finished(one) for one in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]

    def _finished(self, trial: FrozenTrial) -> FinishedTrial:
        return FinishedTrial(trial.number, self._values(trial.params), tuple(trial.values))

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {one.name: _value(one, params) for one in self.space.parameters}

    def _end_running(self, whose: Callable[[str], bool]) -> None:
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if whose(str(trial.user_attrs.get(_WORKER, ""))):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _counts(trial: FrozenTrial) -> bool:
    """Is it over, by itself? One that was given up has failed without a reason."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (trial.state is TrialState.FAIL and _FAILURE in trial.user_attrs)


def _opened(url: str, name: str, manifest: Mapping[str, Any], directions: list[str]) -> optuna.Study:
    storage = _made(url)
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        study.set_user_attr(_OF, json.dumps(manifest))
        return study
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
    there = _said_of(study)
    remedy = "give another --study, or another directory with --out"
    if there is None:
        raise UsageError(f"{url}: its study {name} is none of pdlab tune's; {remedy}")
    change = first_difference(json.loads(there), json.loads(json.dumps(manifest)))
    if change is not None:
        changed = "the policy, a file that is read, or pdlab was changed" if change.startswith("hash is ") else change
        raise UsageError(f"{url}: its study {name} is of another experiment ({changed}); {remedy}")
    return study


def _made(url: str) -> optuna.storages.BaseStorage:
    """The storage. Optuna makes its tables without a lock: of processes that start at once all but one are told they are there already."""
    for _ in range(_TRIES):
        try:
            return optuna.storages.get_storage(url)
        except (IntegrityError, OperationalError, ProgrammingError, OptunaError) as error:
            if not isinstance(error, IntegrityError) and not any(words in str(error) for words in _MEANWHILE):
                raise
        time.sleep(_PAUSE_S)
    return optuna.storages.get_storage(url)


def _said_of(study: optuna.Study) -> Any:
    """What it is of. Who has just made it says so a moment later."""
    for _ in range(_TRIES):
        if _OF in study.user_attrs or study.get_trials(deepcopy=False):
            break
        time.sleep(_PAUSE_S)
    return study.user_attrs.get(_OF)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """A database's trouble in one line. Ctrl-C waits until what was begun there is done."""
    try:
        with _ctrl_c_later():
            yield
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or getattr(error.__context__, "name", None) or "its driver"
        raise UsageError(f"--storage {url}: its driver is not installed; pip install {driver}") from None
    except (SQLAlchemyError, OptunaError, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).partition("\n")[0].split())
        raise UsageError(f"--storage {url}: {reason}; give the URL of a database, such as sqlite:///study.db") from None


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _distributions(one: TunedParameter) -> Iterator[tuple[str, BaseDistribution]]:
    if one.choices is not None:
        yield one.name, CategoricalDistribution([*one.choices, None] if one.optional else list(one.choices))
        return
    if one.whole:
        yield one.name, IntDistribution(int(one.low), int(one.high), log=one.log)
    else:
        yield one.name, FloatDistribution(one.low, one.high, log=one.log)
    if one.optional:
        yield _null(one), CategoricalDistribution([False, True])


def _as_params(one: TunedParameter, value: Any) -> Iterator[tuple[str, Any]]:
    """What Optuna calls a value."""
    number = one.choices is None
    yield one.name, one.low if value is None and number else value
    if one.optional and number:
        yield _null(one), value is None


def _value(one: TunedParameter, params: Mapping[str, Any]) -> Any:
    if one.choices is not None:
        return params[one.name]
    return None if params.get(_null(one)) else one.rounded(params[one.name])


def _null(one: TunedParameter) -> str:
    return f"{one.name} is null"


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _is_dead(worker: str) -> bool:
    """Was it a process of this machine, which was killed?"""
    host, _, pid = worker.rpartition(":")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
