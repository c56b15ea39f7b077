"""How KV passes from one rank's memory to another's, where the two may differ: in their ranks, by a whole factor in their blocks, and in
the kind of their elements, which the reader converts. Worked out once for each pair, from their descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pdlab.core.kv_plan import HeadsRead, KvLayout, common_run, readers_of, reads_of
from pdlab.real.transfer.descriptor import ITEM_BYTES, Descriptor, decode
from pdlab.real.transfer.result import TransferStopped

CHUNK_BYTES = 1 << 20  # fits the second-level cache, so that packing costs little beside the socket


@dataclass(frozen=True, slots=True)
class KvPair:
    """From `source` to `target`, one rank each, in runs of `unit` tokens. `read`: which heads; None: it gets none from there. `dtypes`: of
    the elements at either end."""

    source: KvLayout
    target: KvLayout
    unit: int
    read: HeadsRead | None
    dtypes: tuple[str, str]

    @property
    def converts(self) -> bool:
        return self.dtypes[0] != self.dtypes[1]

    @property
    def apart(self) -> bool:
        """Do a run's heads lie apart at one of the two?"""
        return self.source.block_tokens != self.target.block_tokens

    @property
    def chunk_bytes(self) -> int:
        """What passes at once at most: a run of all heads and layers at least."""
        heads = min(self.source.heads, self.target.heads)
        return max(CHUNK_BYTES, self.source.layers * self.source.halves * heads * self.unit * self.source.token_bytes)


def layout_of(one: Descriptor) -> KvLayout:
    """Of its rank's KV memory."""
    shape = one.geometry
    return KvLayout(shape.layers, shape.planes, one.blocks, len(one.heads), shape.block_tokens, shape.head_dim * ITEM_BYTES[shape.dtype])


@lru_cache(maxsize=1024)
def pair_of(source: Descriptor, target: Descriptor) -> KvPair:
    """Of two ranks between which KV can pass."""
    a, b = layout_of(source), layout_of(target)
    reads = reads_of(source.geometry.kv_heads, source.tp, target.tp, target.rank)
    read = next((read for read in reads if read.source == source.rank), None)
    return KvPair(a, b, common_run(a.block_tokens, b.block_tokens), read, (source.geometry.dtype, target.geometry.dtype))


@lru_cache(maxsize=256)
def ranks_of(encoded: bytes) -> tuple[Descriptor, ...]:
    """All ranks of an instance, by rank, of the descriptor that speaks for all. Trouble where it is none."""
    whole = decode(encoded)
    ranks = (whole.alone, *map(decode, whole.ranks))
    if [(one.rank, one.tp, one.geometry) for one in ranks] != [(rank, len(ranks), whole.geometry) for rank in range(len(ranks))]:
        raise TransferStopped(f"the descriptor of {whole.name} does not tell of all its ranks")
    return ranks


def tokens_held(blocks: int, encoded: bytes, otherwise: int) -> int:
    """How many tokens' KV so many blocks hold at a peer, or in blocks of `otherwise` tokens where it does not tell of itself."""
    try:
        return blocks * ranks_of(encoded)[0].geometry.block_tokens
    except TransferStopped:
        return blocks * otherwise


def sources_of(own: Descriptor, peer: tuple[Descriptor, ...]) -> list[Descriptor]:
    """The ranks of a peer from which this one reads."""
    return [peer[read.source] for read in reads_of(own.geometry.kv_heads, len(peer), own.tp, own.rank)]


def targets_of(own: Descriptor, peer: tuple[Descriptor, ...]) -> list[Descriptor]:
    """The ranks of a peer that are to get KV from this one."""
    return [peer[rank] for rank in readers_of(own.geometry.kv_heads, own.tp, len(peer), own.rank)]
