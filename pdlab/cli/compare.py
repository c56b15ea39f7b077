"""`pdlab compare`: how well a simulation foretold what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdlab.core.types import UsageError
from pdlab.report.compare import comparison_page, comparison_table
from pdlab.report.result import Result
from pdlab.results.comparison import compare as compared


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            file_okay=False, metavar="SIM_DIR REAL_DIR", help="Results of pdlab sim and pdlab bench, in any order.", show_default=False
        ),
    ],
    out_file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The page.", show_default="compare.html")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Simulated against measured, and repeated runs among themselves; of several policies, also whether they rank the same."""

    if len(directories) < 2:
        raise UsageError("compare takes a result of pdlab sim and at least one of pdlab bench")
    found = compared([(str(directory), Result.load(directory)) for directory in directories])
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
