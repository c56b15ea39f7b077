"""`pdlab trace`: look at a workload, convert one to pdlab's own format, make one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pdlab.core.types import UsageError
from pdlab.experiment.mistakes import mistakes
from pdlab.experiment.yaml import read_yaml
from pdlab.report.workload import overview
from pdlab.results.units import MISSING, number, percent
from pdlab.workload import builtin
from pdlab.workload.base import Workload
from pdlab.workload.columns import Wanted, parse_columns
from pdlab.workload.readers import FORMATS, load
from pdlab.workload.spec import WorkloadSpec, build
from pdlab.workload.stats import stats as figures_of
from pdlab.workload.text import Progress as Report
from pdlab.workload.times import PER_S
from pdlab.workload.writer import check_writable, write

app = typer.Typer(
    help="Look at a workload, convert one, or make one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Format = Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}; auto looks at the first line.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns", metavar="ROLE=NAME,...", help="What a file's columns are: arrival_s=ts,prompt_tokens=in.", show_default=False
    ),
]
TimeUnit = Annotated[str | None, typer.Option("--time-unit", metavar="UNIT", help="Of its times: s, ms, us, ns.", show_default=False)]
HashTokens = Annotated[int | None, typer.Option("--hash-tokens", min=1, help="Tokens behind an id of a prefix.", show_default=False)]
Requests = Annotated[int | None, typer.Option("--requests", min=1, help="Only so many, from the beginning.", show_default=False)]
Rate = Annotated[float | None, typer.Option("--rate", help="Stretch the times to so many requests/s.", show_default=False)]
_PLOTS = (".png", ".svg", ".pdf")


@app.command()
def stats(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A trace file, or a built-in's name.", show_default=False)],
    requests: Requests = None,
    format: Format = "auto",
    columns: Columns = None,
    time_unit: TimeUnit = None,
    hash_tokens: HashTokens = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg or .pdf.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Rate, burstiness, lengths and prefix reuse of a workload."""
    if plot is not None and plot.suffix not in _PLOTS:
        raise UsageError(f"--plot {plot}: the suffix says what to draw: {', '.join(_PLOTS)}")
    workload = _found(source, format, requests, _wanted(columns, time_unit, hash_tokens))
    figures = figures_of(workload)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        Console().print(_table(figures))
        if workload.reading:
            print(f"read as {workload.reading}")
    if plot is not None:
        _draw(workload, plot)


@app.command()
def convert(
    trace: Annotated[Path, typer.Argument(metavar="IN", help="A trace file.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".csv or .jsonl, and .gz or .zst after it.", show_default=False)],
    format: Format = "auto",
    columns: Columns = None,
    time_unit: TimeUnit = None,
    hash_tokens: HashTokens = None,
    requests: Requests = None,
    rate: Rate = None,
) -> None:
    """Write a trace in pdlab's own format."""
    check_writable(out)
    workload = _loaded(trace, format, requests, _wanted(columns, time_unit, hash_tokens))
    if rate is not None:
        workload = _rescaled(workload, rate)
    _keep(workload, out)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".csv or .jsonl, and .gz or .zst after it.", show_default=False)],
    source: Annotated[str | None, typer.Option("--source", metavar="NAME", help="A built-in's name.", show_default=False)] = None,
    spec: Annotated[
        str | None,
        typer.Option("--spec", metavar="YAML", help="An experiment's workload: a file, or '{source: synthetic, ...}'.", show_default=False),
    ] = None,
    requests: Requests = None,
    rate: Rate = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds make equal files.")] = 0,
) -> None:
    """Make a workload as an experiment would, and write it."""
    check_writable(out)
    if (source is None) == (spec is None):
        raise UsageError(f"give either --source ({', '.join(builtin.NAMES)}) or --spec")
    mapping, base_dir = ({"source": source}, Path()) if spec is None else _spec_of(spec)
    mapping |= {key: value for key, value in (("requests", requests), ("rate", rate)) if value is not None}
    _keep(build(_checked(mapping), seed, base_dir), out)


def _wanted(columns: list[str] | None, time_unit: str | None, hash_tokens: int | None) -> Wanted:
    if time_unit is not None and time_unit not in PER_S:
        raise UsageError(f"--time-unit {time_unit}: must be one of {', '.join(PER_S)}")
    return Wanted(parse_columns(columns or ()), time_unit, hash_tokens)


