"""A folder of runs that are done: a line for each in `runs.jsonl`, by its hash, written when it ends.

So what is there after any end can be used, and a second start goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from pdlab.core.types import UsageError
from pdlab.search.pool import Scalar

RUNS = "runs.jsonl"


class RunJournal:
    """`figures` are those of each run by its hash."""

    def __init__(self, folder: Path, journal: IO[bytes]) -> None:
        self.folder, self.journal = folder, journal
        self.figures: dict[str, Mapping[str, Scalar]] = {}
        self._read()

    @classmethod
    def locked(cls, folder: Path, command: str) -> Self:
        """Of a folder that is there, for `command` alone. Raises UsageError where it is in use, OSError where it cannot be written."""
        journal = (folder / RUNS).open("a+b")
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.close()
            raise UsageError(f"{folder}: another {command} writes there; wait for it, or give another directory with --out") from None
        return cls(folder, journal)

    def put(self, key: str, figures: Mapping[str, Scalar]) -> None:
        """Raises UsageError where the disk is full."""
        line = json.dumps({"run": key, "figures": figures}, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            self.journal.write(line.encode())
            self.journal.flush()
        except OSError as error:
            raise UsageError(f"{self.folder / RUNS}: {error.strerror}; what is there is kept, and the same command goes on") from None
        self.figures[key] = figures

    def write(self, name: str, content: bytes) -> None:
        """A file of the folder, whole or not at all."""
        aside = self.folder / f".{name}.partial"
        aside.write_bytes(content)
        os.replace(aside, self.folder / name)

    def close(self) -> None:
        self.journal.close()

    def _read(self) -> None:
        """What is there, up to a line that was cut off."""
        self.journal.seek(0)
        whole = 0
        for line in self.journal:
            try:
                entry: dict[str, Any] = json.loads(line)
                self.figures[entry["run"]] = entry["figures"]
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        self.journal.truncate(whole)
