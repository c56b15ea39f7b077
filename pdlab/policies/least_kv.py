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
        prompt, best, least = request.prompt_tokens, None, (inf, 0)
        for alike in cluster.decode.alike(kv_tokens):
            x = alike.least(used_tokens)
            if x is not None and (projected := ((x.used_tokens + prompt) / x.kv_tokens, x.index)) < least:
                best, least = x, projected
        return best


def kv_tokens(x: Instance) -> int:
    return x.kv_tokens


def used_tokens(x: Instance) -> int:
    return x.used_tokens
