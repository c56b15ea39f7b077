"""The one event of the simulator's own: something is to be called after so many seconds."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import Any

import simpy

NORMAL = simpy.events.NORMAL


class After(simpy.Event):
    """Call `callbacks` with this event in `delay` seconds; its `_value` is `value`. A SimPy Timeout that is born with its callbacks, and
    puts itself into the queue: a list made once serves every event of a kind, which makes it the cheapest event there is."""

    _ok = True

    def __init__(self, env: simpy.Environment, delay: float, callbacks: list[Callable[[Any], None]], value: object = None) -> None:
        self.callbacks = callbacks
        self._value = value
        heappush(env._queue, (env._now + delay, NORMAL, next(env._eid), self))
