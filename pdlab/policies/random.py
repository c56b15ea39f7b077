"""Any, with equal chances, for both phases: the baseline every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class Random(Policy):
    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return cluster.rng.choice(cluster.prefill) if cluster.prefill else None

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return cluster.rng.choice(cluster.decode) if cluster.decode else None
