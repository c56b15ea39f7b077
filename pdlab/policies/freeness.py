"""Llumnix' one number, freeness, for all it decides: how many more decode steps an instance can run before its memory is full.

    F = (free blocks - blocks the waiting need - headroom) / (running + waiting)        infinite where there is no request

With `head_of_line` only the first waiting request counts, which makes an instance with free but too little room look loaded: its
requests are moved away, and the head fits (defragmentation). Dispatch and hand-off go to the freest.

Every `tick_s` sources (F below the threshold, or preempted requests still waiting) are paired with destinations (F above it, none
preempted), most loaded with freest: `defrag` takes every pair, `balanced` only one that brings the two closer without overshooting. One
request moves: of the lowest priority there the shortest (SR), the longest (LR) or the last to come (LCR).

An instance sends one at a time, and again only after a report that knows of the last; it receives one at a time. One that is draining or
switching counts as full: all must leave.

With `priority_tokens`, an instance holding a request of priority `high_priority` or more claims to have only that capacity (virtual
usage). Requests of high priority see this on instances without one, others on instances with one: the former gather, the latter keep
away. Sources: Llumnix, OSDI 2024, and the code of its versions 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Literal

from pdlab.core.policy import Policy, Range, Reject
from pdlab.core.types import MIGRATE, InstanceState, Request, Stage
from pdlab.core.view import Cluster, Instance, LiveRequest

Room = Mapping[Instance, tuple[float, int]]


def room(x: Instance, *, head_of_line: bool = True) -> tuple[float, int]:
    """(free blocks, requests) by the last report and what was sent since: freeness is their quotient."""
    report = x.report
    sent = sum(1 for _, _, tokens in x.unreported if tokens)
    waiting = min(1, report.waiting) if head_of_line else report.waiting
    needed = report.waiting_head_blocks if head_of_line else report.waiting_blocks
    return report.free_blocks - needed - x.since_decode_tokens / x.spec.block_tokens, report.running + sent + waiting


def steps(free_blocks: float, requests: int) -> float:
    """Freeness: decode steps until full."""
    return free_blocks / requests if requests > 0 else math.inf


@dataclass
class Freeness(Policy):
    tick_s: Annotated[float, Range(gt=0.0, tuned=(0.02, 2.0), log=True)] | None = 0.1
    migrate_out_threshold: Annotated[float, Range(ge=0.0, tuned=(0.5, 200.0), log=True)] = 3.0  # steps
    pairing: Literal["defrag", "balanced"] = "defrag"
    request_order: Literal["SR", "LR", "LCR"] = "SR"
    head_of_line: bool = True
    priority_tokens: Annotated[int, Range(gt=0)] | None = None
    high_priority: int = 1

    def __post_init__(self) -> None:
        self._calm: dict[Instance, int] = {}  # preemptions up to the last report without anybody waiting
        self._sent_s: dict[Instance, float] = {}  # when it was last told to send a request away

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        return self.freest(cluster.prefill, request)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self.freest(cluster.decode, request)

    def freest(self, candidates: Iterable[Instance], request: Request) -> Instance | None:
        return max(candidates, key=lambda x: (steps(*self.room(x, request)), -x.index), default=None)

    def room(self, x: Instance, request: Request | None = None) -> tuple[float, int]:
        """(free blocks, requests) with the headroom of high priority taken off, as `request` sees it; as migration does with None."""
        free, requests = room(x, head_of_line=self.head_of_line)
        if self.priority_tokens is not None:
            has_high = any(r.request.priority >= self.high_priority for r in x.decoding.values())
            if has_high is (request is None or request.priority < self.high_priority):
                free -= max(0.0, x.kv_tokens / x.spec.block_tokens - self.priority_tokens / x.spec.block_tokens)
        return free, requests

    # ------------------------------------------------------------ migration

    def must_leave(self, x: Instance) -> bool:
        """Shall all that decodes there go elsewhere?"""
        return x.state is InstanceState.DRAINING or x.state is InstanceState.SWITCHING

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        if cluster.degraded:
            return ()
        known = [x for x in cluster.instances if x.state is not InstanceState.GONE]
        room = {x: self.room(x) for x in known}
        preempted = {x for x in known if self._preempted(x)}
        for memory in (self._calm, self._sent_s):
            for x in memory.keys() - room.keys():
                del memory[x]  # gone, or restarted
        moving = [r for r in cluster.live.values() if r.migrating is not None]
        destinations = self._destinations(cluster, room, preempted, {r.migrating for r in moving})
        moves: list[tuple[int, Instance]] = []
        for x in known:
            for live in self._in_order(x, cluster) if self.must_leave(x) else ():
                target = next((d for d in destinations if d is not x and self._fits(live, d, room[d][0], cluster)), None)
                if target is not None:
                    destinations.remove(target)
                    moves.append((live.request.id, target))
        sources = self._sources(known, room, preempted, {r.decode for r in moving})
        for x, target in zip(sources, destinations, strict=False):
            chosen = next((r for r in self._in_order(x, cluster) if self._fits(r, target, room[target][0], cluster)), None)
            if chosen is not None and self._accepts(chosen, room[x], room[target], cluster):
                self._sent_s[x] = cluster.now
                moves.append((chosen.request.id, target))
        return moves

    def _destinations(self, cluster: Cluster, room: Room, preempted: Set[Instance], receiving: Set[Instance | None]) -> list[Instance]:
        """The freest first."""
        busy = preempted | receiving
        found = [x for x in cluster.decode if steps(*room[x]) > self.migrate_out_threshold and x not in busy and x.can(MIGRATE)]
        return sorted(found, key=lambda x: (-steps(*room[x]), x.index))

    def _sources(self, known: Sequence[Instance], room: Room, preempted: Set[Instance], sending: Set[Instance | None]) -> list[Instance]:
        """The most loaded first."""
        found = [
            x
            for x in known
            if (steps(*room[x]) < self.migrate_out_threshold or x in preempted)
            and (x.ready and x.decoding and x not in sending and not self.must_leave(x) and x.can(MIGRATE))
            and x.report.taken_s > self._sent_s.get(x, -math.inf)
        ]
        return sorted(found, key=lambda x: (steps(*room[x]), x.index))

    def _preempted(self, x: Instance) -> bool:
        """Does a preempted request wait there? Reports count preemptions since the start; with nobody waiting all have resumed."""
        if not x.report.waiting:
            self._calm[x] = x.report.preempted
        return x.report.preempted > self._calm.get(x, 0)

    def _in_order(self, x: Instance, cluster: Cluster) -> list[LiveRequest]:
        """The requests that can be moved from there, the one to move first first."""
        movable = [r for r in x.decoding.values() if r.stage is Stage.DECODE and r.migrating is None]
        if self.request_order == "LCR":
            return sorted(reversed(movable), key=lambda r: r.request.priority)  # noqa: C414 a stable sort: of equals the last first
        sign = 1 if self.request_order == "SR" else -1
        return sorted(movable, key=lambda r: (r.request.priority, sign * cluster.context_tokens(r), r.request.id))

    def _fits(self, live: LiveRequest, target: Instance, free_blocks: float, cluster: Cluster) -> bool:
        assert live.decode is not None, f"request {live.request.id} decodes somewhere"
        return cluster.context_tokens(live) < free_blocks * live.decode.spec.block_tokens and cluster.can_migrate(live, target)

    def _accepts(self, live: LiveRequest, source: tuple[float, int], target: tuple[float, int], cluster: Cluster) -> bool:
        """The pairing's test of one move, given (free blocks, requests) at both ends."""
        if self.pairing == "defrag":
            return True
        assert live.decode is not None, f"request {live.request.id} decodes somewhere"
        blocks = math.ceil(cluster.context_tokens(live) / live.decode.spec.block_tokens)
        source_after, target_after = steps(source[0] + blocks, source[1] - 1), steps(target[0] - blocks, target[1] + 1)
        if target_after < self.migrate_out_threshold:
            return False
        return target[1] == 0 or 0.0 < target_after - source_after < steps(*target) - steps(*source)
