"""A policy that scales with the load: an instance of each role for so many requests that live. For the recorded logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdlab.core.policy import Policy
from pdlab.core.types import Role, Scale
from pdlab.core.view import Cluster, Instance


@dataclass
class Tide(Policy):
    tick_s: float | None = 0.5
    requests: int = 8  # for one instance

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        wanted, there = 1 + len(cluster.live) // self.requests, len(cluster.decode)
        return [] if wanted == there else [Scale(1 if wanted > there else -1, Role.DECODE)]
