"""What more explains the misses of a run, beside the resource that binds: `find_causes` tells each in a sentence with its figures.

imbalance       one instance was busy while a like one idled: the policy's doing
head-of-line    short prompts waited behind a single long one
interference    prompts in the same steps make decodes miss their objective, which the decodes alone would meet
reservation     decode instances keep room for prompts that are not computed yet, and others wait for it
single instance the role in which time was lost has one instance: no spare, and nothing to balance

Each is judged by the requests that missed in the phase in which most were lost; of many, by some of them at even distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import Role
from pdlab.results.headroom import Headroom
from pdlab.results.records import Column, InstanceUse, Samples
from pdlab.results.units import number, percent, seconds

QUEUED, PREFILLED, ROOM, MOVED, DECODED = (
    "queued for prefill",
    "in prefill",
    "waiting for room to decode",
    "in KV transfer",
    "in decode",
)
MOST = 0.5  # of the misses, that have a cause in common
JUDGED = 200  # misses
LONGER = 4.0  # times as long as what waits behind it, a prompt is long
UNEVEN = 2.0  # times as many sequences as a like instance
SLOWED = 2.0  # times as long as a decode step by itself
RESERVED = 0.2  # of the KV-seconds of decode instances


@dataclass(frozen=True, slots=True)
class Cause:
    kind: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Misses:
    """`rows` missed, most of them in `phase`; `names` are the instances that records refer to."""

    found: Mapping[str, Column]
    rows: NDArray[np.int64]
    phase: str
    names: Sequence[str]
    tpot_s: float  # the median of those that missed; nan where they have none

    def of(self, name: str) -> Column:
        column: Column = self.found[name][self.rows]
        return column

    @property
    def role(self) -> str:
        return "prefill" if self.phase in (QUEUED, PREFILLED) else "decode"

    @property
    def judged(self) -> NDArray[np.int64]:
        return self.rows[:: -(-self.rows.size // JUDGED) or 1]


def find_causes(
    misses: Misses, samples: Samples, instances: Sequence[InstanceUse], headroom: Headroom | None, policy: str | Mapping[str, Any] | None
) -> list[Cause]:
    able = [use for use in instances if (Role(use.role).prefills if misses.role == "prefill" else Role(use.role).decodes)]
    checks = [
        _imbalance(misses, samples, able, policy),
        _head_of_line(misses) if misses.phase == QUEUED else None,
        _interference(misses, instances, headroom) if misses.phase == DECODED else None,
        _reservation(misses) if misses.phase in (QUEUED, ROOM) else None,
        Cause("single instance", f"{able[0].name} is the only one that can {_verb(misses.role)}: no spare") if len(able) == 1 else None,
    ]
    return [cause for cause in checks if cause is not None]


def _verb(role: str) -> str:
    return "prefill" if role == "prefill" else "decode"


# ------------------------------------------------------------ imbalance


def _imbalance(misses: Misses, samples: Samples, able: Sequence[InstanceUse], policy: str | Mapping[str, Any] | None) -> Cause | None:
    if len(able) < 2:
        return None
    words = (
        _idle_beside_a_queue(misses, able)
        if misses.phase == QUEUED
        else _uneven_batches(misses, samples, able)
        if misses.phase == DECODED
        else None
    )
    return None if words is None else Cause("imbalance", f"by {_policy_words(policy, misses.role)}: {words}")


def _policy_words(policy: str | Mapping[str, Any] | None, role: str) -> str:
    """Who decided where it goes: the policy, or the part of it that does."""
    chosen = policy.get("dispatch" if role == "prefill" else "handoff", policy) if isinstance(policy, Mapping) else policy
    if isinstance(chosen, Mapping):
        chosen = chosen.get("name") or chosen.get("class") or next(iter(chosen), None)
    return f"policy {str(chosen).rpartition(':')[2]}" if chosen else "the policy"


def _idle_beside_a_queue(misses: Misses, able: Sequence[InstanceUse]) -> str | None:
    """Was a like instance without any prompt when half of the wait was over?"""
    found, rows = misses.found, misses.judged
    begun = found["prefill_start_s"][rows]
    known = ~np.isnan(begun)
    rows, at_s = rows[known], (found["arrival_s"][rows][known] + begun[known]) / 2
    if not rows.size:
        return None
    places = {use.name: k for use in able if (k := _place(misses.names, use.name)) is not None}
    covered = {k: _covered(found, k, at_s) for k in places.values()}
    for use in able:  # one that was never asked was idle
        if use.name not in places:
            covered[-1] = np.zeros(at_s.size, np.bool_)
    own = found["prefill_instance"][rows]
    idle = np.zeros(at_s.size, np.bool_)
    for place, busy in covered.items():
        idle |= ~busy & (own != place)
    share = float(idle.mean())
    if share < MOST:
        return None
    fullest, emptiest = (pick(able, key=lambda use: use.prefill_busy_s / max(use.up_s, 1e-9)) for pick in (max, min))
    most, least = (percent(use.prefill_busy_s / max(use.up_s, 1e-9)) for use in (fullest, emptiest))
    shown = f"{fullest.name} computed prompts {most} of the time, {emptiest.name} {least}"
    return f"{shown}; a like instance was idle while {percent(share)} of the misses waited"


def _place(names: Sequence[str], name: str) -> int | None:
    return names.index(name) if name in names else None


def _covered(found: Mapping[str, Column], place: int, at_s: Column) -> NDArray[np.bool_]:
    """At which of the times the instance had a prompt, queued or computed."""
    mine = (found["prefill_instance"] == place) & ~np.isnan(found["dispatched_s"])
    starts = np.sort(found["dispatched_s"][mine])
    ends = np.sort(np.where(np.isnan(found["first_token_s"]), found["finish_s"], found["first_token_s"])[mine])
    there: NDArray[np.bool_] = np.searchsorted(starts, at_s, "right") > np.searchsorted(ends, at_s, "right")
    return there


def _uneven_batches(misses: Misses, samples: Samples, able: Sequence[InstanceUse]) -> str | None:
    names = {name: k for k, name in enumerate(samples.instances)}
    place, running = samples.column("instance"), samples.column("running")
    mean = {
        use.name: float(running[place == names[use.name]].mean()) for use in able if use.name in names and (place == names[use.name]).any()
    }
    mean |= {use.name: 0.0 for use in able if use.name not in mean}
    fullest, emptiest = max(mean, key=lambda name: mean[name]), min(mean, key=lambda name: mean[name])
    if mean[fullest] < UNEVEN * max(mean[emptiest], 1.0):
        return None
    share = float((misses.of("decode_instance") == _place(misses.names, fullest)).mean())
    if share < MOST:
        return None
    return (
        f"{fullest} decoded {number(mean[fullest])} sequences at a time, {emptiest} {number(mean[emptiest])}; "
        f"{percent(share)} of the misses were {fullest}'s"
    )


# ------------------------------------------------------------ the others


def _head_of_line(misses: Misses) -> Cause | None:
    """Does one prompt, much longer than those that wait, make up half of their wait?"""
    found = misses.found
    begun, done = found["prefill_start_s"], found["first_token_s"]
    blocked, waits, lengths = 0, [], []
    rows = misses.judged
    for place in np.unique(found["prefill_instance"][rows][~np.isnan(found["prefill_instance"][rows])]):
        here = np.flatnonzero((found["prefill_instance"] == place) & ~np.isnan(begun) & ~np.isnan(done))
        here = here[np.argsort(begun[here])]
        longest_s = float((done[here] - begun[here]).max()) if here.size else 0.0
        for row in rows[found["prefill_instance"][rows] == place]:
            arrival_s, start_s = found["arrival_s"][row], begun[row]
            if np.isnan(start_s):
                continue
            low, high = np.searchsorted(begun[here], (arrival_s - longest_s, start_s))
            ahead = here[low:high]
            ahead = ahead[found["prompt_tokens"][ahead] >= LONGER * found["prompt_tokens"][row]]
            overlap_s = np.minimum(done[ahead], start_s) - np.maximum(begun[ahead], arrival_s)
            if overlap_s.size and float(overlap_s.max()) >= MOST * (start_s - arrival_s):
                blocked += 1
                waits.append(start_s - arrival_s)
                lengths.append(found["prompt_tokens"][ahead[int(overlap_s.argmax())]])
    if blocked < MOST * rows.size:
        return None
    share, long = percent(blocked / rows.size), number(int(np.median(lengths)))
    return Cause(
        "head-of-line",
        f"{share} of the misses waited {seconds(float(np.median(waits)))} behind one prompt of {long} tokens, most of their wait",
    )


def _interference(misses: Misses, instances: Sequence[InstanceUse], headroom: Headroom | None) -> Cause | None:
    mixed = [use for use in instances if Role(use.role).decodes and use.prefill_busy_s > 0.0 and use.decode_busy_s > 0.0]
    if not mixed or math.isnan(misses.tpot_s):
        return None
    prefill_s, decode_s = sum(use.prefill_busy_s for use in mixed), sum(use.decode_busy_s for use in mixed)
    share = percent(prefill_s / (prefill_s + decode_s))
    if headroom is None:
        if prefill_s < decode_s:
            return None
        return Cause("interference", f"of prefill with decode: prompts took {share} of the time of instances that do both")
    if headroom.step_s > headroom.objective_s and misses.tpot_s < SLOWED * headroom.step_s:
        return None
    alone = f"a decode step takes {seconds(headroom.step_s)} by itself, a token of the misses {seconds(misses.tpot_s)}"
    return Cause(
        "interference", f"of prefill with decode: {alone}; prompts take {share} of the time (fewer engine.max_batch_tokens divide them)"
    )


def _reservation(misses: Misses) -> Cause | None:
    """Did the misses wait before they were sent to prefill, and does what waits for its KV fill decode instances?"""
    found = misses.found
    queue_s = misses.of("prefill_start_s") - misses.of("arrival_s")
    before_s = misses.of("dispatched_s") - misses.of("arrival_s")
    undispatched = np.isnan(before_s)
    held = undispatched | (before_s >= MOST * np.where(np.isnan(queue_s), math.inf, queue_s))
    if misses.phase == QUEUED and held.mean() < MOST:
        return None
    away = (found["prefill_instance"] != found["decode_instance"]) & ~np.isnan(found["decode_start_s"]) & ~np.isnan(found["finish_s"])
    since_s = found["dispatched_s"] if misses.phase == QUEUED else found["handoff_s"]
    tokens = found["prompt_tokens"][away]
    reserved = float(np.nansum(tokens * np.maximum(found["decode_start_s"] - since_s, 0.0)[away]))
    decoding = float(np.nansum(tokens * (found["finish_s"] - found["decode_start_s"])[away]))
    share = reserved / (reserved + decoding) if reserved + decoding > 0 else 0.0
    if share < RESERVED:
        return None
    waited = (
        f"{percent(float(held.mean()))} of the misses waited for a decode instance before they were sent to prefill; "
        if misses.phase == QUEUED
        else ""
    )
    return Cause(
        "reservation",
        f"{waited}{percent(share)} of what decode instances hold, they hold for prompts whose KV has not come (transfer.reserve)",
    )
