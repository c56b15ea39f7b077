"""`pdlab bench`: an experiment's workload against a server that is running."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress as bars
from rich.markup import escape

from pdlab.cli.results import check_writable, free_folder, show
from pdlab.cli.shared import Force, HardwareFile, Overrides, err
from pdlab.experiment.experiment import Trial
from pdlab.proof.bench.run import Progress, Target, measure
from pdlab.real.net.credentials import from_file
from pdlab.real.net.tls import CA_CERTS, Tls
from pdlab.results.units import percent, seconds


def bench(
    file: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The file that pdlab sim reads.", show_default=False)],
    url: Annotated[str, typer.Option(help="Any server with OpenAI's /v1/completions that takes token ids.")] = "http://127.0.0.1:8000",
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME-real")] = None,
    force: Force = False,
    set_: Overrides = None,
    hardware_file: HardwareFile = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.", show_default=False)] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Short for --set workload.requests=N.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The name it is served under.", show_default="the server's first")] = None,
    vocab: Annotated[int | None, typer.Option(min=8, help="Token ids are below this.", show_default="30000, or what it says")] = None,
    salt: Annotated[int, typer.Option(min=0, help="Another one, other token ids: a repeat finds a cold cache.")] = 0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PDLAB_API_KEY", callback=from_file("PDLAB_API_KEY"), help="Sent with every request.", show_default=False),
    ] = None,
    ca_certs: Annotated[
        str, typer.Option("--ssl-ca-certs", envvar=CA_CERTS, help="PEM; whom to believe.", show_default="the system's")
    ] = "",
    raw: Annotated[Path | None, typer.Option(help="File for the times of all chunks, a JSON line a request.", show_default=False)] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what the words of the table mean.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, not as a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json).")] = False,
) -> None:
    """Measure a running server with an experiment's workload: same arrivals, lengths and shared prefixes as pdlab sim, same files."""
    overrides = list(set_ or ())
    if seed is not None:
        overrides.append(f"seed={seed}")
    if requests is not None:
        overrides.append(f"workload.requests={requests}")
    experiment = Trial.load(file, overrides, hardware_file)
    for line in experiment.doubts if not quiet else ():
        err.print(line, highlight=False, soft_wrap=True, markup=False)
    directory = free_folder(out_dir or Path("out") / f"{experiment.name}-real", experiment.resolved(), force)
    check_writable(directory)
    try:
        with _progress(experiment.name, quiet) as progress:
            result = measure(experiment, Target(url, model, vocab, api_key, raw, salt, Tls(ca_certs=ca_certs)), progress=progress)
    except KeyboardInterrupt:
        err.print(f"interrupted: nothing of {experiment.name} was kept")
        raise typer.Exit(130) from None
    result.save(directory)
    if as_json:
        print(json.dumps(result.summary, indent=2))
    elif not quiet:
        show(result, directory, client_line(result.summary["client"]), explain=explain)
    if result.summary["partial"]:
        err.print("interrupted: this result is partial, and marked so")
        raise typer.Exit(130)
    if not result.summary["completed"]:
        why = "; ".join(f"{reason} ({times})" for reason, times in list(result.summary["reasons"].items())[:3])
        print(f"error: none of {result.summary['requests']} requests completed: {why or 'nothing was sent'}", file=sys.stderr)
        raise typer.Exit(1)


def client_line(client: dict[str, Any]) -> str:
    """What the client itself cost, in a line."""
    late, read = client["send_late_s"], client["read_late_s"]
    return (
        f"client   {percent(client['cpu_share'])} of a core; sent {seconds(late['p50'])} late at p50, {seconds(late['p99'])} at p99; "
        f"read {seconds(read['p99'])} late at p99; {client['connections']} connections"
    )


@contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr: requests, and the run's time. Nothing where nobody looks."""
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("requests"))
    with bars.Progress(*columns, bars.TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task(escape(name), total=None)
        yield lambda _, ended, total: bar.update(task, completed=ended, total=total)
