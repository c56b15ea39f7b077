"""When what happened to each request: one account, kept alike by the simulator, the live router and the client of a bench.

Times are seconds on one clock, nan where it did not come to that.

dispatched_s       the prompt was sent to the prefill instance
prefill_start_s    its first step began there
first_token_s      the client got the first token
handoff_s          a decode instance was asked to go on from the prompt's KV, and did not refuse; the prefill instance itself may be asked
transfer_start_s   the KV began to move; while the prompt was still computed, where it is pushed by chunk or layer
transfer_end_s     all of it had come
decode_start_s     the first decode step began

A row is about the last attempt: with the next dispatch all times but the client's, the instances and the cached tokens are forgotten. What
the client has, and what was spent (attempts, migrations, preemptions, bytes that came), goes over all of them.

Live, from outside an instance, the begin of prefill is the dispatch plus the time that the instance says the prompt waited, and the begin
of decoding is when it says that it goes on, or, without a transfer, the first token.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping
from typing import Any

from pdlab.core.types import Report, Request, Stage
from pdlab.results.gaps import Gaps
from pdlab.results.records import FIELDS, SAMPLE_FIELDS, Records, Samples

NAN = math.nan
QUEUED_P, PREFILL, LEASED, QUEUED_D = Stage.QUEUED_P, Stage.PREFILL, Stage.LEASED, Stage.QUEUED_D  # enum look-ups cost
TRANSFER, DECODE, MIGRATING = Stage.TRANSFER, Stage.DECODE, Stage.MIGRATING
ROW = struct.Struct(f"={len(FIELDS)}d")  # a third of the time that array.extend takes
SAMPLE = struct.Struct(f"={len(SAMPLE_FIELDS)}d")
TIMES = ("dispatched_s", "prefill_start_s", "handoff_s", "transfer_start_s", "transfer_end_s", "decode_start_s")  # that a server sees


class Timeline:
    """One request's. Its methods are the things that happen to it."""

    __slots__ = (
        "attempts",
        "cached_tokens",
        "decode_instance",
        "decode_start_s",
        "dispatched_s",
        "finish_s",
        "first_token_s",
        "handoff_s",
        "migrations",
        "preemptions",
        "prefill_instance",
        "prefill_start_s",
        "reason",
        "received_tokens",
        "request",
        "stage",
        "transfer_bytes",
        "transfer_end_s",
        "transfer_start_s",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stage: Stage = QUEUED_P
        self.dispatched_s: float = NAN
        self.prefill_start_s: float = NAN
        self.first_token_s: float = NAN
        self.handoff_s: float = NAN
        self.transfer_start_s: float = NAN
        self.transfer_end_s: float = NAN
        self.decode_start_s: float = NAN
        self.finish_s: float = NAN
        self.prefill_instance: str | None = None
        self.decode_instance: str | None = None  # or the one that is asked, or keeps room for it
        self.cached_tokens = 0
        self.received_tokens = 0  # by the client, of all its sequences
        self.transfer_bytes: float = 0.0
        self.attempts = 0
        self.preemptions = 0
        self.migrations = 0
        self.reason: str | None = None

    def restarted(self) -> None:
        """Another attempt: how far the lost one came is forgotten."""
        self.stage = QUEUED_P
        self.dispatched_s = self.prefill_start_s = self.handoff_s = NAN
        self.transfer_start_s = self.transfer_end_s = self.decode_start_s = NAN
        self.prefill_instance = self.decode_instance = None
        self.cached_tokens = 0

    def dispatched(self, now: float, prefill: str) -> None:
        self.dispatched_s, self.prefill_instance = now, prefill
        self.attempts += 1

    def assigned(self, decode: str) -> None:
        """That one is to decode it."""
        self.decode_instance = decode

    def refused(self) -> None:
        """It is not: there is no room, or no way. The prompt's KV, if it is computed, waits where it is."""
        self.decode_instance = None
        self.handoff_s = self.transfer_start_s = NAN
        if self.stage is TRANSFER:
            self.stage = LEASED

    def prefill_started(self, at_s: float, cached_tokens: int) -> None:
        self.stage = PREFILL
        self.prefill_start_s, self.cached_tokens = at_s, cached_tokens

    def prefilled(self) -> None:
        """Its KV waits for who decodes."""
        self.stage = LEASED

    def first_token(self, at_s: float) -> None:
        """The client has it; whatever comes later is none."""
        if self.first_token_s != self.first_token_s:
            self.first_token_s = at_s

    def handed_off(self, now: float, decode: str) -> None:
        self.handoff_s, self.decode_instance = now, decode
        if decode != self.prefill_instance:
            self.stage = TRANSFER

    def transfer_began(self, at_s: float) -> None:
        self.transfer_start_s = at_s

    def transferred(self, at_s: float, size_bytes: float) -> None:
        self.stage = QUEUED_D
        self.transfer_end_s = at_s
        self.transfer_bytes += size_bytes

    def decode_began(self, at_s: float) -> None:
        self.stage = DECODE
        if self.decode_start_s != self.decode_start_s:
            self.decode_start_s = at_s

    def migrating(self) -> None:
        """It stands still for the last stage."""
        self.stage = MIGRATING

    def copied(self, size_bytes: float) -> None:
        """A migration's KV has come, all or a part."""
        self.transfer_bytes += size_bytes

    def migrated(self, decode: str) -> None:
        self.decode_instance = decode
        self.migrations += 1

    def ended(self, stage: Stage, now: float, reason: str | None = None) -> None:
        self.stage, self.finish_s, self.reason = stage, now, reason

    # ------------------------------------------------------------ over the wire

    def figures(self) -> dict[str, object]:
        """Under the names of `records.FIELDS`, with names in place of indices."""
        request = self.request
        own: dict[str, object] = {
            "request_id": request.id,
            "status": self.stage.name.lower(),
            "output_tokens": self.received_tokens,
            "transfer_bytes": int(self.transfer_bytes),
            "n": request.best_of,
        }
        return {name: own[name] if name in own else getattr(self if hasattr(self, name) else request, name) for name in FIELDS}

    def follow(self, figures: Mapping[str, Any]) -> None:
        """What a server says of it, on its own clock, moved so that the request arrives there when it was sent here: the way to the server
        counts as none of its stages. What it does not say is left as it was."""
        shift_s = self.request.arrival_s - _number(figures.get("arrival_s"), 0.0)
        for name in TIMES:
            setattr(self, name, _number(figures.get(name), NAN) + shift_s)
        for name in ("cached_tokens", "attempts", "preemptions", "migrations"):
            setattr(self, name, int(_number(figures.get(name), float(getattr(self, name)))))
        self.transfer_bytes = _number(figures.get("transfer_bytes"), 0.0)
        for name in ("prefill_instance", "decode_instance"):
            where = figures.get(name)
            if isinstance(where, str):
                setattr(self, name, where)


class Book:
    """Takes down the requests that have ended, and the instances' reports. With `most_rows` of either, the older half of them goes."""

    def __init__(self, most_rows: int = 0) -> None:
        self.records, self.samples, self.gaps = Records(), Samples(), Gaps()
        self._most_rows = most_rows
        self._places: dict[str, int] = {}
        self._reasons: dict[str, int] = {}

    def place(self, instance: str) -> int:
        """An instance's number in every row."""
        place = self._places.get(instance)
        if place is None:
            place = self._places[instance] = len(self._places)
            self.records.instances.append(instance)
            self.samples.instances.append(instance)
        return place

    def write(self, line: Timeline) -> None:
        """A request's row."""
        request, rows, places = line.request, self.records.rows, self._places
        prefill, decode, reason = line.prefill_instance, line.decode_instance, line.reason
        if prefill is not None and prefill not in places:
            self.place(prefill)
        if decode is not None and decode not in places:
            self.place(decode)
        rows.frombytes(
            ROW.pack(
                request.id,
                line.stage,
                request.arrival_s,
                line.dispatched_s,
                line.prefill_start_s,
                line.first_token_s,
                line.handoff_s,
                line.transfer_start_s,
                line.transfer_end_s,
                line.decode_start_s,
                line.finish_s,
                request.prompt_tokens,
                line.cached_tokens,
                line.received_tokens,
                NAN if prefill is None else places[prefill],
                NAN if decode is None else places[decode],
                line.transfer_bytes,
                line.attempts,
                line.preemptions,
                line.migrations,
                request.priority,
                NAN if request.ttft_slo_s is None else request.ttft_slo_s,
                NAN if request.tpot_slo_s is None else request.tpot_slo_s,
                request.best_of,
                NAN if reason is None else self._reason(reason),
            )
        )
        if self._most_rows:
            self._bound(rows, len(FIELDS))

    def sample(self, now: float, report: Report, kv_blocks: int) -> None:
        """An instance's report, as it comes at `now`."""
        rows, place = self.samples.rows, self._places.get(report.instance)
        rows.frombytes(
            SAMPLE.pack(
                now,
                self.place(report.instance) if place is None else place,
                report.waiting,
                report.waiting_tokens,
                report.running,
                report.context_tokens,
                report.used_blocks,
                kv_blocks,
            )
        )
        if self._most_rows:
            self._bound(rows, len(SAMPLE_FIELDS))

    def _reason(self, reason: str) -> int:
        place = self._reasons.get(reason)
        if place is None:
            place = self._reasons[reason] = len(self._reasons)
            self.records.reasons.append(reason)
        return place

    def _bound(self, rows: array[float], width: int) -> None:
        if len(rows) > self._most_rows * width:
            del rows[: self._most_rows // 2 * width]


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise
