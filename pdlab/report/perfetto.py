"""A run as a trace for ui.perfetto.dev or chrome://tracing: one track a request, one an instance and link, load as counters."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pdlab.core.types import Stage
from pdlab.report.stages import stretches
from pdlab.results.records import Records, Samples, Span

_REQUESTS, _LINKS, _FIRST_INSTANCE = 1, 2, 10
_CHUNK = 4096


def write_trace(
    path: Path, records: Records, *, spans: Iterable[Span] = (), samples: Samples | None = None, max_requests: int = 20_000
) -> None:
    """Write Chrome trace events as JSON, compressed where `path` ends in .gz; the file appears when it is whole.

    Of more than `max_requests` requests the first ones are written (a browser cannot show a million); batch spans and counters all.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with gzip.open(partial, "wt", compresslevel=4) if path.suffix == ".gz" else partial.open("w") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            separator = ""
            for event in trace_events(records, spans=spans, samples=samples, max_requests=max_requests):
                file.write(separator)
                file.write(json.dumps(event, separators=(",", ":")))
                separator = ",\n"
            file.write("\n]}\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def trace_events(
    records: Records, *, spans: Iterable[Span] = (), samples: Samples | None = None, max_requests: int = 20_000
) -> Iterator[dict[str, Any]]:
    """The events of `write_trace`, times in microseconds."""
    pids = {name: _FIRST_INSTANCE + k for k, name in enumerate(records.instances)}
    yield from _named(_REQUESTS, "requests", 0)
    yield from _named(_LINKS, "KV transfers", 1)
    for name, pid in pids.items():
        yield from _named(pid, name, pid)
    for start in range(0, min(len(records), max_requests), _CHUNK):
        yield from _requests(records, slice(start, min(start + _CHUNK, max_requests, len(records))))
    for who, start_s, end_s, kind, sequences, tokens in spans:
        instance = records.instances[who] if isinstance(who, int) else who
        if instance not in pids:
            pids[instance] = _FIRST_INSTANCE + len(pids)
            yield from _named(pids[instance], instance, pids[instance])
        yield {
            "ph": "X",
            "name": kind,
            "pid": pids[instance],
            "tid": 1,
            "ts": _us(start_s),
            "dur": _us(end_s - start_s),
            "args": {"sequences": sequences, "tokens": tokens},
        }
    if samples is not None:
        yield from _counters(samples, records, pids)


def _named(pid: int, name: str, place: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": place}}


def _requests(records: Records, rows: slice) -> Iterator[dict[str, Any]]:
    found = records.columns(rows)
    stages = [(s.name, s.place, s.start_s, s.end_s) for s in stretches(records, rows)]
    for k in range(len(found["request_id"])):
        request = int(found["request_id"][k])
        ends = [end[k] for _, _, _, end in stages if not np.isnan(end[k])]
        last = max([*ends, float(found["arrival_s"][k])])
        arguments = {
            "status": Stage(int(found["status"][k])).name.lower(),
            "prompt_tokens": int(np.nan_to_num(found["prompt_tokens"][k])),
            "cached_tokens": int(np.nan_to_num(found["cached_tokens"][k])),
            "output_tokens": int(np.nan_to_num(found["output_tokens"][k])),
            "prefill": _who(records, found["prefill_instance"][k]),
            "decode": _who(records, found["decode_instance"][k]),
        }
        yield from _slice(f"request {request}", request, _REQUESTS, float(found["arrival_s"][k]), last, arguments, inner=False)
        for name, place, start, end in stages:
            if np.isnan(start[k]) or np.isnan(end[k]) or end[k] < start[k]:
                continue
            if place == "link":  # may overlap the prefill, so it cannot nest in the request's own track
                moved = {"request": request, "bytes": int(np.nan_to_num(found["transfer_bytes"][k]))}
                route = f"{arguments['prefill']} → {arguments['decode']}"
                yield from _slice(route, request, _LINKS, float(start[k]), float(end[k]), moved, inner=False)
            elif end[k] > start[k]:
                yield from _slice(name, request, _REQUESTS, float(start[k]), float(end[k]), {}, inner=True)


def _slice(
    name: str, request: int, pid: int, start_s: float, end_s: float, arguments: dict[str, Any], *, inner: bool
) -> Iterator[dict[str, Any]]:
    shared = {"cat": "link" if pid == _LINKS else "request", "id": request, "pid": pid, "tid": 0, "name": name}
    yield {"ph": "b", **shared, "ts": _us(start_s), **({} if inner else {"args": arguments})}
    yield {"ph": "e", **shared, "ts": _us(end_s)}


def _counters(samples: Samples, records: Records, pids: dict[str, int]) -> Iterator[dict[str, Any]]:
    names = samples.instances or records.instances
    columns = [samples.column(name) for name in ("t_s", "instance", "waiting", "running", "used_blocks")]
    for t_s, instance, waiting, running, used in zip(*columns, strict=True):
        pid = pids.get(names[int(instance)]) if 0 <= instance < len(names) else None
        if pid is None:
            continue
        shared = {"ph": "C", "pid": pid, "tid": 0, "ts": _us(float(t_s))}
        yield {**shared, "name": "sequences", "args": {"waiting": int(waiting), "running": int(running)}}
        yield {**shared, "name": "KV blocks", "args": {"used": int(used)}}


def _who(records: Records, index: float) -> str | None:
    return records.instances[int(index)] if not np.isnan(index) and 0 <= index < len(records.instances) else None


def _us(time_s: float) -> float:
    return round(time_s * 1e6, 3)
