"""Prompts of like length go to the same instances, so that short ones never queue behind long ones. Source: SGLang's router (bucket).

Each prefill instance has a range of lengths, in order. The bounds are set anew every `adjust_interval_s`, such that each range had the
same share of the last prompts' tokens. When loads (outstanding prompt tokens) differ by more than both thresholds, the least loaded takes
a prompt whatever its length. Decode: the fewest decode tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Request
from pdlab.core.view import Cluster, Instance


@dataclass
class LengthBuckets(Policy):
    adjust_interval_s: Annotated[float, Range(gt=0.0, tuned=(0.5, 60.0), log=True)] = 5.0
    balance_abs_threshold: Annotated[int, Range(ge=0, tuned=(256, 65536), log=True)] = 8192  # prompt tokens
    balance_rel_threshold: Annotated[float, Range(ge=1.0, tuned=(1.0, 4.0))] = 1.5
    window: Annotated[int, Range(ge=1)] = 500  # prompts

    def __post_init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=self.window)
        self._bounds: list[int] = []
        self._adjusted_s = float("-inf")

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        candidates = cluster.prefill
        if not candidates:
            return None
        self._lengths.append(request.prompt_tokens)
        if len(self._bounds) != len(candidates) - 1 or cluster.now - self._adjusted_s >= self.adjust_interval_s:
            self._bounds, self._adjusted_s = equal_shares(sorted(self._lengths), len(candidates)), cluster.now
        least = min(candidates, key=lambda x: (x.prefill_tokens, x.index))
        most = max(x.prefill_tokens for x in candidates)
        if most - least.prefill_tokens > self.balance_abs_threshold and most > self.balance_rel_threshold * least.prefill_tokens:
            return least
        return candidates[bisect_left(self._bounds, request.prompt_tokens)]


def equal_shares(lengths: list[int], buckets: int) -> list[int]:
    """The greatest length in each bucket but the last; in each lies about an equal share of all tokens."""
    sums = list(accumulate(lengths))
    return [lengths[bisect_left(sums, sums[-1] * i / buckets)] for i in range(1, buckets)]
