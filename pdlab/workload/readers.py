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

`auto` tells which by what the file begins with. Times count from the first request, but for the generic format's. Rows without a prompt
or an output (failures) are dropped and counted; in the generic format they are mistakes. What `writer.write` writes, `load` gives back.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdlab.types import UsageError
from pdlab.workload import generic, guidellm, mooncake, vllm_log
from pdlab.workload.base import Workload
from pdlab.workload.columns import FORMS, LABELS, REQUIRED, TURNS, Form, Wanted, form_of, known_columns
from pdlab.workload.hash_unit import HashUnit
from pdlab.workload.requests import OPTIONAL, Requests, by_arrival
from pdlab.workload.rows import Layout, Row, Table, collect, delimiter, json_document, json_lines, json_rows, missing
from pdlab.workload.text import COMPRESSED, Progress, TextFile
from pdlab.workload.times import PER_S, Clock, named_unit

FORMATS = (*FORMS, "vllm", "generic", "table")
_COLUMNS = frozenset({"arrival_s", "prompt_tokens", "output_tokens", "hashes", *OPTIONAL})
_LONG_GAP_S, _SHORT_GAP_S = 100.0, 0.005  # seconds between requests that may be milliseconds, and milliseconds that may be seconds


def load(
    path: Path, *, format: str = "auto", requests: int | None = None, wanted: Wanted | None = None, progress: Progress | None = None
) -> Workload:
    """The workload in a trace file; plain, gzip or zstd. `wanted`: what the user says of it.

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
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name.rpartition(".")[0] or name


def _fields(
    file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], format: str, limit: int | None, wanted: Wanted
) -> dict[str, Any]:
    """The Workload's fields."""
    is_json = first.lstrip().startswith(("{", "["))
    if format in FORMS and is_json != FORMS[format].json:
        raise file.wrong(f"this is {'JSON' if is_json else 'not JSON'}, which the format {format} {'is not' if is_json else 'is'}")
    if format == "vllm" or (format == "auto" and not is_json and vllm_log.begins(first)):
        return vllm_log.read(file, chain((first,), lines), limit, wanted)
    if not is_json:
        return _of_csv(file, lines, first, comments, format, limit, wanted)
    if _is_document(first):
        value = json_document(file, lines, first)
        if isinstance(value, list) and not (value and isinstance(value[0], dict)):
            raise file.wrong("not a JSON object; a JSONL trace has one on every line")
        file.counted, file.line = "request", 0
        entries = guidellm.requests(file, value) if isinstance(value, dict) else _listed(file, value)
        form = FORMS["guidellm"] if isinstance(value, dict) else None
        return _of_json(file, entries, form, "guidellm" if form else format, limit, wanted)
    if _is_generic(format, lambda: generic.is_head(first) or _own(list(next(json_lines(file, iter(()), first)))), wanted):
        return generic.read_jsonl(file, lines, first, comments, limit, wanted.hash_tokens)
    return _of_json(file, json_lines(file, lines, first), FORMS.get(format), format, limit, wanted)


def _is_generic(format: str, own: Callable[[], bool], wanted: Wanted) -> bool:
    """pdlab's own format; what the user says of the columns makes a file anybody's."""
    return format == "generic" or (format == "auto" and not wanted.columns and wanted.time_unit is None and own())


def _own(names: Sequence[str]) -> bool:
    return {name.lower() for name in names} >= set(REQUIRED)


# ---------------------------------------------------------------- CSV and JSON by their columns


def _of_csv(
    file: TextFile, lines: Iterator[str], first: str, comments: Sequence[str], format: str, limit: int | None, wanted: Wanted
) -> dict[str, Any]:
    names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter(first)))]
    if _is_generic(format, lambda: _own(names), wanted):
        return generic.read_csv(file, lines, first, comments, limit, wanted.hash_tokens)
    form = FORMS.get(format) or (form_of(names, json=False) if format == "auto" else None)
    if form is None and format == "auto" and not wanted.columns and not _some_known(names):
        header = file.line
        if log := vllm_log.ahead(lines):
            return vllm_log.read(file, chain(log, lines), limit, wanted)
        file.line = header
    columns = _columns(file, names, names, form, wanted)
    table = Table(file, lines, first)
    lower = {name.lower() for name in names}
    columns = {role: name for role, name in columns.items() if role in (*REQUIRED, *wanted.columns) or name.lower() in lower}
    _pair(file, columns, wanted)
    return _by_columns(file, form, columns, limit, wanted, table.rows, names=table.columns)


