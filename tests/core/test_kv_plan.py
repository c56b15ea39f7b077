"""Ranks read what they hold, byte for byte, whatever the two sides are: every case against a copy by index, not one wrong byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdlab.core.kv_plan import (
    HeadsRead,
    KvLayout,
    common_run,
    copies,
    heads_fit,
    heads_moved,
    heads_of,
    pieces,
    readers_of,
    reads_of,
    runs_of,
    senders,
)

RANKS = st.sampled_from((1, 2, 4, 8))
HEADS = st.sampled_from((1, 2, 4, 8, 16))  # 1: a model of one KV head, or MLA's latent vector
SIZES = st.sampled_from((np.uint8, np.uint16, np.uint32))  # fp8, bfloat16, float32


@given(heads=HEADS, source=RANKS, target=RANKS)
def test_each_head_is_read_once_from_one_that_has_it(heads: int, source: int, target: int) -> None:
    for rank in range(target):
        wanted = heads_of(heads, target, rank)
        found = []
        for read in reads_of(heads, source, target, rank):
            held = heads_of(heads, source, read.source)
            assert read.source_first + read.count <= len(held)
            there = [held[read.source_first + i] for i in range(read.count)]
            assert there == [wanted[read.target_first + i] for i in range(read.count)]
            found += there
            assert rank in readers_of(heads, source, target, read.source)
        assert found == list(wanted)
    assert heads_moved(heads, target) == sum(len(heads_of(heads, target, rank)) for rank in range(target))


def test_the_arithmetic_of_known_cases() -> None:
    assert [list(heads_of(8, 4, r)) for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(heads_of(2, 8, r)) for r in range(8)] == [[0]] * 4 + [[1]] * 4
    assert reads_of(8, 2, 4, 3) == (HeadsRead(1, 2, 0, 2),)
    assert reads_of(8, 4, 2, 1) == (HeadsRead(2, 0, 0, 2), HeadsRead(3, 0, 2, 2))
    assert [reads_of(2, 8, 4, r)[0].source for r in range(4)] == [0, 1, 6, 7]  # spread over the copies
    assert [reads_of(1, 4, 4, r)[0].source for r in range(4)] == [0, 1, 2, 3] and copies(1, 4) == 4
    assert readers_of(2, 8, 2, 2) == () and readers_of(2, 8, 2, 0) == (0,)
    assert not heads_fit(6, 4) and heads_fit(6, 3) and heads_fit(3, 6)


@settings(max_examples=1000)
@given(
    heads=HEADS,
    source_ranks=RANKS,
    target_ranks=RANKS,
    blocks=st.sampled_from(((4, 4), (4, 8), (16, 4), (2, 2), (8, 16))),
    halves=st.sampled_from((2, 1)),
    dtypes=st.tuples(SIZES, SIZES),
    dim=st.sampled_from((1, 3, 8)),
    tokens=st.integers(1, 40),
    skipped=st.integers(0, 2),
    layers=st.sampled_from((range(3), range(1, 3), range(2, 3))),
    seed=st.integers(0, 1 << 16),
)
def test_not_one_wrong_byte(
    heads: int,
    source_ranks: int,
    target_ranks: int,
    blocks: tuple[int, int],
    halves: int,
    dtypes: tuple[type, type],
    dim: int,
    tokens: int,
    skipped: int,
    layers: range,
    seed: int,
) -> None:
    """A sequence's KV [layers, halves, tokens, heads, dim] is spread over a source's ranks, read by a destination's, and compared there;
    what was not read stays as it was. The two may have elements of one to four bytes, which the reader makes its own."""
    rng = np.random.default_rng(seed)
    small, large = sorted(blocks)
    first = min(skipped * small, (tokens - 1) // small * small)  # a cached prefix ends at a block of the target, perhaps within one
    of_both = -(-tokens // large) * large
    assert common_run(*blocks) == small
    sequence = rng.integers(0, 255, (3, halves, of_both, heads, dim)).astype(dtypes[0])
    sides = [
        Side(heads, ranks, size, halves, dim, of_both, dtype, rng)
        for ranks, size, dtype in zip((source_ranks, target_ranks), blocks, dtypes, strict=True)
    ]
    source, target = sides
    for rank, memory in enumerate(source.memories):
        for at in range(of_both):
            memory[:, :, source.ids[at // blocks[0]], :, at % blocks[0]] = sequence[:, :, at][
                :, :, list(heads_of(heads, source_ranks, rank))
            ]
    before = [memory.copy() for memory in target.memories]
    for rank in range(target_ranks):
        for read in reads_of(heads, source_ranks, target_ranks, rank):
            runs = [runs_of(side.ids, side.layout.block_tokens, small, range(first, tokens)) for side in sides]
            found = pieces(read, source.layout, target.layout, *runs, small, layers)
            there, here = source.memories[read.source].reshape(-1), target.memories[rank].reshape(-1)
            count = found.bytes // there.itemsize
            for a, b in zip((found.source // there.itemsize).tolist(), (found.target // here.itemsize).tolist(), strict=True):
                here[b : b + count] = there[a : a + count]
    end = -(-tokens // small) * small
    for rank, memory in enumerate(target.memories):
        expected = before[rank]
        for at in range(first, end):
            part = sequence[layers.start : layers.stop, :, at][:, :, list(heads_of(heads, target_ranks, rank))]
            expected[layers.start : layers.stop, :, target.ids[at // blocks[1]], :, at % blocks[1]] = part
        assert np.array_equal(memory, expected)


class Side:
    """A side's ranks: their memories, and the ids of the sequence's blocks, in no order."""

    def __init__(
        self, heads: int, ranks: int, size: int, halves: int, dim: int, tokens: int, dtype: type, rng: np.random.Generator
    ) -> None:
        held, count = len(heads_of(heads, ranks, 0)), tokens // size + 2
        self.layout = KvLayout(3, halves, count, held, size, dim * np.dtype(dtype).itemsize)
        shape = (3, halves, count, held, size, dim)
        self.memories: list[NDArray[np.generic]] = [rng.integers(0, 255, shape).astype(dtype) for _ in range(ranks)]
        self.ids = rng.permutation(count)[: tokens // size].astype(np.int64)
        assert self.layout.bytes == self.memories[0].nbytes


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 4 and 6 tokens"):
        common_run(4, 6)


def test_a_transfer_has_the_links_of_those_who_send() -> None:
    assert [senders(8, 4, ranks) for ranks in (1, 2, 4, 8)] == [4, 4, 4, 4]  # all heads, each rank its own
    assert senders(2, 8, 2) == 2  # of eight ranks, one for each head is read
    assert [senders(1, 8, ranks) for ranks in (1, 4, 8, 16)] == [1, 4, 8, 8]  # a latent vector: by as many as read
    assert senders(8, 1, 8) == 1
