"""Which KV heads each tensor-parallel rank holds."""

from __future__ import annotations


def heads_fit(heads: int, ranks: int) -> bool:
    """Can so many KV heads be shared evenly among the ranks, or be held by several each?"""
    return heads % ranks == 0 or ranks % heads == 0


def copies(heads: int, ranks: int) -> int:
    """rho = max(1, T / H): on how many ranks each head is."""
    return max(1, ranks // heads)


def heads_of(heads: int, ranks: int, rank: int) -> range:
    """The KV heads of one rank of T: h = max(1, H / T), from floor(rank / rho) h on."""
    each = max(1, heads // ranks)
    first = rank // copies(heads, ranks) * each
    return range(first, first + each)
