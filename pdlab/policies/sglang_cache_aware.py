"""Prefix affinity while loads are alike, the fewest requests once they are not; for both phases. Source: SGLang's router (cache_aware).

Loads are requests under way. They differ too much when the most exceed the fewest by more than `balance_abs_threshold` and by the factor
`balance_rel_threshold`: then the instance with the fewest takes it. Else the one whose tree shares the longest prefix does, if that is
more than `cache_threshold` of the prompt; if not, the one with the fewest requests, or with the smallest tree (`cold: smallest_tree`, as
older versions have it).

Of several that share as much, the one whose tree had it first, or the one with the fewest requests (`ties: fewest_requests`), as vLLM's
router has it, which is otherwise the same (0.1.17). Trees are the router's own guess: they know what was sent where, not what
was evicted there. Every `eviction_interval_s` each is cut down to `max_tree_tokens`, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class SglangCacheAware(Policy):
    cache_threshold: Annotated[float, Range(ge=0.0, le=1.0)] = 0.3
    balance_abs_threshold: Annotated[int, Range(ge=0, tuned=(1, 128), log=True)] = 64
    balance_rel_threshold: Annotated[float, Range(ge=1.0, tuned=(1.0, 4.0))] = 1.5
    eviction_interval_s: Annotated[float, Range(gt=0.0)] = 120.0
    max_tree_tokens: Annotated[int, Range(gt=0)] = 1 << 24
    cold: Literal["fewest_requests", "smallest_tree"] = "fewest_requests"
    ties: Literal["first_owner", "fewest_requests"] = "first_owner"

    def __post_init__(self) -> None:
        self._trees: dict[Instance, dict[int, int]] = {}  # blocks, each named by its whole prefix, and the last prompt that used it
        self._owners: dict[int, Instance] = {}  # of blocks: whose tree had it first
        self._prompts = 0
        self._evicted_s = 0.0

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._choose(cluster.prefill, request, cluster)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._choose(cluster.decode, request, cluster)

    def _choose(self, candidates: Sequence[Instance], request: Request, cluster: Cluster) -> Instance | None:
        if not candidates:
            return None
        self._evict(cluster)
        trees = {x: self._trees.setdefault(x, {}) for x in candidates}
        fewest = min(candidates, key=lambda x: (load(x), x.index))
        most = max(map(load, candidates))
        if most - load(fewest) > self.balance_abs_threshold and most > self.balance_rel_threshold * load(fewest):
            chosen = fewest
        else:
            shared = {x: _shared(request.hashes, trees[x]) for x in candidates}
            most_shared = max(shared.values())
            owner = self._owners.get(request.hashes[most_shared - 1]) if most_shared else None
            by_load = self.ties == "fewest_requests"
            chosen = max(candidates, key=lambda x: (shared[x], -load(x) if by_load else x is owner, -x.index))
            if shared[chosen] * cluster.hash_tokens <= self.cache_threshold * request.prompt_tokens:
                chosen = fewest if self.cold == "fewest_requests" else min(candidates, key=lambda x: (len(trees[x]), x.index))
        self.plant(chosen, request)
        return chosen

    def plant(self, x: Instance, request: Request) -> None:
        """Its prompt is sent there."""
        tree, self._prompts = self._trees[x], self._prompts + 1
        for block in reversed(request.hashes):  # a prompt's tail is forgotten before its head
            tree.pop(block, None)
            tree[block] = self._prompts
            self._owners.setdefault(block, x)

    def _evict(self, cluster: Cluster) -> None:
        if cluster.now - self._evicted_s < self.eviction_interval_s:
            return
        self._evicted_s, known, most = cluster.now, set(cluster.instances), self.max_tree_tokens // cluster.hash_tokens
        self._trees = {x: tree for x, tree in self._trees.items() if x in known}
        for tree in self._trees.values():
            for block in list(tree)[: max(0, len(tree) - most)]:
                del tree[block]
        self._owners = {block: x for block, x in self._owners.items() if block in self._trees.get(x, ())}


def load(x: Instance) -> int:
    """Requests under way there."""
    return x.decode_requests if x.role.decodes else x.prefill_requests


def _shared(hashes: Sequence[int], tree: dict[int, int]) -> int:
    """Leading blocks in the tree."""
    return next((i for i, block in enumerate(hashes) if block not in tree), len(hashes))
