"""A slow, plain fluid model of shared links, to compare `pdlab.sim.link` with: one list of flows, all rates anew at every event."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import inf

Links = tuple[str, ...]


@dataclass(eq=False)
class Flow:
    links: Links
    start_s: float
    size: float
    limit: float = inf
    open: bool = False
    cancelled: bool = False
    delivered: float = 0.0
    done_s: float = inf
    rate: float = field(default=0.0, repr=False)

    @property
    def left(self) -> float:
        return self.size - self.delivered


class Fluid:
    def __init__(self, capacity: dict[str, float]) -> None:
        self.now = 0.0
        self.capacity = dict(capacity)
        self.carried = dict.fromkeys(capacity, 0.0)
        self.busy_s = dict.fromkeys(capacity, 0.0)
        self.flows: list[Flow] = []

    def flowing(self) -> list[Flow]:
        return [f for f in self.flows if f.start_s <= self.now and f.left > 0.0 and not f.cancelled]

    def fill(self, flows: list[Flow]) -> None:
        """Raise all by the largest common increment; whoever hits a limit or a full link stops."""
        for flow in flows:
            flow.rate = 0.0
        rising = list(flows)
        slack = {name: self.capacity[name] for flow in flows for name in flow.links}
        while rising:
            count = Counter(name for flow in rising for name in flow.links)
            step = min([slack[name] / n for name, n in count.items()] + [f.limit - f.rate for f in rising])
            for flow in rising:
                flow.rate += step
            for name, n in count.items():
                slack[name] -= n * step
            full = {name for name in count if slack[name] <= 1e-12 * max(1.0, self.capacity[name])}
            still = [f for f in rising if f.rate < f.limit * (1 - 1e-12) and full.isdisjoint(f.links)]
            assert len(still) < len(rising), "every round stops somebody"
            rising = still

    def run(self, until_s: float) -> None:
        for _ in range(10_000):
            for flow in self.flows:
                if flow.done_s == inf and not (flow.open or flow.cancelled) and flow.left <= 0.0 and flow.start_s <= self.now:
                    flow.done_s = self.now
            flows = self.flowing()
            self.fill(flows)
            ends = [self.now + f.left / f.rate for f in flows if f.rate > 0.0]
            starts = [f.start_s for f in self.flows if f.start_s > self.now]
            then = min([until_s, *ends, *starts])
            for flow in flows:
                moved = flow.rate * (then - self.now)
                if flow.left - moved <= 1e-9 * max(1.0, flow.size):
                    moved, flow.delivered = flow.left, flow.size
                else:
                    flow.delivered += moved
                for name in flow.links:
                    self.carried[name] += moved
            for name in {name for flow in flows for name in flow.links}:
                self.busy_s[name] += then - self.now
            if then == self.now == until_s:
                return
            self.now = then
        raise AssertionError(f"no progress at {self.now}: {self.flowing()}")
