"""A sweep's folder: `runs.jsonl` has a line for each run that is done, `sweep.json` says of what, `sweep.parquet` and `sweep.html` are made
of both.

A line is written when its run ends. So what is there after any end can be used, and a second start goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pdlab.core.types import UsageError
from pdlab.search.identity import first_difference
from pdlab.search.run_journal import RUNS, RunJournal

MANIFEST, TABLE, PAGE = "sweep.json", "sweep.parquet", "sweep.html"


class SweepStore(RunJournal):
    """The journal of a sweep, and the files beside it."""

    @classmethod
    def open(cls, folder: Path, experiment: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> Self:
        """For a sweep over `grid` of the resolved `experiment`. Raises UsageError where the folder has something else, cannot be written,
        or is in use."""
        try:
            _check_kind(folder)
            _check_same(folder, experiment, grid)
            folder.mkdir(parents=True, exist_ok=True)
            store = cls.locked(folder, "pdlab sweep")
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({error.strerror}); give another directory with --out") from None
        manifest = {"experiment": experiment, "grid": grid, "seeds": list(seeds)}
        store.write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return store

    def write_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows may have different keys."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
        aside = self.folder / f".{TABLE}.partial"
        pq.write_table(table, aside, compression="zstd")
        os.replace(aside, self.folder / TABLE)

    def write_page(self, page: str) -> None:
        self.write(PAGE, page.encode())


def _check_kind(folder: Path) -> None:
    if folder.is_dir() and not (folder / MANIFEST).is_file() and any(file.name not in (RUNS,) for file in folder.iterdir()):
        raise UsageError(f"{folder}: has something else than a sweep; give another directory with --out")


def _check_same(folder: Path, experiment: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> None:
    """Two sweeps of a folder may have other axes, values and seeds, but what neither varies is the same."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        change = first_difference(dict(manifest["experiment"]), experiment, [*manifest["grid"], *grid, "seed"])
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{folder}: its {MANIFEST} is none of pdlab sweep's; give another directory with --out") from None
    if change is not None:
        raise UsageError(f"{folder}: has a sweep of another experiment ({change}); give another directory with --out")
