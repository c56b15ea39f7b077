"""What a router shows of itself to whoever looks on: requests under way and the last that ended, and what has happened to its members.

GET /pdlab/v1/requests?limit=N     the stages of each, in seconds since the router began
GET /pdlab/v1/events?after=N       what an operator wants to know of, numbered; the last MOST of them are kept
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from pdlab.core.types import (
    Action,
    AnyEvent,
    Drained,
    Evict,
    Failed,
    Joined,
    Leads,
    Left,
    Lost,
    Migrated,
    Notice,
    Refused,
    RegistryAway,
    Scale,
    Stop,
    Suspected,
    Switch,
    Switched,
    TransferFailed,
    Unreachable,
)

MOST = 2048
MOST_SHOWN = 1000


class Happening(msgspec.Struct, frozen=True):
    """`kind` is the event's or action's name, `alarm` whether somebody should look. `at_s` counts from the router's beginning."""

    number: int
    at_s: float
    kind: str
    instance: str
    request_id: int | None
    words: str
    alarm: bool


class Onlooker:
    """`heard` is told every event and its actions: some a request, none a token."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.happenings: deque[Happening] = deque(maxlen=MOST)
        self.count = 0

    def heard(self, event: AnyEvent, actions: Iterable[Action]) -> None:
        for said in (event, *actions):
            tell = _TOLD.get(said.__class__)
            if tell is not None:
                instance, words, alarm = tell(said)
                self.count += 1
                number = getattr(said, "request_id", None)
                self.happenings.append(Happening(self.count, self.now(), type(said).__name__, instance, number, words, alarm))

    def after(self, number: int) -> dict[str, Any]:
        """Those that came after; `missed` are so many that are not kept any more."""
        found = [one for one in self.happenings if one.number > number]
        first = found[0].number if found else self.count + 1
        return {"now_s": self.now(), "last": self.count, "missed": max(0, first - 1 - max(number, 0)), "events": found}


def _away(event: RegistryAway) -> tuple[str, str, bool]:
    return "", "the registry does not answer, or shows nobody" if event.away else "the registry answers again", event.away


def _left(event: Left) -> tuple[str, str, bool]:
    return event.instance, "died" if event.died else "has left, or lost its lease", event.died


_TOLD: Mapping[type, Callable[[Any], tuple[str, str, bool]]] = {
    Joined: lambda one: (one.spec.name, f"joined as {one.spec.role}", False),
    Left: _left,
    Refused: lambda one: (one.instance, "had no room", True),
    TransferFailed: lambda one: (one.dst, f"KV from {one.src} did not come: {one.reason}", True),
    Unreachable: lambda one: (one.dst, f"does not reach {one.src}: {one.reason}", True),
    Migrated: lambda one: (one.dst, f"took it over from {one.src}", False),
    Lost: lambda one: (one.instance, f"lost it: {one.reason}", True),
    Failed: lambda one: (one.instance, f"cannot serve it: {one.reason}", True),
    Switched: lambda one: (one.instance, f"is {one.role} now", False),
    Drained: lambda one: (one.instance, "drains" if one.draining else "takes work again", False),
    Leads: lambda one: ("", "this router leads" if one.leading else "this router does not lead", False),
    RegistryAway: _away,
    Suspected: lambda one: (one.instance, "lease lost: the registry does not see it" if one.lost else "is seen again", one.lost),
    Switch: lambda one: (one.instance, f"is to be {one.role}", False),
    Stop: lambda one: (one.instance, "is to stop", False),
    Evict: lambda one: (one.instance, "is given up", True),
    Scale: lambda one: ("", f"one more {one.role}", False),
    Notice: lambda one: ("", one.text, True),
}
