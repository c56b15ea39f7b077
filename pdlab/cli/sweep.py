"""`pdlab sweep`: every point of a grid, simulated with several seeds on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich import progress as bars

from pdlab.cli.shared import HardwareFile, Overrides, Traceback, err, out, traced
from pdlab.core.extras import RAY, lacks
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.search.grid import Grid
from pdlab.search.pool import ProcessPool, TaskPool, usable_cores
from pdlab.search.sweep import MOST_RUNS, Sweep, plan_sweep, run_sweep
from pdlab.search.sweep_page import sweep_page, warnings
from pdlab.search.sweep_store import PAGE, TABLE, SweepStore
from pdlab.search.sweep_table import sweep_table


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment file.", show_default=False)],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY.PATH=V,V,...", help="An axis: a key and its values, in YAML.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Of each point: the file's seed, and those after it.")] = 5,
    set_: Overrides = None,
    hardware_file: HardwareFile = None,
    jobs: Annotated[int | None, typer.Option("--jobs", help="Processes.", show_default="one for each core")] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="On a Ray cluster: its address, auto, or local.", show_default=False),
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME-sweep")] = None,
    force: Annotated[bool, typer.Option("--force", help=f"More than {MOST_RUNS:,} runs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    traceback: Traceback = False,
) -> None:
    """Simulate every point of a grid with several seeds: one table, one page. A second start computes what is missing."""
    with traced(traceback):
        if jobs is not None and jobs < 1:
            raise UsageError(f"--jobs {jobs}: it takes a process at least; write --jobs 1 or more")
        axes = Grid.read(grid or ())
        base = Experiment.load(file, list(set_ or ()), hardware_file)
        planned = plan_sweep(base, axes, seeds, most=None if force else MOST_RUNS)
        pool = ProcessPool(jobs or usable_cores()) if ray is None else _ray_pool(ray, jobs)
        _sweep(base, planned, pool, out_dir or Path("out") / f"{base.name}-sweep", quiet)


def _ray_pool(address: str, jobs: int | None) -> TaskPool:
    try:
        module = import_module("pdlab.search.ray_pool")
    except ImportError as error:
        raise lacks("pdlab sweep --ray", error, RAY) from None
    pool: TaskPool = module.RayPool(address, jobs)
    return pool


def _sweep(base: Experiment, planned: Sweep, pool: TaskPool, folder: Path, quiet: bool) -> None:
    store = SweepStore.open(folder, base.resolved(), {axis.key: axis.values for axis in planned.grid.axes}, planned.seeds)
    interrupted = False
    try:
        with closing(pool), _progress(base.name, len(planned.missing(store)), quiet) as ended:
            run_sweep(planned, store, pool, ended)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        store.close()
    _show(base, planned, store, quiet)
    if interrupted:
        raise typer.Exit(130)
    if planned.failures:
        raise typer.Exit(1)


def _show(base: Experiment, planned: Sweep, store: SweepStore, quiet: bool) -> None:
    """The table and the page of what there is, also after Ctrl-C."""
    outcomes = planned.outcomes(store)
    done = sum(len(outcome.done) for outcome in outcomes)
    for line in warnings(planned, done):
        err.print(line, highlight=False, soft_wrap=True, markup=False)
    if not done:
        return
    store.write_table(planned.rows(store))
    store.write_page(sweep_page(planned, outcomes, base))
    if not quiet:
        out.print(sweep_table(planned, outcomes, base.name))
        for line in (f"picture  {store.folder / PAGE}", f"table    {store.folder / TABLE}: {done:,} runs"):
            out.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _progress(name: str, runs: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """One bar for all on stderr. Nothing where nobody looks."""
    if quiet or not err.is_terminal:
        yield lambda: None
        return
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("runs"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(name, total=runs)
        yield lambda: bar.advance(task)
