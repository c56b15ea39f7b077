"""From what a store shows to events, sans-IO: differences only, in an order that a router can follow.

An instance that vanishes has Left, since a lease that ran out says that its holder is cut off or dead. Not so where the registry is what is
ill: it has been silent for half a lease, or everybody vanishes at once. Then an instance is Suspected for one lease, in which its holder
takes its place again, and for longer where nobody at all is left.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

from pdlab.core.types import InstanceSpec, Joined, Left, Report, Suspected, Switched
from pdlab.real.registry.records import Garbage, read_instance, read_report
from pdlab.real.registry.store import INSTANCE, REPORT

log = logging.getLogger(__name__)
WatchEvent = Joined | Left | Report | Suspected | Switched
NEVER = float("-inf")
QUIET_S = 0.4  # without a word from the store; any watcher asks more often
MOST_HELD_S = 120.0  # for so long nobody is taken for gone where all have vanished


class _Known:
    """An instance that has Joined and not Left."""

    def __init__(self, spec: InstanceSpec, lease_s: float, value: bytes) -> None:
        self.spec, self.lease_s, self.value = spec, lease_s, value
        self.report = b""
        self.reported_s = NEVER
        self.vanished_s = NEVER
        self.leaves_s: float | None = None


class Observer:
    def __init__(self) -> None:
        self.known: dict[str, _Known] = {}
        self.left: dict[str, int] = {}  # name -> the highest incarnation that has Left: it never comes back
        self.away = False
        self.back_s = NEVER
        self.refused: dict[str, int] = {}  # key -> hash of the value that was skipped, so that it is logged once
        self.returned: list[InstanceSpec] = []  # incarnations that are there again though they have Left: they must come back as new ones
        self._heard_s = NEVER
        self._silences: deque[tuple[float, float]] = deque(maxlen=32)  # (until, for how long) the store said nothing

    @property
    def ill(self) -> bool:
        """The store does not answer, or shows nobody of those who were there: it says nothing of them."""
        return self.away or (bool(self.known) and all(known.leaves_s is not None for known in self.known.values()))

    @property
    def due_s(self) -> float | None:
        """When `expire` has something to say."""
        return None if self.away else min((k.leaves_s for k in self.known.values() if k.leaves_s is not None), default=None)

    def heard(self, now: float) -> None:
        """The store has answered, or told of a change: before what it said is told to this."""
        if self._heard_s != NEVER and now - self._heard_s >= QUIET_S:
            self._silences.append((now, now - self._heard_s))
        self._heard_s = now

    def outage(self) -> None:
        """The store does not answer: from now on nothing can be said of anybody, until the next snapshot."""
        self.away = True

    def snapshot(self, entries: Mapping[str, bytes], now: float) -> list[WatchEvent]:
        if self.away:
            self.away, self.back_s = False, now
            for known in self.known.values():
                if known.leaves_s is not None:
                    known.leaves_s, known.vanished_s = now + known.lease_s, now
        self.refused = {key: value for key, value in self.refused.items() if key in entries}
        events = [event for name in sorted(self.known) if f"{INSTANCE}/{name}" not in entries for event in self._vanish(name, now)]
        for key in sorted(entries):  # instances come before their reports
            events += self.put(key, entries[key])
        return events

    def put(self, key: str, value: bytes) -> list[WatchEvent]:
        kind, _, name = key.partition("/")
        try:
            if kind == INSTANCE:
                return self._instance(name, value)
            if kind == REPORT:
                return self._report(name, value)
        except Garbage as garbage:
            if self.refused.get(key) != hash(value):
                self.refused[key] = hash(value)
                log.warning("registry: skipped %.200r: %s", key, garbage)
        return []

    def delete(self, key: str, now: float) -> list[WatchEvent]:
        kind, _, name = key.partition("/")
        return self._vanish(name, now) if kind == INSTANCE and name in self.known else []

    def expire(self, now: float) -> list[WatchEvent]:
        if self.away:
            return []
        if self.ill and len(self.known) > 1:
            for known in self.known.values():
                known.leaves_s = max(known.leaves_s or now, known.vanished_s + MOST_HELD_S)
        ended = [name for name, known in self.known.items() if known.leaves_s is not None and known.leaves_s <= now]
        return [self._leave(name) for name in sorted(ended)]

    def _instance(self, name: str, value: bytes) -> list[WatchEvent]:
        known = self.known.get(name)
        if known is not None and known.value == value:
            return self._found(known)
        record = read_instance(name, value)
        spec, last = record.spec, self.left.get(name, 0)
        if known is None and spec.incarnation == last:
            self.returned.append(spec)
            return []
        if spec.incarnation <= last or (known is not None and spec.incarnation < known.spec.incarnation):
            raise Garbage(f"incarnation {spec.incarnation} came after {max(last, known.spec.incarnation if known else 0)}")
        self._somebody()
        self.known[name] = new = _Known(spec, record.lease_s, value)
        if known is None:
            return [Joined(spec)]
        if spec.incarnation > known.spec.incarnation:
            self.left[name] = known.spec.incarnation
            return [Left(name, known.spec.incarnation), Joined(spec)]
        new.report, new.reported_s = known.report, known.reported_s
        switched = [Switched(name, spec.incarnation, spec.role)] if spec.role is not known.spec.role else []
        return [*self._found(known), Joined(spec), *switched]

    def _report(self, name: str, value: bytes) -> list[WatchEvent]:
        known = self.known.get(name)
        if known is None or known.report == value:
            return []
        report = read_report(name, value)
        if report.incarnation != known.spec.incarnation:
            return []
        known.report, known.reported_s = value, self._heard_s
        return [report]

    def _found(self, known: _Known) -> list[WatchEvent]:
        if known.leaves_s is None:
            return []
        self._somebody()
        known.leaves_s = None
        return [Suspected(known.spec.name, known.spec.incarnation, lost=False)]

    def _somebody(self) -> None:
        """One is there. Where nobody was, the others have a lease from now on, as after an outage."""
        if self.ill and self._heard_s != NEVER:
            for known in self.known.values():
                if known.leaves_s is not None:
                    known.leaves_s = self._heard_s + known.lease_s

    def _vanish(self, name: str, now: float) -> list[WatchEvent]:
        known = self.known[name]
        if known.leaves_s is not None:
            return []
        grace_s = self._grace_s(known, now)
        if grace_s <= now:
            return [self._leave(name)]
        known.leaves_s, known.vanished_s = grace_s, now
        return [Suspected(name, known.spec.incarnation)]

    def _grace_s(self, known: _Known, now: float) -> float:
        """Until when it may come back; what lies in the past: it may not."""
        lease_s = known.lease_s
        if known.spec.draining:
            return NEVER  # it said that it would leave
        quiet = any(until_s > now - lease_s and for_s >= lease_s / 2 for until_s, for_s in self._silences)
        return now + lease_s if quiet or self._alone(known, now) else self.back_s + lease_s

    def _alone(self, known: _Known, now: float) -> bool:
        """Has nobody been heard of for half a lease, of those that report?"""
        others = [other for other in self.known.values() if other is not known and other.reported_s != NEVER]
        return bool(others) and all(other.leaves_s is not None or other.reported_s <= now - known.lease_s / 2 for other in others)

    def _leave(self, name: str) -> Left:
        self.left[name] = self.known.pop(name).spec.incarnation
        return Left(name, self.left[name])
