"""What comes round: the instances' reports, and the router's ticks. At rest, when none of them has anything to say, they are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pdlab.core.router import Router
from pdlab.core.types import Report, Tick
from pdlab.results.timeline import Book
from pdlab.sim.calls import call_later
from pdlab.sim.due_call import DueCall
from pdlab.sim.scene import Scene
from pdlab.sim.source import RequestSource
from pdlab.sim.worker import SimInstance


class Periodic:
    """`retired` are instances' earlier incarnations. `wake` is what is called at times that matter only to an instance with work."""

    def __init__(
        self,
        scene: Scene,
        router: Router,
        source: RequestSource,
        book: Book,
        retired: Sequence[SimInstance],
        wake: Callable[[Any], None],
        *,
        report_period_s: float,
        report_delay_s: float,
    ) -> None:
        self.scene, self.router, self.source, self.book = scene, router, source, book
        self.report_period_s, self.report_delay_s = report_period_s, report_delay_s
        self.on_progress: Callable[[float, int, int], None] | None = None
        self._retired, self._wake = retired, wake
        self._stirred_s = 0.0  # when something was last seen to happen
        self._seen = (0, 0, 0)  # by then: requests ended, instances retired, and there

    def start(self) -> None:
        call_later(self.scene.env, self.report_period_s, self._report)
        call_later(self.scene.env, self.router.tick_s, self._tick)

    def _report(self, event: DueCall) -> None:
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
        call_later(self.scene.env, periods * self.report_period_s, self._report)

    def _at_rest(self, now: float, period_s: float, step: int = 1) -> int:
        """In how many periods, 1 plus a multiple of `step`, there is something to say again. While nobody does or holds anything, and
        nothing has changed for a while, that is shortly before the next thing happens."""
        settled_s = 2.0 * max(self.report_period_s + self.report_delay_s, self.router.policy_ticks * self.router.tick_s)
        seen = self.source.ended, len(self._retired), len(self.scene.instances)
        if self.scene.jobs or seen != self._seen or not self.router.rests or not self._all_rest(now):
            self._seen, self._stirred_s = seen, now
        if now - self._stirred_s < settled_s:
            return 1
        own = (self._report, self._tick, self._deliver_late, self._wake)
        next_s = min((entry[0] for entry in self.scene.env._queue if getattr(entry[3], "call", None) not in own), default=now)
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
            call_later(scene.env, delay_s, self._deliver_late, report)
        else:
            scene.teller.tell(report, now)

    def _deliver_late(self, event: DueCall) -> None:
        self.scene.tell(event.value)

    def _tick(self, event: DueCall) -> None:
        self.scene.tell(Tick())
        tick_s, step = self.router.tick_s, self.router.policy_ticks
        ticks = self._at_rest(self.scene.env.now, tick_s, step)
        if ticks > 1:
            self.router.rested(ticks_s=(ticks - 1) * tick_s)
        call_later(self.scene.env, ticks * tick_s, self._tick)