def _some_known(names: Sequence[str]) -> bool:
    try:
        return bool(known_columns(names))
    except UsageError:
        return True


def _of_json(
    file: TextFile, entries: Iterator[dict[str, Any]], form: Form | None, format: str, limit: int | None, wanted: Wanted
) -> dict[str, Any]:
    entry = next(entries, None)
    if entry is None:
        raise UsageError(f"{file.path}: no requests in it")
    names, paths = list(entry), list(_paths(entry))
    form = form or (form_of(names, json=True) if format == "auto" else None)
    columns = _columns(file, names, paths, form, wanted)
    if form is None and "session_id" in columns:
        columns.setdefault("delay_s", "delay")  # the first turn has none
    _pair(file, columns, wanted)
    return _by_columns(file, form, columns, limit, wanted, lambda layout: json_rows(file, chain((entry,), entries), layout), names=names)


def _is_document(first: str) -> bool:
    """Whether a file that begins like that is one JSON value, and not one on each line."""
    if first.lstrip().startswith("["):
        return True
    try:
        value = msgspec.json.decode(first)
    except msgspec.DecodeError as error:
        return "truncated" in str(error) and first.count('"') <= 2
    return isinstance(value, dict) and guidellm.KEY in value


def _listed(file: TextFile, value: Any) -> Iterator[dict[str, Any]]:
    for entry in value:
        file.line += 1
        if not isinstance(entry, dict):
            raise file.wrong("not a JSON object")
        yield entry


def _paths(entry: dict[str, Any], within: str = "", depth: int = 4) -> Iterator[str]:
    for key, value in entry.items():
        if isinstance(value, dict) and depth:
            yield from _paths(value, f"{within}{key}.", depth - 1)
        else:
            yield within + key


def _columns(file: TextFile, names: Sequence[str], paths: Sequence[str], form: Form | None, wanted: Wanted) -> dict[str, str]:
    """Role to name. `names` are those of the first row, `paths` of all that is inside them."""
    if form is not None:
        columns = dict(form.columns)
    else:
        try:
            columns = known_columns(names, wanted.columns)
            columns = known_columns(paths, {**columns, **wanted.columns}) | columns
        except UsageError as error:
            raise file.wrong(str(error)) from None
    lower = {name.lower(): name for name in (*paths, *names)}
    for role, name in wanted.columns.items():
        if name.lower() not in lower and role in REQUIRED:
            raise missing(file, name, paths)
        columns[role] = lower.get(name.lower(), name)
    if "gap_s" in columns:
        columns.pop("arrival_s" if "gap_s" in wanted.columns else "gap_s" if "arrival_s" in columns else "", None)
    for role in REQUIRED:
        if role == "arrival_s" and "gap_s" in columns:
            continue
        if role in wanted.replaced and columns.get(role, "").lower() not in lower:
            columns.pop(role, None)
        elif role not in columns:
            raise _unknown(file, role, columns, paths)
    return columns


def _pair(file: TextFile, columns: dict[str, str], wanted: Wanted) -> None:
    """Sessions without delays are of turns with times of their own, and delays without sessions of something else."""
    if len(alone := set(TURNS) & set(columns)) == 1:
        role = alone.pop()
        if role in wanted.columns:
            raise UsageError(f"{file.path}: columns.{role}: {' and '.join(TURNS)} go together; there is only one of them")
        del columns[role]


