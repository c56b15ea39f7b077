"""Prefill where the prompt would be computed first: what is queued there, plus what of this prompt is not cached there.

cost(x) = TTFT_x(queued_x + L - hit_x). A hit counts from the first block on and without holes; an instance without a hit has to compute
all of L; a cold idle instance beats a hot overloaded one. The queue is the router's own ledger, which knows of a computed prompt at
once where a report is up to a period late. Fetching blocks from another holder instead of computing them is not a choice here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdlab.core.policy import Policy, Reject
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance

NOMINAL_S_PER_TOKEN = 1e-4  # of an instance without a profile: any figure ranks them alike


@dataclass
class PrefixAware(Policy):
    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        return self.soonest(request, cluster, cluster.cached_tokens(request))

    def soonest(self, request: Request, cluster: Cluster, hits: Mapping[Instance, int]) -> Instance | None:
        """The prefill instance of least cost, given the prompt tokens each is believed to hold."""
        prompt = request.prompt_tokens
        best, least_s = None, float("inf")
        for x in cluster.prefill:
            tokens = x.prefill_tokens + prompt
            if hits:
                tokens -= hits.get(x, 0)
            cost_s = x.prefill_predictor.seconds(tokens) or tokens * NOMINAL_S_PER_TOKEN
            if cost_s < least_s:
                best, least_s = x, cost_s
        return best
