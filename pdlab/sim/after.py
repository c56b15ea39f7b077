"""The one event of the simulator's own: something is to be called after so many seconds.

It never fails, and nobody but its callbacks waits for it, which spares it most of what a SimPy event costs. Any other event may be among
them: SimPy takes that one's step.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, ClassVar

import simpy

NORMAL = simpy.events.NORMAL


class After:
    """Call `callbacks` with this event in `delay` seconds; its `_value` is `value`. It has what SimPy's `step` asks of an event, is born
    with its callbacks and puts itself into the queue: a list made once serves every event of a kind, which makes it the cheapest event
    there is. No process can wait for it."""

    __slots__ = ("_value", "callbacks")

    _ok: ClassVar[bool] = True

    def __init__(self, env: simpy.Environment, delay: float, callbacks: list[Callable[[Any], None]], value: object = None) -> None:
        self.callbacks: Any = callbacks  # SimPy puts None there
        self._value: Any = value
        heappush(env._queue, (env._now + delay, NORMAL, next(env._eid), self))  # type: ignore[misc]


def run_until(env: simpy.Environment, event: simpy.Event) -> None:
    """`env.run(until=event)`, where that is still to come, and something until then."""
    queue: list[Any] = env._queue
    while True:
        at_s, priority, number, after = heappop(queue)
        if after.__class__ is After:
            env._now = at_s
            for callback in after.callbacks:
                callback(after)
        else:
            heappush(queue, (at_s, priority, number, after))
            env.step()
            if event.processed:
                return
