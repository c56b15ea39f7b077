"""As many prefill instances as the load of both phases asks for, and no flip that does not pay. It decides roles alone; others place
requests.

Pressure of prefill with P instances: predicted seconds of prompts that arrive in a second, plus what waits over `horizon_s`, over P.
Pressure of decode with D: the predicted step of an equal share of all sequences over the TPOT objective, or the KV memory in use, if that
is more. The split with the least greater pressure is wanted.

Instances flip towards it once it has been better for `settle_s`, by more than `hysteresis` of the pressure and by more over `horizon_s`
than a flip costs: the time that an instance serves nobody, which is measured at every flip, and `switch_cost_s` before the first. An
instance keeps its role for `min_flip_interval_s`. Of those that flip the least loaded does; mixed instances are given a role as soon as
there are two.

Two instances with one role each swap these in one step where each does better what the other does, by more than `hysteresis` and over the
same costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Arrived, Event, InstanceState, Role, Scale, Switched
from pdlab.core.view import Cluster, Instance

LEARNS = 0.5  # of what the last flip took
FULL = 0.9  # of the KV memory
NOMINAL_TOKENS = 1000  # of a prompt by which two instances are compared
ROUNDING_S = 1e-6  # ticks are not exact


@dataclass
class SettledRoles(Policy):
    tick_s: Annotated[float, Range(gt=0.0, tuned=(0.1, 5.0), log=True)] | None = 0.5
    horizon_s: Annotated[float, Range(gt=0.0, tuned=(2.0, 60.0), log=True)] = 10.0
    memory_s: Annotated[float, Range(gt=0.0, tuned=(1.0, 60.0), log=True)] = 5.0
    settle_s: Annotated[float, Range(ge=0.0, tuned=(0.5, 20.0), log=True)] = 2.0
    hysteresis: Annotated[float, Range(ge=0.0, tuned=(0.0, 1.0))] = 0.15
    switch_cost_s: Annotated[float, Range(ge=0.0, tuned=(0.1, 20.0), log=True)] = 1.0
    min_flip_interval_s: Annotated[float, Range(ge=0.0, tuned=(0.5, 60.0), log=True)] = 5.0

    def __post_init__(self) -> None:
        self._arriving = 0.0  # seconds of prefill that arrive in a second
        self._at_s = 0.0  # as of then
        self._began_s: float | None = None  # when the first came
        self._better_since_s: float | None = None
        self._asked_s: dict[str, float] = {}  # flips under way
        self.cost_s = self.switch_cost_s

    # ------------------------------------------------------------ what comes

    def observe(self, event: Event, cluster: Cluster) -> None:
        if isinstance(event, Arrived):
            one = next((x for x in cluster.instances if x.ready), None)
            if one is not None:
                self._began_s = cluster.now if self._began_s is None else self._began_s
                self._fade(cluster.now)
                tokens = event.request.prompt_tokens - max(cluster.cached_tokens(event.request).values(), default=0)
                self._arriving += one.ttft_s(tokens) / self.memory_s
        elif isinstance(event, Switched):
            asked_s = self._asked_s.pop(event.instance, None)
            if asked_s is not None:
                self.cost_s += LEARNS * (cluster.now - asked_s - self.cost_s)

    def _fade(self, now: float) -> None:
        self._arriving *= exp((self._at_s - now) / self.memory_s)
        self._at_s = now

    # ------------------------------------------------------------ pressures

    def prefill_pressure(self, instances: int, cluster: Cluster) -> float:
        waiting_s = sum([x.ttft_s(x.prefill_tokens) for x in cluster.instances if x.ready and x.prefill_tokens])
        seen_s = max(1.0, cluster.now - self._began_s) if self._began_s is not None else self.memory_s
        return (self._arriving / (1.0 - exp(-seen_s / self.memory_s)) + waiting_s / self.horizon_s) / instances

    def decode_pressure(self, instances: int, cluster: Cluster, one: Instance) -> float:
        decoding = [live for x in cluster.instances for live in x.decoding.values()]
        context = sum([cluster.context_tokens(live) for live in decoding])
        step_s = one.tpot_s(-(-len(decoding) // instances), context // instances) if decoding else 0.0
        return max(step_s / cluster.tpot_slo_s, context / instances / one.kv_tokens / FULL)

    def pressure(self, prefill: int, decode: int, cluster: Cluster, one: Instance) -> float:
        return max(self.prefill_pressure(prefill, cluster), self.decode_pressure(decode, cluster, one))

    # ------------------------------------------------------------ roles

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        ready = [x for x in cluster.instances if x.ready]
        switching = {x.name for x in cluster.instances if x.state is InstanceState.SWITCHING}
        self._asked_s = {name: at_s for name, at_s in self._asked_s.items() if name in switching}
        self.rests = not self._asked_s  # as long as no other split is better; while nothing comes that does not change
        if len(ready) < 2 or self._asked_s:
            return ()
        self._fade(cluster.now)
        n = len(ready)
        pressures = {p: self.pressure(p, n - p, cluster, ready[0]) for p in range(1, n)}
        wanted = min(pressures, key=lambda p: (pressures[p], p))
        mixed = [x for x in ready if x.role is Role.MIXED]
        prefill, decode = ([x for x in ready if x.role is role] for role in (Role.PREFILL, Role.DECODE))
        if mixed:
            given = min(len(mixed), max(0, wanted - len(prefill)))
            return self._flips([(x, Role.PREFILL if i < given else Role.DECODE) for i, x in enumerate(mixed)], cluster.now)
        if n == 2 and prefill and decode:
            return self._swap(prefill[0], decode[0], cluster)
        if not prefill or not decode or not self._pays(pressures[len(prefill)], pressures[wanted], cluster.now):
            return ()
        flips = [(x, Role.DECODE) for x in sorted(prefill, key=lambda x: (x.prefill_tokens, x.index))[: max(0, len(prefill) - wanted)]]
        flips += [(x, Role.PREFILL) for x in sorted(decode, key=lambda x: (x.decode_tokens, x.index))[: max(0, wanted - len(prefill))]]
        return self._flips([(x, role) for x, role in flips if cluster.now - x.flipped_s >= self.min_flip_interval_s], cluster.now)

    def _swap(self, a: Instance, b: Instance, cluster: Cluster) -> list[tuple[Instance, Role]]:
        """One prefills, the other decodes: would they the other way round?"""
        base_s = next(x for x in cluster.instances if x.ready).ttft_s(NOMINAL_TOKENS) or 1.0
        now_at, then_at = (
            max(self.prefill_pressure(1, cluster) * p.ttft_s(NOMINAL_TOKENS) / base_s, self.decode_pressure(1, cluster, d))
            for p, d in ((a, b), (b, a))
        )
        if min(cluster.now - x.flipped_s for x in (a, b)) < self.min_flip_interval_s:
            self.rests = False
            return []
        if not self._pays(now_at, then_at, cluster.now):
            return []
        return self._flips([(a, Role.DECODE), (b, Role.PREFILL)], cluster.now)

    def _pays(self, now_at: float, then_at: float, now: float) -> bool:
        """Has the other split been better for long enough, by enough?"""
        gain = now_at - then_at
        if gain <= self.hysteresis * now_at or gain * self.horizon_s <= self.cost_s * then_at:
            self._better_since_s = None
            return False
        self.rests = False
        if self._better_since_s is None:
            self._better_since_s = now
        return now - self._better_since_s >= self.settle_s - ROUNDING_S

    def _flips(self, flips: list[tuple[Instance, Role]], now: float) -> list[tuple[Instance, Role]]:
        for x, _ in flips:
            self._asked_s[x.name] = now
        self._better_since_s = None
        return flips
