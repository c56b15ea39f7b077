"""When what happened to each request, under the names and with the meaning of `pdlab.records`, so that a live run is judged like a
simulated one.

Two times are not seen from outside an instance: computation began `queue_s` after the dispatch, if the instance says so; decoding is taken
to begin when the KV is there (or, without a transfer, at the first token).
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from pdlab.gaps import Gaps
from pdlab.records import FIELDS, SAMPLE_FIELDS, Records, Samples
from pdlab.types import Report, Request, Stage

NAN = math.nan
KEPT = 4096  # timelines of requests that have ended
MOST_ROWS = 1 << 18  # of requests, and of samples; then the older half goes


@dataclass(slots=True, eq=False)
class Timeline:
    """One request's. Seconds on the world's clock; nan: not yet."""

    request: Request
    status: Stage = Stage.QUEUED_P
    dispatched_s: float = NAN
    prefill_start_s: float = NAN
    first_token_s: float = NAN
    handoff_s: float = NAN
    transfer_start_s: float = NAN
    transfer_end_s: float = NAN
    decode_start_s: float = NAN
    finish_s: float = NAN
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_instance: str | None = None
    decode_instance: str | None = None
    transfer_bytes: int = 0
    attempts: int = 0
    migrations: int = 0
    reason: str | None = None

    def dispatched(self, now: float, prefill: str) -> None:
        """An attempt's prompt is sent."""
        self.dispatched_s, self.prefill_start_s, self.prefill_instance, self.cached_tokens = now, NAN, prefill, 0
        self.attempts += 1

    def restart(self) -> None:
        """A new attempt: forget how far the lost one came."""
        self.handoff_s = self.transfer_start_s = self.transfer_end_s = NAN
        self.prefill_instance = self.decode_instance = None
        self.status = Stage.QUEUED_P

    def prefilled(self, queue_s: float, cached_tokens: int) -> None:
        self.prefill_start_s = self.dispatched_s + queue_s
        self.cached_tokens = cached_tokens

    def decodes(self, now: float) -> None:
        self.status = Stage.DECODE
        if math.isnan(self.decode_start_s):
            self.decode_start_s = now

    def transferred(self, now: float, seconds: float, waited_s: float, size: int) -> None:
        """All KV is at the decode instance since `waited_s`; it took `seconds` (0: nobody says)."""
        self.transfer_end_s = max(now - waited_s, self.dispatched_s)
        self.transfer_start_s = max(self.transfer_end_s - seconds, self.dispatched_s) if seconds > 0.0 else self.handoff_s
        self.transfer_bytes += size
        self.decodes(now)


class Timelines:
    """All of a world's: the live ones, the last of those that have ended, and the books that `pdlab.metrics` reads."""

    def __init__(self) -> None:
        self.records = Records()
        self.samples = Samples(instances=self.records.instances)
        self.gaps = Gaps()
        self._known: OrderedDict[int, Timeline] = OrderedDict()
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._instances: dict[str, int] = {}
        self._reasons: dict[str, int] = {}

    def begin(self, request: Request) -> Timeline:
        made = self._known[request.id] = Timeline(request)
        return made

    def end(self, line: Timeline, now: float, stage: Stage, reason: str | None, output_tokens: int) -> None:
        """Write a request's row."""
        line.status, line.reason, line.finish_s, line.output_tokens = stage, reason, now, output_tokens
        request = line.request
        own = {
            "request_id": request.id,
            "arrival_s": request.arrival_s,
            "prompt_tokens": request.prompt_tokens,
            "preemptions": 0,  # the instances' affair
            "priority": request.priority,
            "ttft_slo_s": NAN if request.ttft_slo_s is None else request.ttft_slo_s,
            "tpot_slo_s": NAN if request.tpot_slo_s is None else request.tpot_slo_s,
            "n": request.best_of,
            "prefill_instance": self._instance(line.prefill_instance),
            "decode_instance": self._instance(line.decode_instance),
            "reason": NAN if reason is None else self._reason(reason),
        }
        self.records.rows.extend(float(own[name] if name in own else getattr(line, name)) for name in FIELDS)
        _bound(self.records.rows, len(FIELDS))
        self._ended[request.id] = None
        while len(self._ended) > KEPT:
            del self._known[self._ended.popitem(last=False)[0]]

    def of(self, request_id: int) -> dict[str, object]:
        """A request's timeline under the names of `records.FIELDS`, names in place of indices. Empty where it is not known (any more)."""
        line = self._known.get(request_id)
        if line is None:
            return {}
        request = line.request
        found: dict[str, object] = {"request_id": request_id, "n": request.best_of, "preemptions": 0, "status": line.status.name.lower()}
        for name in FIELDS:
            if name not in found:
                found[name] = getattr(line, name) if hasattr(line, name) else getattr(request, name)
        return {name: found[name] for name in FIELDS}

    def sample(self, now: float, report: Report, kv_blocks: int) -> None:
        """Take down an instance's report."""
        own = {"t_s": now, "instance": self.index(report.instance), "kv_blocks": kv_blocks}
        self.samples.rows.extend(float(own[name] if name in own else getattr(report, name)) for name in SAMPLE_FIELDS)
        _bound(self.samples.rows, len(SAMPLE_FIELDS))

    def index(self, name: str) -> int:
        """An instance's place in every record."""
        found = self._instances.get(name)
        if found is None:
            found = self._instances[name] = len(self._instances)
            self.records.instances.append(name)
        return found

    def _instance(self, name: str | None) -> float:
        return NAN if name is None else self.index(name)

    def _reason(self, reason: str) -> int:
        found = self._reasons.get(reason)
        if found is None:
            found = self._reasons[reason] = len(self._reasons)
            self.records.reasons.append(reason)
        return found


def _bound(rows: array[float], width: int) -> None:
    if len(rows) > MOST_ROWS * width:
        del rows[: MOST_ROWS // 2 * width]
