"""What each kind of job does, in a process of its own. It leaves files in its folder, and says by which figures it is listed.

A job that is begun a second time goes on where its journal ends, and is otherwise done anew: equal experiments give equal figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.cost.measurements import of_models, read_rows
from pdlab.experiment.experiment import Experiment
from pdlab.lab.progress import CountedProgress, LiveProgress, News
from pdlab.lab.store import JobKind, JobOrder
from pdlab.lab.submission import question
from pdlab.report.aggregates import write_aggregates
from pdlab.report.result import Result
from pdlab.results.metrics import flat_figures
from pdlab.results.run import SUMMARY
from pdlab.search.board.page import write_board
from pdlab.search.board.run import score
from pdlab.search.grid import Grid
from pdlab.search.plan import Plan
from pdlab.search.plan_files import at_comfort, write_plan
from pdlab.search.plan_rows import rows
from pdlab.search.plan_store import PlanStore
from pdlab.search.pool import ProcessPool, TaskPool
from pdlab.search.replicate import Replicated, replicate
from pdlab.search.sweep import plan_sweep, run_sweep
from pdlab.search.sweep_page import sweep_page
from pdlab.search.sweep_store import SweepStore
from pdlab.sim import simulate

SEED_FIGURES = "seeds.json"
CHOICES = "experiments.json"  # of a plan: the finalists' files, which run as they are
POINTS = "points.json"  # of a sweep: its axes, and what each point came to
Tell = Callable[[News], None]


@dataclass(frozen=True, slots=True)
class JobPlace:
    """`folder`: where its files go; `base_dir`: what the experiment's paths are relative to; `slots`: processes that it may use."""

    folder: Path
    base_dir: Path
    slots: int
    ray: str | None = None

    def pool(self) -> TaskPool:
        if self.ray is None:
            return ProcessPool(self.slots)
        pool: TaskPool = import_module("pdlab.search.ray_pool").RayPool(self.ray, None)
        return pool


def perform(pipe: Connection, order: JobOrder, place: JobPlace) -> None:
    """Tells `("news", ...)` as it goes, and `("done", figures)` or `("failed", line)` in the end."""

    def tell(news: News) -> None:
        pipe.send(("news", news))

    try:
        pipe.send(("done", dict(_KINDS[order.kind](order.asked, place, tell))))
    except UsageError as error:
        pipe.send(("failed", str(error)))
    except MemoryError:
        pipe.send(("failed", "there was not enough memory for it"))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def experiment_of(asked: Mapping[str, Any], base_dir: Path) -> Experiment:
    return Experiment.parse({**asked["experiment"], "base_dir": base_dir})


