"""What a token's KV weighs at an instance: what a hand-off or a migration brings there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvSize:
    """Of a token's KV at one instance: bytes of all layers, copies of KV heads at several ranks counted. So much does each token bring that
    comes there, whatever ranks sent it (`kv_plan.heads_moved`), but in the sender's numbers, which the reader converts."""

    bytes_per_token: float = 131072.0
    windows: tuple[tuple[int, int], ...] = ()  # (of those bytes, tokens): what layers have that keep the last so many tokens only
    element_bytes: float = 1.0  # of a number

    def size_bytes(self, first: int, last: int, of: int, source: KvSize) -> float:
        """What `source` sends of tokens `first` to `last` of a sequence, to go on from its token `of`."""
        size = (last - first) * self.bytes_per_token
        for bytes_per_token, window in self.windows:
            size -= max(0, min(last, of - window) - first) * bytes_per_token
        return size if source.element_bytes == self.element_bytes else size * source.element_bytes / self.element_bytes


ANY_SIZE = KvSize()
