"""Step times as `pdlab calibrate` fits them to one instance. The grids go on linearly beyond their ends, and count how often.

T(n, c): a step of one chunk of n tokens after c in KV;   D(b, c): a decode step;   both bilinear in a grid.
X(n, c) = T(n, c) - T(n, 0): attention to what is cached. A chunk's attention to itself is what half of its tokens, cached, would cost, so
F(n) = T(n, 0) - X(n, n / 2) is what depends on the number of tokens alone, however they divide.

several chunks:   F(sum of n) + sum of (T(n, c) - F(n)) + prompt_s for each but the first
mixed:            the chunks' step + A(sum of n, b) + (D(b, c) - D(b, shortest context)),  A measured

Each sequence that gets a token adds `token_s`; a step in which none does is `unfinished_chunk_saving_s` shorter, which is the
caller's to take off.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdlab.cost.profile import Overheads, StepTimes
from pdlab.cost.table import Profile, Table, bilinear


class MeasuredCost(Table):
    """The cost of a profile's steps, for its own model."""

    def __init__(self, steps: StepTimes, overheads: Overheads | None = None, name: str = "the fit") -> None:
        super().__init__(Profile(name=name, prefill=steps.prefill, decode=steps.decode), extrapolate=True)
        self._added, self._prompt_s = steps.added, steps.prompt_s
        self.unfinished_chunk_saving_s = steps.unfinished_chunk_saving_s
        self._token_s = overheads.token_s if overheads is not None else 0.0

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        told_s = self._token_s * len(chunks)
        alone = [self._prefill_one_s(new, context) for new, context in chunks]
        if len(chunks) == 1:
            return alone[0] + told_s
        own_s = sum(alone) - sum(self.linear_s(new) for new, _ in chunks)
        together_s = self.linear_s(sum(new for new, _ in chunks)) + own_s + self._prompt_s * (len(chunks) - 1)
        return max(together_s, *alone) + told_s

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        base_s, slope_s, until = super().decode_line(batch, context_tokens)
        return base_s + self._token_s * batch, slope_s, until

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        added, shortest = self._added, self._decode.context[0]
        decode_s = self.decode_s(batch, context_tokens)
        attention_s = decode_s - self.decode_s(batch, shortest * batch)
        added_s = bilinear(added.tokens, added.batch, added.seconds, sum(new for new, _ in chunks), batch)
        return max(decode_s, self.prefill_s(chunks) + max(0.0, added_s) + attention_s + self._token_s * batch)

    def linear_s(self, tokens: int) -> float:
        """F: what a step of so many prompt tokens takes without any attention, at least nothing."""
        grid = self._prefill
        alone_s = bilinear(grid.tokens, grid.cached, grid.seconds, tokens, 0)
        return max(0.0, 2 * alone_s - bilinear(grid.tokens, grid.cached, grid.seconds, tokens, tokens / 2))
