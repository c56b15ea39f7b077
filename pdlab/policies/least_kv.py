"""Decode where the smallest part of the KV memory would be in use with this prompt there, by the last report and what was sent since.
Source: Llumnix v1's projected KV ratio."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pdlab.core.policy import Policy
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class LeastKv(Policy):
    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        prompt, best, least = request.prompt_tokens, None, inf
        for x in cluster.decode:
            projected = (x.used_tokens + prompt) / x.kv_tokens
            if projected < least:
                best, least = x, projected
        return best
