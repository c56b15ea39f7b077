"""Consistent hashing with bounded loads: what belongs together goes to one instance, as long as that has not far more than the others,
and stays there when instances come and go. For both phases. Source: Mirrokni, Thorup, Zadimoghaddam 2018.

The key is a request's session; without one its tenant; without that the first `prefix_blocks` of its prompt; a request with none of these
has a key of its own. Each instance has `points` places on a ring. From its key on, a request goes to the first instance on the ring that
would have at most `most_load` times the average of requests under way, this one included.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance
from pdlab.policies.sglang_cache_aware import load

KEPT = 64  # rings, of as many sets of instances


class HashRing:
    """Instances at `points` places each, by their names alone."""

    def __init__(self, points: int) -> None:
        self.points = points
        self._places: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # by the instances' names: (place, which of them)

    def walk(self, candidates: Sequence[Instance], key: str) -> Iterator[Instance]:
        """From the key's place on, once round; an instance comes as often as it has places."""
        names = tuple(x.name for x in candidates)
        if names not in self._places:
            if len(self._places) >= KEPT:
                self._places.clear()
            self._places[names] = sorted((place(f"{name}#{point}"), i) for i, name in enumerate(names) for point in range(self.points))
        ring = self._places[names]
        start = bisect(ring, (place(key), -1))
        for index in range(start, start + len(ring)):
            yield candidates[ring[index % len(ring)][1]]


@dataclass
class ConsistentHash(Policy):
    most_load: Annotated[float, Range(gt=1.0, tuned=(1.05, 4.0), log=True)] = 1.25
    points: Annotated[int, Range(ge=1)] = 160
    prefix_blocks: Annotated[int, Range(ge=1)] = 16

    def __post_init__(self) -> None:
        self._ring = HashRing(self.points)

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._choose(cluster.prefill, request)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._choose(cluster.decode, request)

    def _choose(self, candidates: Sequence[Instance], request: Request) -> Instance | None:
        if not candidates:
            return None
        most = ceil(self.most_load * (1 + sum(map(load, candidates))) / len(candidates))
        return next(x for x in self._ring.walk(candidates, self.key(request)) if load(x) < most)  # who has the fewest has less

    def key(self, request: Request) -> str:
        if request.session or request.tenant:
            return f"session {request.session}" if request.session else f"tenant {request.tenant}"
        return f"prefix {request.hashes[: self.prefix_blocks]}" if request.hashes else f"request {request.id}"


def place(key: str) -> int:
    """On the ring, the same in every process."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