def _found(source: str, format: str, requests: int | None, wanted: Wanted) -> Workload:
    """A file's, or a built-in's by name."""
    if source in builtin.NAMES and not Path(source).exists():
        if wanted != Wanted():
            raise UsageError(f"--columns, --time-unit, --hash-tokens are of a trace file, which {source} is not")
        return build(_checked({"source": source, "requests": requests}), 0, Path())
    if not Path(source).exists() and not Path(source).suffix:
        raise UsageError(builtin.unknown(source))
    return _loaded(Path(source), format, requests, wanted)


def _loaded(path: Path, format: str, requests: int | None, wanted: Wanted) -> Workload:
    with _progress(path.name) as progress:
        return load(path, format=format, requests=requests, wanted=wanted, progress=progress)


def _rescaled(workload: Workload, rate: float) -> Workload:
    if not 0 < rate < float("inf"):
        raise UsageError(f"--rate {rate:g}: must be above 0, in requests/s")
    if len(workload.opening_s) > 1 and not workload.rate_rps > 0:
        raise UsageError(f"--rate {rate:g}: {workload.name} has no times to stretch (closed loop, or all requests at once)")
    return workload.rescaled(rate)


def _spec_of(text: str) -> tuple[dict[str, Any], Path]:
    """A mapping given in a file or inline, and what its paths are relative to. An experiment file's `workload` is taken."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        mapping = read_yaml(path)
        inner = mapping.get("workload", mapping)
        if not isinstance(inner, dict):
            raise UsageError(f"{path}: workload: must be a mapping, not {inner!r}")
        return dict(inner), path.parent
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--spec {text}: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise UsageError(
            f"--spec {text}: neither a .yaml file nor a mapping such as {{source: synthetic, rate: 8, prompt: 1024, output: 128}}"
        )
    return mapping, Path()


def _checked(mapping: dict[str, Any]) -> WorkloadSpec:
    try:
        return WorkloadSpec.model_validate(mapping)
    except ValidationError as error:
        raise UsageError("\n".join(mistakes(error, WorkloadSpec))) from None


def _keep(workload: Workload, out: Path) -> None:
    write(workload, out)
    rate = f" at {number(workload.rate_rps)} requests/s" if workload.rate_rps > 0 else ""
    print(f"{out}: {len(workload):,} requests{rate}")
    for note in (*([f"read as {workload.reading}"] if workload.reading else ()), *workload.notes):
        print(f"  {note}")


@contextmanager
def _progress(name: str) -> Iterator[Report | None]:
    """A bar on stderr, of the file's bytes. Nothing where nobody looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(name), total=None)
        yield lambda read, total: bar.update(task, completed=read, total=total)


def _draw(workload: Workload, plot: Path) -> None:

    partial = plot.with_name(f".{plot.name}.partial")
    try:
        overview(workload).savefig(partial, format=plot.suffix[1:], dpi=130)
        partial.replace(plot)
    except OSError as error:
        raise UsageError(f"--plot {plot}: cannot write there ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def _table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"{escape(figures['name'])}: {figures['requests']:,} requests", title_justify="left", title_style="bold", box=None)
    for column in ("", "mean", "p50", "p90", "p99", "max", "cv"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True, header_style="bold")
    for name, key in (("prompt tokens", "prompt_tokens"), ("output tokens", "output_tokens")):
        values = figures[key]
        table.add_row(
            name, *(number(float(round(values[column]))) for column in ("mean", "p50", "p90", "p99", "max")), f"{values['cv']:.2f}"
        )
    for name, value in _lines(figures):
        table.add_row(name, value)
    table.caption = "\n".join(escape(note) for note in figures["notes"])
    table.caption_justify = "left"
    return table


def _lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of the figures that are one number each."""
    yield "rank correlation", MISSING if figures["rank_correlation"] is None else f"{figures['rank_correlation']:.3f}"
    if figures["concurrency"] is not None:
        yield "closed loop, at once", number(figures["concurrency"])
    if figures["sessions"] is not None:
        yield "sessions", number(figures["sessions"])
    if (arrivals := figures["arrivals"]) is not None:
        yield "span, s", number(arrivals["span_s"])
        yield "requests/s", number(arrivals["rate_rps"])
        yield "  in the fullest minute", number(arrivals["peak_minute_rps"])
        yield "gaps' cv", number(arrivals["interarrival_cv"])
        yield "dispersion at 1 s", number(arrivals["dispersion_1s"])
        yield "dispersion at 10 s", number(arrivals["dispersion_10s"])
    if (prefix := figures["prefix"]) is not None:
        yield "prefix hits, tokens", percent(prefix["token_hit_ratio"])
        yield f"  units of {prefix['hash_tokens']} tokens", percent(prefix["unit_hit_ratio"])
        for units, ratio in prefix["lru_hit_ratio"].items():
            yield f"  LRU of {int(units):,} units", percent(ratio)
