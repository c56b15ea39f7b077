"""Rows of a trace file: CSV and JSONL as named cells, and the columns every format ends in, checked as they come.

Whatever the format, a row is an arrival, a prompt length and an output length; a row is checked when it is added, so that reading
stops at the first mistake and at the number of requests asked for.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any, TypeVar

import msgspec

from pdlab.types import UsageError
from pdlab.workload.text import TextFile

T = TypeVar("T")
_INT32_MAX = 2**31 - 1
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "array": "a list",
    "str": "text",
    "null": "nothing",
    "object": "an object",
    "bool": "a truth value",
}


class Lengths:
    """Arrivals and lengths as they are read. `limit`: the number of requests after which `full` is true.

    `names` are the file's names of the three columns, for messages. Rows of zero tokens are dropped and counted; where
    `strict`, they are mistakes, and so are times before 0.
    """

    def __init__(self, file: TextFile, names: tuple[str, str, str], limit: int | None, *, strict: bool = False) -> None:
        self.arrival_s, self.prompt_tokens, self.output_tokens = array("d"), array("i"), array("i")
        self.dropped = 0
        self._file, self._names = file, names
        self._limit = math.inf if limit is None else limit
        self._last_s = 0.0 if strict else -math.inf
        self._least = 1 if strict else 0

    @property
    def full(self) -> bool:
        return len(self.arrival_s) >= self._limit

    def add(self, arrival_s: float, prompt_tokens: int, output_tokens: int, *, ordered: bool = True) -> bool:
        """Whether the row counts: it does not if it has no prompt or no output. `ordered`: it can't come before the last one."""
        if not ((self._last_s if ordered else 0.0) <= arrival_s < math.inf):
            raise self._bad_time(arrival_s, ordered)
        if not (self._least <= prompt_tokens <= _INT32_MAX and self._least <= output_tokens <= _INT32_MAX):
            raise self._bad_length(prompt_tokens, output_tokens)
        if ordered:
            self._last_s = arrival_s
        if not prompt_tokens or not output_tokens:
            self.dropped += 1
            return False
        self.arrival_s.append(arrival_s)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        return True

    def _bad_time(self, arrival_s: float, ordered: bool) -> UsageError:
        if not math.isfinite(arrival_s):
            return self._file.wrong(f"{arrival_s} is not a time", self._names[0])
        if ordered and arrival_s < self._last_s and len(self.arrival_s):
            back = self._last_s - arrival_s
            return self._file.wrong(f"{back:g} s before the row above; sort the file by {self._names[0]}", self._names[0])
        return self._file.wrong(f"{arrival_s:g} s is negative", self._names[0])

    def _bad_length(self, prompt_tokens: int, output_tokens: int) -> UsageError:
        for tokens, name in ((prompt_tokens, self._names[1]), (output_tokens, self._names[2])):
            if tokens < self._least:
                return self._file.wrong(f"{tokens} tokens; must be at least {self._least}", name)
        name, tokens = max(zip(self._names[1:], (prompt_tokens, output_tokens), strict=True), key=lambda pair: pair[1])
        return self._file.wrong(f"{tokens} tokens; must be at most {_INT32_MAX}", name)


class Table:
    """A CSV file below its header. `columns` are the header's names as they stand there."""

    def __init__(self, file: TextFile, lines: Iterator[str], header: str) -> None:
        self.file = file
        self._rows = csv.reader(lines, strict=True)
        self.columns = [name.strip() for name in next(csv.reader([header]))]
        twice = [name for name in self.columns if self.columns.count(name) > 1]
        if twice:
            raise file.wrong("is there twice", twice[0])

    def find(self, *names: str) -> list[int]:
        """Indices of columns, by name in whatever case. Raises UsageError naming the one that is missing and the nearest there is."""
        lower = {name.lower(): index for index, name in enumerate(self.columns)}
        for name in names:
            if name.lower() not in lower:
                raise missing(self.file, name, self.columns)
        return [lower[name.lower()] for name in names]

    def rows(self) -> Iterator[list[str]]:
        width = len(self.columns)
        try:
            for row in self._rows:
                if len(row) == width:
                    yield row
                elif any(row):
                    raise self.file.wrong(f"{len(row)} columns where the header has {width}")
        except csv.Error as error:
            raise self.file.wrong(str(error)) from None

    def refused(self, row: Sequence[str], kinds: dict[int, Callable[[str], Any]]) -> UsageError:
        """Which cell of a row can't be read. `kinds`: the parser of each column index."""
        for index, parse in kinds.items():
            try:
                parse(row[index])
            except (ValueError, OverflowError):
                wanted = {whole: "a whole number", float: "a number"}.get(parse, getattr(parse, "__doc__", None) or "right")
                return self.file.wrong(f"{row[index].strip()[:40]!r} is not {wanted}", self.columns[index])
        raise AssertionError(f"no cell of {row} is wrong")


def whole(text: str) -> int:
    """a whole number"""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def objects(file: TextFile, lines: Iterator[str], first: str, kind: type[T]) -> Iterator[T]:
    """JSONL, one msgspec Struct a line; blank lines are passed over."""
    decode = msgspec.json.Decoder(kind).decode
    for line in chain((first,), lines):
        try:
            yield decode(line)
        except msgspec.MsgspecError as error:
            if line.strip():
                raise _bad_object(file, line, str(error)) from None


def _bad_object(file: TextFile, line: str, message: str) -> UsageError:
    if lacking := re.search(r"missing required field `(\w+)`", message):
        return missing(file, lacking[1], list(msgspec.json.decode(line)))
    if types := re.search(r"Expected `([^`]*)`, got `([^`]*)`(?: - at `\$\.?(\w*))?", message):
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in types[1].split(" | ") if kind != "null")
        return file.wrong(f"must be {wanted}, not {_KINDS.get(types[2], types[2])}", types[3] or None)
    if place := re.search(r"JSON is malformed: (.*) \(byte (\d+)\)", message):
        return file.wrong(f"not JSON: {place[1]}", int(place[2]) + 1)
    return file.wrong("not JSON: the line ends early" if "truncated" in message else message, len(line.rstrip()) + 1)


def missing(file: TextFile, name: str, there: Sequence[str]) -> UsageError:
    near = get_close_matches(name.lower(), [other.lower() for other in there], n=2, cutoff=0.5)
    shown = [other for other in there if other.lower() in near] or there
    words = "nearest" if near else "there are"
    return file.wrong(f"is missing; {words}: {', '.join(shown)}", name)
