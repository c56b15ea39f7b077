"""Prefill on the decode instance itself when little of the prompt is left to compute there: no transfer, and the prefill instances stay
free for long prompts. Everything else goes the way of `prefix_aware`.

An instance takes such a prompt only while its KV use, with the prompt, stays below `max_kv_use` and the prompt tokens it computes
already do not exceed the threshold together with it, since every one of them delays the decodes there. Source: NVIDIA Dynamo's
conditional disaggregation (the idea).
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.policy import Reject, require
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.prefix_aware import PrefixAware


@dataclass
class Conditional(PrefixAware):
    threshold_tokens: int = 256
    max_kv_use: float = 0.9

    def __post_init__(self) -> None:
        require(self.threshold_tokens >= 0, "threshold_tokens", self.threshold_tokens, "be 0 or more")
        require(0.0 < self.max_kv_use <= 1.0, "max_kv_use", self.max_kv_use, "lie in (0, 1]")

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        hits = cluster.cached_tokens(request)
        prompt = request.prompt_tokens
        able = [
            x
            for x in cluster.decode
            if x.prefill_tokens + prompt - hits.get(x, 0) <= self.threshold_tokens
            and x.used_tokens + prompt <= self.max_kv_use * x.kv_tokens
        ]
        if able:
            return min(able, key=lambda x: (x.prefill_tokens - hits.get(x, 0), x.decode_tokens, x.index))
        return self.soonest(request, cluster, hits)
