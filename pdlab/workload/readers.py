"""Traces as published, and pdlab's own format: one function a format, chosen by name or by a file's first line.

    azure      CSV    TIMESTAMP, ContextTokens, GeneratedTokens                       (Azure LLM inference traces, 2023 and 2024)
    burstgpt   CSV    Timestamp, Model, Request tokens, Response tokens, ...          (BurstGPT)
    mooncake   JSONL  timestamp (ms), input_length, output_length, hash_ids           (Mooncake, FAST'25; units of 512 tokens)
    bailian    JSONL  chat_id, ..., timestamp (s), input_length, output_length, ...   (Alibaba Bailian; units of 16 tokens)
    generic    both   arrival_s, prompt_tokens, output_tokens, and any of priority, ttft_slo_s, tpot_slo_s, n, best_of, after, hash_ids

Published times are kept, counted from the first request. Rows without a prompt or an output (failures) are dropped and counted; in the
generic format they are mistakes. What `writer.write` writes, `load` gives back identically.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdlab.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.chains import Chains
from pdlab.workload.generic import REQUIRED, is_head, read_csv, read_jsonl
from pdlab.workload.rows import Lengths, Table, objects, whole
from pdlab.workload.text import COMPRESSED, Progress, TextFile

FORMATS = ("azure", "burstgpt", "mooncake", "bailian", "generic")

_MOONCAKE_UNIT, _BAILIAN_UNIT = 512, 16  # tokens
_MOONCAKE_STEP_S, _MOONCAKE_JITTER_S = 3.0, 0.01


def load(path: Path, *, format: str = "auto", requests: int | None = None, progress: Progress | None = None) -> Workload:
    """The workload in a trace file; plain, gzip or zstd.

    `requests` stops reading there, however long the file is; where the file has fewer, a note says so. `progress` is called with
    (bytes read, bytes of the file) as it goes.

    Raises UsageError, one line naming file, line and column, for whatever is wrong with the file.
    """
    if format not in ("auto", *FORMATS):
        raise UsageError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
    if requests is not None and requests < 1:
        raise UsageError(f"requests {requests}: must be at least 1")
    with TextFile(path, progress) as file:
        lines = iter(file)
        comments, first = _head(file, lines)
        read = _reader(file, first, format)
        fields: dict[str, Any] = read(file, lines, first, comments, requests)
        found = len(fields["arrival_s"])
        notes = tuple(fields.get("notes", ()))
        if not found:
            dropped = fields.get("dropped", 0)
            why = f"all {dropped} rows have no prompt or no output" if dropped else "it ends after the header"
            raise UsageError(f"{path}: no requests in it; {why}")
    if requests is not None and found < requests:
        notes = (*notes, f"{requests} requests were asked for, {path.name} has {found}")
    fields |= {"notes": notes, "arrival_s": np.array(fields["arrival_s"], np.float64)}
    fields |= {name: np.array(fields[name], np.int32) for name in ("prompt_tokens", "output_tokens")}
    try:
        return Workload(**{"name": _stem(path), **fields})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


Reader = Callable[[TextFile, Iterator[str], str, Sequence[str], int | None], dict[str, Any]]


def _head(file: TextFile, lines: Iterator[str]) -> tuple[list[str], str]:
    """The comment lines at the top, and the first line that is none."""
    comments = []
    for line in lines:
        if line.startswith("#"):
            comments.append(line)
        elif line.strip():
            return comments, line
    raise UsageError(f"{file.path}: empty; a trace has a header line (CSV) or one JSON object a line (JSONL)")


def _reader(file: TextFile, first: str, format: str) -> Reader:
    """By name; else by the names in the first line."""
    is_json = first.lstrip().startswith(("{", "["))
    if format == "auto":
        format = _format_of(file, first, is_json)
    elif is_json != (format in ("mooncake", "bailian")) and format != "generic":
        raise file.wrong(f"this is {'JSON' if is_json else 'not JSON'}, which the format {format} {'is not' if is_json else 'is'}")
    if format == "generic":
        return _generic_jsonl if is_json else _generic_csv
    return {"azure": _azure, "burstgpt": _burstgpt, "mooncake": _mooncake, "bailian": _bailian}[format]


def _format_of(file: TextFile, first: str, is_json: bool) -> str:
    if is_json:
        try:
            found = json.loads(first)
        except ValueError as error:
            position = error.pos + 1 if isinstance(error, json.JSONDecodeError) else None
            raise file.wrong(f"not JSON: {getattr(error, 'msg', error)}", position) from None
        if not isinstance(found, dict):
            raise file.wrong("not a JSON object; a JSONL trace has one on every line")
        names = list(found)
        formats = {"bailian": _BAILIAN, "mooncake": _MOONCAKE, "generic": REQUIRED}
    else:
        names = [name.strip() for name in first.strip().split(",")]
        formats = {"azure": _AZURE, "burstgpt": _BURSTGPT, "generic": REQUIRED}
    lower = {name.lower() for name in names}
    if is_json and is_head(first):
        return "generic"
    shared = {format: sum(name.lower() in lower for name in wanted) / len(wanted) for format, wanted in formats.items()}
    best = max(shared, key=lambda format: shared[format])
    if shared[best] > 0.5:
        return best
    known = "; ".join(f"{format}: {', '.join(wanted)}" for format, wanted in formats.items())
    raise file.wrong(f"no known format has the columns {', '.join(names)[:120]} ({known})")


def _stem(path: Path) -> str:
    name = path.name
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name.rpartition(".")[0] or name


# ---------------------------------------------------------------- one format a function

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_BAILIAN = ("chat_id", *_MOONCAKE)


def _azure(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], requests: int | None) -> dict[str, Any]:
    table = Table(file, lines, first)
    time, prompt, output = table.find(*_AZURE)
    lengths = Lengths(file, _AZURE, requests)
    clock_s = _Clock()
    for row in table.rows():
        try:
            lengths.add(clock_s(row[time]), int(row[prompt]), int(row[output]))
        except ValueError:
            raise table.refused(row, {time: clock_s, prompt: whole, output: whole}) from None
        if lengths.full:
            break
    return _published(lengths)


def _burstgpt(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], requests: int | None) -> dict[str, Any]:
    table = Table(file, lines, first)
    time, prompt, output = table.find(*_BURSTGPT)
    lengths = Lengths(file, _BURSTGPT, requests)
    for row in table.rows():
        try:
            lengths.add(float(row[time]), whole(row[prompt]), whole(row[output]))
        except (ValueError, OverflowError):
            raise table.refused(row, {time: float, prompt: whole, output: whole}) from None
        if lengths.full:
            break
    return _published(lengths)


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _mooncake(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], requests: int | None) -> dict[str, Any]:
    """Times in steps of 3 s are spread within the step; reading goes on to the end of the step in which `requests` are reached, so that
    a part of a trace is the head of the whole. The last id of a prompt is of a partial unit, unless its length is a multiple."""
    lengths = Lengths(file, _MOONCAKE, None)
    hashes = Chains()
    for row in objects(file, lines, first, _MooncakeRow):
        arrival_s = row.timestamp / 1e3
        if (
            requests is not None
            and len(hashes) >= requests
            and round(arrival_s / _MOONCAKE_STEP_S) > round(lengths.arrival_s[-1] / _MOONCAKE_STEP_S)
        ):
            break
        if lengths.add(arrival_s, row.input_length, row.output_length):
            hashes.append(row.hash_ids[: row.input_length // _MOONCAKE_UNIT])
    times_s = np.array(lengths.arrival_s)
    steps = np.round(times_s / _MOONCAKE_STEP_S)
    if np.all(np.abs(times_s - steps * _MOONCAKE_STEP_S) <= _MOONCAKE_JITTER_S):
        times_s = _spread(steps) * _MOONCAKE_STEP_S
    fields = _published(lengths) | {"arrival_s": times_s - times_s[:1], "hashes": hashes}
    columns = ("arrival_s", "prompt_tokens", "output_tokens", "hashes")
    return fields | {name: fields[name][:requests] for name in columns} | {"hash_tokens": _MOONCAKE_UNIT}


class _BailianRow(msgspec.Struct):
    chat_id: int | str
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _bailian(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], requests: int | None) -> dict[str, Any]:
    """Turns of a chat keep their own times: what `parent_chat_id` says is in them already, and in the shared `hash_ids`."""
    lengths = Lengths(file, _MOONCAKE, requests)
    hashes = Chains()
    for row in objects(file, lines, first, _BailianRow):
        if lengths.add(row.timestamp, row.input_length, row.output_length):
            hashes.append(row.hash_ids[: row.input_length // _BAILIAN_UNIT])
        if lengths.full:
            break
    return _published(lengths) | {"hashes": hashes, "hash_tokens": _BAILIAN_UNIT}


def _generic_csv(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], requests: int | None) -> dict[str, Any]:
    return read_csv(file, Table(file, lines, first), comments, requests)


def _generic_jsonl(file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], requests: int | None) -> dict[str, Any]:
    return read_jsonl(file, lines, first, comments, requests)


def _published(lengths: Lengths) -> dict[str, Any]:
    """Times from the first request on, and a note of what was dropped."""
    arrival_s = np.array(lengths.arrival_s)
    dropped = lengths.dropped
    return {
        "arrival_s": arrival_s - arrival_s[:1],
        "prompt_tokens": lengths.prompt_tokens,
        "output_tokens": lengths.output_tokens,
        "dropped": dropped,
        "notes": (f"{dropped} of {dropped + len(arrival_s)} rows dropped: no prompt or no output",) if dropped else (),
    }


def _spread(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Requests of one step at places drawn uniformly within it, in the order of the file: what a Poisson process looks like once the
    number in each step is known. The draws are the same for every reading, and a file's head gets those of the whole."""
    _, counts = np.unique(steps, return_counts=True)
    rng = np.random.default_rng(0)
    spread: NDArray[np.float64] = steps + np.concatenate([np.zeros(0), *(np.sort(rng.random(count)) for count in counts)])
    return spread


class _Clock:
    """a time such as 2023-11-16 18:15:46.6805900"""

    def __init__(self) -> None:
        self._minutes: dict[str, float] = {}

    def __call__(self, text: str) -> float:
        """Seconds since 1970 UTC. Only the minute is parsed as a date, once: a year of rows has half a million minutes."""
        minute = self._minutes.get(text[:16])
        if minute is None:
            minute = datetime.fromisoformat(f"{text[:16]}:00+00:00").timestamp()
            self._minutes[text[:16]] = minute
        seconds, _, zone = text[16:].partition("+")
        if seconds[:1] not in ("", ":") or zone.strip(":0"):
            raise ValueError(text)
        return minute + float(seconds[1:] or 0)