def _experiment(asked: Mapping[str, Any], place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    experiment = experiment_of(asked, place.base_dir)
    if asked["seeds"] > 1:
        return _seeds(experiment, asked["seeds"], place, tell)
    return _listed(_run(experiment, place, tell))


def _run(experiment: Experiment, place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    """Here, or on the Ray cluster; its files are here. What its summary says."""
    if place.ray is None:
        write_run(experiment, place.folder, tell)
    else:
        with closing(import_module("pdlab.search.ray_pool").RayPool(place.ray)) as pool:
            files = pool.files(experiment, write_run, tell)
        place.folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place.folder / name).write_bytes(content)
    return flat_figures(json.loads((place.folder / SUMMARY).read_text(encoding="utf-8")))


def write_run(experiment: Experiment, folder: Path, tell: Tell) -> None:
    progress = LiveProgress(tell)
    result = simulate(experiment, progress=progress.at, watch=progress.watch)
    result.save(folder)
    write_aggregates(result, folder)


def _seeds(experiment: Experiment, seeds: int, place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    """The files are those of the first seed."""
    one = Replicated(experiment.name, experiment, place.folder)
    numbers = range(experiment.seed, experiment.seed + seeds)
    counted = CountedProgress(tell, seeds, "seeds")
    if place.ray is not None:  # whose workers cannot write here
        one.by_seed[numbers[0]] = _run(experiment, place, lambda _: None)
        counted.ended()
    rest = numbers if place.ray is None else numbers[1:]
    with closing(place.pool()) as pool:
        replicate([one], tuple(rest), pool, trim=True, keep=place.ray is None, ended=counted.ended)
    if one.failures or one.unsaved:
        raise UsageError("\n".join(dict.fromkeys([*one.failures.values(), one.unsaved])).strip())
    one.write_seeds()
    runs = one.runs
    paths = dict.fromkeys(path for figures in runs.by_seed.values() for path in figures)
    means = {path: {"mean": mean.mean, "half": mean.half} for path in paths if (mean := runs.figure(path)) is not None}
    found = {"figures": means, "by_seed": {str(seed): dict(figures) for seed, figures in runs.by_seed.items()}}
    _write_json(place.folder / SEED_FIGURES, found)
    write_aggregates(Result.load(place.folder), place.folder)
    return _listed({path: figure["mean"] for path, figure in means.items()})


def _plan(asked: Mapping[str, Any], place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    planned = Plan(experiment_of(asked, place.base_dir), question(asked["seeds"], asked["options"]))
    with closing(place.pool()) as pool, closing(PlanStore.open(place.folder, planned.base.resolved())) as store:

        def ended(done: int, total: int) -> None:
            tell({"done": done, "total": total, "phase": planned.search.phase, "simulations": planned.judge.simulated})

        planned.run(pool, store, ended)
        found = rows(planned)
        write_plan(planned, found, store)
        choices = [at_comfort(planned, row).to_yaml() for row in found]
        store.write(CHOICES, json.dumps(choices).encode())
    return {"goodput_rps": found[0].capacity.mean}


def _sweep(asked: Mapping[str, Any], place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    base = experiment_of(asked, place.base_dir)
    planned = plan_sweep(base, Grid.read(asked["options"]["grid"]), asked["seeds"])
    grid = {axis.key: axis.values for axis in planned.grid.axes}
    with closing(place.pool()) as pool, closing(SweepStore.open(place.folder, base.resolved(), grid, planned.seeds)) as store:
        run_sweep(planned, store, pool, CountedProgress(tell, len(planned.missing(store)), "runs").ended)
        outcomes = planned.outcomes(store)
        if not any(outcome.done for outcome in outcomes):
            raise UsageError("\n".join(dict.fromkeys(planned.failures.values())))
        store.write_table(planned.rows(store))
        store.write_page(sweep_page(planned, outcomes, base))
        names = ("slo_attainment", "goodput_rps", "ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "tpot_s.p99")
        points = []
        for outcome in outcomes:
            means = {name: {"mean": figure.mean, "half": figure.half} for name in names if (figure := outcome.figure(name)) is not None}
            points.append({"values": outcome.point.values, "figures": means, "marks": outcome.marks})
        store.write(POINTS, json.dumps({"axes": [axis.key for axis in planned.grid.axes], "points": points}).encode())
    return {}


def _tuning(asked: Mapping[str, Any], place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    tune, cases, folders, spaces, studies = (
        import_module(f"pdlab.search.{name}") for name in ("tune", "tune_cases", "tune_folder", "tune_space", "tune_study")
    )  # which need Optuna
    options, experiment = asked["options"], experiment_of(asked, place.base_dir)
    name = options["policy"] or spaces.named_policy(experiment)
    objectives = tune.TuneObjective.read(options["objective"])
    space = spaces.TuneSpace.read(name, [text for one in options["params"] for text in one.split(",")], experiment.base_dir)
    rungs = options["rungs"] if len(objectives) == 1 else 1
    split = cases.TuneCases.of(experiment, options["seeds"], options["judge"], options["holdout"], rungs)
    plan = tune.TunePlan(experiment, space, objectives, split, space.untuned(experiment))
    folder = folders.TuneFolder.open(place.folder)
    study = studies.TuneStudy.open(
        folder.url, "tuning", space, [one.better for one in objectives], plan.manifest, plan.untuned, experiment.seed
    )
    trials = options["trials"]
    with closing(place.pool()) as pool:
        counted = CountedProgress(tell, max(0, trials - study.counts.over), "trials")
        tune.Tuning(plan, study, trials, counted.ended).run(pool)
        if not study.counts.complete:
            raise UsageError(f"no trial came to its end: {study.counts.failed:,} failed; the last: {study.failure}")
        chosen = tune.candidates(plan, study)
        counted = CountedProgress(tell, (1 + len(chosen)) * len(split.judging), "judging")
        folder.write(plan, study, tune.judge(plan, chosen, pool, counted.ended) if chosen else [])
    return {}


def _board(asked: Mapping[str, Any], place: JobPlace, tell: Tell) -> Mapping[str, Any]:
    options = asked["options"]
    every, left_out = read_rows(place.base_dir / options["rows"])
    measured = of_models(every, options["models"])
    with closing(place.pool()) as pool:
        counted = CountedProgress(tell, len(measured), "rows")
        scored = list(_counted(score(measured, pool), counted.ended))
    write_board(place.folder, Path(options["rows"]).stem, scored, [] if options["models"] else left_out)
    return {"requests": len(scored)}


def _counted(scored: Iterator[Any], ended: Callable[[], None]) -> Iterator[Any]:
    for one in scored:
        ended()
        yield one


def _listed(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {"requests": "requests", "slo_attainment": "slo_attainment", "goodput_rps": "goodput_rps"}
    names |= {"ttft_p99_s": "ttft_s.p99", "tpot_p99_s": "tpot_s.p99"}
    return {own: figures.get(path) for own, path in names.items()}


def _write_json(path: Path, content: Any) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)


_KINDS: Mapping[JobKind, Callable[[Mapping[str, Any], JobPlace, Tell], Mapping[str, Any]]] = {
    JobKind.EXPERIMENT: _experiment,
    JobKind.PLAN: _plan,
    JobKind.SWEEP: _sweep,
    JobKind.TUNING: _tuning,
    JobKind.BOARD: _board,
}
