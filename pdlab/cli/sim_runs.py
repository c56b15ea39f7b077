"""What `pdlab sim` does: the experiments of several files, simulated, shown and kept."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich import progress as bars
from rich.markup import escape

from pdlab.cli.pools import pool_of, progress
from pdlab.cli.results import check_writable, free_folder, show
from pdlab.cli.shared import err, out
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.replay.log import cut_to_lines
from pdlab.report.result import REPORT, Result
from pdlab.report.seeded import SeededRuns, comparison
from pdlab.report.tables import definitions, summary_table
from pdlab.results.run import SUMMARY
from pdlab.search.pool import TaskPool
from pdlab.search.replicate import Replicated, ThisProcess, replicate
from pdlab.sim import simulate

Progress = Callable[[float, int, int], None]
LEAST_LOG_BYTES = 1 << 12  # that are kept of an event log for whose results a disk has no room


@dataclass(frozen=True, slots=True)
class Shown:
    """What is printed of results."""

    as_json: bool
    quiet: bool
    explain: bool

    @property
    def tables(self) -> bool:
        return not (self.as_json or self.quiet)


def run(
    files: Sequence[Path],
    overrides: Sequence[str],
    hardware_file: Path | None,
    seeds: int,
    jobs: int | None,
    baseline: str | None,
    out_dir: Path | None,
    shown: Shown,
    *,
    force: bool,
    trace_events: bool,
    trim: bool,
    here: bool,
) -> None:
    """As `pdlab sim` says of its options; `here`: in this process. Raises UsageError."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: it takes a process at least; write --jobs 1 or more")
    experiments = _load(files, overrides, hardware_file)
    numbers = _seeds(experiments, seeds, trace_events)
    _doubts(experiments, numbers, shown.quiet)
    names = _names(experiments)
    _check_baseline(baseline, names)
    directories = _directories(experiments, names, out_dir, force, numbers)
    for directory in directories:
        check_writable(directory)
    trim = trim and len(experiments) == 1  # several are compared over the same requests
    if trace_events or len(experiments) * seeds == 1:
        named = {name: (experiment, directory) for name, experiment, directory in zip(names, experiments, directories, strict=True)}
        _one_by_one(named, trace_events, trim, shown, baseline)
    else:
        pool = ThisProcess() if jobs == 1 or here else pool_of("sim", jobs, None)
        many = [Replicated(*one) for one in zip(names, experiments, directories, strict=True)]
        _over_a_pool(many, numbers, pool, trim, shown, baseline)


def _seeds(experiments: Sequence[Experiment], seeds: int, trace_events: bool) -> tuple[int, ...] | None:
    """The seeds of all; None: each has its own. Raises UsageError."""
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: a figure needs a seed at least; write --seeds 1 or more")
    if seeds > 1 and trace_events:
        raise UsageError(f"--seeds {seeds} with --trace-events: an event log is of one run; leave one of them out")
    return None if seeds == 1 else tuple(range(experiments[0].seed, experiments[0].seed + seeds))


def _doubts(experiments: Sequence[Experiment], seeds: tuple[int, ...] | None, quiet: bool) -> None:
    """What a reader should know before anything runs."""
    said = [line for experiment in experiments for line in (experiment.ignored, *experiment.doubts) if line]
    if seeds is not None and len({experiment.seed for experiment in experiments}) > 1:
        said.append(f"seeds {seeds[0]} to {seeds[-1]} for all files, so that they have the same arrivals; their own differ")
    if len({experiment.workload.model_dump_json() for experiment in experiments}) > 1:
        said.append("the files' workloads differ: what is compared are not the same requests")
    if not quiet:
        for line in dict.fromkeys(said):
            err.print(line, highlight=False, soft_wrap=True, markup=False)


def _check_baseline(baseline: str | None, names: Sequence[str]) -> None:
    """Raises UsageError."""
    if baseline is not None and len(names) < 2:
        raise UsageError(f"--baseline {baseline}: one file has nothing to be compared with; give several")
    if baseline is not None and baseline not in names:
        raise UsageError(f"--baseline {baseline}: it is none of {', '.join(names)}")


def _names(experiments: Sequence[Experiment]) -> list[str]:
    """How a comparison calls them: a name that is there twice gets a number."""
    names: list[str] = []
    for experiment in experiments:
        name, number = experiment.name, 2
        while name in names:
            name, number = f"{experiment.name}-{number}", number + 1
        names.append(name)
    return names


def _one_by_one(named: Mapping[str, tuple[Experiment, Path]], trace_events: bool, trim: bool, shown: Shown, baseline: str | None) -> None:
    """In this process, each with its bar."""
    results: list[tuple[str, Result]] = []
    for name, (experiment, directory) in named.items():
        try:
            result = _simulate(experiment, directory, trace_events, trim, shown.quiet)
        except KeyboardInterrupt:
            err.print(f"interrupted: nothing of {experiment.name} was kept")
            raise typer.Exit(130) from None
        except _Unsaved as unsaved:
            _tell(unsaved.result, shown)
            raise
        results.append((name, result))
        if shown.tables:
            show(result, directory, explain=shown.explain)
        if result.summary["partial"]:
            break
    if shown.as_json:
        summaries = [result.summary for _, result in results]
        print(json.dumps(summaries[0] if len(named) == 1 else summaries, indent=2))
    elif len(results) > 1 and not shown.quiet:
        out.print(comparison(SeededRuns.of([(name, result.summary) for name, result in results]), baseline))
    if any(result.summary["partial"] for _, result in results):
        err.print("interrupted: these results are partial, and marked so")
        raise typer.Exit(130)


