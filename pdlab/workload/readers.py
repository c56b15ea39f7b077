"""Traces as published, as tools export them, as anybody writes them, and in pdlab's own format: a file becomes a Workload.

    azure      CSV    TIMESTAMP, ContextTokens, GeneratedTokens                       (Azure LLM inference traces, 2023 and 2024)
    burstgpt   CSV    Timestamp, Model, Request tokens, Response tokens, ...          (BurstGPT)
    vidur      CSV    arrived_at, num_prefill_tokens, num_decode_tokens               (Vidur)
    splitwise  CSV    ..., arrival_timestamp, batch_size, prompt_size, token_size     (splitwise-sim)
    mooncake   JSONL  timestamp (ms), input_length, output_length, hash_ids, and session_id, delay (ms) of later turns (Mooncake; AIPerf)
    bailian    JSONL  chat_id, ..., timestamp (s), input_length, output_length, ...   (Alibaba Bailian; units of 16 tokens)
    aiperf     JSONL  profile_export.jsonl, what AIPerf has measured of each request
    guidellm   JSON   benchmarks.json, what GuideLLM has measured
    vllm       text   the log of a vLLM server that logs its requests
    generic    both   arrival_s, prompt_tokens, output_tokens, and more: see `generic`
    table      both   any other, by the names that everybody uses, or as the user says: see `columns`

`auto` tells which by what the file begins with; a Parquet file is a table. Times count from the first request, but for the generic
format's. Rows without a prompt or an output (failures) are dropped and counted; in the generic format they are mistakes. What
`writer.write` writes, `load` gives back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from pdlab.core.file_kinds import TRACE, in_place_of, kind_by_keys
from pdlab.core.types import UsageError
from pdlab.workload import generic, guidellm, vllm_log
from pdlab.workload.base import Workload
from pdlab.workload.by_columns import csv_fields, json_fields
from pdlab.workload.columns import FORMS, REQUIRED, Wanted, form_of, known_columns
from pdlab.workload.csv_rows import header_names
from pdlab.workload.json_rows import by_column, json_document, json_lines
from pdlab.workload.parquet import parquet_rows
from pdlab.workload.text import PACKED, PARQUET, Progress, TextFile

FORMATS = (*FORMS, "vllm", "generic", "table")
_LOG = re.compile(r"\s*\[\d{4}-\d\d-\d\d[ T]\d\d:")


def load(
    path: Path, *, format: str = "auto", requests: int | None = None, wanted: Wanted | None = None, progress: Progress | None = None
) -> Workload:
    """The workload in a trace file; plain or packed, or Parquet. `wanted`: what the user says of it.

    `requests` stops reading there, however long the file is; where the file has fewer, a note says so. `progress` is called with
    (bytes read, bytes of the file) as it goes.

    Raises UsageError, one line naming file, line and column, for whatever is wrong with the file.
    """
    if format not in ("auto", *FORMATS):
        raise UsageError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
    if requests is not None and requests < 1:
        raise UsageError(f"requests {requests}: must be at least 1")
    with TextFile(path, progress) as file:
        if file.magic == PARQUET:
            fields = _of_parquet(file, format, requests, wanted or Wanted())
        else:
            lines = iter(file)
            comments, first = _head(file, lines)
            fields = _fields(file, lines, first, comments, format, requests, wanted or Wanted())
    count = len(fields["arrival_s"])
    if not count:
        dropped = fields.get("dropped", 0)
        why = f"all {dropped} rows have no prompt or no output" if dropped else "it ends after the header"
        raise UsageError(f"{path}: no requests in it; {why}")
    if requests is not None and count < requests:
        fields["notes"] = (*fields.get("notes", ()), f"{requests} requests were asked for, {path.name} has {count}")
    try:
        return Workload(**{"name": _stem(path), **fields})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _head(file: TextFile, lines: Iterator[str]) -> tuple[list[str], str]:
    """The comment lines at the top, and the first line that is none."""
    comments = []
    for line in lines:
        if line.startswith("#"):
            comments.append(line)
        elif line.strip():
            return comments, line
    raise UsageError(f"{file.path}: empty; a trace has a header line (CSV) or one JSON object a line (JSONL)")


def _stem(path: Path) -> str:
    name = path.name
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return name.rpartition(".")[0] or name


def _fields(
    file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], format: str, limit: int | None, wanted: Wanted
) -> dict[str, Any]:
    """The Workload's fields."""
    if _LOG.match(first) and format in ("auto", "table", "generic") and not vllm_log.begins(first):
        if log := vllm_log.ahead(lines):
            return vllm_log.read(file, chain(log, lines), limit, wanted)
        raise file.wrong("a log, and not vLLM's: of SGLang's, take the JSON that --log-requests-format json writes, or a benchmark's file")
    is_json = first.lstrip().startswith("{") or (first.lstrip().startswith("[") and not _LOG.match(first))
    if format in FORMS and is_json != FORMS[format].json:
        raise file.wrong(f"this is {'JSON' if is_json else 'not JSON'}, which the format {format} {'is not' if is_json else 'is'}")
    if format == "vllm" or (format == "auto" and not is_json and vllm_log.begins(first)):
        return vllm_log.read(file, chain((first,), lines), limit, wanted)
    if not is_json:
        return _of_csv(file, lines, first, comments, format, limit, wanted)
    if _is_document(first):
        return _of_document(file, lines, first, limit, wanted)
    entry = next(json_lines(file, iter(()), first))
    if _is_generic(file, list(entry), format, wanted) or (format == "auto" and generic.is_head(first)):
        return generic.read_jsonl(file, lines, first, comments, limit, wanted.hash_tokens)
    form = FORMS.get(format) or (form_of(list(entry), json=True) if format == "auto" else None)
    if form is None and not wanted.columns and (instead := in_place_of(file.path, kind_by_keys(entry), TRACE)):
        raise UsageError(instead)
    return json_fields(file, json_lines(file, lines, first), form, limit, wanted)


