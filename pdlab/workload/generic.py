"""pdlab's own trace format, as CSV and as JSONL: one request a row, under a head that holds what is true of all of them.

    # name: chat                              {"workload": {"name": "chat", "hash_tokens": 16}}
    # hash_tokens: 16                         {"arrival_s": 0.0, "prompt_tokens": 70, "output_tokens": 5, "hash_ids": [1, 2, 3, 4]}
    arrival_s,prompt_tokens,output_tokens,hash_ids
    0.0,70,5,1 2 3 4

The head may be left out; `hash_tokens` may be a column instead. Optional columns: priority, ttft_slo_s, tpot_slo_s (empty: the
experiment's), n, best_of, hash_ids, and what a request waits for: after (the row, from 0, that must end first; empty or -1: none), or
session_id and delay_s (after the session's last row; arrival_s may then be empty). A column that is there in no row is None in the
workload. The head's values are JSON, or else text. A row's ids are of the prompt and, as far as they go, of the output.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pdlab.core.types import UsageError
from pdlab.workload.columns import REQUIRED, TURNS
from pdlab.workload.csv_rows import CsvTable
from pdlab.workload.json_rows import json_lines, json_rows
from pdlab.workload.requests import OPTIONAL, RequestRows
from pdlab.workload.rows import Layout, TraceRow, add
from pdlab.workload.text import TextFile
from pdlab.workload.times import Seconds

HEAD: dict[str, Any] = {"name": str, "hash_tokens": int, "concurrency": int, "dropped": int, "notes": list}
_MORE = (*OPTIONAL, "hash_ids", "hash_tokens", *TURNS)


def read_csv(
    file: TextFile, lines: Iterator[str], header: str, comments: Sequence[str], limit: int | None, hash_tokens: int | None = None
) -> dict[str, Any]:
    """The Workload's fields; `hash_tokens` in place of the head's. Raises UsageError."""
    table = CsvTable(file, lines, header)
    lower = {name.lower(): name for name in table.columns}
    there = [name for name in _MORE if name in lower]
    layout = Layout({name: lower.get(name, name) for name in (*REQUIRED, *there)}, Seconds())
    return _read(file, table.rows(layout), layout, there, _commented(file, comments), limit, hash_tokens)


def read_jsonl(
    file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], limit: int | None, hash_tokens: int | None = None
) -> dict[str, Any]:
    """The Workload's fields; `hash_tokens` in place of the head's. Raises UsageError."""
    head, there = _commented(file, comments), set[str]()
    if is_head(first):
        head |= _checked(file, json.loads(first)["workload"])
        first = ""

    def noted() -> Iterator[dict[str, Any]]:
        for entry in json_lines(file, lines, first):
            there.update(entry)
            yield entry

    layout = Layout({name: name for name in (*REQUIRED, *_MORE)}, Seconds())
    return _read(file, json_rows(file, noted(), layout), layout, there, head, limit, hash_tokens)


def _read(
    file: TextFile,
    rows: Iterator[TraceRow],
    layout: Layout,
    there: Collection[str],
    head: dict[str, Any],
    limit: int | None,
    hash_tokens: int | None,
) -> dict[str, Any]:
    """`there`: the optional columns, of which JSON's are known when the rows are."""
    requests = RequestRows(file, {name: name for name in (*REQUIRED, *_MORE)}, limit, strict=True)
    for row in rows:
        if row.labels.get("after", -1) >= 0 and "concurrency" in head:
            raise file.wrong("a closed loop (concurrency in the head) has none; requests come one after another anyway", "after")
        if hash_tokens is not None:
            _fitting(file, row, hash_tokens)
        elif row.hash_tokens is not None:
            _one_unit(file, head, row.hash_tokens)
        add(row, requests, layout, file)
        if requests.full:
            break
    for name in OPTIONAL:
        if name in there:
            requests.labels(name)
    shares = "hash_ids" in there
    if hash_tokens is not None and not shares:
        raise UsageError(f"{file.path}: hash_tokens {hash_tokens}: the file has no ids of prefixes, which it would be about")
    return {**requests.fields(shares=shares), **head} | ({} if hash_tokens is None else {"hash_tokens": hash_tokens})


def _fitting(file: TextFile, row: TraceRow, hash_tokens: int) -> None:
    """Ids go as far as prompt and output do."""
    context = row.prompt_tokens + row.output_tokens
    if len(row.ids) > -(-context // hash_tokens):
        more = f"{len(row.ids)} ids of {hash_tokens} tokens each are more than the {context:,} tokens of the request"
        raise file.wrong(more, "hash_ids")


def _one_unit(file: TextFile, head: dict[str, Any], hash_tokens: int) -> None:
    """A row's own `hash_tokens`; all have to agree."""
    if hash_tokens != head.setdefault("hash_tokens", hash_tokens):
        raise file.wrong(f"{hash_tokens}, but {head['hash_tokens']} above; one unit for the whole file", "hash_tokens")
    if hash_tokens < 1:
        raise file.wrong(f"{hash_tokens} tokens; must be at least 1", "hash_tokens")


def is_head(line: str) -> bool:
    """Whether a JSONL line is the head of a generic file, not a request."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["workload"] and isinstance(value["workload"], dict)


def _commented(file: TextFile, comments: Sequence[str]) -> dict[str, Any]:
    """What the `# key: value` lines say; other comments are passed over."""
    said: dict[str, Any] = {}
    for comment in comments:
        key, colon, text = comment.lstrip("# ").partition(":")
        if colon and key.strip() in HEAD:
            try:
                said[key.strip()] = json.loads(text)
            except ValueError:
                said[key.strip()] = text.strip()
    return _checked(file, said)


def _checked(file: TextFile, head: Mapping[str, Any]) -> dict[str, Any]:
    """The head with its values' types made sure of."""
    checked: dict[str, Any] = {}
    for key, value in head.items():
        kind = HEAD.get(key)
        if kind is None:
            raise file.wrong(f"unknown key; there are: {', '.join(HEAD)}", key)
        least = 0 if key == "dropped" else 1
        if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and value < least):
            wanted = {int: f"a whole number of at least {least}", str: "text", list: "a list of text"}[kind]
            raise file.wrong(f"{value!r} is not {wanted}", key)
        checked[key] = tuple(map(str, value)) if kind is list else value
    return checked
