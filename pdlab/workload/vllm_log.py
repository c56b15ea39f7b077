"""The log of a vLLM server as a trace: what each version writes of a request, which is not always enough.

    INFO 12-06 08:33:02 async_llm_engine.py:379] Received request cmpl-1: prompt: '...', sampling params: SamplingParams(n=1, ...,
        max_tokens=7, ...), prompt token ids: [3087, 8970].                                                       (0.2, 0.3)
    INFO 04-16 09:38:36 [logger.py:39] Received request cmpl-1-0: prompt: '...', params: SamplingParams(...), prompt_token_ids: [23729,
        12879], lora_request: None, prompt_adapter_request: None.                                                 (0.5 to 0.9)
    DEBUG 09-02 08:46:16 [logger.py:37] Request chatcmpl-1 details: prompt: '...', prompt_token_ids: [1, 2], prompt_embeds shape: None.
    INFO 09-02 08:46:16 [logger.py:47] Received request chatcmpl-1: params: SamplingParams(...), lora_request: None.    (from 0.10 on)
    INFO 09-02 08:46:18 [logger.py:92] Generated response chatcmpl-1: output: '...', output_token_ids: [9, 9], finish_reason: stop

The first two have the prompt's tokens (chats of 0.6 to 0.9 have not), the third has them in DEBUG only. Prompts' tokens give lengths
and shared prefixes. The output's length is there with --enable-log-outputs, or where `ignore_eos` makes it `max_tokens`; else the user may
take the limit for it (`columns: {output_tokens: max_tokens}`) or give lengths. Times are whole seconds, without a year.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np

from pdlab.core.types import UsageError
from pdlab.workload.columns import Wanted
from pdlab.workload.requests import RequestRows, by_arrival
from pdlab.workload.text import TextFile

_LINE = re.compile(r"^(?:\([^)]*\)\s*)?(?:INFO|DEBUG|WARNING|ERROR)\s+\d\d-\d\d \d\d:\d\d:\d\d\b")
_STAMP = re.compile(r"(?:(?P<year>\d{4})[-/])?(?P<month>\d\d)[-/](?P<day>\d\d)[ T](?P<time>\d\d:\d\d:\d\d)(?:[.,](?P<part>\d{1,6}))?")
_LEVEL = re.compile(r"\b(?:INFO|DEBUG)\s+(?=\d)")
_EVENT = re.compile(
    r"\b(?:(Received) request ([^\s:]+): |Request (\S+) (details): |(Generated) response (\S+?)(?: \(streaming (\w+)\))?: )"
)
_IDS = re.compile(r"(?:prompt|output)[ _]token[ _]ids: (\[[\d, ]*\]|\(\)|None)")
_CUT_SHARE, _CUT_LEAST = 0.2, 3
UNIT = 16  # tokens behind a hash, if the user says no other number


def begins(line: str) -> bool:
    """Whether a file that begins like that is a log of vLLM's."""
    return _LINE.match(line) is not None or (_EVENT.search(line) is not None and "Params" in line)


def ahead(lines: Iterator[str], most: int = 2000) -> Sequence[str]:
    """The next lines, up to one that names a request; none where none of them does."""
    seen = []
    for line in islice(lines, most):
        seen.append(line)
        if begins(line):
            return seen
    return ()


Prompt = tuple[int, tuple[int, ...]]  # its length in tokens, and the ids of its full units


@dataclass(slots=True)
class _Logged:
    """What the log says of one request; None: nothing."""

    arrival_s: float
    max_tokens: int | None
    ignore_eos: bool
    n: int
    prompt: Prompt | None = None
    output_tokens: int | None = None


def read(file: TextFile, lines: Iterator[str], limit: int | None, wanted: Wanted) -> dict[str, Any]:
    """The Workload's fields. Raises UsageError, which says what the log lacks."""
    if wanted.columns not in ({}, {"output_tokens": "max_tokens"}) or wanted.time_unit is not None:
        raise UsageError(f"{file.path}: of a vLLM log, columns can only say output_tokens: max_tokens, and there is no time_unit to choose")
    unit = wanted.hash_tokens or UNIT
    logged = list(_logged(lines, _Named(unit)).values())
    if not logged:
        raise UsageError(f"{file.path}: no request in this log; vLLM writes them with --enable-log-requests (before 0.10: unless disabled)")
    by_limit = "output_tokens" in wanted.columns
    outputs = [_output(one, by_limit) for one in logged]
    _complain(file, logged, outputs, wanted)
    names = {"arrival_s": "time", "prompt_tokens": "prompt_token_ids", "output_tokens": "output_token_ids"}
    requests = RequestRows(file, names, None, ordered=False)
    several = any(one.n > 1 for one in logged)
    for one, output in zip(logged, outputs, strict=True):
        prompt, ids = one.prompt or (int("prompt_tokens" in wanted.replaced), ())
        output = 1 if output is None and "output_tokens" in wanted.replaced else output
        requests.add(one.arrival_s, prompt, output or 0, ids, {"n": one.n, "best_of": one.n} if several else {})
    fields = by_arrival(requests.fields(shares=any(one.prompt for one in logged)))
    return _told(fields, logged, limit) | {"hash_tokens": unit, "reading": _reading(by_limit, unit)}


