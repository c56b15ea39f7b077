"""Prefill where weighted prompt blocks to compute plus blocks in use are fewest, or nearly so. Source: NVIDIA Dynamo's KV router.

    cost(x) = overlap_weight x prefill blocks(x) + decode blocks(x)

Prefill blocks are those queued on x and those of this prompt that x does not hold; decode blocks are those of the requests that decode
there, this one included. With a `temperature` above 0 an instance is drawn: the costs, brought to [0, 1], go through a softmax. For
decode instances the weight is 0, as their KV comes from elsewhere.

An instance is busy above `busy_kv_use` of its KV memory or above `busy_prefill_tokens` queued; busy ones are left out, and where all are,
the request is turned away. What an instance is believed to hold counts half after every `overlap_half_life_s` without a prompt that used
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Annotated

from pdlab.core.policy import Policy, Range, Reject
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance

FORGET_HALF_LIVES = 10.0


@dataclass
class DynamoKv(Policy):
    overlap_weight: Annotated[float, Range(ge=0.0, tuned=(0.0, 4.0))] = 1.0
    temperature: Annotated[float, Range(ge=0.0, tuned=(0.0, 1.0))] = 0.0
    busy_kv_use: Annotated[float, Range(gt=0.0, le=1.0)] | None = None
    busy_prefill_tokens: Annotated[int, Range(gt=0)] | None = None
    overlap_half_life_s: Annotated[float, Range(gt=0.0, tuned=(1.0, 600.0), log=True)] | None = None

    def __post_init__(self) -> None:
        self._used_s: dict[tuple[Instance, int], float] = {}  # when a prompt last used this block there; the oldest first

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        free = [x for x in cluster.prefill if not self._busy(x)]
        if not free:
            return Reject("every instance is busy") if cluster.prefill else None
        hits = cluster.cached_tokens(request)
        if self.overlap_half_life_s is not None:
            hits = self._faded(request, hits, cluster, self.overlap_half_life_s)
        prompt = request.prompt_tokens
        costs = [
            self.overlap_weight * (x.prefill_tokens + prompt - hits.get(x, 0)) / x.spec.block_tokens + self._decode_blocks(x, prompt)
            for x in free
        ]
        chosen = self._draw(free, costs, cluster)
        if self.overlap_half_life_s is not None:
            for block in request.hashes:
                self._used_s.pop((chosen, block), None)
                self._used_s[chosen, block] = cluster.now
        return chosen

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        free = [x for x in cluster.decode if not self._busy(x)] or cluster.decode
        return self._draw(free, [self._decode_blocks(x, request.prompt_tokens) for x in free], cluster) if free else None

    def _decode_blocks(self, x: Instance, prompt_tokens: int) -> float:
        return (x.decode_tokens + prompt_tokens) / x.spec.block_tokens

    def _busy(self, x: Instance) -> bool:
        full = self.busy_kv_use is not None and x.used_tokens > self.busy_kv_use * x.kv_tokens
        return full or (self.busy_prefill_tokens is not None and x.prefill_tokens > self.busy_prefill_tokens)

    def _draw(self, candidates: Sequence[Instance], costs: Sequence[float], cluster: Cluster) -> Instance:
        least, span = min(costs), max(costs) - min(costs)
        if self.temperature == 0.0 or span == 0.0:
            return candidates[costs.index(least)]
        weights = [exp((least - cost) / span / self.temperature) for cost in costs]
        return cluster.rng.choices(candidates, weights)[0]

    def _faded(self, request: Request, hits: Mapping[Instance, int], cluster: Cluster, half_life_s: float) -> dict[Instance, int]:
        """A hit by the age of its last block."""
        now, used_s = cluster.now, self._used_s
        while used_s and now - next(iter(used_s.values())) > FORGET_HALF_LIVES * half_life_s:
            del used_s[next(iter(used_s))]
        found = {}
        for x, tokens in hits.items():
            last = request.hashes[max(0, -(-tokens // cluster.hash_tokens) - 1)]
            age_s = now - used_s.get((x, last), now - FORGET_HALF_LIVES * half_life_s)
            found[x] = int(tokens * 0.5 ** (age_s / half_life_s))
        return found
