"""How a command keeps a result, and shows it."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from pdlab.cli.shared import err, out
from pdlab.core.types import UsageError
from pdlab.report.result import REPORT, Result
from pdlab.report.tables import summary_table
from pdlab.results.run import EXPERIMENT


def check_writable(directory: Path) -> None:
    """Before an hour is spent on results that have nowhere to go. Raises UsageError."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"{directory}: cannot write there; give another directory with --out")


def free_folder(directory: Path, experiment: Mapping[str, Any], force: bool, taken: Container[Path] = ()) -> Path:
    """Where an experiment's results go: `directory`, or where another experiment's are there, beside it as NAME-2. `experiment` is the
    resolved one; `taken` are promised to others. With `force` another's are replaced."""
    number, free = 2, directory
    while free in taken or not (force or holds(free, experiment)):
        free, number = directory.with_name(f"{directory.name}-{number}"), number + 1
    if free != directory and directory not in taken:
        err.print(
            f"{directory} holds another experiment's results: these go to {free} (--force replaces those)",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    return free


def holds(directory: Path, experiment: Mapping[str, Any]) -> bool:
    """Is what is there this experiment's, or nobody's?"""
    try:
        there = yaml.load((directory / EXPERIMENT).read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return True
    return bool(there == experiment)


def show(result: Result, directory: Path, *more: str, explain: bool = False) -> None:
    """The summary, with `explain` what its words mean, and where the rest is."""
    out.print(summary_table(result.summary, result.name, explain=explain))
    others = sorted(file.name for file in directory.iterdir() if file.name != REPORT and not file.name.startswith("."))
    for line in (*more, f"picture  {directory / REPORT}", f"files    {directory}: {', '.join(others)}"):
        out.print(line, highlight=False, soft_wrap=True, markup=False)
