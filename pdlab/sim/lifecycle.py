"""Instances come, switch their role, drain, die and come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from pdlab.core.types import Drained, Evict, Left, Role, Scale, Stage, Stop, Switch, Switched
from pdlab.sim.job import Job
from pdlab.sim.worker import After, SimInstance

if TYPE_CHECKING:
    from pdlab.sim.world import World

STILL = 1e9  # by which a step takes longer that makes no progress


class Lifecycle:
    """Who has died is known to be dead `detect_s` after something of it broke off, or was asked of it in vain; of whom nobody asks
    anything, when its lease has run out. Who stands still loses its place with its lease, too. A switch drains, then takes `switch_s`.
    Whoever drains says so, and that it takes work again."""

    def __init__(self, world: World, *, switch_s: float = 1.0, detect_s: float = 0.5) -> None:
        self.world, self.switch_s, self.detect_s = world, switch_s, detect_s
        self.retired: list[SimInstance] = []  # earlier incarnations, for the records
        self._deaths: dict[SimInstance, dict[int, int]] = {}  # who was killed, and nobody knows: what clients have of what it served
        self._still: dict[SimInstance, tuple[float, float]] = {}  # who stands still: how slow it was before

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
        else:
            self.asked(instance)

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
        self._go_on(instance)
        served, left_s = bool(instance.jobs), self._lease_left_s(instance)
        self._deaths[instance] = self._take_down(instance)
        if served:
            self.asked(instance)
        After(self.world.env, left_s, [lambda _: self._is_known(instance, died=False)])
        if restart_after_s is not None:
            After(self.world.env, restart_after_s, [lambda _: self._again(instance)])

    def asked(self, instance: SimInstance) -> None:
        """Something is asked of one that has died, and who asks will know."""
        if instance in self._deaths:
            After(self.world.env, self.detect_s, [lambda _: self._is_known(instance)])

    def _is_known(self, instance: SimInstance, *, died: bool = True) -> None:
        sent = self._deaths.pop(instance, None)
        if sent is not None:
            self.world.tell(Left(instance.name, instance.spec.incarnation, sent, died))

    def _again(self, instance: SimInstance) -> None:
        """The next incarnation of one that has died or lost its place joins."""
        self._is_known(instance)
        self.world.bring_up(msgspec.structs.replace(instance.spec, incarnation=instance.spec.incarnation + 1))

    def stand_still(self, name: str, for_s: float) -> None:
        world, instance = self.world, self.world.instances[name]
        if not instance.alive or instance in self._still:
            return
        self._still[instance] = world.longer.get(name, (1.0, 1.0))
        world.slow_down(name, STILL, STILL)
        world.network.scale_bandwidth(name, 0.0)
        world.silent_until_s[name] = max(world.silent_until_s.get(name, 0.0), world.env.now + for_s)
        left_s = self._lease_left_s(instance)
        if left_s < for_s:
            After(world.env, left_s, [lambda _: self._lose_place(instance)])
        After(world.env, for_s, [lambda _: self._go_on(instance)])

    def _lose_place(self, instance: SimInstance) -> None:
        if instance in self._still and instance.alive:
            self.world.tell(Left(instance.name, instance.spec.incarnation, self._take_down(instance), died=False))

    def _go_on(self, instance: SimInstance) -> None:
        before = self._still.pop(instance, None)
        if before is None:
            return
        self.world.slow_down(instance.name, *before)
        self.world.network.scale_bandwidth(instance.name, 1.0)
        if not instance.alive:
            self._again(instance)

    def _lease_left_s(self, instance: SimInstance) -> float:
        """It is renewed each third of it."""
        lease_s = self.world.router.limits.lease_s
        return lease_s - (self.world.env.now - instance.joined_s) % (lease_s / 3.0)

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
            assert isinstance(job, Job)
            if job.target is instance:
                calls_off.append(job)
                continue
            tokens = world.client_tokens(job)
            if tokens and job.request.best_of == 1:  # several are made anew
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