def _unknown(file: TextFile, role: str, columns: dict[str, str], names: Sequence[str]) -> UsageError:
    if not set(columns) & set(REQUIRED):
        if all(_is_number(name) for name in names):
            return file.wrong(f"no header; a line such as {','.join(REQUIRED)} says what the columns are")
        return file.wrong(
            f"no known format has the columns {', '.join(names)[:120]}; "
            f"say which is what with columns: {{{', '.join(f'{role}: NAME' for role in REQUIRED)}}}"
        )
    instead = {"arrival_s": "workload.arrival and rate draw times", "prompt_tokens": "workload.prompt draws them"}
    remedy = f"columns: {{{role}: NAME}} says which it is, or {instead.get(role, 'workload.output draws them')}"
    return UsageError(f"{missing(file, role, names)}; {remedy}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


Rows = Callable[[Layout], Iterator[Row]]


def _by_columns(
    file: TextFile, form: Form | None, columns: dict[str, str], limit: int | None, wanted: Wanted, rows: Rows, *, names: Sequence[str]
) -> dict[str, Any]:
    """The Workload's fields, of rows that say what `columns` says."""
    times = form.time_unit if form else "s"
    unit_s = wanted.time_unit or named_unit(columns.get("arrival_s", ""))[1]
    clock = Clock(unit_s, times)
    delay_unit = named_unit(columns.get("delay_s", ""))[1] or unit_s or times
    gap_unit = named_unit(columns.get("gap_s", ""))[1] or wanted.time_unit or "s"
    layout = Layout(columns, clock, PER_S[delay_unit], PER_S[gap_unit], failures=form is not None and form.failures)
    shuffled = form is not None and form.shuffled
    in_steps = form is FORMS["mooncake"] and wanted.hash_tokens in (None, 512)
    unit = None
    if "hash_ids" in columns:
        stated = wanted.hash_tokens or (form.hash_tokens if form else None)
        unit = HashUnit(file, columns["hash_ids"], stated, fewer=wanted.hash_tokens is None)
    turns = "session_id" in columns and columns["session_id"] in names
    requests = Requests(file, columns, None if shuffled else limit, ordered=not (shuffled or turns), steps=in_steps, unit=unit)
    collect(rows(layout), requests, layout, file)
    shares = unit is not None and unit.rows > 0
    if wanted.hash_tokens is not None and not shares:
        raise UsageError(f"{file.path}: hash_tokens {wanted.hash_tokens}: the file has no ids of prefixes, which it would be about")
    fields, notes = requests.fields(shares=shares), []
    if unit is not None and shares:
        fields["hash_tokens"] = unit.tokens
        fields["hashes"] = requests.hashes.cut((fields["prompt_tokens"] // unit.tokens).tolist())
        if in_steps and not turns and unit.like_mooncake and unit.rows >= len(requests) and mooncake.in_steps(fields["arrival_s"]):
            fields["arrival_s"] = mooncake.spread(fields["arrival_s"])
            notes.append(mooncake.NOTE)
    for role in set(wanted.columns) & set(LABELS) - set(fields):
        raise UsageError(f"{file.path}: columns.{role}: no row has {columns[role]}")
    reading = _reading(form.name if form else "table", columns, clock, {"gap_s": gap_unit, "delay_s": delay_unit}, fields)
    return _ended(by_arrival(fields), notes, limit) | {"reading": reading}


def _ended(fields: dict[str, Any], notes: list[str], limit: int | None) -> dict[str, Any]:
    """The first `limit` requests, times from the first on, and a note of what was dropped."""
    dropped, kept = fields["dropped"], len(fields["arrival_s"])
    if dropped:
        notes.append(f"{dropped} of {dropped + kept} rows dropped: no prompt or no output")
    fields = {name: value[:limit] if name in _COLUMNS else value for name, value in fields.items()}
    arrival_s, after = fields["arrival_s"], fields.get("after")
    first_s = arrival_s[0] if kept else 0.0
    fields["arrival_s"] = arrival_s - first_s if after is None else np.where(after < 0, arrival_s - first_s, arrival_s)
    return fields | {"notes": tuple(notes)}


def _reading(name: str, columns: dict[str, str], clock: Clock, units: dict[str, str], fields: dict[str, Any]) -> str:
    """What was understood, in one line."""
    said = [f"{role} {columns[role]}" for role in REQUIRED[1:] if role in columns]
    if "arrival_s" in columns:
        said.insert(0, f"arrival_s {columns['arrival_s']} ({clock.said}{_doubt(columns['arrival_s'], clock, fields['arrival_s'])})")
    elif "gap_s" in columns:
        said.insert(0, f"gap_s {columns['gap_s']} ({units['gap_s']} since the row above)")
    if fields.get("hashes") is not None:
        said.append(f"{columns['hash_ids']} of {fields['hash_tokens']} tokens each")
    if "after" in fields:
        said.append(f"{columns['delay_s']} ({units['delay_s']}) after the answer before, by {columns['session_id']}")
    said += [f"{role} {name}" for role, name in columns.items() if role in LABELS]
    return f"{name}: {', '.join(said)}"


def _doubt(column: str, clock: Clock, times_s: NDArray[np.float64]) -> str:
    """What to say where times from a start may be of another unit than the usual one of their format."""
    if named_unit(column)[1] or len(times_s) < 2 or clock.chosen:
        return ""
    gap_s = float(times_s.max() - times_s.min()) / (len(times_s) - 1)
    if clock.said == "relative s" and gap_s > _LONG_GAP_S and not np.any(times_s % 1):
        return "; time_unit: ms if they are milliseconds"
    return "; time_unit: s if they are seconds" if clock.said == "relative ms" and 0.0 < gap_s < _SHORT_GAP_S else ""
