"""How a command keeps a result, and shows it."""

from __future__ import annotations

import os
from pathlib import Path

from pdlab.cli.shared import out
from pdlab.core.types import UsageError
from pdlab.report.result import REPORT, Result
from pdlab.report.tables import summary_table


def check_writable(directory: Path) -> None:
    """Before an hour is spent on results that have nowhere to go. Raises UsageError."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"{directory}: cannot write there; give another directory with --out")


def show(result: Result, directory: Path, *more: str, explain: bool = False) -> None:
    """The summary, with `explain` what its words mean, and where the rest is."""
    out.print(summary_table(result.summary, result.name, explain=explain))
    others = sorted(file.name for file in directory.iterdir() if file.name != REPORT and not file.name.startswith("."))
    for line in (*more, f"picture  {directory / REPORT}", f"files    {directory}: {', '.join(others)}"):
        out.print(line, highlight=False, soft_wrap=True, markup=False)
