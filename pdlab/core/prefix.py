"""The names of prompt prefixes: a chain of hashes, one for each full block, which every party that shares a cache computes alike."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def chain(tokens: Sequence[int], block_tokens: int, salt: str = "") -> tuple[int, ...]:
    """One signed 64-bit integer for each full block of `block_tokens` tokens, standing for everything up to its end. `salt` keeps apart
    what must not share (another model, another tenant)."""
    hashed = blake2b(salt.encode(), digest_size=8)
    raw = memoryview(array("i", tokens)).cast("B")
    width = 4 * block_tokens
    hashes = []
    for end in range(width, len(raw) + 1, width):
        hashed.update(raw[end - width : end])
        hashes.append(int.from_bytes(hashed.digest(), "little", signed=True))
    return tuple(hashes)
