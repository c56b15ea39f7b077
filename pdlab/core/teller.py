"""What passes between a world and its router: one queue, one order of events and actions, one log, in both worlds.

An event's actions are performed in order before the next event is taken. What arises while they are performed waits its turn, behind what
waits already; it keeps the time at which it happened. The log has an event as soon as the router has answered it, before anything is
done about it, so that its lines are in the order in which the router was asked.

Where a policy, the router or the world that performs fails, nothing more is told: what waits is dropped, `down` says why, and whoever told
the event gets the error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pdlab.core.router import Router
from pdlab.core.types import Action, AnyEvent, UsageError


class Log(Protocol):
    """Takes every event and what was answered. Where it cannot write any more it says so itself, and counts what is `dropped`."""

    @property
    def dropped(self) -> int: ...

    def write(self, now: float, event: AnyEvent, actions: list[Action], /) -> None: ...


class Teller:
    """`perform` has one call for each class of action. `on_event(event, actions)` is called when these are performed."""

    def __init__(self, router: Router, perform: Mapping[type, Callable[[Any], None]], log: Log | None = None) -> None:
        self.router = router
        self.perform = dict(perform)
        self.log = log
        self.on_event: Callable[[AnyEvent, list[Action]], None] | None = None
        self.down: str | None = None  # why nothing is told any more
        self._waiting: deque[tuple[AnyEvent, float]] = deque()
        self._engaged = False  # with an event, or for good: down

    def tell(self, event: AnyEvent, now: float) -> None:
        """What happened at `now`, which never goes back. Within another event's actions it waits until these are performed."""
        if self._engaged:
            if self.down is None:
                self._waiting.append((event, now))
            return
        self._engaged = True
        try:
            while True:
                actions = self.router.handle(event, now)
                if self.log is not None:
                    self.log.write(now, event, actions)
                for action in actions:
                    self.perform[action.__class__](action)
                if self.on_event is not None:
                    self.on_event(event, actions)
                if not self._waiting:
                    break
                event, now = self._waiting.popleft()
        except BaseException as error:
            self._waiting.clear()
            if isinstance(error, UsageError):
                self.down = str(error)
            elif isinstance(error, Exception):
                self.down = f"the router has a bug: {type(error).__name__}: {error}"
            self._engaged = self.down is not None
            raise
        self._engaged = False
