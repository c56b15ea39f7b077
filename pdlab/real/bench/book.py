"""The rows of a measured run: what the client saw, and beside it what the server tells of the request's way through it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pdlab.records import FIELDS, Column, InstanceUse, Records
from pdlab.types import Request, Role, Stage

NAN = math.nan
_TIMES = ("dispatched_s", "prefill_start_s", "handoff_s", "transfer_start_s", "transfer_end_s", "decode_start_s")
_COUNTS = ("cached_tokens", "transfer_bytes", "attempts", "preemptions", "migrations")


class Book:
    """`write` one row a request, in the order they end. `timelines` counts the requests of which the server told its part."""

    def __init__(self) -> None:
        self.records = Records()
        self.timelines = 0
        self._reasons: dict[str, int] = {}
        self._instances: dict[str, int] = {}

    def write(
        self,
        request: Request,
        stage: Stage,
        *,
        first_token_s: float,
        finish_s: float,
        output_tokens: int,
        first_tokens: int = 1,
        cached_tokens: int = 0,
        reason: str | None = None,
        timeline: Mapping[str, Any] | None = None,
    ) -> None:
        """Times are in seconds since the run began; a timeline's, on the server's clock, are moved so that the request arrives there when
        it was sent here: the way to the server counts as none of its stages."""
        row = dict.fromkeys(FIELDS, NAN)
        row |= {"cached_tokens": cached_tokens, "transfer_bytes": 0, "attempts": 1, "preemptions": 0, "migrations": 0}
        if timeline:
            self.timelines += 1
            row |= self._told(timeline, request.arrival_s)
        row |= {
            "request_id": request.id,
            "status": stage,
            "arrival_s": request.arrival_s,
            "first_token_s": first_token_s,
            "finish_s": finish_s,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": output_tokens,
            "priority": request.priority,
            "ttft_slo_s": NAN if request.ttft_slo_s is None else request.ttft_slo_s,
            "tpot_slo_s": NAN if request.tpot_slo_s is None else request.tpot_slo_s,
            "n": request.best_of,
            "reason": NAN if reason is None else _index(self._reasons, reason, self.records.reasons),
        }
        self.records.rows.extend([float(row[name]) for name in FIELDS])
        self.records.first_tokens.append(first_tokens)

    def _told(self, timeline: Mapping[str, Any], arrival_s: float) -> dict[str, float]:
        shift_s = arrival_s - _number(timeline.get("arrival_s"), 0.0)
        found = {name: _number(timeline.get(name)) + shift_s for name in _TIMES}
        found |= {name: _number(timeline[name], 0.0) for name in _COUNTS if name in timeline}
        for name in ("prefill_instance", "decode_instance"):
            where = timeline.get(name)
            if isinstance(where, str):
                found[name] = _index(self._instances, where, self.records.instances)
        return found


def uses(records: Records, duration_s: float, *, first_by_prefill: bool = True) -> list[InstanceUse]:
    """What each instance did, as far as timelines tell: it was busy with prompts from a prompt's begin to its first token, with decoding
    from there to its last, whatever else it did meanwhile. Its KV memory and max_seqs are not known. The first token is the prompt's work,
    not a decode's; where it is not told `first_by_prefill`, it is sampled again after a transfer, by a decode."""
    found = records.columns()
    begun, first, finish = found["prefill_start_s"], found["first_token_s"], found["finish_s"]
    decoding = np.where(np.isnan(found["decode_start_s"]), first, found["decode_start_s"])
    prompts, outputs = found["prompt_tokens"] - found["cached_tokens"], found["output_tokens"]
    decoded = outputs - (1 if first_by_prefill else found["prefill_instance"] == found["decode_instance"])
    uses = []
    for index, name in enumerate(records.instances):
        here, there = found["prefill_instance"] == index, found["decode_instance"] == index
        if not (here | there).any():
            continue  # it was polled, and no timeline names it
        prefill = spans(begun[here], first[here])
        decode = spans(decoding[there], finish[there])
        uses.append(
            InstanceUse(
                name=name,
                role=str(Role.MIXED if here.any() and there.any() else Role.PREFILL if here.any() else Role.DECODE),
                busy_s=length_s([*prefill, *decode]),
                prefill_busy_s=length_s(prefill),
                decode_busy_s=length_s(decode),
                up_s=duration_s,
                kv_blocks=0,
                kv_use_mean=NAN,
                kv_use_peak=NAN,
                requests=int((here | there).sum()),
                prefill_tokens=int(prompts[here].sum()),
                decode_tokens=int(decoded[there].sum()),
            )
        )
    return uses


def spans(start_s: Column, end_s: Column) -> list[tuple[float, float]]:
    """Those that began and ended."""
    held = ~np.isnan(start_s) & (end_s > start_s)
    return list(zip(start_s[held].tolist(), end_s[held].tolist(), strict=True))


def length_s(stretches: Sequence[tuple[float, float]]) -> float:
    """Of their union."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(stretches):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _number(value: object, otherwise: float = NAN) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _index(known: dict[str, int], name: str, names: list[str]) -> int:
    """A name's place among `names`, to which others may add."""
    if name not in known:
        if name not in names:
            names.append(name)
        known[name] = names.index(name)
    return known[name]
