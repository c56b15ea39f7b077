"""Prefill where the fewest tokens are to be computed: queued there, and of this prompt not cached there. Source: Llumnix v1 (cache-aware).

Instances with `most_queued_tokens` or more are left out as long as there are others. Prompts below `least_prompt_tokens` go by the queue
alone. Ties go to the shorter queue. Decode: the smallest part of the KV memory in use with this prompt, as in `least_kv`.

`as_found`: an instance that holds nothing of the prompt counts as if it held all of it, and so beats those that hold a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.least_kv import LeastKv


@dataclass
class LlumnixV1Cache(LeastKv):
    most_queued_tokens: Annotated[int, Range(ge=1, tuned=(256, 32768), log=True)] = 2048
    least_prompt_tokens: Annotated[int, Range(ge=0)] = 1024
    as_found: bool = False

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        hits, prompt = cluster.cached_tokens(request), request.prompt_tokens

        def missing(x: Instance) -> int:
            if prompt < self.least_prompt_tokens or (self.as_found and x not in hits):
                return 0
            return prompt - hits.get(x, 0)

        candidates = [x for x in cluster.prefill if x.prefill_tokens < self.most_queued_tokens] or cluster.prefill
        return min(candidates, key=lambda x: (missing(x) + x.prefill_tokens, x.prefill_tokens, x.index), default=None)
