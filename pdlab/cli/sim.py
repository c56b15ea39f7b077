"""`pdlab sim`: experiments, simulated."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import progress as bars
from rich.markup import escape

from pdlab.cli.results import check_writable, show
from pdlab.cli.shared import HardwareFile, Overrides, Traceback, err, out, traced
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.replay.log import cut_to_lines
from pdlab.report.result import Result
from pdlab.report.tables import comparison, summary_table
from pdlab.sim import simulate

Progress = Callable[[float, int, int], None]
LEAST_LOG_BYTES = 1 << 12  # that are kept of an event log for whose results a disk has no room


def sim(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Experiment files; several are compared.", show_default=False)],
    set_: Overrides = None,
    hardware_file: HardwareFile = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.", show_default=False)] = None,
    requests: Annotated[int | None, typer.Option(help="Short for --set workload.requests=N.", show_default=False)] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME")] = None,
    trace_events: Annotated[bool, typer.Option("--trace-events", help="Keep the event log, and a Perfetto trace.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, not as a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json).")] = False,
    traceback: Traceback = False,
) -> None:
    """Simulate experiments: progress, one table each, a comparison of several; results in DIR."""
    with traced(traceback):
        _sim(files, list(set_ or ()), hardware_file, seed, requests, out_dir, trace_events, as_json, quiet)


def _sim(
    files: list[Path],
    overrides: list[str],
    hardware_file: Path | None,
    seed: int | None,
    requests: int | None,
    out_dir: Path | None,
    trace_events: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    if seed is not None:
        overrides.append(f"seed={seed}")
    if requests is not None:
        overrides.append(f"workload.requests={requests}")
    experiments = _load(files, overrides, hardware_file)
    if not quiet:
        for line in dict.fromkeys(experiment.ignored for experiment in experiments):
            if line:
                err.print(line, highlight=False, soft_wrap=True, markup=False)
    directories = _directories(experiments, out_dir)
    for directory in directories:
        check_writable(directory)
    results: list[tuple[str, Result]] = []
    for experiment, directory in zip(experiments, directories, strict=True):
        try:
            result = _simulate(experiment, directory, trace_events, quiet)
        except KeyboardInterrupt:
            err.print(f"interrupted: nothing of {experiment.name} was kept")
            raise typer.Exit(130) from None
        except _Unsaved as unsaved:
            _tell(unsaved.result, as_json, quiet)
            raise
        results.append((directory.name, result))
        if not (quiet or as_json):
            show(result, directory)
        if result.summary["partial"]:
            break
    if as_json:
        summaries = [result.summary for _, result in results]
        print(json.dumps(summaries[0] if len(files) == 1 else summaries, indent=2))
    elif len(results) > 1 and not quiet:
        out.print(comparison([(name, result.summary) for name, result in results]))
    if any(result.summary["partial"] for _, result in results):
        err.print("interrupted: these results are partial, and marked so")
        raise typer.Exit(130)


def _load(files: Sequence[Path], overrides: Sequence[str], hardware_file: Path | None) -> list[Experiment]:
    """All files, before any is run. Raises UsageError with the mistakes of all."""
    found, wrong = [], []
    for file in files:
        try:
            found.append(Experiment.load(file, overrides, hardware_file))
        except UsageError as error:
            wrong.append(error)
    if wrong:
        raise UsageError("\n".join(dict.fromkeys(line for error in wrong for line in str(error).splitlines()))) from wrong[0].__cause__
    return found


def _directories(experiments: Sequence[Experiment], given: Path | None) -> list[Path]:
    """Where each one's results go: DIR itself for one, DIR/NAME for several; a name that is there twice gets a number."""
    if given is not None and len(experiments) == 1:
        return [given]
    names: list[str] = []
    for experiment in experiments:
        name, number = experiment.name, 2
        while name in names:
            name, number = f"{experiment.name}-{number}", number + 1
        names.append(name)
    return [(given or Path("out")) / name for name in names]


def _simulate(experiment: Experiment, directory: Path, trace_events: bool, quiet: bool) -> Result:
    """Run one, and keep its files: all of them or, on a UsageError, none."""
    log = directory.parent / f".{directory.name}.events.jsonl.partial-{os.getpid()}"  # another run may go to the same folder
    if trace_events:
        _make_folder(directory.parent)
    try:
        with _progress(experiment.name, quiet) as progress:
            result = simulate(experiment, progress=progress, trace_events=log if trace_events else None)
        try:
            if not trace_events:
                result.save(directory)
                return result
            cut = _save_beside(log, result, directory)
            log.replace(directory / "events.jsonl")
        except UsageError as error:
            raise _Unsaved(str(error), result) from None
        stopped = next((line for line in result.summary["warnings"] if line.startswith("the event log stopped")), "")
        if stopped or cut:
            stopped = stopped or "the event log's end had to give way to the results (No space left on device)"
            err.print(f"{directory / 'events.jsonl'}: {stopped}", highlight=False, soft_wrap=True, markup=False)
    except OSError as error:
        raise UsageError(f"{directory}: cannot write there ({error.strerror}); give another directory with --out") from None
    finally:
        if trace_events:
            log.unlink(missing_ok=True)
    return result


class _Unsaved(UsageError):
    """A run is over, and its files cannot be written."""

    def __init__(self, line: str, result: Result) -> None:
        super().__init__(line)
        self.result = result


def _tell(result: Result, as_json: bool, quiet: bool) -> None:
    """The summary, which is all that is left of a run whose files have no place."""
    if as_json:
        print(json.dumps(result.summary, indent=2))
    elif not quiet:
        out.print(summary_table(result.summary, result.name))


def _save_beside(log: Path, result: Result, directory: Path) -> bool:
    """Save a result where its event log lies already. On a disk without room for both the log's end gives way: True."""
    cut = False
    while True:
        try:
            result.save(directory)
            return cut
        except UsageError as error:
            size = log.stat().st_size
            if os.strerror(errno.ENOSPC) not in str(error) or size < LEAST_LOG_BYTES:
                raise
            cut_to_lines(log, size // 2)
            cut = True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}); give another directory with --out") from None


@contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr: simulated time, requests, requests a second. Nothing where nobody looks."""
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("requests  {task.fields[speed]}  simulated {task.fields[now]}"),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(escape(name), total=None, speed="", now="0 s")

        def update(now_s: float, ended: int, total: int) -> None:
            elapsed_s = bar.tasks[0].elapsed or 0.0
            speed = f"{ended / elapsed_s:,.0f}/s" if elapsed_s > 0.0 else ""
            bar.update(task, completed=ended, total=total, now=f"{now_s:,.0f} s", speed=speed)

        yield update
