"""What commands that run many simulations have in common: where these run, and the bar that shows how many have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from rich import progress as bars

from pdlab.cli.shared import err
from pdlab.core.extras import lacks
from pdlab.search.pool import ProcessPool, TaskPool, check_jobs, usable_cores


def pool_of(command: str, jobs: int | None, ray: str | None) -> TaskPool:
    """Raises UsageError."""
    if jobs is not None:
        check_jobs(jobs)
    if ray is None:
        return ProcessPool(jobs or usable_cores())
    try:
        module = import_module("pdlab.search.ray_pool")
    except ImportError as error:
        raise lacks(f"pdlab {command} --ray", error) from None
    pool: TaskPool = module.RayPool(ray, jobs)
    return pool


@contextmanager
def progress(name: str, total: int, of: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """One bar for all on stderr. Nothing where nobody looks."""
    if quiet or not err.is_terminal:
        yield lambda: None
        return
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(of),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
