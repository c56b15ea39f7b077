"""A workload as a file in pdlab's own format (see `generic`), which `readers.load` gives back identically."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.columns import REQUIRED
from pdlab.workload.requests import OPTIONAL
from pdlab.workload.text import COMPRESSED, new_text_file

_FORMS = (".csv", ".jsonl")


def check_writable(path: Path) -> None:
    """Raises UsageError if `write` would refuse the path's suffix."""
    if not path.name.endswith(tuple(form + packing for form in _FORMS for packing in ("", *COMPRESSED))):
        raise UsageError(f"{path}: the suffix says what to write: .csv or .jsonl, and .gz or .zst after it to compress")


def write(workload: Workload, path: Path) -> None:
    """Write CSV or JSONL, by the suffix, compressed if .gz or .zst follows; whole or not at all. Raises UsageError."""
    check_writable(path)
    with new_text_file(path) as file:
        _form(path)(workload, file)


def _form(path: Path) -> Callable[[Workload, io.TextIOBase], None]:
    name = path.name
    for packing in COMPRESSED:
        name = name.removesuffix(packing)
    return _write_csv if name.endswith(".csv") else _write_jsonl


def _write_csv(workload: Workload, file: io.TextIOBase) -> None:
    file.writelines(f"# {key}: {json.dumps(value)}\n" for key, value in _head(workload).items())
    rows = csv.writer(file, lineterminator="\n")
    names = _names(workload)
    rows.writerow(names)
    for row in _rows(workload):
        cells = [" ".join(map(str, value)) if isinstance(value, tuple) else value for value in row]
        rows.writerow(["" if value is None else value for value in cells])


def _write_jsonl(workload: Workload, file: io.TextIOBase) -> None:
    file.write(json.dumps({"workload": _head(workload)}) + "\n")
    names = _names(workload)
    for row in _rows(workload):
        file.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")


def _head(workload: Workload) -> dict[str, Any]:
    """What is true of all requests; what is as it would be without saying is not said."""
    head: dict[str, Any] = {"name": workload.name, "hash_tokens": workload.hash_tokens}
    said = {"concurrency": workload.concurrency, "dropped": workload.dropped, "notes": list(workload.notes)}
    return head | {key: value for key, value in said.items() if value}


def _names(workload: Workload) -> list[str]:
    optional = [name for name in OPTIONAL if getattr(workload, name) is not None]
    return [*REQUIRED, *optional, *(["hash_ids"] if workload.hashes is not None else [])]


def _rows(workload: Workload) -> Iterator[tuple[Any, ...]]:
    """Plain Python values in the order of `_names`; None where a row does not say. Floats keep every bit: they are written by repr."""
    columns = [getattr(workload, name) for name in _names(workload) if name != "hash_ids"]
    for index in range(len(workload)):
        values = [column[index].item() for column in columns]
        row = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
        yield tuple(row) if workload.hashes is None else (*row, tuple(map(int, workload.hashes[index])))
