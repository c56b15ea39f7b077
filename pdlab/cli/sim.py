"""`pdlab sim`: experiments, simulated. What it does is in `sim_runs`, which `--help` does not wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdlab.cli.shared import Force, HardwareFile, Jobs, Overrides, Traceback, traced


def sim(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Experiment files; several are compared.", show_default=False)],
    set_: Overrides = None,
    hardware_file: HardwareFile = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many: the first file's seed, and those after it, for all files.")] = 1,
    jobs: Jobs = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="Compare all others with this one.", show_default=False)
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Short for --set workload.requests=N.", show_default=False)] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME")] = None,
    force: Force = False,
    trace_events: Annotated[bool, typer.Option("--trace-events", help="Keep the event log, and a Perfetto trace.")] = False,
    no_trim: Annotated[bool, typer.Option("--no-trim", help="Count the warm-up, too, as where several files are compared.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say what the words of the table mean.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, not as a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json).")] = False,
    traceback: Traceback = False,
) -> None:
    """Simulate experiments: a table each, a comparison of several, with intervals over several seeds; results in DIR."""
    from pdlab.cli.sim_runs import Shown, run

    with traced(traceback):
        run(
            files,
            _overrides(set_, seed, requests),
            hardware_file,
            seeds,
            jobs,
            baseline,
            out_dir,
            Shown(as_json, quiet, explain),
            force=force,
            trace_events=trace_events,
            trim=not no_trim,
            here=traceback,
        )


def _overrides(set_: list[str] | None, seed: int | None, requests: int | None) -> list[str]:
    found = list(set_ or ())
    if seed is not None:
        found.append(f"seed={seed}")
    if requests is not None:
        found.append(f"workload.requests={requests}")
    return found
