"""From what a store shows to events, sans-IO: differences only, in an order that a router can follow.

An instance that vanishes has Left, since a lease that ran out says that its holder has fenced itself. Only after an outage of the store it
is Suspected for one lease: a store that lost writes has lost live instances too, and they come back within that time or never.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pdlab.real.registry.records import Garbage, read_instance, read_report
from pdlab.real.registry.store import INSTANCE, REPORT
from pdlab.types import InstanceSpec, Joined, Left, Report, Suspected, Switched

log = logging.getLogger(__name__)
WatchEvent = Joined | Left | Report | Suspected | Switched
NEVER = float("-inf")


class _Known:
    """An instance that has Joined and not Left."""

    def __init__(self, spec: InstanceSpec, lease_s: float, value: bytes) -> None:
        self.spec, self.lease_s, self.value = spec, lease_s, value
        self.report = b""
        self.leaves_s: float | None = None


class Observer:
    def __init__(self) -> None:
        self.known: dict[str, _Known] = {}
        self.left: dict[str, int] = {}  # name -> the highest incarnation that has Left: it never comes back
        self.away = False
        self.back_s = NEVER
        self.refused: dict[str, int] = {}  # key -> hash of the value that was skipped, so that it is logged once

    @property
    def due_s(self) -> float | None:
        """When `expire` has something to say."""
        return None if self.away else min((k.leaves_s for k in self.known.values() if k.leaves_s is not None), default=None)

    def outage(self) -> None:
        """The store does not answer: from now on nothing can be said of anybody, until the next snapshot."""
        self.away = True

    def snapshot(self, entries: Mapping[str, bytes], now: float) -> list[WatchEvent]:
        if self.away:
            self.away, self.back_s = False, now
            for known in self.known.values():
                if known.leaves_s is not None:
                    known.leaves_s = now + known.lease_s
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
        ended = [name for name, known in self.known.items() if known.leaves_s is not None and known.leaves_s <= now]
        return [] if self.away else [self._leave(name) for name in sorted(ended)]

    def _instance(self, name: str, value: bytes) -> list[WatchEvent]:
        known = self.known.get(name)
        if known is not None and known.value == value:
            return self._found(known)
        record = read_instance(name, value)
        spec, last = record.spec, self.left.get(name, 0)
        if spec.incarnation <= last or (known is not None and spec.incarnation < known.spec.incarnation):
            raise Garbage(f"incarnation {spec.incarnation} came after {max(last, known.spec.incarnation if known else 0)}")
        self.known[name] = new = _Known(spec, record.lease_s, value)
        if known is None:
            return [Joined(spec)]
        if spec.incarnation > known.spec.incarnation:
            self.left[name] = known.spec.incarnation
            return [Left(name, known.spec.incarnation), Joined(spec)]
        new.report = known.report
        switched = [Switched(name, spec.incarnation, spec.role)] if spec.role is not known.spec.role else []
        return [*self._found(known), Joined(spec), *switched]

    def _report(self, name: str, value: bytes) -> list[WatchEvent]:
        known = self.known.get(name)
        if known is None or known.report == value:
            return []
        report = read_report(name, value)
        if report.incarnation != known.spec.incarnation:
            return []
        known.report = value
        return [report]

    def _found(self, known: _Known) -> list[WatchEvent]:
        if known.leaves_s is None:
            return []
        known.leaves_s = None
        return [Suspected(known.spec.name, known.spec.incarnation, lost=False)]

    def _vanish(self, name: str, now: float) -> list[WatchEvent]:
        known = self.known[name]
        if known.leaves_s is not None:
            return []
        if now >= self.back_s + known.lease_s:
            return [self._leave(name)]
        known.leaves_s = self.back_s + known.lease_s
        return [Suspected(name, known.spec.incarnation)]

    def _leave(self, name: str) -> Left:
        self.left[name] = self.known.pop(name).spec.incarnation
        return Left(name, self.left[name])
