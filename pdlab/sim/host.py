"""A machine that several instances share: they slow each other, and what serves them may take the time of one of their cores."""

from __future__ import annotations

from typing import Protocol

import simpy

from pdlab.core.batch import Batch
from pdlab.cost.profile import FrontCosts, Interference


class Neighbour(Protocol):
    """An instance, as the machine sees it. `batch` is the step under way."""

    name: str
    alive: bool
    env: simpy.Environment

    @property
    def batch(self) -> Batch | None: ...

    def stretch(self, seconds: float) -> None:
        """The step under way takes so much longer."""


class Host:
    """`beside`: by how much a step takes longer for each other engine that computes as it begins. `front`: the work of HTTP, router and
    client, none where the machine has a core to spare. All of it is done on the core of the instance that joined last, whose steps take so
    much longer; while that has nothing to do it costs nobody anything. Instances sleep through single steps only."""

    def __init__(self, beside: Interference, front: FrontCosts | None = None) -> None:
        self.beside, self.front = beside, front
        self.instances: dict[str, Neighbour] = {}
        self.last = ""  # the instance on whose core the front end runs
        self._owed = (0.0, 0.0)  # work that came as a step of it ended: when, how much

    def add(self, instance: Neighbour) -> None:
        """Or a later incarnation of it."""
        if instance.name not in self.instances:
            self.last = instance.name
        self.instances[instance.name] = instance

    def extra_s(self, instance: Neighbour, prefill_tokens: int) -> float:
        """How much longer the step takes that `instance` begins now, of so many tokens where some are of prompts, or 0: a decode."""
        added_s = 0.0
        for other in self.instances.values():
            if other is not instance and other.batch is not None:
                added_s += self.beside.added_s(prefill_tokens, bool(other.batch.chunks))
        if instance.name == self.last and self._owed[0] == instance.env.now:
            added_s += self._owed[1]
        return added_s

    def received(self) -> None:
        """A request arrives."""
        if self.front is not None:
            self._work(self.front.request_s)

    def step_ended(self, instance: Neighbour, tokens: int) -> None:
        """A step of `instance` has ended, and made so many."""
        if self.front is None or not tokens:
            return
        work_s = self.front.step_s + tokens * self.front.token_s
        if instance.name == self.last:
            self._owed = (instance.env.now, work_s)
        else:
            self._work(work_s)

    def _work(self, seconds: float) -> None:
        slowed = self.instances[self.last]
        if slowed.alive and slowed.batch is not None:
            slowed.stretch(seconds)
