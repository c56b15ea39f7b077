"""Instances come, switch their role, drain, die and come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from pdlab.core.types import Drained, Evict, Left, Role, Scale, Stage, Stop, Switch, Switched
from pdlab.sim.worker import After, SimInstance

if TYPE_CHECKING:
    from pdlab.sim.world import World


class Lifecycle:
    """A kill is noticed `detect_s` later (a broken connection, not the lease). A switch drains, then takes `switch_s`. Whoever drains says
    so, and that it takes work again."""

    def __init__(self, world: World, *, switch_s: float = 1.0, detect_s: float = 0.5) -> None:
        self.world, self.switch_s, self.detect_s = world, switch_s, detect_s
        self.retired: list[SimInstance] = []  # earlier incarnations, for the records

    def switch(self, action: Switch) -> None:
        self._drain(action.instance, action.role)

    def stop(self, action: Stop) -> None:
        self._drain(action.instance, None)

    def drain(self, name: str) -> None:
        """An operator's wish: it ends what it has, and leaves."""
        self._drain(name, None)

    def _drain(self, name: str, goal: Role | None) -> None:
        instance = self.world.instances[name]
        if instance.alive:
            instance.worker.drain(goal)
            self.world.tell(Drained(name, instance.spec.incarnation))
            instance.kick()

    def drained(self, instance: SimInstance) -> None:
        goal = instance.worker.goal
        delay_s = 0.0 if goal is None else self.switch_s
        After(self.world.env, delay_s, [lambda _: self._arrived_at(instance, goal)])

    def _arrived_at(self, instance: SimInstance, goal: Role | None) -> None:
        if not instance.alive:
            return
        if goal is None:
            self._take_down(instance)
            self.world.tell(Left(instance.name, instance.spec.incarnation, died=False))
            return
        instance.worker.switch(goal)
        instance.switches += 1
        self.world.tell(Switched(instance.name, instance.spec.incarnation, goal))
        self.world.tell(Drained(instance.name, instance.spec.incarnation, draining=False))

    def kill(self, name: str, restart_after_s: float | None = None) -> None:
        instance = self.world.instances[name]
        if not instance.alive:
            return
        sent = self._take_down(instance)
        left = Left(name, instance.spec.incarnation, sent)
        After(self.world.env, self.detect_s, [lambda _: self.world.tell(left)])
        if restart_after_s is not None:
            spec = msgspec.structs.replace(instance.spec, incarnation=instance.spec.incarnation + 1)
            After(self.world.env, max(restart_after_s, self.detect_s), [lambda _: self.world.bring_up(spec)])

    def evict(self, action: Evict) -> None:
        instance = self.world.instances[action.instance]
        if instance.alive and instance.spec.incarnation == action.incarnation:
            self.world.tell(Left(instance.name, action.incarnation, self._take_down(instance)))

    def _take_down(self, instance: SimInstance) -> dict[int, int]:
        """Stop it dead; returns the tokens of this attempt that the clients of its requests have, where they have any."""
        world = self.world
        instance.sync()
        sent: dict[int, int] = {}
        calls_off = []
        for job in list(instance.jobs):
            if job.target is instance:
                calls_off.append(job)
                continue
            if tokens := world.client_tokens(job):
                sent[job.request.id] = tokens
            job.received_tokens = job.sent + tokens
            if job.stage is Stage.DECODE and instance.runs(job.active):
                job.last_token_s = instance.emitted_s
            world.moves.cancel(job)
        instance.die()
        instance.lived_s += world.env.now - instance.up_s
        instance.jobs.clear()
        for job in calls_off:
            world.moves.call_off(job, f"{instance.name} died")
        return sent

    def scale(self, action: Scale) -> None:
        """Start more instances of a role; each joins when it is up."""
        start = self.world.start_instance
        assert start is not None, "scaling without autoscale"
        for _ in range(action.count):
            add, start_s = start(action.role)
            After(self.world.env, start_s, [partial(_call, add)])


def _call(add: Callable[[], None], _: object) -> None:
    add()
