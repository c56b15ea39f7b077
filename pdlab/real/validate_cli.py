"""`pdlab validate`, the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pdlab.report.units import seconds
from pdlab.types import UsageError

if TYPE_CHECKING:
    from pdlab.real.validate import Outcome


def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Layouts, policies and rates to try.", exists=True, dir_okay=False)],
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME")] = None,
) -> None:
    """The same experiments simulated and served on this machine: do the figures agree? Exit 1 where they do not."""
    try:
        from pdlab.real.validate import validate as run
    except ImportError as error:
        raise UsageError(f"pdlab validate needs {error.name}: pip install 'pdlab[real]'") from None
    from pdlab.report.compare import comparison_page

    directory = out_dir or Path("out") / file.stem
    out = Console()
    outcome = run(file, directory, lambda line: out.print(line, highlight=False, style="dim"))
    for number, comparison in enumerate(outcome.comparisons.values(), 1):
        (directory / f"compare-{number}.html").write_text(comparison_page(comparison), encoding="utf-8")
    out.print(_table(outcome))
    missed = [check for check in outcome.checks if not check.holds]
    held = len(outcome.checks) - len(missed)
    out.print(f"{held} of {len(outcome.checks)} figures are within their bar or the spread of the repeats", highlight=False)
    out.print(f"policies rank {'alike' if outcome.ranked_alike else 'differently'} wherever the measured runs decide", highlight=False)
    out.print(f"took {outcome.seconds / 60:.1f} min; {directory}: compare-*.html, profile.json, results", highlight=False)
    if missed or not outcome.ranked_alike:
        out.print("the two worlds do not agree", style="bold red")
        raise typer.Exit(1)
    out.print("the two worlds agree", style="bold green")


def _table(outcome: Outcome) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "policy", "figure"):
        table.add_column(column, no_wrap=True)
    for column in ("simulated", "measured", "error", "spread", "bar"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for check in outcome.checks:
        spread = "" if check.spread != check.spread else f"±{check.spread:.1%}"
        key = check.key.replace("_s.", " ").upper().replace("MEAN", "mean").replace("P99", "p99")
        numbers = (
            seconds(check.simulated),
            seconds(check.measured),
            f"{check.error:+.1%}",
            spread,
            f"{check.bound:.0%}",
        )
        table.add_row(check.run, check.policy, key, *numbers, "" if check.holds else "missed")
    return table