def _is_generic(file: TextFile, names: Sequence[str], format: str, wanted: Wanted) -> bool:
    """pdlab's own format; what the user says of the columns makes a file anybody's."""
    said = bool(wanted.columns) or wanted.time_unit is not None
    if format == "generic" and said:
        raise UsageError(f"{file.path}: the format generic has columns and units of its own; with columns or time_unit, leave format out")
    return format == "generic" or (format == "auto" and not said and {name.lower() for name in names} >= set(REQUIRED))


def _of_csv(
    file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], format: str, limit: int | None, wanted: Wanted
) -> dict[str, Any]:
    names = header_names(first)
    if _is_generic(file, names, format, wanted):
        return generic.read_csv(file, lines, first, comments, limit, wanted.hash_tokens)
    form = FORMS.get(format) or (form_of(names, json=False) if format == "auto" else None)
    if form is None and format == "auto" and not wanted.columns and not _some_known(names):
        header = file.line
        if log := vllm_log.ahead(lines):
            return vllm_log.read(file, chain(log, lines), limit, wanted)
        file.line = header
    return csv_fields(file, lines, first, form, limit, wanted)


def _some_known(names: Sequence[str]) -> bool:
    try:
        return bool(known_columns(names))
    except UsageError:
        return True


def _is_document(first: str) -> bool:
    """Whether a file that begins like that is one JSON value, and not one on each line."""
    if first.lstrip().startswith("["):
        return True
    try:
        value = msgspec.json.decode(first)
    except msgspec.DecodeError as error:
        return "truncated" in str(error) and first.count('"') <= 2
    return isinstance(value, dict) and (guidellm.KEY in value or by_column(value) is not None)


def _of_document(file: TextFile, lines: Iterator[str], first: str, limit: int | None, wanted: Wanted) -> dict[str, Any]:
    """A list of requests, or what GuideLLM writes."""
    value = json_document(file, lines, first)
    if isinstance(value, list) and not (value and isinstance(value[0], dict)):
        raise file.wrong("not a JSON object; a JSONL trace has one on every line")
    file.counted, file.line = "request", 0
    if isinstance(value, dict) and (rows := by_column(value)) is not None:
        return json_fields(file, _listed(file, rows), None, limit, wanted)
    if isinstance(value, dict):
        return json_fields(file, guidellm.requests(file, value), FORMS["guidellm"], limit, wanted)
    return json_fields(file, _listed(file, value), form_of(list(value[0]), json=True), limit, wanted)


def _of_parquet(file: TextFile, format: str, limit: int | None, wanted: Wanted) -> dict[str, Any]:
    """Its rows as if they were JSON objects."""
    if format not in ("auto", "table"):
        raise UsageError(f"{file.path}: this is Parquet, which the format {format} is not")
    return json_fields(file, parquet_rows(file), None, limit, wanted)


def _listed(file: TextFile, value: Any) -> Iterator[dict[str, Any]]:
    for entry in value:
        file.line += 1
        if not isinstance(entry, dict):
            raise file.wrong("not a JSON object")
        yield entry
