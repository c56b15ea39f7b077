"""The copies of a migration: how often its KV is copied while the request goes on, and when it stands still for the rest.

Each copy takes what was made during the one before, so that the last, for which the request stands still, is short however long the
context. Source: Llumnix (OSDI'24), §4.2, and its defaults.
"""

from __future__ import annotations

STAGES = 3  # the last included
LAST_BLOCKS = 16  # that are soon copied


class Staging:
    """One migration. `copied_tokens` of the request's KV are at its destination."""

    __slots__ = ("block_tokens", "copied_tokens", "stages")

    def __init__(self, block_tokens: int, cached_tokens: int = 0) -> None:
        self.block_tokens = block_tokens
        self.copied_tokens = cached_tokens
        self.stages = 0

    def copy(self, kv_tokens: int) -> int:
        """A copy begins of all it holds by now; returns the tokens that are not there yet."""
        missing = max(0, kv_tokens - self.copied_tokens)
        self.copied_tokens += missing
        self.stages += 1
        return missing

    @property
    def full(self) -> bool:
        """Is the next copy the last, whatever the request holds by then?"""
        return self.stages >= STAGES - 1

    def stops(self, kv_tokens: int) -> bool:
        """Is the next copy the last, for which the request stands still? It holds `kv_tokens` now."""
        return self.full or -(-(kv_tokens - self.copied_tokens) // self.block_tokens) <= LAST_BLOCKS
