"""Each in turn, for both phases."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class RoundRobin(Policy):
    def __post_init__(self) -> None:
        self._prefill = self._decode = 0  # whose turn it is

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        candidates = cluster.prefill
        if not candidates:
            return None
        turn = self._prefill % len(candidates)
        self._prefill = turn + 1
        return candidates[turn]

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        candidates = cluster.decode
        if not candidates:
            return None
        turn = self._decode % len(candidates)
        self._decode = turn + 1
        return candidates[turn]
