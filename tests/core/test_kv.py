"""Blocks are conserved, a prefix match is contiguous, the least recently used idle unit goes first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdlab.core.holding import Holding
from pdlab.core.kv import PLAIN, UNBOUNDED, BlockLayout, BlockPool


def chain(name: int, units: int) -> tuple[int, ...]:
    return tuple(hash((name, i)) for i in range(units))


def compute(pool: BlockPool, hashes: tuple[int, ...], tokens: int) -> Holding:
    holding = Holding()
    pool.allocate(holding, hashes, pool.match(hashes, tokens - 1), tokens)
    pool.cache(holding, hashes, tokens)
    return holding


def test_only_full_units_are_cached_and_the_last_token_is_always_computed() -> None:
    pool = BlockPool(100, 16)
    hashes = chain(1, 3)
    pool.release(compute(pool, hashes, 50))
    assert pool.idle_blocks == 3
    assert pool.match(hashes, 50 - 1) == 3
    assert pool.match(hashes, 48 - 1) == 2, "a prompt of exactly three units still computes its last token"


def test_a_hole_ends_the_match() -> None:
    pool = BlockPool(100, 16)
    hashes = chain(1, 4)
    pool.release(compute(pool, hashes, 64))
    del pool.idle[hashes[1]]
    assert pool.match(hashes, 64) == 1


def test_shared_units_are_counted_once() -> None:
    pool = BlockPool(100, 16)
    hashes = chain(1, 4)
    first, second = compute(pool, hashes, 65), Holding()
    pool.allocate(second, hashes, pool.match(hashes, 64), 65)
    assert pool.used == 5 + 1
    pool.release(first)
    assert pool.used == 5, "the units are still referenced by the second"
    pool.release(second)
    assert (pool.used, pool.idle_blocks, pool.free) == (0, 4, 96)


def test_the_tail_of_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(6, 16)
    old, new = chain(1, 3), chain(2, 3)
    pool.release(compute(pool, old, 48))
    pool.release(compute(pool, new, 48))
    compute(pool, (), 2 * 16)
    assert pool.match(old, 100) == 1
    assert pool.match(new, 100) == 3
    stored, evicted = pool.drain_events()
    assert (set(stored), evicted) == ({old[0], *new}, (old[1], old[2]))


def test_of_each_unit_is_told_what_became_of_it_last() -> None:
    pool = BlockPool(4, 16)
    one, two = chain(1, 2), chain(2, 3)
    pool.release(compute(pool, one, 32))
    assert pool.drain_events() == (one, ())
    pool.release(compute(pool, two, 48))  # evicts a unit of the first
    pool.release(compute(pool, one, 32))
    stored, evicted = pool.drain_events()
    held = {h for h in (*one, *two) if h in pool.idle}
    assert set(stored) <= held and not set(evicted) & held
    assert set(stored) | set(evicted) >= set(two)
    assert pool.drain_events() == ((), ())


def test_a_coarse_hash_covers_several_blocks() -> None:
    pool = BlockPool(200, 16, hash_tokens=512)
    hashes = chain(1, 2)
    holding = compute(pool, hashes, 1100)
    assert (pool.used, len(holding.shared), holding.private) == (69, 2, 69 - 64)
    pool.release(holding)
    assert (pool.idle_blocks, pool.free) == (64, 136)


def test_block_tables_share_cached_blocks_and_nothing_else() -> None:
    pool = BlockPool(40, 16)
    hashes = chain(1, 2)
    first = Holding()
    pool.allocate(first, hashes, 0, 40)
    table = pool.table(first)
    pool.cache(first, hashes, 40)
    assert pool.table(first) == table, "caching a block does not move it"
    second = Holding()
    pool.allocate(second, hashes, pool.match(hashes, 39), 40)
    assert pool.table(second)[:2] == table[:2]
    assert pool.table(second)[2] != table[2]
    pool.release(first)
    pool.release(second)
    third = Holding()
    pool.allocate(third, (), 0, 40 * 16)
    assert sorted(pool.table(third)) == list(range(40)), "evicting the cache gives its ids back"


WINDOWED = BlockLayout(1, ((2, 33),), chunk_tokens=64)


def test_a_windowed_sequence_keeps_its_window_and_while_it_is_computed_a_chunk_beside_it() -> None:
    pool = BlockPool(100, 16, layout=WINDOWED)
    assert pool.total == 300
    assert [pool.held(tokens) for tokens in (1, 32, 48, 49, 160)] == [3, 6, 9, 10, 16], "a window of 33 tokens touches 3 blocks at most"
    assert pool.held(160, computing=160) == 10 + 2 * 7, "33 - 1 + 64 tokens, wherever they begin"
    assert pool.held(160, computing=1) == 10 + 2 * 4
    holding = pool.take((), 0, 160, 0)
    assert holding is not None
    assert pool.used == 24
    pool.slide(holding)
    assert pool.used == holding.private == 16
    arriving = pool.take((), 0, 160, 0, computed=True)
    assert arriving is not None
    assert pool.used == 32
    for one in (holding, arriving):
        pool.release(one)
    assert (pool.used, pool.free) == (0, 300)


def test_a_cached_unit_costs_the_layers_that_keep_it_while_it_is_used_and_all_while_idle() -> None:
    pool = BlockPool(20, 16, layout=WINDOWED)
    hashes = chain(1, 10)
    first = compute(pool, hashes, 160)
    pool.slide(first)
    assert pool.used == 10 + 2 * 3
    pool.release(first)
    assert (pool.used, pool.idle_blocks, pool.free) == (0, 30, 30)
    second = compute(pool, hashes, 161)
    assert pool.used == 11 + 2 * 3 + second.surplus
    assert second.surplus == 2, "one token is computed"
    compute(pool, (), 16 * 13)
    pool.release(second)
    assert pool.used + pool.idle_blocks <= pool.total, "what idle ones cost more evicts some"


def test_the_longest_sequence_is_one_that_fits_while_it_is_computed() -> None:
    for layout in (PLAIN, WINDOWED, BlockLayout(3, ((1, 20), (2, 500)), 1 << 40)):
        pool = BlockPool(100, 16, layout=layout)
        most = pool.most_tokens(spare=10)
        assert pool.held(most - 1, most - 1) <= pool.total - 10 < pool.held(most, most)
    assert BlockPool(100, 16).most_tokens(10) == 90 * 16 + 1
    assert BlockPool(100, 16, layout=BlockLayout(0, ((1, 64),), 256)).most_tokens(0) == UNBOUNDED + 1


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocating, caching, growing and releasing keeps the sum; ids are never shared but through the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(40, 16)
        self.held: list[tuple[Holding, tuple[int, ...], int]] = []

    @rule(name=st.integers(0, 3), tokens=st.integers(1, 200), named=st.booleans(), table=st.booleans())
    def allocate(self, name: int, tokens: int, named: bool, table: bool) -> None:
        hashes = chain(name, tokens // 16) if named else ()
        units = self.pool.match(hashes, tokens - 1)
        if self.pool.blocks_to_allocate(hashes, units, tokens) <= self.pool.available:
            holding = Holding()
            self.pool.allocate(holding, hashes, units, tokens)
            if table:
                assert len(self.pool.table(holding)) == self.pool.blocks(tokens)
            self.held.append((holding, hashes, tokens))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def computed(self, which: int) -> None:
        holding, hashes, tokens = self.held[which % len(self.held)]
        self.pool.cache(holding, hashes, tokens)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        self.pool.release(self.held.pop(which % len(self.held))[0])

    @invariant()
    def blocks_are_conserved(self) -> None:
        shared = {h for holding, _, _ in self.held for h in holding.shared}
        assert shared == set(self.pool.refs)
        assert not shared & set(self.pool.idle)
        assert self.pool.used == len(shared) + sum(holding.private for holding, _, _ in self.held)
        assert self.pool.used + self.pool.idle_blocks + self.pool.free == self.pool.total
        assert self.pool.free >= 0

    @invariant()
    def private_ids_belong_to_one(self) -> None:
        ids = [i for holding, _, _ in self.held for i in holding.ids]
        assert len(ids) == len(set(ids))


class WindowedPoolMachine(RuleBasedStateMachine):
    """The same where layers have windows, and idle units cost more than used ones."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(60, 16, layout=WINDOWED)
        self.held: list[tuple[Holding, tuple[int, ...], int]] = []

    @rule(name=st.integers(0, 3), tokens=st.integers(1, 300), named=st.booleans(), computed=st.booleans())
    def allocate(self, name: int, tokens: int, named: bool, computed: bool) -> None:
        hashes = chain(name, tokens // 16) if named else ()
        units, before = self.pool.match(hashes, tokens - 1), self.pool.available
        need = self.pool.blocks_to_allocate(hashes, units, tokens, computed)
        holding = self.pool.take(hashes, units, tokens, 0, computed)
        assert (holding is not None) == (need <= before)
        if holding is not None:
            assert self.pool.available == before - need
            self.held.append((holding, hashes, tokens))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def computed(self, which: int) -> None:
        holding, hashes, tokens = self.held[which % len(self.held)]
        self.pool.cache(holding, hashes, tokens)
        self.pool.slide(holding)
        assert holding.private >= 0

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        self.pool.release(self.held.pop(which % len(self.held))[0])

    @invariant()
    def shares_are_conserved(self) -> None:
        assert self.pool.used == len(self.pool.refs) * self.pool.unit + sum(holding.private for holding, _, _ in self.held)
        assert self.pool.used + self.pool.idle_blocks + self.pool.free == self.pool.total
        assert self.pool.free >= 0


TestWindowedPool = WindowedPoolMachine.TestCase
TestWindowedPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
