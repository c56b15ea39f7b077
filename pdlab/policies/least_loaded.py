"""The one with the least outstanding work by the router's own ledger, for both phases, counted in prompt tokens or in requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class LeastLoaded(Policy):
    by: Literal["tokens", "requests"] = "tokens"

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        """Prompts still to compute come first; what decodes there (on a mixed instance) settles ties."""
        if self.by == "tokens":
            return min(cluster.prefill, key=lambda x: (x.prefill_tokens, x.decode_tokens, x.index), default=None)
        return min(cluster.prefill, key=lambda x: (x.prefill_requests, x.decode_requests, x.index), default=None)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        if self.by == "tokens":
            return min(cluster.decode, key=lambda x: (x.decode_tokens, x.index), default=None)
        return min(cluster.decode, key=lambda x: (x.decode_requests, x.index), default=None)
