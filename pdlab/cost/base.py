"""What every cost model answers: how many seconds an engine step takes.

A step computes prompt chunks, one token for each of `batch` decoding sequences, or both. All times are seconds; all contexts are KV
tokens. The simulator advances many decode steps at once in closed form, so a cost model states its decode step as a line in the
batch's total context rather than as a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Cost(ABC):
    """Seconds of one engine step. `unfinished_chunk_saving_s`: by how much a step is shorter in which no sequence gets a
    token, since all of its chunks leave something of their prompts to later ones: what comes after the layers is left out.
    Zero where engines do it all the same. `request_s`: what the front end takes of a request before its first token, beside steps."""

    request_s: float = 0.0
    unfinished_chunk_saving_s: float = 0.0
    joins: bool = False  # does a sequence's first decode step take longer?

    @abstractmethod
    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Seconds of one step that computes only prompt tokens; chunks are (new_tokens, context_tokens already in KV before them)."""

    @abstractmethod
    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        """(base_s, s_per_token, until_tokens): a decode step of `batch` sequences whose contexts sum to c costs base_s + s_per_token * c
        for context_tokens <= c < until_tokens; `until_tokens` is math.inf where the line never bends."""

    @abstractmethod
    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        """Seconds of one step with prompt chunks and `batch` decodes, whose contexts sum to `context_tokens`, together."""

    def join_s(self, prompts: Sequence[tuple[int, int]]) -> float:
        """By how much a step is longer in which these sequences decode first, (tokens, context_tokens already in KV) each."""
        return 0.0

    def decode_is_compute_bound(self, batch: int) -> bool:
        """Does arithmetic, not reading the weights, set the pace of a decode step of `batch` sequences? Who cannot tell says no."""
        return False

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of one decode step of `batch` sequences whose contexts sum to `context_tokens`."""
        base_s, s_per_token, _ = self.decode_line(batch, context_tokens)
        return base_s + s_per_token * context_tokens
