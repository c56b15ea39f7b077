"""`pdlab plan`: which deployment carries the most, the cheapest, or a given rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import progress as bars

from pdlab.cli.pools import pool_of
from pdlab.cli.shared import Jobs, Overrides, RayAddress, Traceback, err, out, traced
from pdlab.experiment.experiment import Experiment
from pdlab.search.plan import Objective, Plan, PlanQuestion
from pdlab.search.plan_commands import pdlab_arguments, router_arguments, started, vllm_command
from pdlab.search.plan_files import write_plan
from pdlab.search.plan_rows import PlanRow, rows
from pdlab.search.plan_store import BEST, COMMANDS, PAGE, PlanStore
from pdlab.search.plan_table import plan_table
from pdlab.search.pool import TaskPool


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment file.", show_default=False)],
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", metavar="N", help="Accelerators that there are; of several types h100-sxm=8,l40s=4.", show_default=False),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="R", help="Requests/s wanted: with how few accelerators?", show_default=False)
    ] = None,
    budget: Annotated[float | None, typer.Option("--budget", metavar="$/H", help="Dollars an hour.", show_default=False)] = None,
    objective: Annotated[
        Objective, typer.Option("--objective", help="The most requests/s: in all, for each accelerator, or for each $ an hour.")
    ] = "rate",
    failures: Annotated[int, typer.Option("--failures", metavar="0|1", help="1: with an instance of the worst role away.")] = 0,
    seeds: Annotated[int, typer.Option("--seeds", help="Of the finalists' capacities.")] = 5,
    requests: Annotated[
        int | None, typer.Option("--requests", help="Of a simulation.", show_default="the file's, or 30 s at capacity")
    ] = None,
    set_: Overrides = None,
    jobs: Jobs = None,
    ray: RayAddress = None,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME-plan")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    traceback: Traceback = False,
) -> None:
    """Mixed, or prefill and decode apart? How many of each, how large? Ranks deployments by the rate they carry, and says what to run."""
    with traced(traceback):
        pool = pool_of("plan", jobs, ray)
        question = PlanQuestion(gpus, rate, budget, objective, failures, seeds, requests)
        base = Experiment.load(file, list(set_ or ()))
        _plan(Plan(base, question), pool, out_dir or Path("out") / f"{base.name}-plan", quiet)


def _plan(planned: Plan, pool: TaskPool, folder: Path, quiet: bool) -> None:
    store = PlanStore.open(folder, planned.base.resolved())
    interrupted = False
    try:
        with closing(pool), _progress(planned, quiet) as ended:
            planned.run(pool, store, ended)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        store.close()
    found = rows(planned) if planned.begun else []
    if found:
        _show(planned, found, store, quiet)
    if interrupted:
        done = f"interrupted: {len(store.figures):,} simulations are kept, and the same command goes on"
        err.print(done if found else f"{done}; no capacity is known yet", highlight=False, soft_wrap=True)
        raise typer.Exit(130)


def _show(planned: Plan, found: list[PlanRow], store: PlanStore, quiet: bool) -> None:
    """The table, the page, and what to run."""
    best = write_plan(planned, found, store)
    if quiet:
        return
    out.print(plan_table(planned, found))
    lines = _what_to_run(best, store)
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _what_to_run(best: Experiment, store: PlanStore) -> list[str]:
    """One command of each role; the file has all."""
    instances = {one.placement.role: one for one in reversed(started(best))}
    lines = [
        f"page     {store.folder / PAGE}",
        f"file     {store.folder / BEST}: pdlab sim {store.folder / BEST}",
        f"commands {store.folder / COMMANDS}, such as",
    ]
    for one in instances.values():
        lines += [f"  {vllm_command(best, one)}", f"  pdlab {' '.join(pdlab_arguments(best, one, BEST, native=False))}"]
    return [*lines, f"  pdlab {' '.join(router_arguments(BEST))}"]


@contextmanager
def _progress(planned: Plan, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for each round of simulations. Nothing where nobody looks."""
    if quiet or not err.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[whole]:,} simulations"),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(planned.base.name, total=None, whole=0)

        def ended(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=planned.search.phase, whole=planned.judge.simulated)

        yield ended
