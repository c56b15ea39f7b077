"""`pdlab compare`: how well a simulation foretold what was measured, or how two simulations differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdlab.core.types import UsageError
from pdlab.report.compare import comparison_page, comparison_table
from pdlab.report.result import Result
from pdlab.results.comparison import compare as compared
from pdlab.results.comparison_sims import compare_simulations


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            file_okay=False,
            metavar="DIR DIR",
            help="Results of pdlab sim and pdlab bench, in any order; or two of pdlab sim.",
            show_default=False,
        ),
    ],
    out_file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The page.", show_default="compare.html")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Simulated against measured, and repeated runs among themselves; of several policies, also whether they rank the same. Of two
    simulations which is better, by how much, and what differs between them."""

    if len(directories) < 2:
        raise UsageError("compare takes a result of pdlab sim and at least one of pdlab bench, or two of pdlab sim")
    results = [(str(directory), Result.load(directory)) for directory in directories]
    simulations = all(result.summary["run"].get("world") != "real" for _, result in results)
    if simulations and len(results) > 2:
        raise UsageError(f"{len(results)} simulations: compare takes two; pdlab sim FILE FILE ... --seeds 5 compares more")
    found = compare_simulations(results[0], results[1]) if simulations else compared(results)
    out_file = out_file or Path("compare.html")
    try:
        out_file.parent.mkdir(parents=True, exist_ok=True)
        out_file.write_text(comparison_page(found), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out_file}: cannot write there ({error.strerror}); give another file with --out") from None
    if not quiet:
        out = Console()
        out.print(comparison_table(found))
        out.print(f"picture  {out_file}", highlight=False, soft_wrap=True, markup=False)
