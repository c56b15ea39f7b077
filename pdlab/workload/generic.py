"""pdlab's own trace format, as CSV and as JSONL: one request a row, under a head that holds what is true of all of them.

    # name: chat                              {"workload": {"name": "chat", "hash_tokens": 16}}
    # hash_tokens: 16                         {"arrival_s": 0.0, "prompt_tokens": 70, "output_tokens": 5, "hash_ids": [1, 2, 3, 4]}
    arrival_s,prompt_tokens,output_tokens,hash_ids
    0.0,70,5,1 2 3 4

The head may be left out; `hash_tokens` may be a column instead. Optional columns: priority, ttft_slo_s, tpot_slo_s (empty: the
experiment's), n, best_of, after (the row, from 0, that must end first; empty or -1: none), hash_ids. A column that is there in no row is
None in the workload. The head's values are JSON, or else text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pdlab.workload.chains import Chains
from pdlab.workload.rows import Lengths, Table, objects, whole
from pdlab.workload.text import TextFile

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
HEAD: dict[str, Any] = {"name": str, "hash_tokens": int, "concurrency": int, "dropped": int, "notes": list}


@dataclass(frozen=True)
class Optional:
    """An optional column: what an empty cell means, and what it may hold."""

    default: float
    least: float
    most: float
    dtype: type[np.generic]


OPTIONAL = {
    "priority": Optional(0, -(2**15), 2**15 - 1, np.int16),
    "ttft_slo_s": Optional(math.nan, 0.0, math.inf, np.float64),
    "tpot_slo_s": Optional(math.nan, 0.0, math.inf, np.float64),
    "n": Optional(1, 1, 2**15 - 1, np.int16),
    "best_of": Optional(1, 1, 2**15 - 1, np.int16),
    "after": Optional(-1, -1, 2**31 - 1, np.int32),
}

_Whole = int | None | msgspec.UnsetType
_Number = float | None | msgspec.UnsetType


class _Row(msgspec.Struct):
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: _Whole = msgspec.UNSET
    ttft_slo_s: _Number = msgspec.UNSET
    tpot_slo_s: _Number = msgspec.UNSET
    n: _Whole = msgspec.UNSET
    best_of: _Whole = msgspec.UNSET
    after: _Whole = msgspec.UNSET
    hash_ids: tuple[int, ...] | msgspec.UnsetType | None = msgspec.UNSET
    hash_tokens: _Whole = msgspec.UNSET


class _Requests:
    """The rows so far; `fields` are the Workload's."""

    def __init__(self, file: TextFile, limit: int | None, head: Mapping[str, Any]) -> None:
        self.lengths = Lengths(file, REQUIRED, limit, strict=True)
        self.hashes = Chains()
        self.shares = False
        self.there: set[str] = set()
        self._optional: dict[str, list[float]] = {name: [] for name in OPTIONAL}
        self._file, self._head = file, dict(head)

    def add(self, required: tuple[float, int, int], optional: Mapping[str, float], hashes: tuple[int, ...]) -> None:
        """Check and keep a row. `optional` has what the row says; its default stands for the rest."""
        index = len(self.hashes)
        self.lengths.add(*required, ordered=optional.get("after", -1) < 0)
        for name, column in OPTIONAL.items():
            value = optional.get(name, column.default)
            if not (column.least <= value <= column.most or (math.isnan(column.default) and math.isnan(value))):
                raise self._file.wrong(f"{value:g} is not between {column.least:g} and {column.most:g}", name)
            self._optional[name].append(value)
        if optional.get("after", -1) >= 0 and "concurrency" in self._head:
            raise self._file.wrong("a closed loop (concurrency in the head) has none; requests come one after another anyway", "after")
        if optional.get("after", -1) >= index:
            raise self._file.wrong(f"{optional['after']} is not an earlier row; this one is {index}, counted from 0", "after")
        self.hashes.append(hashes)

    def unit(self, hash_tokens: int) -> None:
        """A row's own `hash_tokens`; all have to agree."""
        if hash_tokens != self._head.setdefault("hash_tokens", hash_tokens):
            raise self._file.wrong(f"{hash_tokens}, but {self._head['hash_tokens']} above; one unit for the whole file", "hash_tokens")
        if hash_tokens < 1:
            raise self._file.wrong(f"{hash_tokens} tokens; must be at least 1", "hash_tokens")

    def fields(self) -> dict[str, Any]:
        lengths = self.lengths
        found: dict[str, Any] = {
            name: np.array(values, OPTIONAL[name].dtype) for name, values in self._optional.items() if name in self.there
        }
        return found | {
            "arrival_s": lengths.arrival_s,
            "prompt_tokens": lengths.prompt_tokens,
            "output_tokens": lengths.output_tokens,
            "hashes": self.hashes if self.shares else None,
            **self._head,
        }


