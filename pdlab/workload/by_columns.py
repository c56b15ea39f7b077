"""Files read by their columns, CSV and JSON: which columns count, how they are read, and what is done with the rows.

What was understood is said in one line, the workload's `reading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.file_kinds import TRACE, in_place_of, kind_of_file
from pdlab.core.types import UsageError
from pdlab.workload import mooncake
from pdlab.workload.columns import FORMS, LABELS, REQUIRED, ROLES, TURNS, Form, Wanted, known_columns
from pdlab.workload.csv_rows import CsvTable
from pdlab.workload.hash_unit import USUAL, HashUnit
from pdlab.workload.json_rows import json_rows, peek
from pdlab.workload.requests import OPTIONAL, RequestRows, by_arrival
from pdlab.workload.rows import Layout, TraceRow, collect, missing
from pdlab.workload.text import TextFile
from pdlab.workload.times import PER_S, Clock, named_unit

_COLUMNS = frozenset({"arrival_s", "prompt_tokens", "output_tokens", "hashes", *OPTIONAL})
_LONG_GAP_S, _SHORT_GAP_S = 100.0, 0.005  # seconds between requests that may be milliseconds, and milliseconds that may be seconds


def csv_fields(file: TextFile, lines: Iterator[str], header: str, form: Form | None, limit: int | None, wanted: Wanted) -> dict[str, Any]:
    """The Workload's fields, of a file whose columns are those of `form`, or None: told by their names. Raises UsageError."""
    table = CsvTable(file, lines, header)
    columns = _columns(file, table.columns, table.columns, form, wanted)
    lower = {name.lower() for name in table.columns}
    columns = {role: name for role, name in columns.items() if role in (*REQUIRED, *wanted.columns) or name.lower() in lower}
    _pair(file, columns, wanted)
    return _fields(file, form, columns, limit, wanted, table.rows, names=table.columns)


def json_fields(file: TextFile, entries: Iterator[dict[str, Any]], form: Form | None, limit: int | None, wanted: Wanted) -> dict[str, Any]:
    """The same of JSON objects. Raises UsageError."""
    first, entries = peek(file, entries)
    if not first:
        raise UsageError(f"{file.path}: no requests in it")
    names = list(dict.fromkeys(name for entry in first for name in entry))
    paths = list(dict.fromkeys(path for entry in first for path in _paths(entry)))
    columns = _columns(file, names, paths, form, wanted)
    _pair(file, columns, wanted)
    return _fields(file, form, columns, limit, wanted, lambda layout: json_rows(file, entries, layout), names=names)


def _paths(entry: dict[str, Any], within: str = "", depth: int = 4) -> Iterator[str]:
    for key, value in entry.items():
        if isinstance(value, dict) and depth:
            yield from _paths(value, f"{within}{key}.", depth - 1)
        else:
            yield within + key


def _columns(file: TextFile, names: Sequence[str], paths: Sequence[str], form: Form | None, wanted: Wanted) -> dict[str, str]:
    """Role to name. `names` are those of the first rows, `paths` of all that is inside them."""
    if form is not None:
        columns = dict(form.columns)
        if form is FORMS["mooncake"]:  # people's own files of its form
            absent = [role for role in ("arrival_s", *TURNS) if columns[role] not in names]
            columns |= known_columns(names, dict.fromkeys(set(ROLES) - set(absent), ""))
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
        if other := in_place_of(file.path, kind_of_file(file.path), TRACE):
            return UsageError(other)
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


Rows = Callable[[Layout], Iterator[TraceRow]]


def _fields(
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
    in_steps = form is FORMS["mooncake"] and wanted.hash_tokens in (None, USUAL)
    unit = None
    if "hash_ids" in columns:
        stated = wanted.hash_tokens or (form.hash_tokens if form else None)
        unit = HashUnit(file, columns["hash_ids"], stated, fewer=wanted.hash_tokens is None)
    turns = "session_id" in columns and columns["session_id"] in names
    requests = RequestRows(file, columns, None if shuffled else limit, ordered=not (shuffled or turns), steps=in_steps, unit=unit)
    collect(rows(layout), requests, layout, file)
    fields, notes = requests.fields(shares=False), []
    if unit is not None and unit.rows:
        fields["hash_tokens"] = unit.tokens
        fields["hashes"] = requests.hashes.cut((fields["prompt_tokens"] // unit.tokens).tolist())
        if in_steps and not turns and unit.like_mooncake and unit.rows >= len(requests) and mooncake.in_steps(fields["arrival_s"]):
            fields["arrival_s"] = mooncake.spread(fields["arrival_s"])
            notes.append(mooncake.NOTE)
    if mistake := _for_nothing(columns, clock, fields, wanted):
        raise UsageError(f"{file.path}: {mistake}")
    reading = _reading(form.name if form else "table", columns, clock, {"gap_s": gap_unit, "delay_s": delay_unit}, fields, names)
    return _ended(by_arrival(fields), notes, limit) | {"reading": reading}


def _for_nothing(columns: dict[str, str], clock: Clock, fields: dict[str, Any], wanted: Wanted) -> str | None:
    """What the user says of the file that no row has."""
    if wanted.hash_tokens is not None and "hashes" not in fields:
        return f"hash_tokens {wanted.hash_tokens}: the file has no ids of prefixes, which it would be about"
    if wanted.time_unit and clock.dates and not {"delay_s", "gap_s"} & set(columns):
        return f"time_unit {wanted.time_unit}: the times are dates, which have none; leave it out"
    for role in set(wanted.columns) & {*LABELS, "hash_ids"}:
        if ("hashes" if role == "hash_ids" else role) not in fields:
            return f"columns.{role}: no row has {columns[role]}"
    return None


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


def _reading(form: str, columns: dict[str, str], clock: Clock, units: dict[str, str], fields: dict[str, Any], names: Sequence[str]) -> str:
    """What was understood, in one line; of the `names` there are, those that pdlab would have a use for and does not take by itself."""
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
    unasked = [name for name in names if name in LABELS and name not in columns.values()]
    more = f"; not {', '.join(unasked)}, which columns: {{{unasked[0]}: {unasked[0]}}} takes" if unasked else ""
    return f"{form}: {', '.join(said)}{more}"


def _doubt(column: str, clock: Clock, times_s: NDArray[np.float64]) -> str:
    """What to say where times from a start may be of another unit than the usual one of their format."""
    if named_unit(column)[1] or len(times_s) < 2 or clock.chosen:
        return ""
    gap_s = float(times_s.max() - times_s.min()) / (len(times_s) - 1)
    if clock.said == "relative s" and gap_s > _LONG_GAP_S and not np.any(times_s % 1):
        return "; time_unit: ms if they are milliseconds"
    return "; time_unit: s if they are seconds" if clock.said == "relative ms" and 0.0 < gap_s < _SHORT_GAP_S else ""
