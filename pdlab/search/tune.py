"""A policy's parameters, searched by simulations: trials go from rung to rung, and the winner is judged on what tuning never saw.

The worlds of a trial are the same for all: equal seeds, equal parts of the trace. So what differs between two trials is not chance, but
what is best there may be so by chance alone. Hence the judge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from statistics import fmean
from typing import Any, Self

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.results.statistics import MeanInterval, mean_interval
from pdlab.search.identity import RunHashes
from pdlab.search.pool import SimulationTask, TaskPool, TaskResult, summary_figures
from pdlab.search.stretches import FIGURES, GOODPUT, SHARES, Stretches, stretch_key
from pdlab.search.tune_cases import TuneCase, TuneCases
from pdlab.search.tune_space import TuneSpace
from pdlab.search.tune_study import FinishedTrial, TuneStudy

MOST_JUDGED = 5  # of a front


@dataclass(frozen=True, slots=True)
class TuneObjective:
    """A figure of a summary by its path; `better` is 1 where more is better, else -1."""

    name: str

    @property
    def better(self) -> int:
        return 1 if self.name in (*SHARES, GOODPUT) else -1

    @classmethod
    def read(cls, texts: Sequence[str]) -> tuple[Self, ...]:
        """Raises UsageError."""
        for text in texts:
            if text not in FIGURES:
                near = get_close_matches(text, FIGURES, n=2, cutoff=0.5)
                hint = f" (did you mean {' or '.join(near)}?)" if near else ""
                raise UsageError(f"--objective {text}: unknown{hint}; there are {', '.join(FIGURES)}")
        if len(texts) > 2 or len(set(texts)) < len(texts):
            raise UsageError(f"--objective {', '.join(texts)}: give one, or two that differ")
        return tuple(map(cls, texts))


@dataclass(frozen=True, slots=True)
class TunePlan:
    """`experiment` is the file's; `untuned` are the values that its tuned parameters have there."""

    experiment: Experiment
    space: TuneSpace
    objectives: tuple[TuneObjective, ...]
    cases: TuneCases
    untuned: Mapping[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        """What its study is of."""
        untuned = self.space.with_(self.experiment, self.untuned)
        said = {key: value for key, value in untuned.resolved().items() if key not in ("name", "base_dir")}
        return {
            **said,
            "policy": self.space.policy,
            "params": {one.name: one.plain for one in self.space.parameters},
            "objective": [one.name for one in self.objectives],
            "rungs": [[[case.seed, *case.part] for case in rung] for rung in self.cases.rungs],
            "hash": RunHashes().of(untuned),
        }

    def task(self, key: str, values: Mapping[str, Any], case: TuneCase, stretches: Stretches | None = None) -> SimulationTask:
        """Raises UsageError where the policy refuses the values."""
        experiment = self.space.with_(self.experiment, values).model_copy(update={"seed": case.seed})
        return SimulationTask(key, experiment, case.part, stretches or summary_figures)


@dataclass(slots=True)
class TrialRun:
    """A trial on its way; `figures` are those of each case that is simulated."""

    trial: Any  # optuna's
    values: Mapping[str, Any]
    rung: int = 0
    figures: dict[TuneCase, tuple[float, ...]] = field(default_factory=dict)


class Tuning:
    """Trials as many as cores that have nothing else to do."""

    def __init__(self, plan: TunePlan, study: TuneStudy, trials: int, ended: Callable[[], None] = lambda: None) -> None:
        self.plan, self.study, self.trials, self.ended = plan, study, trials, ended
        self.runs: dict[int, TrialRun] = {}
        self.asked: dict[str, tuple[TrialRun, TuneCase]] = {}
        self.waiting: deque[SimulationTask] = deque()

    def run(self, pool: TaskPool) -> None:
        """Until there are as many trials as were asked for. What is under way when it ends otherwise counts as never begun."""
        try:
            first = self._more()
            for result in pool.run([] if first is None else [first], self._more):
                self._take(result)
        finally:
            self.study.give_up()

    def _more(self) -> SimulationTask | None:
        while not self.waiting and self.study.begun < self.trials:
            self._begin()
        return self.waiting.popleft() if self.waiting else None

    def _begin(self) -> None:
        trial, values = self.study.ask()
        one = self.runs[trial.number] = TrialRun(trial, values)
        try:
            self._climb(one)
        except UsageError as error:
            self._fail(one, str(error))

    def _climb(self, one: TrialRun) -> None:
        for index, case in enumerate(self.plan.cases.rungs[one.rung]):
            if case not in one.figures:
                task = self.plan.task(f"{one.trial.number}/{one.rung}/{index}", one.values, case)
                self.asked[task.key] = (one, case)
                self.waiting.append(task)

    def _take(self, result: TaskResult) -> None:
        one, case = self.asked.pop(result.key)
        if one.trial.number not in self.runs:
            return  # it has failed elsewhere
        figures = [result.figures.get(objective.name) for objective in self.plan.objectives]
        if result.failure or None in figures:
            lacking = next((o.name for o, figure in zip(self.plan.objectives, figures, strict=True) if figure is None), "")
            self._fail(one, result.failure or f"its run has no {lacking}: no request has one")
            return
        one.figures[case] = tuple(float(figure) for figure in figures if isinstance(figure, int | float))
        cases = self.plan.cases.rungs[one.rung]
        if all(each in one.figures for each in cases):
            means = [fmean(column) for column in zip(*(one.figures[each] for each in cases), strict=True)]
            self._end_rung(one, means)

    def _end_rung(self, one: TrialRun, means: list[float]) -> None:
        if one.rung == len(self.plan.cases.rungs) - 1:
            self.study.completed(one.trial, means)
        elif len(means) > 1 or self.study.rung_ended(one.trial, one.rung, means[0]):
            one.rung += 1
            self._climb(one)
            return
        self._over(one)

    def _fail(self, one: TrialRun, reason: str) -> None:
        self.waiting = deque(task for task in self.waiting if self.asked[task.key][0] is not one)
        self.study.failed(one.trial, reason)
        self._over(one)

    def _over(self, one: TrialRun) -> None:
        del self.runs[one.trial.number]
        self.ended()


@dataclass(frozen=True, slots=True)
class JudgedFigure:
    """`difference` is the tuned less the untuned, figure by figure: what both have in common cancels out."""

    objective: TuneObjective
    untuned: MeanInterval
    tuned: MeanInterval
    difference: MeanInterval

    @property
    def verdict(self) -> str:
        """better or worse where the difference is outside its interval, else undecided."""
        half = self.difference.half or 0.0
        gain = self.objective.better * self.difference.mean
        return "better" if gain > half else "worse" if gain < -half else "undecided"


@dataclass(frozen=True, slots=True)
class Judgement:
    trial: FinishedTrial
    figures: tuple[JudgedFigure, ...]

    @property
    def verdict(self) -> str:
        """better: in one objective at least, and worse in none; worse: the other way round."""
        verdicts = {figure.verdict for figure in self.figures}
        if verdicts <= {"better", "undecided"} and "better" in verdicts:
            return "better"
        if verdicts <= {"worse", "undecided"} and "worse" in verdicts:
            return "worse"
        return "undecided" if verdicts == {"undecided"} else "better in one, worse in the other"


def candidates(plan: TunePlan, study: TuneStudy) -> list[FinishedTrial]:
    """Who is judged: the best trial, or some of the front from end to end; none that is as the untuned."""
    if len(plan.objectives) == 1:
        best = study.best
        found = [] if best is None else [best]
    else:
        front = study.front
        steps = max(1, min(MOST_JUDGED, len(front)) - 1)
        found = [front[index] for index in sorted({round(k * (len(front) - 1) / steps) for k in range(steps + 1)})] if front else []
    return [one for one in found if dict(one.parameters) != dict(plan.untuned)]


def judge(plan: TunePlan, trials: Sequence[FinishedTrial], pool: TaskPool, ended: Callable[[], None] = lambda: None) -> list[Judgement]:
    """Each against the untuned. Raises UsageError where a run fails."""
    names = tuple(one.name for one in plan.objectives)
    stretches = None if plan.cases.stretches is None else Stretches(plan.cases.stretches, names)
    judged: dict[str, Mapping[str, Any]] = {"untuned": plan.untuned, **{str(one.number): one.parameters for one in trials}}
    tasks = [
        plan.task(f"{who}/{index}", values, case, stretches)
        for index, case in enumerate(plan.cases.judging)
        for who, values in judged.items()
    ]
    results: dict[str, TaskResult] = {}
    for result in pool.run(tasks):
        if result.failure:
            raise UsageError(f"the judge's run {result.key} failed: {result.failure}")
        results[result.key] = result
        ended()
    return [Judgement(one, tuple(_judged(plan, results, str(one.number)))) for one in trials]


def _judged(plan: TunePlan, results: Mapping[str, TaskResult], who: str) -> Iterator[JudgedFigure]:
    for objective in plan.objectives:
        own, plain = _figures(plan, results, who, objective.name), _figures(plan, results, "untuned", objective.name)
        both = [(a, b) for a, b in zip(own, plain, strict=True) if a is not None and b is not None]
        tuned, untuned = mean_interval([a for a, _ in both]), mean_interval([b for _, b in both])
        difference = mean_interval([a - b for a, b in both])
        if tuned is None or untuned is None or difference is None:
            raise UsageError(f"the judge's runs have no {objective.name}: no request has one")
        yield JudgedFigure(objective, untuned, tuned, difference)


def _figures(plan: TunePlan, results: Mapping[str, TaskResult], who: str, name: str) -> list[float | None]:
    """One for each seed; or for each stretch, the mean over the seeds."""
    runs = [results[f"{who}/{index}"].figures for index in range(len(plan.cases.judging))]
    if plan.cases.stretches is None:
        return [_number(figures.get(name)) for figures in runs]
    found = []
    for index in range(plan.cases.stretches):
        values = [value for figures in runs if (value := _number(figures.get(stretch_key(index, name)))) is not None]
        found.append(fmean(values) if values else None)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
