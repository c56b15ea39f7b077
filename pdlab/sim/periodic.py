"""What comes round: the instances' reports, and the router's ticks. At rest, when none of them has anything to say, they are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pdlab.core.router import Router
from pdlab.core.types import Report, Tick
from pdlab.results.timeline import Book
from pdlab.sim.after import After
from pdlab.sim.scene import Scene
from pdlab.sim.source import RequestSource
from pdlab.sim.worker import SimInstance


class Periodic:
    """`retired` are instances' earlier incarnations. `wake_callbacks` are those of events that matter only to an instance with work."""

    def __init__(
        self,
        scene: Scene,
        router: Router,
        source: RequestSource,
        book: Book,
        retired: Sequence[SimInstance],
        wake_callbacks: list[Callable[[Any], None]],
        *,
        report_period_s: float,
        report_delay_s: float,
    ) -> None:
        self.scene, self.router, self.source, self.book = scene, router, source, book
        self.report_period_s, self.report_delay_s = report_period_s, report_delay_s
        self.on_progress: Callable[[float, int, int], None] | None = None
        self._retired, self._wake_callbacks = retired, wake_callbacks
        self._report_callbacks: list[Callable[[Any], None]] = [self._report]
        self._tick_callbacks: list[Callable[[Any], None]] = [self._tick]
        self._late_callbacks: list[Callable[[Any], None]] = [self._deliver_late]
        self._stirred_s = 0.0  # when something was last seen to happen
        self._seen = (0, 0, 0)  # by then: requests ended, instances retired, and there

    def start(self) -> None:
        After(self.scene.env, self.report_period_s, self._report_callbacks)
        After(self.scene.env, self.router.tick_s, self._tick_callbacks)

    def _report(self, event: After) -> None:
        now = self.scene.env.now
        alive = [instance for instance in self.scene.instances.values() if instance.alive]
        for instance, report in [(instance, instance.report()) for instance in alive]:  # none knows what another's brings about
            self.deliver(instance, report)
        if self.on_progress is not None:
            self.on_progress(now, self.source.ended, self.source.requests)
        periods = self._at_rest(now, self.report_period_s)
        if periods > 1:
            self.router.rested(reports_s=(periods - 1) * self.report_period_s)
            for instance in self.scene.instances.values():
                if instance.alive:
                    instance.reports_at_rest += periods - 1
        After(self.scene.env, periods * self.report_period_s, self._report_callbacks)

    def _at_rest(self, now: float, period_s: float, step: int = 1) -> int:
        """In how many periods, 1 plus a multiple of `step`, there is something to say again. While nobody does or holds anything, and
        nothing has changed for a while, that is shortly before the next thing happens."""
        settled_s = 2.0 * max(self.report_period_s + self.report_delay_s, self.router.policy_ticks * self.router.tick_s)
        seen = self.source.ended, len(self._retired), len(self.scene.instances)
        if self.scene.jobs or seen != self._seen or not self.router.rests or not self._all_rest(now):
            self._seen, self._stirred_s = seen, now
        if now - self._stirred_s < settled_s:
            return 1
        own = (self._report_callbacks, self._tick_callbacks, self._late_callbacks, self._wake_callbacks)
        next_s = min((entry[0] for entry in self.scene.env._queue if not any(entry[3].callbacks is mine for mine in own)), default=now)
        return 1 + max(0, int((next_s - settled_s - now) / (step * period_s)) - 1) * step

    def _all_rest(self, now: float) -> bool:
        alive = [x for x in self.scene.instances.values() if x.alive]
        silent = any(
            self.scene.silent_until_s.get(x.name, now) > now or self.scene.late_until_s.get(x.name, (now, 0.0))[0] > now for x in alive
        )
        return not silent and all(x.rests for x in alive)

    def deliver(self, instance: SimInstance, report: Report) -> None:
        """To the router, unless it is lost on the way."""
        scene, delay_s = self.scene, self.report_delay_s
        now = scene.env._now
        self.book.sample(now, report, instance.spec.kv_blocks)
        if scene.silent_until_s and now < scene.silent_until_s.get(instance.name, -1.0):
            return
        if scene.late_until_s and now < scene.late_until_s.get(instance.name, (-1.0, 0.0))[0]:
            delay_s += scene.late_until_s[instance.name][1]
        if delay_s > 0.0:
            After(scene.env, delay_s, self._late_callbacks, report)
        else:
            scene.teller.tell(report, now)

    def _deliver_late(self, event: After) -> None:
        self.scene.tell(event._value)

    def _tick(self, event: After) -> None:
        self.scene.tell(Tick())
        tick_s, step = self.router.tick_s, self.router.policy_ticks
        ticks = self._at_rest(self.scene.env.now, tick_s, step)
        if ticks > 1:
            self.router.rested(ticks_s=(ticks - 1) * tick_s)
        After(self.scene.env, ticks * tick_s, self._tick_callbacks)
