"""`pdlab tune`: a policy's parameters, searched on all cores, and judged on what the search never saw."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pdlab.cli.pools import pool_of, progress
from pdlab.cli.shared import HardwareFile, Jobs, Overrides, RayAddress, Traceback, err, out, traced
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.pool import TaskPool
from pdlab.search.tune import TuneObjective, TunePlan, Tuning, candidates, judge
from pdlab.search.tune_cases import TuneCases
from pdlab.search.tune_folder import TuneFolder
from pdlab.search.tune_space import TuneSpace, named_policy
from pdlab.search.tune_study import TuneStudy
from pdlab.search.tune_table import best_line, judged_table, lines_of


def tune(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment file.", show_default=False)],
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME", help="Which policy: a name, or a path.", show_default="the file's")
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option("--params", metavar="NAME[=LOW..HIGH],...", help="Which of its parameters.", show_default="all that have a range"),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="In all, with those that the study has.")] = 200,
    objective: Annotated[
        list[str] | None,
        typer.Option("--objective", metavar="FIGURE", help="A figure of summary.json. Twice: a front.", show_default="slo_attainment"),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Of the longest rung.", show_default="4, of a trace 1")] = None,
    rungs: Annotated[int, typer.Option("--rungs", help="Each twice as long as the one before; 1: nothing is pruned.")] = 3,
    holdout: Annotated[float, typer.Option("--holdout", help="The last part of a trace, for judging.")] = 0.4,
    judge_: Annotated[int, typer.Option("--judge", help="Seeds to judge by, or stretches of the trace's last part.")] = 10,
    set_: Overrides = None,
    hardware_file: HardwareFile = None,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="A database, as Optuna takes it.", show_default="DIR/study.db")
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Its name there.", show_default="NAME-POLICY")] = None,
    jobs: Jobs = None,
    ray: RayAddress = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME-POLICY-tune")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    traceback: Traceback = False,
) -> None:
    """Search a policy's parameters by simulations, and judge what was found on seeds, or a part of the trace, that the search never saw."""
    with traced(traceback):
        if trials < 1:
            raise UsageError(f"--trials {trials}: write 1 or more")
        pool = pool_of("tune", jobs, ray)
        experiment = Experiment.load(file, list(set_ or ()), hardware_file)
        name = policy or named_policy(experiment)
        objectives = TuneObjective.read(objective or ["slo_attainment"])
        space = TuneSpace.read(name, [text for texts in params or () for text in texts.split(",")], experiment.base_dir)
        cases = TuneCases.of(experiment, seeds, judge_, holdout, rungs if len(objectives) == 1 else 1)
        plan = TunePlan(experiment, space, objectives, cases, space.untuned(experiment))
        own = f"{experiment.name}-{Path(name.partition('.py')[0]).name}"
        folder = TuneFolder.open(out_dir or Path("out") / f"{own}-tune")
        found = TuneStudy.open(
            storage or folder.url, study or own, space, [one.better for one in objectives], plan.manifest, plan.untuned, experiment.seed
        )
        _tune(plan, found, trials, pool, folder, quiet)


def _tune(plan: TunePlan, study: TuneStudy, trials: int, pool: TaskPool, folder: TuneFolder, quiet: bool) -> None:
    if plan.space.left and not quiet:
        _say([f"left as they are: {', '.join(plan.space.left)}, which have no range"])
    missing = max(0, trials - study.counts.over)
    try:
        with closing(pool):
            with progress(study.name, missing, "trials", quiet) as ended:
                Tuning(plan, study, trials, ended).run(pool)
            _check_any(study)
            chosen = candidates(plan, study)
            with progress("judging", (1 + len(chosen)) * len(plan.cases.judging) if chosen else 0, "runs", quiet) as ended:
                judgements = judge(plan, chosen, pool, ended) if chosen else []
    except KeyboardInterrupt:
        _say([*lines_of(plan, study), f"{study.counts.over:,} of {trials:,} trials: the same command goes on"])
        raise typer.Exit(130) from None
    written = folder.write(plan, study, judgements)
    if not quiet:
        if judgements:
            out.print(judged_table(plan, judgements, plan.experiment.name))
        for line in (best_line(plan, judgements), *lines_of(plan, study), *(f"policy   {path}" for path in written)):
            out.print(line, highlight=False, soft_wrap=True, markup=False)


def _check_any(study: TuneStudy) -> None:
    if not study.counts.complete:
        why = f"; the last: {study.failure}" if study.failure else ""
        raise UsageError(f"no trial came to its end: {study.counts.failed:,} failed{why}")


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        err.print(line, highlight=False, soft_wrap=True, markup=False)
