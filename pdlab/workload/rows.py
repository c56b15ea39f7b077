"""Rows of a trace file: whatever the format, an arrival, a prompt length and an output length, and what more the file says of a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from pdlab.core.types import UsageError
from pdlab.workload.requests import RequestRows
from pdlab.workload.text import TextFile
from pdlab.workload.times import Clock, Seconds

NO_LABELS: Mapping[str, float] = {}


class TraceRow(NamedTuple):
    """One request. `arrival_s` None: only a delay is known; `labels`: cells of optional columns that are not empty."""

    arrival_s: float | None
    prompt_tokens: int
    output_tokens: int
    ids: tuple[int, ...] = ()
    labels: Mapping[str, float] = NO_LABELS
    session: object = None
    delay_s: float | None = None
    hash_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in a file. `columns`: role to the file's name, of the roles of `columns.ROLES`, `after` and `hash_tokens`; a
    required role that has none is replaced later. `delay_per_s`, `gap_per_s`: of the file's delays, and of its times since the row above;
    `failures`: rows without lengths are such."""

    columns: Mapping[str, str]
    clock: Clock | Seconds
    delay_per_s: float = 1.0
    gap_per_s: float = 1.0
    failures: bool = False

    @property
    def turns(self) -> bool:
        return "delay_s" in self.columns


def collect(rows: Iterator[TraceRow], requests: RequestRows, layout: Layout, file: TextFile) -> None:
    """Add rows until there are enough."""
    for row in rows:
        add(row, requests, layout, file)
        if requests.full:
            break


def add(row: TraceRow, requests: RequestRows, layout: Layout, file: TextFile) -> None:
    """One more request, or one more turn of a session. Raises UsageError."""
    if row.session is not None:
        requests.add_turn(row.session, row.arrival_s, row.delay_s, *row[1:5])
    elif row.delay_s is not None:
        raise file.wrong("a delay, but no session whose answer it comes after", layout.columns.get("session_id", "session_id"))
    elif row.arrival_s is None:
        raise file.wrong("is missing", layout.columns["arrival_s"])
    else:
        requests.add(row.arrival_s, *row[1:5])


def missing(file: TextFile, name: str, there: Sequence[str]) -> UsageError:
    near = get_close_matches(name.lower(), [other.lower() for other in there], n=2, cutoff=0.5)
    shown = [other for other in there if other.lower() in near] or there
    words = "nearest" if near else "there are"
    return file.wrong(f"is missing; {words}: {', '.join(shown)}", name)
