"""What is to be called at its time. Any other event may be in the same queue: SimPy takes that one's step."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy

from pdlab.sim.due_call import DueCall

NORMAL = simpy.events.NORMAL


def call_at(env: simpy.Environment, at_s: float, call: Callable[[Any], None], value: object = None) -> DueCall:
    """`call` gets the event that is returned here when it is `at_s`, which is not before now. No process can wait for it."""
    event = DueCall(call, value)
    heappush(env._queue, (at_s, NORMAL, next(env._eid), event))  # type: ignore[misc]
    return event


def call_later(env: simpy.Environment, delay_s: float, call: Callable[[Any], None], value: object = None) -> DueCall:
    """`call_at`, in so many seconds."""
    return call_at(env, env._now + delay_s, call, value)


def run_until(env: simpy.Environment, event: simpy.Event) -> None:
    """`env.run(until=event)`, where that is still to come, and something until then."""
    queue: list[Any] = env._queue
    while True:
        at_s, priority, number, due = heappop(queue)
        if due.__class__ is DueCall:
            env._now = at_s
            due.call(due)
        else:
            heappush(queue, (at_s, priority, number, due))
            env.step()
            if event.processed:
                return
