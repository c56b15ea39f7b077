"""The less loaded of two drawn at random, for both phases: nearly the least loaded one's waiting times, without the herd that runs to
one instance when the view is old. Source: Mitzenmacher 2001; FastDeploy's router has it by that name."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class PowerOfTwo(Policy):
    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        two = cluster.rng.sample(cluster.prefill, min(2, len(cluster.prefill)))
        return min(two, key=lambda x: (x.prefill_tokens, x.index), default=None)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        two = cluster.rng.sample(cluster.decode, min(2, len(cluster.decode)))
        return min(two, key=lambda x: (x.decode_tokens, x.index), default=None)
