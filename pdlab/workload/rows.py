"""Rows of a trace file: CSV cells and JSON values by their columns' roles, each parsed as it comes.

Whatever the format, a row is an arrival, a prompt length and an output length, and what more the file says of a request.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from pdlab.types import UsageError
from pdlab.workload.requests import OPTIONAL, Requests
from pdlab.workload.text import TextFile
from pdlab.workload.times import Clock, Seconds

_DELIMITERS = ",;\t|"
_NO_LABELS: Mapping[str, float] = {}
_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "a truth value",
    type(None): "nothing",
}


class Row(NamedTuple):
    """One request. `arrival_s` None: only a delay is known; `labels`: cells of optional columns that are not empty."""

    arrival_s: float | None
    prompt_tokens: int
    output_tokens: int
    ids: tuple[int, ...] = ()
    labels: Mapping[str, float] = _NO_LABELS
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


def collect(rows: Iterator[Row], requests: Requests, layout: Layout, file: TextFile) -> None:
    """Add rows until there are enough."""
    for row in rows:
        if row.session is None and row.delay_s is None and row.arrival_s is not None:
            requests.add(row.arrival_s, *row[1:5])
        elif row.session is None:
            if row.delay_s is None:
                raise file.wrong("is missing", layout.columns["arrival_s"])
            raise file.wrong("a delay, but no session whose answer it comes after", layout.columns.get("session_id", "session_id"))
        else:
            requests.add_turn(row.session, row.arrival_s, row.delay_s, *row[1:5])
        if requests.full:
            break


# ---------------------------------------------------------------- CSV


def delimiter(header: str) -> str:
    """What stands between the cells."""
    return max(_DELIMITERS, key=header.count)


class Table:
    """A CSV file below its header, with commas, semicolons, tabs or bars between. `columns` are the header's names as they stand there."""

    def __init__(self, file: TextFile, lines: Iterator[str], header: str) -> None:
        self.file = file
        self._rows = csv.reader(lines, strict=True, delimiter=delimiter(header))
        self.columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter(header)))]
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

    def rows(self, layout: Layout) -> Iterator[Row]:
        """Raises UsageError."""
        place = {role: self.find(name) for role, name in layout.columns.items()}
        arrival, prompt, output = (place.get(role) for role in ("arrival_s", "prompt_tokens", "output_tokens"))
        clock, plain = layout.clock, len(place) == 3 and None not in (arrival, prompt, output)
        passed_s = 0.0
        for cells in self.cells():
            try:
                if plain:
                    yield Row(clock(cells[arrival]), whole(cells[prompt]), whole(cells[output]))  # type: ignore[index]
                    continue
                if "gap_s" in place:
                    passed_s += real(cells[place["gap_s"]].strip() or "0") / layout.gap_per_s
                yield self._row(cells, place, layout, passed_s)
            except (ValueError, OverflowError):
                raise self._refused(cells, place, layout) from None

    def _row(self, cells: Sequence[str], place: Mapping[str, int], layout: Layout, passed_s: float) -> Row:
        there = {role: text for role, index in place.items() if (text := cells[index].strip()) or role in _NEVER_EMPTY}
        delay = there.get("delay_s")
        arrival = there.get("arrival_s", None if "arrival_s" in place else "0")
        if arrival is None and delay is None:
            raise ValueError("no time")
        return Row(
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
    return tuple(map(int, text.strip("[]").replace(",", " ").split()))


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


# ---------------------------------------------------------------- JSON


def json_lines(file: TextFile, lines: Iterator[str], first: str) -> Iterator[dict[str, Any]]:
    """JSONL, one object a line; blank lines are passed over."""
    decode = msgspec.json.Decoder().decode
    for line in chain((first,), lines):
        try:
            value = decode(line)
        except msgspec.MsgspecError as error:
            if not line.strip():
                continue
            raise _malformed(file, line, str(error)) from None
        if not isinstance(value, dict):
            raise file.wrong("not a JSON object; a JSONL trace has one on every line")
        yield value


def json_document(file: TextFile, lines: Iterator[str], first: str) -> Any:
    """What a file of one JSON value holds, however many lines it has."""
    try:
        return json.loads("".join(chain((first,), lines)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file.path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None


def json_rows(file: TextFile, objects: Iterator[dict[str, Any]], layout: Layout) -> Iterator[Row]:
    """Raises UsageError."""
    values = _Values(file, layout)
    labels = [role for role in OPTIONAL if role in layout.columns]
    passed_s = 0.0
    shares, turns, units = (role in layout.columns for role in ("hash_ids", "session_id", "hash_tokens"))
    for entry in objects:
        values.entry = entry
        delay = values.number("delay_s") if layout.turns else None
        if "gap_s" in layout.columns:
            passed_s += (values.number("gap_s") or 0.0) / layout.gap_per_s
        time = values.get("arrival_s") if "arrival_s" in layout.columns else passed_s
        session = values.get("session_id") if turns else None
        yield Row(
            None if time is None and (delay is not None or session is not None) else values.time(time),
            values.tokens("prompt_tokens"),
            values.tokens("output_tokens"),
            values.ids() if shares else (),
            {role: value for role in labels if (value := values.label(role)) is not None} if labels else _NO_LABELS,
            session,
            None if delay is None else delay / layout.delay_per_s,
            values.whole("hash_tokens") if units else None,
        )


class _Values:
    """What a JSON object holds, by role. `entry` is the one looked at."""

    def __init__(self, file: TextFile, layout: Layout) -> None:
        self.entry: dict[str, Any] = {}
        self._file, self._layout = file, layout
        self._paths = {role: name.split(".") for role, name in layout.columns.items()}

    def get(self, role: str) -> Any:
        """The value; None where there is none."""
        name = self._layout.columns[role]
        if name in self.entry:
            return self.entry[name]
        value: Any = self.entry
        for key in self._paths[role]:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def tokens(self, role: str) -> int:
        if role not in self._layout.columns:
            return 1
        value = self.get(role)
        if type(value) is int:
            return value
        if value is None:
            if self._layout.failures:
                return 0
            raise self._lacking(role)
        return self._whole(role, value)

    def whole(self, role: str) -> int | None:
        value = self.get(role)
        return value if value is None or type(value) is int else self._whole(role, value)

    def number(self, role: str) -> float | None:
        value = self.get(role)
        if value is None or type(value) in (int, float):
            return value  # type: ignore[no-any-return]
        raise self._wrong(role, "a number", value)

    def label(self, role: str) -> float | None:
        return self.number(role) if math.isnan(OPTIONAL[role].default) else self.whole(role)

    def ids(self) -> tuple[int, ...]:
        value = self.get("hash_ids")
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._wrong("hash_ids", "a list", value)
        strange = next((one for one in value if type(one) is not int), None) if {*map(type, value)} - {int} else None
        if strange is not None:
            raise self._wrong("hash_ids", "a whole number", strange)
        return tuple(value)

    def time(self, value: Any) -> float:
        if value is None:
            raise self._lacking("arrival_s")
        if "arrival_s" not in self._layout.columns:
            return float(value)
        try:
            if isinstance(value, (str, int, float)):
                return self._layout.clock(value)
        except (ValueError, OverflowError):
            raise self._file.wrong(f"{str(value)[:40]!r} is not {self._layout.clock.wanted}", self._layout.columns["arrival_s"]) from None
        raise self._wrong("arrival_s", "a time", value)

    def _whole(self, role: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise self._wrong(role, "a whole number", value)

    def _wrong(self, role: str, wanted: str, value: Any) -> UsageError:
        shown = f"{value:g}" if isinstance(value, float) else _KINDS.get(type(value), "that")
        return self._file.wrong(f"must be {wanted}, not {shown}", self._layout.columns[role])

    def _lacking(self, role: str) -> UsageError:
        name = self._layout.columns[role]
        if name in self.entry:
            return self._wrong(role, "a time" if role == "arrival_s" else "a whole number", None)
        return missing(self._file, name, list(self.entry))


def _malformed(file: TextFile, line: str, message: str) -> UsageError:
    if place := re.search(r"JSON is malformed: (.*) \(byte (\d+)\)", message):
        return file.wrong(f"not JSON: {place[1]}", int(place[2]) + 1)
    return file.wrong("not JSON: the line ends early" if "truncated" in message else message, len(line.rstrip()) + 1)


def missing(file: TextFile, name: str, there: Sequence[str]) -> UsageError:
    near = get_close_matches(name.lower(), [other.lower() for other in there], n=2, cutoff=0.5)
    shown = [other for other in there if other.lower() in near] or there
    words = "nearest" if near else "there are"
    return file.wrong(f"is missing; {words}: {', '.join(shown)}", name)
