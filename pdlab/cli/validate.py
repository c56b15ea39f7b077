"""`pdlab validate`, the command."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdlab.core.extras import lacks

WIDTH = 140  # of the table in a file


def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Layouts, policies and rates to try.", exists=True, dir_okay=False)],
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME")] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON", help="Two vLLM servers are the engines, of that environment: docs/guides/vllm.md.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="REQ/S", help="In place of the file's rates, which suit another machine; may be repeated.", show_default=False
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Judge the runs that are there already; nothing is measured.")] = False,
) -> None:
    """The same experiments simulated and served on this machine: do the figures agree? Exit 1 where they do not."""
    try:
        from pdlab.proof.validate import validate as run
    except ImportError as error:
        raise lacks("pdlab validate", error) from None
    from pdlab.report.compare import checks_markdown, checks_table, comparison_page

    directory = out_dir or Path("out") / file.stem
    out = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    start = None
    if vllm is not None:
        from pdlab.proof.validate_vllm import vllm_pair

        start = partial(vllm_pair, vllm)
    outcome = run(file, directory, lambda line: out.print(line, highlight=False, style="dim"), start, again=again, rates=rate or ())
    for number, comparison in enumerate(outcome.comparisons.values(), 1):
        (directory / f"compare-{number}.html").write_text(comparison_page(comparison), encoding="utf-8")
    (directory / "table.md").write_text(checks_markdown(outcome.checks), encoding="utf-8")
    out.print(checks_table(outcome.checks))
    if outcome.undisturbed != outcome.checks:
        held = sum(check.holds for check in outcome.undisturbed)
        out.print(
            f"{held} of {len(outcome.undisturbed)}, had the simulation not known when this machine's cores were slow", highlight=False
        )
    missed = [check for check in outcome.checks if not check.holds]
    agree, decided = outcome.ranked
    ranks = f"policies rank alike in {agree} of {decided} pairs that the measured runs decide"
    out.print(ranks if decided else "the measured runs decide no pair of policies", highlight=False)
    out.print(f"HTTP, router and client took {100 * outcome.front_end:.1f} % of all cores, from the engines", highlight=False)
    out.print(
        f"took {outcome.seconds / 60:.1f} min; {directory}: compare-*.html, table.md, profile.json, manifest.json, requests.parquet",
        highlight=False,
    )
    if missed or agree < decided:
        out.print("the two worlds do not agree", style="bold red")
        raise typer.Exit(1)
    out.print("the two worlds agree", style="bold green")
