"""Several experiments with the same seeds, over a pool: the figures of each run, and the files of each experiment's first.

The same seed gives the same arrivals and lengths to all whose workload is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.report.result import Result
from pdlab.report.seeded import SeededRuns
from pdlab.results.metrics import Scalar, flat_figures
from pdlab.search.pool import SimulationTask, TaskPool, TaskResult, no_more
from pdlab.sim import simulate
from pdlab.sim.outcome import rests_on

UNSAVED = "unsaved"  # the figure that says why a run's files are not there
SEEDS = "seeds.parquet"


@dataclass(frozen=True, slots=True)
class KeptFigures:
    """What is wanted of a run: its figures, and its files in `directory`, where that is given."""

    directory: Path | None = None

    def __call__(self, result: Result) -> Mapping[str, Scalar]:
        figures: dict[str, Scalar] = dict(flat_figures(result.summary))
        if self.directory is not None:
            try:
                result.save(self.directory)
            except UsageError as error:
                figures[UNSAVED] = str(error)
        return figures


@dataclass(slots=True)
class Replicated:
    """An experiment, where its results go, and what its seeds have come to so far. `failures` are the reasons of those without figures."""

    name: str
    experiment: Experiment
    directory: Path
    by_seed: dict[int, Mapping[str, Scalar]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def runs(self) -> SeededRuns:
        return SeededRuns(self.name, dict(sorted(self.by_seed.items())), tuple(rests_on(self.experiment)))

    @property
    def unsaved(self) -> str:
        """Why its files are not there."""
        return next((str(figures[UNSAVED]) for figures in self.by_seed.values() if UNSAVED in figures), "")

    def write_seeds(self) -> Path:
        """A row a seed, beside the first one's files. Raises UsageError."""
        import pandas as pd

        path = self.directory / SEEDS
        frame = pd.DataFrame([{"seed": seed, **figures} for seed, figures in sorted(self.by_seed.items())])
        try:
            frame.to_parquet(path, index=False)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror}); give another directory with --out") from None
        return path


class ThisProcess:
    """A pool of one that starts no process: what a policy raises is raised, and Ctrl-C ends the run that is under way early."""

    def run(self, tasks: Sequence[SimulationTask], more: Callable[[], SimulationTask | None] = no_more) -> Iterator[TaskResult]:
        for task in chain(tasks, iter(more, None)):
            result = simulate(task.experiment)
            yield TaskResult(task.key, task.figures(result))
            if result.summary["partial"]:
                raise KeyboardInterrupt

    def close(self) -> None:
        pass


def replicate(
    experiments: Sequence[Replicated],
    seeds: Sequence[int] | None,
    pool: TaskPool,
    *,
    trim: bool = False,
    keep: bool = True,
    ended: Callable[[], None],
) -> None:
    """Every experiment with every seed, or each with its own; what comes is put into `experiments` as it comes, and `ended` called after
    each. A seed's runs go first, so that what there is after Ctrl-C can be compared. With `trim` each run's own warm-up is left out, and
    what is compared are not the same requests. With `keep` the first seed's runs leave their files."""
    waiting = {f"{seed} {k}": (one, seed) for k, one in enumerate(experiments) for seed in seeds or (one.experiment.seed,)}
    tasks = []
    for key in sorted(waiting, key=lambda key: (waiting[key][1], int(key.split()[1]))):
        one, seed = waiting[key]
        kept = one.directory if keep and seed == (seeds or (one.experiment.seed,))[0] else None
        tasks.append(SimulationTask(key, one.experiment.model_copy(update={"seed": seed}), figures=KeptFigures(kept), trim=trim))
    for result in pool.run(tasks):
        one, seed = waiting[result.key]
        if result.failure:
            one.failures[seed] = result.failure
        else:
            one.by_seed[seed] = result.figures
        ended()
