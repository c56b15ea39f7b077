"""Another cost, with its prefill or its decode slower or quicker by a factor: what if it is wrong by a tenth?

A step of both is its decodes' part, and what the prompts add to that.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdlab.cost.base import Cost


class Scaled(Cost):
    """`prefill` and `decode` multiply seconds."""

    def __init__(self, cost: Cost, prefill: float, decode: float, front: float = 1.0) -> None:
        self._cost, self._prefill, self._decode = cost, prefill, decode
        self.request_s = cost.request_s * front
        self.unfinished_chunk_saving_s = cost.unfinished_chunk_saving_s * prefill
        self.joins = cost.joins

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self._prefill * self._cost.prefill_s(chunks)

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        base_s, s_per_token, until_tokens = self._cost.decode_line(batch, context_tokens)
        return self._decode * base_s, self._decode * s_per_token, until_tokens

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        decode_s = self._cost.decode_s(batch, context_tokens)
        return self._decode * decode_s + self._prefill * (self._cost.mixed_s(chunks, batch, context_tokens) - decode_s)

    def join_s(self, prompts: Sequence[tuple[int, int]]) -> float:
        return self._prefill * self._cost.join_s(prompts)

    def decode_is_compute_bound(self, batch: int) -> bool:
        return self._cost.decode_is_compute_bound(batch)
