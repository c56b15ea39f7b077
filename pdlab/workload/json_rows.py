"""Rows of JSON objects, one a line or in a list, their values by their names' roles."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import msgspec

from pdlab.core.types import UsageError
from pdlab.workload.columns import known_columns
from pdlab.workload.requests import OPTIONAL
from pdlab.workload.rows import NO_LABELS, Layout, TraceRow, missing
from pdlab.workload.text import TextFile

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "a truth value",
    type(None): "nothing",
}


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


def peek(file: TextFile, entries: Iterator[dict[str, Any]], most: int = 100) -> tuple[list[dict[str, Any]], Iterator[dict[str, Any]]]:
    """The first objects, and all of them again with their lines; what is wrong with one is said when it is reached."""
    seen: list[tuple[int, dict[str, Any]]] = []
    mistake: UsageError | None = None
    try:
        for entry in islice(entries, most):
            seen.append((file.line, entry))  # noqa: PERF401  # those before a mistake count
    except UsageError as error:
        mistake = error
    last = file.line

    def again() -> Iterator[dict[str, Any]]:
        for line, entry in seen:
            file.line = line
            yield entry
        file.line = last
        if mistake is not None:
            raise mistake
        yield from entries

    if seen:
        file.line = seen[0][0]
    elif mistake is not None:
        raise mistake
    return [entry for _, entry in seen], again()


def by_column(value: object) -> list[dict[str, Any]] | None:
    """The rows of an object that has a list for each column, as vLLM's and SGLang's benchmarks write; None where it is something else."""
    if not isinstance(value, dict):
        return None
    lists = {name: column for name, column in value.items() if isinstance(column, list)}
    named = known_columns(list(lists))
    lengths = {len(lists[named[role]]) for role in ("prompt_tokens", "output_tokens") if role in named}
    if len(lengths) != 1:
        return None
    (rows,) = lengths
    whole = {name: column for name, column in lists.items() if len(column) == rows}
    return [{name: column[row] for name, column in whole.items()} for row in range(rows)]


def json_document(file: TextFile, lines: Iterator[str], first: str) -> Any:
    """What a file of one JSON value holds, however many lines it has."""
    try:
        return json.loads("".join(chain((first,), lines)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file.path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None


def json_rows(file: TextFile, objects: Iterator[dict[str, Any]], layout: Layout) -> Iterator[TraceRow]:
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
        yield TraceRow(
            None if time is None and (delay is not None or session is not None) else values.time(time),
            values.tokens("prompt_tokens"),
            values.tokens("output_tokens"),
            values.ids() if shares else (),
            {role: value for role in labels if (value := values.label(role)) is not None} if labels else NO_LABELS,
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
        return tuple(
            value if {*map(type, value)} <= {int} else [one if type(one) is int else self._whole("hash_ids", one) for one in value]
        )

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
