"""What GuideLLM has measured, `benchmarks.json`, as rows: the requests that a benchmark, or several after another, has sent.

A request that was answered has its start (seconds since 1970) and its lengths; those that failed or were cut off have no lengths, and so
count as dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdlab.core.file_kinds import TRACE, in_place_of, kind_by_keys
from pdlab.core.types import UsageError
from pdlab.workload.text import TextFile

KEY = "benchmarks"
_ANSWERED, _OTHERS = "successful", ("incomplete", "errored")


def requests(file: TextFile, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One object a request: arrival_s, prompt_tokens, output_tokens. Raises UsageError where the document is not GuideLLM's."""
    benchmarks = document.get(KEY)
    if not isinstance(benchmarks, list):
        if instead := in_place_of(file.path, kind_by_keys(document), TRACE):
            raise UsageError(instead)
        what = f"one JSON object, but not GuideLLM's: it has no list of {KEY}"
        raise UsageError(f"{file.path}: {what} (AIPerf's requests are in profile_export.jsonl)")
    for benchmark in benchmarks:
        groups = benchmark.get("requests") if isinstance(benchmark, dict) else None
        if not isinstance(groups, dict) or not isinstance(groups.get(_ANSWERED), list):
            raise UsageError(f"{file.path}: a benchmark without requests.{_ANSWERED}; GuideLLM writes them with --output-path FILE.json")
        for group in (_ANSWERED, *_OTHERS):
            for entry in groups.get(group) or ():
                file.line += 1
                if not isinstance(entry, dict):
                    raise file.wrong("not a JSON object")
                yield _request(entry, answered=group == _ANSWERED)


def _request(entry: dict[str, Any], *, answered: bool) -> dict[str, Any]:
    """Lengths and times have moved between GuideLLM's versions 0.2 and 0.5."""
    timings = _within(entry, "info", "timings") or _within(entry, "scheduler_info", "request_timings") or {}
    starts = (entry.get("request_start_time"), entry.get("start_time"), timings.get("request_start"), timings.get("resolve_start"))
    start_s = next((start for start in starts if start is not None), None)
    if not answered or start_s is None:
        return {"arrival_s": start_s or 0.0, "prompt_tokens": None, "output_tokens": None}
    prompt = entry.get("prompt_tokens", _within(entry, "input_metrics", "text_tokens"))
    output = entry.get("output_tokens", _within(entry, "output_metrics", "text_tokens"))
    return {"arrival_s": start_s, "prompt_tokens": prompt, "output_tokens": output}


def _within(entry: dict[str, Any], *path: str) -> Any:
    value: Any = entry
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
