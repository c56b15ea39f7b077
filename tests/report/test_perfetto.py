from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdlab.report.perfetto import Span, trace_events, write_trace
from pdlab.report.result import Result

Made = Callable[..., Result]
SPANS: list[Span] = [(0, 1.0, 1.25, "prefill", 3, 2048), ("decode-9", 2.0, 2.5, "decode", 40, 40)]


def test_the_file_is_json_with_every_slice_closed(made_run: Made, tmp_path: Path) -> None:
    result = made_run(40, rejected=1)
    write_trace(tmp_path / "trace.json.gz", result.records, spans=SPANS, samples=result.samples)
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert [f.name for f in tmp_path.iterdir()] == ["trace.json.gz"]
    open_slices: dict[Any, list[str]] = defaultdict(list)
    for event in events:
        key = (event.get("cat"), event.get("id"))
        if event["ph"] == "b":
            open_slices[key].append(event["name"])
        elif event["ph"] == "e":
            assert open_slices[key].pop() == event["name"]
    assert not any(open_slices.values())
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"requests", "KV transfers", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-9"}
    assert any(e["ph"] == "C" and "waiting" in e["args"] for e in events)


def test_times_are_microseconds(made_run: Made) -> None:
    result = made_run(5)
    events = list(trace_events(result.records, spans=SPANS))
    batch = next(e for e in events if e["ph"] == "X")
    assert (batch["ts"], batch["dur"], batch["args"]) == (1e6, 0.25e6, {"sequences": 3, "tokens": 2048})
    prefill = next(e for e in events if e["ph"] == "b" and e["name"] == "prefill")
    assert prefill["ts"] == pytest.approx(result.requests["prefill_start_s"].iloc[0] * 1e6, abs=0.01)


def test_only_so_many_requests(made_run: Made, tmp_path: Path) -> None:
    result = made_run(60)
    write_trace(tmp_path / "t.json", result.records, max_requests=7)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "b" and e["name"].startswith("request ") for e in events) == 7


def test_a_failed_write_leaves_nothing(made_run: Made, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_trace(tmp_path / "t.json", made_run(3).records, spans=[("a", 0.0, 1.0, object(), 1, 1)])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []
