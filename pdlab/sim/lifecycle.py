"""Instances come, switch their role, drain, die and come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from pdlab.core.types import Drained, Evict, InstanceSpec, Left, Lost, Role, Scale, Stage, Stop, Switch, Switched
from pdlab.sim.calls import call_later
from pdlab.sim.job import Job
from pdlab.sim.moves import Moves
from pdlab.sim.scene import Scene
from pdlab.sim.worker import SimInstance

STILL = 1e9  # by which a step takes longer that makes no progress


class Lifecycle:
    """Who has died is known to be dead `detect_s` after something of it broke off, or was asked of it in vain; of whom nobody asks
    anything, when its lease has run out. Who stands still loses its place with its lease, too. A switch drains, then takes `switch_s`.
    Whoever drains says so, and that it takes work again."""

    def __init__(
        self,
        scene: Scene,
        moves: Moves,
        bring_up: Callable[[InstanceSpec], None],
        start_instance: Callable[[Role], tuple[Callable[[], None], float]] | None,
        *,
        switch_s: float = 1.0,
        lease_s: float,
    ) -> None:
        self.scene, self.moves = scene, moves
        self.bring_up, self.start_instance = bring_up, start_instance
        self.switch_s, self.lease_s = switch_s, lease_s
        self.retired: list[SimInstance] = []  # earlier incarnations, for the records
        self._still: dict[SimInstance, tuple[float, float]] = {}  # who stands still: how slow it was before

    def switch(self, action: Switch) -> None:
        self._drain(action.instance, action.role)

    def stop(self, action: Stop) -> None:
        self._drain(action.instance, None)

    def drain(self, name: str) -> None:
        """An operator's wish: it ends what it has, and leaves."""
        self._drain(name, None)

    def _drain(self, name: str, goal: Role | None) -> None:
        instance = self.scene.instances[name]
        if instance.alive:
            instance.worker.drain(goal)
            self.scene.tell(Drained(name, instance.spec.incarnation))
            instance.kick()
        else:
            self.scene.asked(instance)

    def drained(self, instance: SimInstance) -> None:
        goal = instance.worker.goal
        delay_s = 0.0 if goal is None else self.switch_s
        call_later(self.scene.env, delay_s, lambda _: self._arrived_at(instance, goal))

    def _arrived_at(self, instance: SimInstance, goal: Role | None) -> None:
        if not instance.alive:
            return
        if goal is None:
            self._take_down(instance)
            self.scene.tell(Left(instance.name, instance.spec.incarnation, died=False))
            return
        instance.worker.switch(goal)
        instance.switches += 1
        self.scene.tell(Switched(instance.name, instance.spec.incarnation, goal))
        self.scene.tell(Drained(instance.name, instance.spec.incarnation, draining=False))

    def kill(self, name: str, restart_after_s: float | None = None) -> None:
        instance = self.scene.instances[name]
        if not instance.alive:
            return
        self._go_on(instance)
        served, left_s = bool(instance.jobs), self._lease_left_s(instance)
        self.scene.deaths[instance] = self._take_down(instance)
        if served:
            self.scene.asked(instance)
        call_later(self.scene.env, left_s, lambda _: self.scene.is_known(instance, died=False))
        if restart_after_s is not None:
            call_later(self.scene.env, restart_after_s, lambda _: self._again(instance))

    def _again(self, instance: SimInstance) -> None:
        """The next incarnation of one that has died or lost its place joins."""
        self.scene.is_known(instance)
        self.bring_up(msgspec.structs.replace(instance.spec, incarnation=instance.spec.incarnation + 1))

    def stand_still(self, name: str, for_s: float) -> None:
        scene, instance = self.scene, self.scene.instances[name]
        if not instance.alive or instance in self._still:
            return
        self._still[instance] = scene.longer.get(name, (1.0, 1.0))
        scene.slow_down(name, STILL, STILL)
        self.moves.network.scale_bandwidth(name, 0.0)
        scene.silent_until_s[name] = max(scene.silent_until_s.get(name, 0.0), scene.env.now + for_s)
        left_s = self._lease_left_s(instance)
        if left_s < for_s:
            call_later(scene.env, left_s, lambda _: self._lose_place(instance))
        call_later(scene.env, for_s, lambda _: self._go_on(instance))

    def _lose_place(self, instance: SimInstance) -> None:
        if instance in self._still and instance.alive:
            self.scene.tell(Left(instance.name, instance.spec.incarnation, self._take_down(instance), died=False))

    def _go_on(self, instance: SimInstance) -> None:
        before = self._still.pop(instance, None)
        if before is None:
            return
        self.scene.slow_down(instance.name, *before)
        self.moves.network.scale_bandwidth(instance.name, 1.0)
        if not instance.alive:
            self._again(instance)

    def _lease_left_s(self, instance: SimInstance) -> float:
        """It is renewed each third of it."""
        lease_s = self.lease_s
        return lease_s - (self.scene.env.now - instance.joined_s) % (lease_s / 3.0)

    def evict(self, action: Evict) -> None:
        instance = self.scene.instances[action.instance]
        if instance.alive and instance.spec.incarnation == action.incarnation:
            self.scene.tell(Left(instance.name, action.incarnation, self._take_down(instance)))

    def _take_down(self, instance: SimInstance) -> dict[int, int]:
        """Stop it dead; returns the tokens of this attempt that the clients of its requests have, where they have any."""
        scene = self.scene
        instance.sync()
        sent: dict[int, int] = {}
        calls_off = []
        for job in list(instance.jobs):
            assert isinstance(job, Job)
            if job.target is instance:
                calls_off.append(job)
                continue
            tokens = scene.client_tokens(job)
            if tokens and job.request.best_of == 1:  # several are made anew
                sent[job.request.id] = tokens
            job.received_tokens = job.sent + tokens
            if job.stage is Stage.DECODE and instance.runs(job.active):
                job.last_token_s = instance.emitted_s
            self.moves.cancel(job)
        instance.die()
        instance.lived_s += scene.env.now - instance.up_s
        instance.jobs.clear()
        self._break_off(instance)
        self.moves.prefixes.lost(instance)
        for job in calls_off:
            self.moves.call_off(job, f"{instance.name} died")
        return sent

    def _break_off(self, relay: SimInstance) -> None:
        """The streams that it passes on: their requests go on elsewhere, from what their clients have."""
        if not self.moves.mode.via_prefill:
            return
        for job in list(self.scene.jobs.values()):
            seq = job.dseq
            if seq is None or job.done or job.stage is not Stage.DECODE or self.moves.relay(job, seq) is not relay:
                continue
            assert job.d is not None
            lost = Lost(
                job.request.id, job.attempt, job.d.name, f"{relay.name} passed it on, and is gone", self.scene.client_tokens(job), False
            )
            call_later(self.scene.env, 0.0, partial(_tell, self.scene, lost))

    def scale(self, action: Scale) -> None:
        """Start more instances of a role; each joins when it is up."""
        start = self.start_instance
        assert start is not None, "scaling without autoscale"
        for _ in range(action.count):
            add, start_s = start(action.role)
            call_later(self.scene.env, start_s, partial(_call, add))


def _tell(scene: Scene, event: Lost, _: object) -> None:
    scene.tell(event)


def _call(add: Callable[[], None], _: object) -> None:
    add()
