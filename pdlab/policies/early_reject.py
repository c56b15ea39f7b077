"""`prefix_aware`, but a request that would miss its TTFT objective wherever it goes is turned away at once instead of making others late.

Predicted TTFT of the best instance x: its queue, taken as equally long prompts one after the other, then this one. A request is turned
away when that exceeds `slack` times the objective. Without a profile nothing is predicted, and nothing turned away. Source: Mooncake's
early rejection (the idea).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Range, Reject
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.prefix_aware import PrefixAware


@dataclass
class EarlyReject(PrefixAware):
    slack: Annotated[float, Range(gt=0.0, tuned=(0.2, 5.0), log=True)] = 1.0

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        hits = cluster.cached_tokens(request)
        best = self.soonest(request, cluster, hits)
        if best is None:
            return None
        n = best.prefill_requests
        queue_s = n * best.prefill_predictor.seconds(best.prefill_tokens / n) if n else 0.0
        ttft_s = queue_s + best.ttft_s(request.prompt_tokens - hits.get(best, 0))
        target_s = cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        if ttft_s > self.slack * target_s:
            return Reject(f"TTFT predicted {ttft_s:.3g} s, objective {target_s:.3g} s")
        return best
