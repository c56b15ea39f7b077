"""A weighted sum of what is missing in the cache and of load; the fewest tokens once loads differ. Source: FastDeploy's router
(cache_aware).

    score(x) = hit_weight x (1 - part of the prompt that x holds) + load_weight x load(x) / largest load          the least wins

Load is requests under way. Where the largest exceeds the least by more than one and by more than `imbalance` of itself, the fewest
outstanding prompt tokens decide alone. Ties go to the fewest tokens, too. What an instance holds is the router's guess, made when it
sends a prompt there and forgotten after `idle_s` without use, or as the oldest of `most_blocks`. Decode: the fewest requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.sglang_cache_aware import load


@dataclass
class FastdeployCacheAware(Policy):
    hit_weight: Annotated[float, Range(ge=0.0, tuned=(0.0, 4.0))] = 1.0
    load_weight: Annotated[float, Range(ge=0.0, tuned=(0.0, 4.0))] = 1.0
    imbalance: Annotated[float, Range(ge=0.0, le=1.0)] = 0.2
    idle_s: Annotated[float, Range(gt=0.0)] = 1800.0
    most_blocks: Annotated[int, Range(ge=1)] = 200_000

    def __post_init__(self) -> None:
        self._used_s: dict[tuple[Instance, int], float] = {}  # when a prompt with this block was last sent there; the oldest first

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        candidates = cluster.prefill
        if not candidates:
            return None
        self._forget(cluster.now)
        most, fewest = max(map(load, candidates)), min(map(load, candidates))
        if most - fewest > 1 and most - fewest > self.imbalance * most:
            chosen = min(candidates, key=lambda x: (x.prefill_tokens, x.index))
        else:
            chosen = min(candidates, key=lambda x: (self._score(x, request, most), x.prefill_tokens, x.index))
        for block in reversed(request.hashes):
            self._used_s.pop((chosen, block), None)
            self._used_s[chosen, block] = cluster.now
        return chosen

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return min(cluster.decode, key=lambda x: (x.decode_requests, x.index), default=None)

    def _score(self, x: Instance, request: Request, most: int) -> float:
        hashes, used_s = request.hashes, self._used_s
        held = next((i for i, block in enumerate(hashes) if (x, block) not in used_s), len(hashes))
        return self.hit_weight * (1.0 - held / max(1, len(hashes))) + self.load_weight * load(x) / max(1, most)

    def _forget(self, now: float) -> None:
        used_s = self._used_s
        while used_s and (len(used_s) > self.most_blocks or now - next(iter(used_s.values())) > self.idle_s):
            del used_s[next(iter(used_s))]
