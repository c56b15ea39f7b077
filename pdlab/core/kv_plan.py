"""Which KV heads each tensor-parallel rank holds, and what each rank of a destination reads from which rank of a source.

KV memory is laid out [layers, 2, blocks, heads, tokens, dim], so that neighbouring heads of a block are contiguous. With H heads a rank
of T holds h = max(1, H / T) of them, each of which is on rho = max(1, T / H) ranks, starting at floor(rank / rho) h. A latent vector in
place of heads (MLA) is one head that every rank holds. The two sides may differ in their ranks and, by a whole factor, in their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Offsets = NDArray[np.int64]


def heads_fit(heads: int, ranks: int) -> bool:
    """Can so many KV heads be shared evenly among the ranks, or be held by several each?"""
    return heads % ranks == 0 or ranks % heads == 0


def copies(heads: int, ranks: int) -> int:
    """rho = max(1, T / H): on how many ranks each head is."""
    return max(1, ranks // heads)


def heads_of(heads: int, ranks: int, rank: int) -> range:
    """The KV heads of one rank."""
    each = max(1, heads // ranks)
    first = rank // copies(heads, ranks) * each
    return range(first, first + each)


@dataclass(frozen=True, slots=True)
class HeadsRead:
    """`count` heads that one rank of the destination reads from rank `source` of the source, from its own `source_first` on, into its own
    from `target_first` on."""

    source: int
    source_first: int
    target_first: int
    count: int


def reads_of(heads: int, source_ranks: int, target_ranks: int, target: int) -> tuple[HeadsRead, ...]:
    """What rank `target` of a destination reads: each head once, from one of the ranks that have it; those who read the same are spread
    over them by target mod rho."""
    wanted, each, rho = heads_of(heads, target_ranks, target), max(1, heads // source_ranks), copies(heads, source_ranks)
    found = []
    for group in range(wanted.start // each, (wanted.stop - 1) // each + 1):
        held = range(group * each, (group + 1) * each)
        first, end = max(wanted.start, held.start), min(wanted.stop, held.stop)
        found.append(HeadsRead(group * rho + target % rho, first - held.start, first - wanted.start, end - first))
    return tuple(found)


def readers_of(heads: int, source_ranks: int, target_ranks: int, source: int) -> tuple[int, ...]:
    """The ranks of the destination that read from rank `source`: its KV is free when all of them have. Empty: another copy is read."""
    return tuple(
        target
        for target in range(target_ranks)
        if any(read.source == source for read in reads_of(heads, source_ranks, target_ranks, target))
    )


def heads_moved(heads: int, target_ranks: int) -> int:
    """Heads that a transfer moves in all, copies counted: as many as the destination holds, whatever the source's ranks."""
    return target_ranks * max(1, heads // target_ranks)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One rank's KV memory [layers, 2, blocks, heads, block_tokens, dim]; a latent vector has one half in place of two."""

    layers: int
    halves: int
    blocks: int
    heads: int
    block_tokens: int
    token_bytes: int  # of one head: dim x the size of an element

    @property
    def bytes(self) -> int:
        return self.layers * self.halves * self.blocks * self.heads * self.block_tokens * self.token_bytes


@dataclass(frozen=True, slots=True)
class Pieces:
    """From offsets in one memory to offsets in another, `bytes` of the source's each (the target's elements may be of another size)."""

    source: Offsets
    target: Offsets
    bytes: int


def pieces(
    read: HeadsRead,
    source: KvLayout,
    target: KvLayout,
    source_blocks: Offsets,
    target_blocks: Offsets,
    tokens: range,
    layers: range,
) -> Pieces:
    """Of one rank's read: where the KV of a sequence's `tokens` lies in blocks of either side (their ids from the sequence's first token
    on), in these layers. `tokens` begins at a block of both sides. As large as they can be: all heads of a block where the blocks are
    alike, else a head's tokens in the smaller block.

    Raises ValueError where one block size does not divide the other.
    """
    small, large = sorted((source.block_tokens, target.block_tokens))
    if large % small:
        raise ValueError(f"blocks of {source.block_tokens} and {target.block_tokens} tokens: one must be a multiple of the other")
    assert tokens.start % large == 0, "a transfer begins at a block of both sides"
    runs = np.arange(tokens.start // small, -(-tokens.stop // small), dtype=np.int64) * small  # first tokens
    heads = np.arange(1 if small == large else read.count, dtype=np.int64)
    size = small * source.token_bytes * (read.count if small == large else 1)
    planes = np.arange(source.halves * layers.start, source.halves * layers.stop, dtype=np.int64)

    def offsets(side: KvLayout, ids: Offsets, first: int) -> Offsets:
        block = ids[runs // side.block_tokens]
        of_head = (block[None, :, None] + planes[:, None, None] * side.blocks) * side.heads + first + heads[None, None, :]
        return ((of_head * side.block_tokens + (runs % side.block_tokens)[None, :, None]) * side.token_bytes).ravel()

    return Pieces(offsets(source, source_blocks, read.source_first), offsets(target, target_blocks, read.target_first), size)
