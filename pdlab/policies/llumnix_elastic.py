"""`llumnix`, with instances that come, go and change their roles by how free each phase is on average. Source: Llumnix, OSDI 2024 (scaling
by average freeness, instances that leave counted as full), and its code's roles; the measure of prefill is pdlab's own.

    spare of prefill = mean of 1 - max(predicted wait / TTFT objective, part of the KV memory used or waited for)
    spare of decode  = mean of min(1, freeness / `enough_steps`)

Every `tick_s` a phase with less spare than `grow_below` is short, and one of two or more with more than `shrink_above` has plenty.
A short phase gets the freest instance of the other where that has plenty, so that the ratio of the two follows the load. Else it gets a new
one, where `cluster.autoscale` is on. Where none is short, a phase with plenty gives one up.

A wish must stand for `settle_s` on end before it is followed, and giving one up for `shrink_s`; after a change nothing changes for
`cooldown_s`. Instances without a role are given one: to the phase with less spare, and each phase gets its first.

What a leaving or
switching instance decodes is migrated away, as `llumnix` does; with `priority_tokens` an instance with important requests has headroom. The
memory's freeness knows no TPOT: a decode phase that is late without being full does not count as short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pdlab.core.policy import Range
from pdlab.core.types import SWITCH, InstanceState, Role, Scale
from pdlab.core.view import Cluster, Instance
from pdlab.policies.freeness import steps
from pdlab.policies.llumnix import Llumnix, blocks_ratio

PHASES = (Role.PREFILL, Role.DECODE)
PATIENCE_S = 60.0  # until one that was asked for and did not come is forgotten

Wish = tuple[Literal["flip", "grow", "shrink"], Role]


@dataclass
class LlumnixElastic(Llumnix):
    grow_below: Annotated[float, Range(ge=0.0, lt=1.0, tuned=(0.1, 0.7))] = 0.5
    shrink_above: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.5, 1.0))] = 0.9
    enough_steps: Annotated[float, Range(gt=0.0, tuned=(10.0, 2000.0), log=True)] = 800.0
    settle_s: Annotated[float, Range(ge=0.0, tuned=(0.2, 20.0), log=True)] = 1.0
    shrink_s: Annotated[float, Range(ge=0.0, tuned=(5.0, 300.0), log=True)] = 30.0
    cooldown_s: Annotated[float, Range(ge=0.0, tuned=(1.0, 60.0), log=True)] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wish: tuple[Wish, float] | None = None  # and since when
        self._changed_s = -math.inf
        self._asked: tuple[int, float] | None = None  # how many there were when one more was asked for, and when that was

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        ready = [x for x in cluster.instances if x.ready]
        if len(ready) < 2:
            self._wish, self.rests = None, True
            return ()
        if without := [x for x in ready if x.role is Role.MIXED and x.can(SWITCH)]:
            self.rests = False
            return self._assigned(without, ready, cluster)
        wish = self._wanted(ready, cluster)
        if self._asked is not None and (len(ready) > self._asked[0] or cluster.now - self._asked[1] >= PATIENCE_S):
            self._asked = None
        self.rests = wish is None and self._asked is None
        if wish is None or self._wish is None or self._wish[0] != wish:
            self._wish = None if wish is None else (wish, cluster.now)
        if wish is None or self._wish is None or not self._due(wish[0], self._wish[1], cluster.now):
            return ()
        self._wish, self._changed_s = None, cluster.now
        return self._followed(wish, ready, cluster.now)

    # ------------------------------------------------------------ how free

    def spare(self, phase: Role, ready: Sequence[Instance], cluster: Cluster) -> float:
        """From 0, no more can be taken, to 1; 0 where nobody does it."""
        own = [x for x in ready if x.role is phase]
        each = [self._prefill_spare(x, cluster) if phase is Role.PREFILL else self._decode_spare(x) for x in own]
        return sum(each) / len(each) if each else 0.0

    def _prefill_spare(self, x: Instance, cluster: Cluster) -> float:
        n = x.prefill_requests
        wait_s = n * x.ttft_s(x.prefill_tokens // n) if n else 0.0
        return max(0.0, 1.0 - max(wait_s / cluster.ttft_slo_s, blocks_ratio(x)))

    def _decode_spare(self, x: Instance) -> float:
        return min(1.0, max(0.0, steps(*self.room(x)) / self.enough_steps))

    # ------------------------------------------------------------ what is changed

    def _wanted(self, ready: Sequence[Instance], cluster: Cluster) -> Wish | None:
        if any(x.state is InstanceState.SWITCHING for x in cluster.instances):
            return None
        spare = {phase: self.spare(phase, ready, cluster) for phase in PHASES}
        plenty = [phase for phase in PHASES if spare[phase] > self.shrink_above and sum(x.role is phase for x in ready) > 1]
        poorest = min(PHASES, key=spare.__getitem__)
        least, most = cluster.autoscale or (len(ready), len(ready))
        if spare[poorest] < self.grow_below:
            if plenty and any(x.role is plenty[0] and x.can(SWITCH) for x in ready):
                return "flip", poorest
            return ("grow", poorest) if len(ready) < most and self._asked is None else None
        if plenty and len(ready) > least:
            return "shrink", max(plenty, key=spare.__getitem__)
        return None

    def _due(self, kind: str, since_s: float, now: float) -> bool:
        return now - since_s >= (self.shrink_s if kind == "shrink" else self.settle_s) and now - self._changed_s >= self.cooldown_s

    def _followed(self, wish: Wish, ready: Sequence[Instance], now: float) -> Sequence[tuple[Instance, Role] | Scale]:
        kind, phase = wish
        if kind == "flip":
            others = [x for x in ready if x.role is not phase and x.can(SWITCH)]
            return [
                (min(others, key=lambda x: (x.prefill_requests + x.decode_requests, x.prefill_tokens + x.decode_tokens, x.index)), phase)
            ]
        if kind == "grow":
            self._asked = len(ready), now
        return [Scale(1 if kind == "grow" else -1, phase)]

    def _assigned(self, without: Sequence[Instance], ready: Sequence[Instance], cluster: Cluster) -> list[tuple[Instance, Role]]:
        """Roles for those that have none. Each counts as idle in the phase that it is given to."""
        share = {phase: (self.spare(phase, ready, cluster), sum(x.role is phase for x in ready)) for phase in PHASES}
        found = []
        for x in without:
            phase = min(PHASES, key=lambda one: (share[one][1] > 0, *share[one]))
            spare, count = share[phase]
            share[phase] = (spare * count + 1.0) / (count + 1), count + 1
            found.append((x, phase))
        return found