def read_csv(file: TextFile, table: Table, comments: Sequence[str], limit: int | None) -> dict[str, Any]:
    """The Workload's fields. Raises UsageError."""
    requests = _Requests(file, limit, _commented(file, comments))
    arrival, prompt, output = table.find(*REQUIRED)
    lower = [name.lower() for name in table.columns]
    optional = {name: lower.index(name) for name in OPTIONAL if name in lower}
    requests.there.update(optional)
    hash_ids = lower.index("hash_ids") if "hash_ids" in lower else None
    unit = lower.index("hash_tokens") if "hash_tokens" in lower else None
    requests.shares = hash_ids is not None
    parse = {name: float if math.isnan(OPTIONAL[name].default) else whole for name in optional}
    kinds: dict[int, Callable[[str], Any]] = {arrival: float, prompt: whole, output: whole}
    kinds |= {index: _unless_empty(parse[name]) for name, index in optional.items()}
    kinds |= {index: kind for index, kind in ((hash_ids, _ids), (unit, whole)) if index is not None}
    for row in table.rows():
        try:
            required = float(row[arrival]), whole(row[prompt]), whole(row[output])
            given = {name: parse[name](row[index]) for name, index in optional.items() if row[index].strip()}
            hashes = () if hash_ids is None else _ids(row[hash_ids])
            if unit is not None:
                requests.unit(whole(row[unit]))
        except (ValueError, OverflowError):
            raise table.refused(row, kinds) from None
        requests.add(required, given, hashes)
        if requests.lengths.full:
            break
    return requests.fields()


def read_jsonl(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], limit: int | None) -> dict[str, Any]:
    """The Workload's fields. Raises UsageError."""
    head = _commented(file, comments)
    if is_head(first):
        head |= _checked(file, json.loads(first)["workload"])
        first = ""
    requests = _Requests(file, limit, head)
    for row in objects(file, lines, first, _Row):
        if row.hash_ids is not msgspec.UNSET:
            requests.shares = True
        if isinstance(row.hash_tokens, int):
            requests.unit(row.hash_tokens)
        given = {name: value for name in OPTIONAL if (value := getattr(row, name)) is not msgspec.UNSET}
        requests.there.update(given)
        hashes = row.hash_ids if isinstance(row.hash_ids, tuple) else ()
        said = {name: value for name, value in given.items() if value is not None}
        requests.add((row.arrival_s, row.prompt_tokens, row.output_tokens), said, hashes)
        if requests.lengths.full:
            break
    return requests.fields()


def is_head(line: str) -> bool:
    """Whether a JSONL line is the head of a generic file, not a request."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["workload"] and isinstance(found["workload"], dict)


def _commented(file: TextFile, comments: Sequence[str]) -> dict[str, Any]:
    """What the `# key: value` lines say; other comments are passed over."""
    found: dict[str, Any] = {}
    for comment in comments:
        key, colon, text = comment.lstrip("# ").partition(":")
        if colon and key.strip() in HEAD:
            try:
                found[key.strip()] = json.loads(text)
            except ValueError:
                found[key.strip()] = text.strip()
    return _checked(file, found)


def _checked(file: TextFile, head: Mapping[str, Any]) -> dict[str, Any]:
    """The head with its values' types made sure of."""
    found: dict[str, Any] = {}
    for key, value in head.items():
        kind = HEAD.get(key)
        if kind is None:
            raise file.wrong(f"unknown key; there are: {', '.join(HEAD)}", key)
        least = 0 if key == "dropped" else 1
        if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and value < least):
            wanted = {int: f"a whole number of at least {least}", str: "text", list: "a list of text"}[kind]
            raise file.wrong(f"{value!r} is not {wanted}", key)
        found[key] = tuple(map(str, value)) if kind is list else value
    return found


def _ids(text: str) -> tuple[int, ...]:
    """whole numbers with spaces between"""
    return tuple(map(int, text.split()))


def _unless_empty(parse: Callable[[str], float]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        return parse(text) if text.strip() else None

    parsed.__doc__ = "a number" if parse is float else "a whole number"
    return parsed
