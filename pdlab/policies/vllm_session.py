"""Session affinity: all requests of a session go to one instance of each phase, whatever its load; without a session, where the fewest
have been sent lately. Source: vLLM's production-stack router (session).

Sessions lie on a ring (see `consistent_hash`), so that few of them move when an instance comes or goes. A request without one goes to the
instance with the fewest requests within the last `qps_window_s`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.consistent_hash import HashRing


@dataclass
class VllmSession(Policy):
    points: Annotated[int, Range(ge=1)] = 160
    qps_window_s: Annotated[float, Range(gt=0.0)] = 60.0

    def __post_init__(self) -> None:
        self._ring = HashRing(self.points)
        self._sent: dict[Instance, deque[float]] = {}  # when requests were sent there

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._choose(cluster.prefill, request, cluster)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._choose(cluster.decode, request, cluster)

    def _choose(self, candidates: Sequence[Instance], request: Request, cluster: Cluster) -> Instance | None:
        if not candidates:
            return None
        for times in self._sent.values():
            while times and times[0] < cluster.now - self.qps_window_s:
                times.popleft()
        if request.session:
            chosen = next(self._ring.walk(candidates, request.session))
        else:
            chosen = min(candidates, key=lambda x: (len(self._sent.get(x, ())), x.index))
        self._sent = {x: times for x, times in self._sent.items() if times}
        self._sent.setdefault(chosen, deque()).append(cluster.now)
        return chosen
