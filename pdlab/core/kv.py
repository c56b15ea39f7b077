"""Paged KV memory of one instance: counts, a prefix cache, and, where an engine asks, block ids. Pure bookkeeping.

A block is *used* while anyone references it, *idle* while only the prefix cache keeps it, else *free*; the three sum to the total.
The prefix cache is a hash chain: a unit of `hash_tokens` prompt tokens (one block, or several where a trace hashes coarser) is named
by an integer that stands for everything up to its end. Only full units are cached, a match is contiguous from the first, and idle
units are evicted least recently used, a sequence's tail before its head.

A sequence's private blocks are a number here, so that the simulator can grow a thousand sequences by arithmetic. An engine that
needs a block table calls `table`, which gives each block its id then.

Layers with a window keep the last tokens of a sequence only. The pool then counts in *shares* of a block, one price for a block of each
kind of layer, as vLLM's hybrid KV cache manager has one pool for all of them. A cached unit in use costs the layers that keep all of it;
each sequence has windows of its own. An idle one costs all layers, since what a window has left behind stays in the cache until it is
evicted. A match needs no more than the unit: that the window before its end is there, too, is taken for granted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdlab.core.holding import Holding

UNBOUNDED = 1 << 40  # tokens of a sequence, where all layers have windows


@dataclass(frozen=True)
class BlockLayout:
    """What a block's bytes belong to: `full` shares to layers that keep all of a sequence, and each of `windows`, (shares, tokens), to
    layers that keep so many tokens, and of a prompt the chunk that is computed, of `chunk_tokens` at most."""

    full: int = 1
    windows: tuple[tuple[int, int], ...] = ()
    chunk_tokens: int = 0

    @property
    def shares(self) -> int:
        return self.full + sum([share for share, _ in self.windows])


PLAIN = BlockLayout()


class BlockPool:
    """`blocks` blocks of `block_tokens` tokens. `hash_tokens` is a multiple of `block_tokens`. `total`, `used` and all that is taken are
    shares of the `layout`, which are blocks where no layer has a window."""

    __slots__ = (
        "_free_ids",
        "_unit_ids",
        "block_tokens",
        "changes",
        "hash_tokens",
        "idle",
        "idle_unit",
        "layout",
        "prefix_cache",
        "refs",
        "shares",
        "total",
        "unit",
        "used",
        "windows",
    )

    def __init__(
        self, blocks: int, block_tokens: int, hash_tokens: int = 0, prefix_cache: bool = True, layout: BlockLayout = PLAIN
    ) -> None:
        hash_tokens = hash_tokens or block_tokens
        assert hash_tokens % block_tokens == 0, f"hash_tokens {hash_tokens} is not a multiple of block_tokens {block_tokens}"
        self.layout = layout
        self.windows = layout.windows
        self.shares = layout.shares
        self.total = blocks * self.shares
        self.block_tokens = block_tokens
        self.hash_tokens = hash_tokens
        self.unit = hash_tokens // block_tokens * layout.full
        self.idle_unit = hash_tokens // block_tokens * self.shares
        self.prefix_cache = prefix_cache
        self.used = 0
        self.refs: dict[int, int] = {}  # cached unit -> sequences that reference it
        self.idle: dict[int, None] = {}  # cached units that nobody references, least recently used first
        self.changes: dict[int, bool] = {}  # units cached (True) or evicted since `drain_events`: what became of each last
        self._free_ids: list[int] | None = None
        self._unit_ids: dict[int, list[int]] = {}

    @property
    def available(self) -> int:
        """Blocks that can be had now: free, or idle in the cache."""
        return self.total - self.used

    @property
    def idle_blocks(self) -> int:
        return len(self.idle) * self.idle_unit

    @property
    def free(self) -> int:
        return self.total - self.used - len(self.idle) * self.idle_unit

    def whole(self, shares: int) -> int:
        """As blocks of all layers."""
        return -(-shares // self.shares)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def window_blocks(self, tokens: int) -> int:
        """That a window of so many tokens touches at most, wherever it begins."""
        return -(-(tokens - 1) // self.block_tokens) + 1

    def held(self, tokens: int, computing: int = 0) -> int:
        """What a sequence of so many tokens takes; while it computes `computing` of them, at most a chunk at a time."""
        blocks, layout = -(-tokens // self.block_tokens), self.layout
        taken = layout.full * blocks
        for share, window in self.windows:
            taken += share * min(blocks, self.window_blocks(window + min(computing, layout.chunk_tokens)))
        return taken

    def most_tokens(self, spare: int) -> int:
        """Of one sequence, prompt and output, while `spare` stays available. The last token's KV is never written."""
        room = self.total - spare
        low, high = room // self.shares, UNBOUNDED // self.block_tokens  # blocks
        if not self.windows:
            return low * self.block_tokens + 1
        while low < high:
            tokens = (low + high + 1) // 2 * self.block_tokens
            if self.held(tokens, tokens) <= room:
                low = (low + high + 1) // 2
            else:
                high = (low + high + 1) // 2 - 1
        return low * self.block_tokens + 1

    def match(self, hashes: Sequence[int], most_tokens: int) -> int:
        """Leading units of `hashes` in the cache, covering at most `most_tokens`."""
        if not hashes or not self.prefix_cache:
            return 0
        refs, idle, units = self.refs, self.idle, 0
        for h in hashes[: most_tokens // self.hash_tokens]:
            if h not in refs and h not in idle:
                break
            units += 1
        return units

    def blocks_to_allocate(self, hashes: Sequence[int], units: int, tokens: int, computed: bool = False) -> int:
        """How much `available` would shrink by `allocate`: idle units that come into use count too."""
        need = self.held(tokens, 0 if computed else tokens - units * self.hash_tokens) - units * self.unit
        if units:
            idle = self.idle
            need += sum(h in idle for h in hashes[:units]) * self.unit
        return need

    def allocate(self, holding: Holding, hashes: Sequence[int], units: int, tokens: int, computed: bool = False) -> None:
        """Reference the first `units` of `hashes` and take private blocks for the rest of `tokens`, which are computed here unless they
        are `computed` elsewhere. The caller has made sure that they are available."""
        if units:
            refs, idle = self.refs, self.idle
            for h in hashes[:units]:
                if h in refs:
                    refs[h] += 1
                else:
                    del idle[h]
                    refs[h] = 1
                    self.used += self.unit
                holding.shared.append(h)
        private = self.held(tokens) - units * self.unit
        if self.windows and not computed:
            holding.surplus = self.held(tokens, tokens - units * self.hash_tokens) - self.held(tokens)
            private += holding.surplus
        holding.private += private
        self.grow(private)

    def take(self, hashes: Sequence[int], units: int, tokens: int, spare_blocks: int, computed: bool = False) -> Holding | None:
        """What `allocate` does, for a new holding, as long as `spare_blocks` stay available; else None."""
        if units or self.windows:
            if self.blocks_to_allocate(hashes, units, tokens, computed) > self.total - self.used - spare_blocks:
                return None
            holding = Holding()
            self.allocate(holding, hashes, units, tokens, computed)
            return holding
        need = -(-tokens // self.block_tokens)
        used = self.used + need
        if used > self.total - spare_blocks:
            return None
        holding = Holding(need)
        self.used = used
        if self.idle:
            self.grow(0)
        return holding

    def slide(self, holding: Holding) -> None:
        """The prompt is computed: windowed layers keep their windows."""
        holding.private -= holding.surplus
        self.used -= holding.surplus
        holding.surplus = 0

    def grow(self, blocks: int) -> None:
        """Take `blocks` private ones that some sequence accounts for; evict idle units to make room."""
        self.used = used = self.used + blocks
        assert used <= self.total, f"KV over-allocated: {used} of {self.total} blocks"
        if self.idle:
            excess = used + len(self.idle) * self.idle_unit - self.total
            if excess > 0:
                self._evict(-(-excess // self.idle_unit))

    def give_back(self, holding: Holding | None, blocks: int, kept: int) -> None:
        """Of what was grown, `blocks` are free again; the sequence keeps `kept` in all."""
        self.used -= blocks
        if holding is not None and self._free_ids is not None:
            private = kept - len(holding.shared) * self.unit
            self._free_ids += holding.ids[private:]
            del holding.ids[private:]

    def _evict(self, units: int) -> None:
        idle, changes, ids = self.idle, self.changes, self._unit_ids
        for _ in range(units):
            h = next(iter(idle))
            del idle[h]
            changes[h] = False
            if ids and (freed := ids.pop(h, None)) and self._free_ids is not None:
                self._free_ids += freed

    def cache(self, holding: Holding, hashes: Sequence[int], tokens: int) -> None:
        """The first `tokens` of the sequence are computed: turn its full private units into shared ones. A unit that somebody else
        has cached meanwhile stays private."""
        if not self.prefix_cache:
            return
        refs, idle, shared, unit = self.refs, self.idle, holding.shared, self.unit
        for i in range(len(shared), min(tokens // self.hash_tokens, len(hashes))):
            h = hashes[i]
            if h in refs or h in idle:
                return  # a duplicate: what follows cannot be reached through this sequence's own blocks
            refs[h] = 1
            shared.append(h)
            holding.private -= unit
            self.changes[h] = True
            if holding.ids:
                self._unit_ids[h], holding.ids = holding.ids[:unit], holding.ids[unit:]

    def release(self, holding: Holding) -> None:
        """Give everything back: private blocks are free, shared units nobody else references become idle, the tail first in line."""
        refs, idle = self.refs, self.idle
        for h in reversed(holding.shared):
            if refs[h] == 1:
                del refs[h]
                idle[h] = None
                self.used -= self.unit
            else:
                refs[h] -= 1
        self.used -= holding.private
        if holding.ids and self._free_ids is not None:
            self._free_ids += holding.ids
        holding.shared, holding.private, holding.ids, holding.surplus = [], 0, [], 0
        if self.idle_unit > self.unit:
            self.grow(0)  # idle ones cost more: those that do not fit go

    def table(self, holding: Holding, blocks: int = 0) -> list[int]:
        """Block ids of the whole sequence, in order; blocks that have none yet get theirs. `blocks` in all, where the sequence has grown
        by some that its holding does not count yet."""
        assert self.shares == 1, "no layer has blocks of its own in a block table"
        if self._free_ids is None:
            self._free_ids = list(range(self.total - 1, -1, -1))
        for h in holding.shared:
            if h not in self._unit_ids:
                self._unit_ids[h] = [self._free_ids.pop() for _ in range(self.unit)]
        private = max(holding.private, blocks - len(holding.shared) * self.unit)
        while len(holding.ids) < private:
            holding.ids.append(self._free_ids.pop())
        return [i for h in holding.shared for i in self._unit_ids[h]] + holding.ids

    def drain_events(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(stored, evicted) prefix hashes since the last call: those that came and are there, those that went and are not. What came and
        went in between is evicted, too: others may have guessed that it is there."""
        changes = self.changes
        if not changes:
            return (), ()
        self.changes = {}
        return tuple([h for h, there in changes.items() if there]), tuple([h for h, there in changes.items() if not there])

    def clear(self) -> None:
        """Drop the idle part of the cache."""
        self._evict(len(self.idle))
