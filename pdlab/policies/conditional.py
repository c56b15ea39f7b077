"""Prefill on the decode instance itself when little of the prompt is left to compute there: no transfer, and the prefill instances stay
free for long prompts. Everything else goes the way of `prefix_aware`.

An instance takes such a prompt only while its KV use, with the prompt, stays below `max_kv_use` and the prompt tokens it computes
already do not exceed the threshold together with it, since every one of them delays the decodes there. Source: NVIDIA Dynamo's
conditional disaggregation (the idea).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Range, Reject
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.prefix_aware import PrefixAware


@dataclass
class Conditional(PrefixAware):
    threshold_tokens: Annotated[int, Range(ge=0, tuned=(16, 8192), log=True)] = 256
    max_kv_use: Annotated[float, Range(gt=0.0, le=1.0, tuned=(0.3, 1.0))] = 0.9

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