def _over_a_pool(
    many: list[Replicated], seeds: tuple[int, ...] | None, pool: TaskPool, trim: bool, shown: Shown, baseline: str | None
) -> None:
    """On all cores, with one bar for all."""
    runs, interrupted = len(many) * len(seeds or (0,)), False
    name = many[0].name if len(many) == 1 else f"{len(many)} experiments"
    try:
        with closing(pool), progress(name, runs, "runs", shown.quiet) as ended:
            replicate(many, seeds, pool, trim=trim, ended=ended)
    except KeyboardInterrupt:
        interrupted = True
    done = [one for one in many if one.by_seed]
    if seeds is not None:
        for one in done:
            if one.directory.is_dir():
                one.write_seeds()
    _show_many(many, done, seeds, shown, baseline)
    partial = any(figures.get("partial") for one in many for figures in one.by_seed.values())
    if interrupted or partial:
        ended_runs = sum(len(one.by_seed) for one in many)
        kept = "what they gave is kept" + (", and what is partial is marked so" if partial else "")
        err.print(f"interrupted: {ended_runs} of {runs} runs have ended; {kept}")
        raise typer.Exit(130)
    wrong = [f"{one.name}: {reason}" for one in many for reason in (*dict.fromkeys(one.failures.values()), one.unsaved) if reason]
    if wrong:
        raise UsageError("\n".join(wrong))


def _show_many(
    many: Sequence[Replicated], done: Sequence[Replicated], seeds: tuple[int, ...] | None, shown: Shown, baseline: str | None
) -> None:
    """A table each where there is one seed, then all of them side by side, and where the files are."""
    if shown.as_json:
        print(json.dumps([_plain(one, seeds) for one in done], indent=2))
        return
    if shown.quiet or not done:
        return
    if seeds is None:
        for one in done:
            summary = json.loads((one.directory / SUMMARY).read_text(encoding="utf-8"))
            out.print(summary_table(summary, one.name, explain=shown.explain))
            _say_files(one.directory)
    if len(done) > 1 or seeds is not None:
        known = baseline if baseline in [one.name for one in done] else None
        out.print(comparison([one.runs for one in done], known, ", ".join(one.name for one in done) if len(done) == 1 else "comparison"))
    if shown.explain and seeds is not None:
        out.print(definitions())
    if seeds is not None:
        for one in done:
            _say_files(one.directory, f" (seed {seeds[0]})")


def _say_files(directory: Path, of: str = "") -> None:
    if directory.is_dir():
        others = sorted(file.name for file in directory.iterdir() if file.name != REPORT and not file.name.startswith("."))
        for line in (f"picture  {directory / REPORT}{of}", f"files    {directory}: {', '.join(others)}"):
            out.print(line, highlight=False, soft_wrap=True, markup=False)


def _plain(one: Replicated, seeds: tuple[int, ...] | None) -> dict[str, Any]:
    """Of one seed its summary; of several each figure's mean and half its interval, and what each seed has."""
    if seeds is None:
        found: dict[str, Any] = json.loads((one.directory / SUMMARY).read_text(encoding="utf-8"))
        return found
    runs = one.runs
    paths = dict.fromkeys(path for figures in runs.by_seed.values() for path in figures)
    means = {path: {"mean": mean.mean, "half": mean.half} for path in paths if (mean := runs.figure(path)) is not None}
    return {"name": one.name, "figures": means, "by_seed": {str(seed): dict(figures) for seed, figures in runs.by_seed.items()}}


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


def _directories(
    experiments: Sequence[Experiment], names: Sequence[str], given: Path | None, force: bool, seeds: tuple[int, ...] | None
) -> list[Path]:
    """Where each one's results go: DIR itself for one, DIR/NAME for several; beside it where another experiment's are there."""
    found: list[Path] = []
    for name, experiment in zip(names, experiments, strict=True):
        wanted = given if given is not None and len(experiments) == 1 else (given or Path("out")) / name
        first = experiment if seeds is None else experiment.model_copy(update={"seed": seeds[0]})
        found.append(free_folder(wanted, first.resolved(), force, found))
    return found


def _simulate(experiment: Experiment, directory: Path, trace_events: bool, trim: bool, quiet: bool) -> Result:
    """Run one, and keep its files: all of them or, on a UsageError, none."""
    log = directory.parent / f".{directory.name}.events.jsonl.partial-{os.getpid()}"  # another run may go to the same folder
    if trace_events:
        _make_folder(directory.parent)
    try:
        with _bar(experiment.name, quiet) as progress:
            result = simulate(experiment, progress=progress, trace_events=log if trace_events else None, trim=trim)
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


def _tell(result: Result, shown: Shown) -> None:
    """The summary, which is all that is left of a run whose files have no place."""
    if shown.as_json:
        print(json.dumps(result.summary, indent=2))
    elif not shown.quiet:
        out.print(summary_table(result.summary, result.name, explain=shown.explain))


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
def _bar(name: str, quiet: bool) -> Iterator[Progress | None]:
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
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(escape(name), total=None, speed="", now="0 s")

        def update(now_s: float, ended: int, total: int) -> None:
            elapsed_s = bar.tasks[0].elapsed or 0.0
            speed = f"{ended / elapsed_s:,.0f}/s" if elapsed_s > 0.0 else ""
            bar.update(task, completed=ended, total=total, now=f"{now_s:,.0f} s", speed=speed)

        yield update
