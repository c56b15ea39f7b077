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
BlockIds = NDArray[np.int32] | NDArray[np.int64]


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


def senders(heads: int, source_ranks: int, target_ranks: int) -> float:
    """As how many ranks' links a transfer has at the source: all heads that move, by those that the busiest rank sends."""
    sent = [0] * source_ranks
    for target in range(target_ranks):
        for read in reads_of(heads, source_ranks, target_ranks, target):
            sent[read.source] += read.count
    return heads_moved(heads, target_ranks) / max(sent)


def common_run(a: int, b: int) -> int:
    """Tokens that lie together in blocks of either size: the smaller.

    Raises ValueError where one block size does not divide the other."""
    small, large = sorted((a, b))
    if large % small:
        raise ValueError(f"blocks of {a} and {b} tokens: one must be a multiple of the other")
    return small


def runs_of(blocks: BlockIds, block_tokens: int, unit: int, tokens: range) -> BlockIds:
    """Where a sequence's `tokens` lie, in runs of `unit` tokens, numbered through all blocks of a memory. `blocks`: the ids of its blocks,
    from its first token on. `tokens` begins at a run."""
    assert tokens.start % unit == 0, "a transfer begins at a block of one side"
    ratio = block_tokens // unit
    at = np.arange(tokens.start // unit, -(-tokens.stop // unit), dtype=np.int64)
    return blocks[at] if ratio == 1 else blocks[at // ratio] * ratio + at % ratio


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

    def offsets(self, runs: BlockIds, unit: int, layers: range, heads: range, *, apart: bool) -> Offsets:
        """[planes, runs, pieces]: where runs of `unit` tokens (`runs_of`) of some heads lie. A piece is one head's, where they are `apart`;
        else all of a run's, which are together where a run is a whole block."""
        head_bytes = self.block_tokens * self.token_bytes
        block_bytes = self.heads * head_bytes
        planes = np.arange(self.halves * layers.start, self.halves * layers.stop, dtype=np.int64) * (self.blocks * block_bytes)
        if unit == self.block_tokens:
            at = runs.astype(np.int64) * block_bytes
        else:
            block, part = np.divmod(runs.astype(np.int64), self.block_tokens // unit)
            at = block * block_bytes + part * (unit * self.token_bytes)
        first = np.arange(heads.start, heads.stop if apart else heads.start + 1, dtype=np.int64) * head_bytes
        return planes[:, None, None] + (at[:, None] + first)


@dataclass(frozen=True, slots=True)
class Pieces:
    """From offsets in one memory to offsets in another, `bytes` of the source's each (the target's elements may be of another size)."""

    source: Offsets
    target: Offsets
    bytes: int


def pieces(
    read: HeadsRead, source: KvLayout, target: KvLayout, source_runs: BlockIds, target_runs: BlockIds, unit: int, layers: range
) -> Pieces:
    """Of one rank's read: where runs of `unit` tokens lie at either side, in these layers. As large as they can be: all heads of a block
    where the blocks are alike, else a head's tokens in the smaller block."""
    apart = source.block_tokens != target.block_tokens

    def offsets(side: KvLayout, runs: BlockIds, first: int) -> Offsets:
        return side.offsets(runs, unit, layers, range(first, first + read.count), apart=apart).ravel()

    size = unit * source.token_bytes * (1 if apart else read.count)
    return Pieces(offsets(source, source_runs, read.source_first), offsets(target, target_runs, read.target_first), size)
