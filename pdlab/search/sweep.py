"""Every point of a grid with every seed, simulated once.

All points have the same seeds: the same arrivals and lengths come to each, so that what differs between two points is not chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.results.statistics import MeanInterval, mean_interval, paired_difference
from pdlab.search.grid import Grid, GridPoint, ImpossiblePoint, worded
from pdlab.search.identity import RunHashes
from pdlab.search.pool import Scalar, SimulationTask, TaskPool
from pdlab.search.sweep_store import SweepStore

MOST_RUNS = 100_000
POLICY_HASH = "run.policy_hash"
MARKS = ("overloaded", "partial")  # figures of a run that make the others doubtful


@dataclass(frozen=True, slots=True)
class PlannedRun:
    point: GridPoint
    seed: int
    key: str
    policy_hash: str

    @property
    def experiment(self) -> Experiment:
        return self.point.experiment.model_copy(update={"seed": self.seed})


@dataclass(slots=True)
class Sweep:
    """`failures` are the reasons of the runs that failed since the start, by their hashes."""

    grid: Grid
    seeds: tuple[int, ...]
    points: list[GridPoint]
    impossible: list[ImpossiblePoint]
    runs: list[PlannedRun]
    failures: dict[str, str] = field(default_factory=dict)

    def missing(self, store: SweepStore) -> list[PlannedRun]:
        return [run for run in self.runs if run.key not in store.figures]

    def rows(self, store: SweepStore) -> list[dict[str, Any]]:
        """One for each run that is done or has failed: the grid's keys, seed, hash, and the figures, or why there are none."""
        rows = []
        for run in self.runs:
            figures, failure = store.figures.get(run.key), self.failures.get(run.key)
            if figures is None and failure is None:
                continue
            own = {axis.key: value if axis.plain else worded(value) for axis, value in zip(self.grid.axes, run.point.values, strict=True)}
            own |= {"seed": run.seed, "experiment_hash": run.key, "failure": failure if figures is None else None}
            rows.append({**own, **{name: value for name, value in (figures or {}).items() if name not in own}})
        return rows

    def outcomes(self, store: SweepStore) -> list[PointOutcome]:
        """One for each point, in the grid's order."""
        found = []
        for index, point in enumerate(self.points):
            own = self.runs[index * len(self.seeds) : (index + 1) * len(self.seeds)]
            done = {run.seed: store.figures[run.key] for run in own if run.key in store.figures}
            failed = sum(run.key in self.failures and run.key not in store.figures for run in own)
            found.append(PointOutcome(point, done, failed, len(self.seeds)))
        return found


@dataclass(frozen=True, slots=True)
class PointOutcome:
    """What the seeds of a point say together; `done` has the figures by seed."""

    point: GridPoint
    done: Mapping[int, Mapping[str, Scalar]]
    failed: int
    seeds: int

    def figure(self, name: str) -> MeanInterval | None:
        """Over the seeds that have it."""
        return mean_interval(list(self._by_seed(name).values()))

    def difference(self, other: PointOutcome, name: str) -> MeanInterval | None:
        """This point's figure less the other's, over the seeds that both have: the arrivals and lengths that they share cancel out."""
        return paired_difference(self._by_seed(name), other._by_seed(name))

    def _by_seed(self, name: str) -> dict[int, float]:
        return {seed: value for seed, figures in self.done.items() if isinstance(value := figures.get(name), int | float)}

    @property
    def marks(self) -> list[str]:
        counts = Counter(name for figures in self.done.values() for name in MARKS if figures.get(name))
        said = [name if times == self.seeds else f"{name} {times}/{self.seeds}" for name, times in counts.items()]
        if self.failed:
            said.append(f"failed {self.failed}/{self.seeds}")
        if missing := self.seeds - len(self.done) - self.failed:
            said.append(f"missing {missing}/{self.seeds}")
        return said


def plan_sweep(base: Experiment, grid: Grid, seeds: int, *, most: int | None = MOST_RUNS) -> Sweep:
    """Raises UsageError for what is wrong with any of it, before anything runs. `most` runs are planned without question."""
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: each point needs a seed at least; write --seeds 1 or more")
    if most is not None and len(grid) * seeds > most:
        raise UsageError(
            f"{len(grid):,} points x {seeds:,} seeds are {len(grid) * seeds:,} runs, more than {most:,}: take fewer values, or give --force"
        )
    points, impossible = grid.points(base)
    hashes = RunHashes()
    numbers = tuple(range(base.seed, base.seed + seeds))
    runs = []
    for point in points:
        policy_hash = hashes.policy(point.experiment)
        seeded = (point.experiment.model_copy(update={"seed": seed}) for seed in numbers)
        runs += [PlannedRun(point, one.seed, hashes.of(one), policy_hash) for one in seeded]
    return Sweep(grid, numbers, points, impossible, runs)


def run_sweep(sweep: Sweep, store: SweepStore, pool: TaskPool, ended: Callable[[], None] = lambda: None) -> None:
    """What is missing, kept as it ends; `ended` is called after each."""
    missing = {run.key: run for run in sweep.missing(store)}
    for result in pool.run([SimulationTask(run.key, run.experiment) for run in missing.values()]):
        failure, found = result.failure, result.figures.get(POLICY_HASH)
        if not failure and found != missing[result.key].policy_hash:
            failure = "the policy's file was changed while the sweep ran; start it again"
        if failure:
            sweep.failures[result.key] = failure
        else:
            store.put(result.key, result.figures)
        ended()


def reasons(sweep: Sweep) -> Iterator[tuple[str, int]]:
    """Why runs failed, and how many."""
    yield from Counter(sweep.failures.values()).most_common()
