"""A sweep's folder: `runs.jsonl` has a line for each run that is done, `sweep.json` says of what, `sweep.parquet` and `sweep.html` are made
of both.

A line is written when its run ends. So what is there after any end can be used, and a second start goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from pdlab.core.types import UsageError
from pdlab.search.identity import first_difference
from pdlab.search.pool import Scalar

MANIFEST, RUNS, TABLE, PAGE = "sweep.json", "runs.jsonl", "sweep.parquet", "sweep.html"


class SweepStore:
    """`figures` are those of each run by its hash."""

    def __init__(self, folder: Path, journal: IO[bytes]) -> None:
        self.folder, self.journal = folder, journal
        self.figures: dict[str, Mapping[str, Scalar]] = {}

    @classmethod
    def open(cls, folder: Path, experiment: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> Self:
        """For a sweep over `grid` of the resolved `experiment`. Raises UsageError where the folder has something else, cannot be written,
        or is in use."""
        try:
            _check_kind(folder)
            _check_same(folder, experiment, grid)
            folder.mkdir(parents=True, exist_ok=True)
            journal = _locked(folder)
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({error.strerror}); give another directory with --out") from None
        store = cls(folder, journal)
        store._read()
        manifest = {"experiment": experiment, "grid": grid, "seeds": list(seeds)}
        _write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return store

    def put(self, key: str, figures: Mapping[str, Scalar]) -> None:
        """Raises UsageError where the disk is full."""
        line = json.dumps({"run": key, "figures": figures}, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            self.journal.write(line.encode())
            self.journal.flush()
        except OSError as error:
            raise UsageError(f"{self.folder / RUNS}: {error.strerror}; what is there is kept, and the same command goes on") from None
        self.figures[key] = figures

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
        _write(self.folder / PAGE, page.encode())

    def close(self) -> None:
        self.journal.close()

    def _read(self) -> None:
        """What is there, up to a line that was cut off."""
        self.journal.seek(0)
        whole = 0
        for line in self.journal:
            try:
                entry = json.loads(line)
                self.figures[entry["run"]] = entry["figures"]
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        self.journal.truncate(whole)


def _locked(folder: Path) -> IO[bytes]:
    journal = (folder / RUNS).open("a+b")
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        journal.close()
        raise UsageError(f"{folder}: another pdlab sweep writes there; wait for it, or give another directory with --out") from None
    return journal


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content)
    os.replace(aside, path)


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
