"""`pdlab sweep`: every point of a grid, simulated with several seeds on all cores."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pdlab.cli.pools import pool_of, progress
from pdlab.cli.shared import HardwareFile, Jobs, Overrides, RayAddress, Traceback, err, out, traced
from pdlab.experiment.experiment import Experiment
from pdlab.search.grid import Grid
from pdlab.search.pool import TaskPool
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
    jobs: Jobs = None,
    ray: RayAddress = None,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME-sweep")] = None,
    force: Annotated[bool, typer.Option("--force", help=f"More than {MOST_RUNS:,} runs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    traceback: Traceback = False,
) -> None:
    """Simulate every point of a grid with several seeds: one table, one page. A second start computes what is missing."""
    with traced(traceback):
        pool = pool_of("sweep", jobs, ray)
        axes = Grid.read(grid or ())
        base = Experiment.load(file, list(set_ or ()), hardware_file)
        planned = plan_sweep(base, axes, seeds, most=None if force else MOST_RUNS)
        _sweep(base, planned, pool, out_dir or Path("out") / f"{base.name}-sweep", quiet)


def _sweep(base: Experiment, planned: Sweep, pool: TaskPool, folder: Path, quiet: bool) -> None:
    store = SweepStore.open(folder, base.resolved(), {axis.key: axis.values for axis in planned.grid.axes}, planned.seeds)
    interrupted = False
    try:
        with closing(pool), progress(base.name, len(planned.missing(store)), "runs", quiet) as ended:
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
