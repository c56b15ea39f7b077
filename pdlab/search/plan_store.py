"""A plan's folder: `runs.jsonl` has every simulation, `plan.json` what was asked and found, `plan.html` shows it; `best.yaml` is the
winner's experiment, and `run.sh` has the commands that start it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pdlab.core.types import UsageError
from pdlab.search.identity import first_difference
from pdlab.search.run_journal import RUNS, RunJournal

MANIFEST, PAGE, BEST, COMMANDS = "plan.json", "plan.html", "best.yaml", "run.sh"


class PlanStore(RunJournal):
    """The journal of a plan, and the files beside it. Plans of one experiment may share a folder, whatever they ask."""

    @classmethod
    def open(cls, folder: Path, experiment: Mapping[str, Any]) -> Self:
        """Of the resolved `experiment`. Raises UsageError where the folder has something else, cannot be written, or is in use."""
        try:
            _check(folder, experiment)
            folder.mkdir(parents=True, exist_ok=True)
            store = cls.locked(folder, "pdlab plan")
            if not (folder / MANIFEST).is_file():
                store.write_found({"experiment": experiment})
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({error.strerror}); give another directory with --out") from None
        return store

    def write_found(self, found: Mapping[str, Any]) -> None:
        self.write(MANIFEST, (json.dumps(found, indent=1) + "\n").encode())


def _check(folder: Path, experiment: Mapping[str, Any]) -> None:
    if not folder.is_dir():
        return
    if not (folder / MANIFEST).is_file():
        if any(file.name != RUNS for file in folder.iterdir()):
            raise UsageError(f"{folder}: has something else than a plan; give another directory with --out")
        return
    try:
        there = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["experiment"]
        change = first_difference(there, experiment, ("plan", "base_dir"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{folder}: its {MANIFEST} is none of pdlab plan's; give another directory with --out") from None
    if change:
        raise UsageError(f"{folder}: has a plan of another experiment ({change}); give another directory with --out")