def _told(fields: dict[str, Any], logged: Sequence[_Logged], limit: int | None) -> dict[str, Any]:
    """The first `limit` requests, times from the first on, and what is to be known of the rest."""
    dropped, notes = fields["dropped"], []
    if not np.any(fields["arrival_s"] % 1):
        notes.append("times in the log are whole seconds: requests of one second come at once")
    if dropped:
        notes.append(f"{dropped} of {len(logged)} requests dropped: the log does not say how long their prompt or output was")
    lengths = [one.prompt[0] for one in logged if one.prompt]
    longest = max(lengths, default=0)
    if lengths.count(longest) >= max(_CUT_LEAST, _CUT_SHARE * len(lengths)):
        notes.append(f"{lengths.count(longest)} prompts have {longest} tokens: if the server ran with --max-log-len, they were longer")
    fields = {name: value[:limit] if name not in ("dropped",) else value for name, value in fields.items()}
    if len(fields["arrival_s"]):
        fields["arrival_s"] = fields["arrival_s"] - fields["arrival_s"][0]
    return fields | {"notes": tuple(notes)}


def _reading(by_limit: bool, unit: int) -> str:
    output = "max_tokens, the limit" if by_limit else "output_token_ids, or max_tokens with ignore_eos"
    return f"vllm: arrival_s the lines' times, prompt_tokens prompt_token_ids, output_tokens {output}, prefixes of {unit} tokens each"


def _logged(lines: Iterator[str], named: _Named) -> dict[str, _Logged]:
    requests: dict[str, _Logged] = {}
    prompts: dict[str, Prompt] = {}  # of DEBUG lines, which come before
    clock = _Calendar()
    for line in lines:
        event = _EVENT.search(line)
        if event is None:
            continue
        received, received_id, details_id, details, _, generated_id, streaming = event.groups()
        if received:
            if (arrival_s := clock(line[: event.start()])) is None or "SamplingParams(" not in line:
                continue
            requests[received_id] = one = _received(line[event.end() :], arrival_s)
            prompt = _ids_in(line[event.end() :])
            one.prompt = named.prompt(prompt) if prompt else prompts.pop(received_id, None)
        elif details:
            prompt = _ids_in(line[event.end() :])
            if prompt and details_id in requests:
                requests[details_id].prompt = named.prompt(prompt)
            elif prompt:
                prompts[details_id] = named.prompt(prompt)
        elif (answered := requests.get(generated_id) or requests.get(f"{generated_id}-0")) is not None and streaming != "complete":
            output = _ids_in(line[event.end() :])
            if output is not None:
                answered.output_tokens = (answered.output_tokens or 0) + len(output)
    return requests


def _received(text: str, arrival_s: float) -> _Logged:
    params = text[text.rfind("SamplingParams(") :]  # the prompt, which may hold anything, stands before

    def said(name: str) -> str | None:
        value = re.search(rf"\b{name}=(\w+)", params)
        return value[1] if value is not None and value[1] != "None" else None

    most = said("max_tokens")
    return _Logged(arrival_s, int(most) if most else None, said("ignore_eos") == "True", int(said("n") or 1))


def _ids_in(text: str) -> tuple[int, ...] | None:
    """The last list of ids: what stands before may be a text that holds anything."""
    places = _IDS.findall(text)
    return tuple(map(int, re.findall(r"\d+", places[-1]))) if places and places[-1] != "None" else None


def _output(one: _Logged, by_limit: bool) -> int | None:
    if one.output_tokens is not None and not by_limit:
        return -(-one.output_tokens // one.n)
    return one.max_tokens if by_limit or one.ignore_eos else None


def _complain(file: TextFile, logged: Sequence[_Logged], outputs: Sequence[int | None], wanted: Wanted) -> None:
    """What no request has, and the user replaces by nothing."""
    if "prompt_tokens" not in wanted.replaced and not any(one.prompt for one in logged):
        raise UsageError(
            f"{file.path}: the log has no prompt's tokens, and so no lengths; vLLM 0.10 and later write them with "
            "VLLM_LOGGING_LEVEL=DEBUG, 0.6 to 0.9 not for chats; or workload.prompt draws them"
        )
    if "output_tokens" not in wanted.replaced and not any(outputs):
        raise UsageError(
            f"{file.path}: the log does not say how long the answers were; vLLM writes it with --enable-log-outputs; "
            "or columns: {output_tokens: max_tokens} takes the limits asked for, or workload.output draws them"
        )


class _Calendar:
    """Seconds of a line's time, from the first on. A log without years goes from December to January into the next."""

    def __init__(self) -> None:
        self._year, self._month = 2024, 0

    def __call__(self, before: str) -> float | None:
        """`before`: what stands before the message; None where it has no time."""
        level = _LEVEL.search(before)
        stamp = _STAMP.search(before, level.end() if level else 0)
        if stamp is None:
            return None
        month = int(stamp["month"])
        if stamp["year"]:
            self._year = int(stamp["year"])
        elif self._month == 12 and month == 1:
            self._year += 1
        self._month = month
        try:
            date = datetime.strptime(f"{self._year}-{month:02}-{stamp['day']} {stamp['time']}", "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        except ValueError:
            return None
        return date.timestamp() + float(f"0.{stamp['part'] or 0}")


class _Named:
    """Prompts' full units as ids: one for each different beginning."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._names: dict[tuple[int, tuple[int, ...]], int] = {}

    def prompt(self, prompt: tuple[int, ...]) -> Prompt:
        chain, last = [], -1
        for start in range(0, len(prompt) - self._unit + 1, self._unit):
            last = self._names.setdefault((last, prompt[start : start + self._unit]), len(self._names))
            chain.append(last)
        return len(prompt), tuple(chain)
