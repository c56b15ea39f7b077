"""Rows of a CSV file, its cells by their columns' roles, each parsed as it comes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pdlab.core.types import UsageError
from pdlab.workload.requests import OPTIONAL
from pdlab.workload.rows import Layout, TraceRow, missing
from pdlab.workload.text import TextFile

_DELIMITERS = ",;\t|"


def delimiter(header: str) -> str:
    """What stands between the cells."""
    return max(_DELIMITERS, key=header.count)


def header_names(header: str) -> list[str]:
    """The columns' names as they stand in the first line."""
    return [name.strip() for name in next(csv.reader([header], delimiter=delimiter(header)))]


class CsvTable:
    """A CSV file below its header, with commas, semicolons, tabs or bars between. `columns` are the header's names as they stand there."""

    def __init__(self, file: TextFile, lines: Iterator[str], header: str) -> None:
        self.file = file
        self._rows = csv.reader(lines, strict=True, delimiter=delimiter(header))
        self.columns = header_names(header)
        twice = [name for name in self.columns if name and self.columns.count(name) > 1]
        if twice:
            raise file.wrong("is there twice", twice[0])

    def find(self, name: str) -> int:
        """Index of a column, by name in whatever case. Raises UsageError naming it and the nearest there is."""
        if name in self.columns:
            return self.columns.index(name)
        lower = [column.lower() for column in self.columns]
        if name.lower() not in lower:
            raise missing(self.file, name, self.columns)
        return lower.index(name.lower())

    def cells(self) -> Iterator[list[str]]:
        width = len(self.columns)
        try:
            for row in self._rows:
                if len(row) == width:
                    yield row
                elif any(row):
                    raise self.file.wrong(f"{len(row)} columns where the header has {width}")
        except csv.Error as error:
            raise self.file.wrong(str(error)) from None

    def rows(self, layout: Layout) -> Iterator[TraceRow]:
        """Raises UsageError."""
        place = {role: self.find(name) for role, name in layout.columns.items()}
        arrival, prompt, output = (place.get(role) for role in ("arrival_s", "prompt_tokens", "output_tokens"))
        clock, plain = layout.clock, len(place) == 3 and None not in (arrival, prompt, output)
        passed_s = 0.0
        for cells in self.cells():
            try:
                if plain:
                    yield TraceRow(clock(cells[arrival]), whole(cells[prompt]), whole(cells[output]))  # type: ignore[index]
                    continue
                if "gap_s" in place:
                    passed_s += real(cells[place["gap_s"]].strip() or "0") / layout.gap_per_s
                yield self._row(cells, place, layout, passed_s)
            except (ValueError, OverflowError):
                raise self._refused(cells, place, layout) from None

    def _row(self, cells: Sequence[str], place: Mapping[str, int], layout: Layout, passed_s: float) -> TraceRow:
        there = {role: text for role, index in place.items() if (text := cells[index].strip()) or role in _NEVER_EMPTY}
        delay = there.get("delay_s")
        arrival = there.get("arrival_s", None if "arrival_s" in place else "0")
        if arrival is None and delay is None:
            raise ValueError("no time")
        return TraceRow(
            None if arrival is None else layout.clock(arrival) if "arrival_s" in place else passed_s,
            whole(there["prompt_tokens"]) if "prompt_tokens" in place else 1,
            whole(there["output_tokens"]) if "output_tokens" in place else 1,
            ids(there.get("hash_ids", "")),
            {role: _PARSERS[role](there[role]) for role in OPTIONAL if role in there},
            there.get("session_id"),
            None if delay is None else float(delay) / layout.delay_per_s,
            whole(there["hash_tokens"]) if "hash_tokens" in there else None,
        )

    def _refused(self, cells: Sequence[str], place: Mapping[str, int], layout: Layout) -> UsageError:
        """Which cell of a row can't be read."""
        for role, index in place.items():
            text = cells[index].strip()
            if not text and role not in _NEVER_EMPTY and role != "arrival_s":
                continue
            try:
                layout.clock(text) if role == "arrival_s" else _PARSERS[role](text)
            except (ValueError, OverflowError):
                wanted = layout.clock.wanted if role == "arrival_s" else _PARSERS[role].__doc__
                what = f"{text[:40]!r} is not" if text else "is empty, not"
                return self.file.wrong(f"{what} {wanted}", self.columns[index])
        raise AssertionError(f"no cell of {cells} is wrong")


def whole(text: str) -> int:
    """a whole number"""
    try:
        if "_" in text:
            raise ValueError(text)
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or "_" in text:
            raise
        return int(number)


def real(text: str) -> float:
    """a number"""
    return float(text)


def ids(text: str) -> tuple[int, ...]:
    """whole numbers with spaces between"""
    return tuple(map(whole, text.strip("[]").replace(",", " ").split()))


def text_of(text: str) -> str:
    """text"""
    return text


_NEVER_EMPTY = frozenset({"prompt_tokens", "output_tokens", "hash_tokens"})
_PARSERS: dict[str, Callable[[str], Any]] = {
    "prompt_tokens": whole,
    "output_tokens": whole,
    "hash_tokens": whole,
    "hash_ids": ids,
    "session_id": text_of,
    "delay_s": real,
    "gap_s": real,
    **{name: real if math.isnan(column.default) else whole for name, column in OPTIONAL.items()},
}
