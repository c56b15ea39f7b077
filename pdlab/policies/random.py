"""Any, with equal chances, for both phases: the baseline every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.cluster import Cluster, Instance
from pdlab.policy import Policy
from pdlab.types import Request


@dataclass
class Random(Policy):
    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return cluster.rng.choice(cluster.prefill) if cluster.prefill else None

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return cluster.rng.choice(cluster.decode) if cluster.decode else None
