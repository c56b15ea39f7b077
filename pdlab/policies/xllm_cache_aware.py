"""xLLM's cache-aware routing (CAR): score = part of the prompt cached - KV use - waiting / longest waiting; the highest wins, for both
phases. Source: xLLM.

Corrected: the ratios are real numbers (the original divides integers, so that only a complete hit or the longest queue counts), hits end
at the first hole, and an idle instance without a hit is a candidate too. `as_found=True` brings the integer divisions and the narrow
choice of candidates back, as a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class XllmCacheAware(Policy):
    hit_weight: Annotated[float, Range(ge=0.0, tuned=(0.0, 4.0))] = 1.0
    kv_weight: Annotated[float, Range(ge=0.0, tuned=(0.0, 4.0))] = 1.0
    waiting_weight: Annotated[float, Range(ge=0.0, tuned=(0.0, 4.0))] = 1.0
    as_found: bool = False

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._best(cluster.prefill, request, cluster, lambda x: x.prefill_requests)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._best(cluster.decode, request, cluster, lambda x: x.report.waiting)

    def _best(
        self, candidates: Sequence[Instance], request: Request, cluster: Cluster, waiting: Callable[[Instance], int]
    ) -> Instance | None:
        hits = cluster.cached_tokens(request)
        if self.as_found:
            hot = [x for x in candidates if x in hits]
            if not hot:
                return min(candidates, key=lambda x: (x.used_tokens / x.kv_tokens, x.index), default=None)
            candidates = hot
        longest = max(map(waiting, candidates), default=0) or 1
        blocks = max(1, request.prompt_tokens // cluster.hash_tokens)

        def score(x: Instance) -> float:
            hit, queue = hits.get(x, 0) / request.prompt_tokens, waiting(x) / longest
            if self.as_found:
                hit, queue = float(-(-hits[x] // cluster.hash_tokens) // blocks), float(int(queue))
            return self.hit_weight * hit - self.kv_weight * x.used_tokens / x.kv_tokens - self.waiting_weight * queue

        return max(candidates, key=lambda x: (score(x), -x.index), default=None)
