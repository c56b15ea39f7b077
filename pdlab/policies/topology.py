"""Decode near where the prompt was computed, as far as the way and the KV memory are free. Source: topology scores, as llm-d and Dynamo
have them (the idea).

    score(x) = nearness x KV bytes / (KV bytes + bytes in flight on the way to x) x part of x's KV memory that is free with this request

Nearness is 1 on one host, `rack` in one rack, `zone` in one zone and `beyond` elsewhere, by the `host`, `rack` and `zone` of the file;
what is not said lies nowhere. The highest score takes it. With `pairs: true`, or where nothing is known of the prompt's place, all are as
near. Prefill: as `prefix_aware`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.prefix_aware import PrefixAware


@dataclass
class Topology(PrefixAware):
    rack: Annotated[float, Range(ge=0.0, le=1.0)] = 0.2
    zone: Annotated[float, Range(ge=0.0, le=1.0)] = 0.05
    beyond: Annotated[float, Range(ge=0.0, le=1.0)] = 0.01

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        live = cluster.live.get(request.id)
        src = live.prefill if live is not None else None
        moving = cluster.links.in_flight_bytes if src is not None else {}
        best, highest = None, float("-inf")
        for x in cluster.decode:
            score = max(0.0, 1.0 - (x.used_tokens + request.prompt_tokens) / x.kv_tokens)
            if src is not None:
                size = request.prompt_tokens / x.spec.block_tokens * x.spec.block_bytes
                way = moving.get((src.name, x.name), 0)
                score *= self.nearness(src, x) * (size / (size + way) if way else 1.0)
            if score > highest:
                best, highest = x, score
        return best

    def nearness(self, a: Instance, b: Instance) -> float:
        if a is b or (a.spec.host and a.spec.host == b.spec.host):
            return 1.0
        if a.spec.zone != b.spec.zone:
            return self.beyond
        if a.spec.rack and a.spec.rack == b.spec.rack:
            return self.rack
        return self.zone if a.spec.zone else self.beyond
