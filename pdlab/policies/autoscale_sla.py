"""As many prefill and decode instances as the load to come needs to meet the objectives. It decides sizes alone, and needs
`cluster.autoscale`. Source: NVIDIA Dynamo's SLA planner.

Every `tick_s` the rate of requests in the last interval is continued: as it is (`constant`), along its trend (`trend`, Holt's smoothing,
which is an ARIMA(0,2,2)), or as it went at this time of the days before (`day`). Lengths are those of the last requests.

    P = rate x TTFT(prompt) x correction / use        D = rate x output / tokens per second of one at the TPOT objective

An instance decodes the largest batch whose step, times its correction, meets TPOT within the KV memory. Corrections are what was seen
over what the predictors say: TTFT from arrival on, and steps; within [1 / `most_correction`, `most_correction`].

An instance is added at once, and taken away only after the number was too large for `min_up_s` on end. There is always one of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Arrived, Event, Finished, InstanceState, PrefillDone, Role, Scale
from pdlab.core.view import Cluster, Instance

SHARE = 0.05  # of a request in the means of lengths and TTFT
LEVEL, TREND = 0.6, 0.3  # of an interval, in Holt's smoothing
FULL = 0.9  # of the KV memory
PATIENCE = 12  # intervals until those who were asked for and did not come are forgotten
AWAY = (InstanceState.GONE, InstanceState.DRAINING)


@dataclass
class AutoscaleSla(Policy):
    tick_s: Annotated[float, Range(gt=0.0, tuned=(1.0, 120.0), log=True)] | None = 10.0
    load: Literal["constant", "trend", "day"] = "trend"
    day_s: Annotated[float, Range(gt=0.0)] = 86_400.0
    use: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.3, 0.9))] = 0.6
    most_correction: Annotated[float, Range(ge=1.0, tuned=(1.0, 8.0))] = 3.0
    min_up_s: Annotated[float, Range(ge=0.0, tuned=(5.0, 600.0), log=True)] = 60.0

    def __post_init__(self) -> None:
        self._arrived = 0
        self._rates: deque[tuple[float, float]] = deque()  # (when, requests/s) of each interval; of one day where that is wanted
        self._level = self._slope = 0.0
        self._prompt_tokens = self._output_tokens = self._ttft_s = 0.0
        self._idle_since_s: dict[Role, float] = {}  # since when there are too many
        self._asked: dict[Role, tuple[int, float]] = {}  # (how many there will be, when that was asked)

    # ------------------------------------------------------------ what was seen

    def observe(self, event: Event, cluster: Cluster) -> None:
        if isinstance(event, Arrived):
            self._arrived += 1
            tokens = event.request.prompt_tokens - max(cluster.cached_tokens(event.request).values(), default=0)
            self._prompt_tokens = _mean(self._prompt_tokens, tokens)
        elif isinstance(event, PrefillDone) and event.request_id in cluster.live:
            self._ttft_s = _mean(self._ttft_s, cluster.now - cluster.live[event.request_id].request.arrival_s)
        elif isinstance(event, Finished):
            self._output_tokens = _mean(self._output_tokens, event.output_tokens)

    def rate_rps(self, now: float, interval_s: float) -> float:
        """Of the interval to come. Where nobody asked for a while, nothing came."""
        if self._rates:
            asleep = min(round((now - self._rates[-1][0]) / interval_s) - 1, ceil(self.day_s / interval_s))
            for k in range(asleep, 0, -1):
                self._learn(now - k * interval_s, 0.0)
        rate, self._arrived = self._arrived / interval_s, 0
        self._learn(now, rate)
        if self.load == "day" and now - self._rates[0][0] >= self.day_s - 1.5 * interval_s:  # a day ago, and an interval later
            return self._rates[1 if len(self._rates) > 1 else 0][1]
        return max(0.0, self._level + self._slope) if self.load == "trend" else rate

    def _learn(self, now: float, rate: float) -> None:
        before = self._level if self._rates else rate
        self._level = LEVEL * rate + (1.0 - LEVEL) * (before + self._slope)
        self._slope = TREND * (self._level - before) + (1.0 - TREND) * self._slope
        self._rates.append((now, rate))
        while self._rates[0][0] < now - self.day_s:
            self._rates.popleft()

    # ------------------------------------------------------------ sizes

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        rate, there = self.rate_rps(cluster.now, self.tick_s or 1.0), [x for x in cluster.instances if x.state not in AWAY]
        if cluster.autoscale is None or not there:
            self.rests = True
            return ()
        wanted = {Role.PREFILL: self.prefill_instances(rate, there), Role.DECODE: self.decode_instances(rate, there, cluster.tpot_slo_s)}
        found = []
        for role, number in wanted.items():
            have = sum(x.role is role for x in there)
            change = self._change(role, have, number, cluster.now) if have else 0
            if change:
                found.append(Scale(change, role))
        self.rests = not found and self._steady(wanted, there, cluster.autoscale[0], cluster.now)
        return found

    def _steady(self, wanted: Mapping[Role, int], there: Sequence[Instance], fewest: int, now: float) -> bool:
        """Nobody is too many, nobody is on the way, and no day comes again: so time alone changes nothing."""
        small = len(there) <= fewest or all(number >= sum(x.role is role for x in there) for role, number in wanted.items())
        coming = any(now - asked_s < PATIENCE * (self.tick_s or 1.0) for _, asked_s in self._asked.values())
        return small and not coming and not (self.load == "day" and any(rate for _, rate in self._rates))

    def prefill_instances(self, rate: float, there: Sequence[Instance]) -> int:
        alone_s = there[0].ttft_s(round(self._prompt_tokens))
        return max(1, ceil(rate * alone_s * self._bounded(self._ttft_s, alone_s) / self.use))

    def decode_instances(self, rate: float, there: Sequence[Instance], tpot_slo_s: float) -> int:
        x, context = there[0], self._prompt_tokens + self._output_tokens
        steps = [(y.decode_step_s, y.tpot_s(y.report.running, y.report.context_tokens)) for y in there if y.report.running]
        correction = self._bounded(sum(seen for seen, _ in steps), sum(foretold for _, foretold in steps))
        low, high = 1, max(1, int(FULL * x.kv_tokens / max(1.0, context)))
        high = min(high, x.spec.max_seqs or high)
        while low < high:
            batch = (low + high + 1) // 2
            late = x.tpot_s(batch, int(batch * context)) * correction > tpot_slo_s
            low, high = (low, batch - 1) if late else (batch, high)
        step_s = x.tpot_s(low, int(low * context)) * correction
        return max(1, ceil(rate * self._output_tokens * step_s / low / self.use))

    def _bounded(self, seen: float, foretold: float) -> float:
        if seen <= 0.0 or foretold <= 0.0:
            return 1.0
        return min(self.most_correction, max(1.0 / self.most_correction, seen / foretold))

    def _change(self, role: Role, have: int, wanted: int, now: float) -> int:
        coming, asked_s = self._asked.get(role, (have, now))
        if have < coming and now - asked_s < PATIENCE * (self.tick_s or 1.0):
            have = coming
        if wanted >= have:
            self._idle_since_s.pop(role, None)
            if wanted > have:
                self._asked[role] = wanted, now
            return wanted - have
        if now - self._idle_since_s.setdefault(role, now) < self.min_up_s or have == 1:
            return 0
        del self._idle_since_s[role]
        self._asked.pop(role, None)
        return -1


def _mean(mean: float, value: float) -> float:
    return value if not mean else mean + SHARE * (value - mean)
