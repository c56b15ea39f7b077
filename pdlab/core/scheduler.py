"""One instance: continuous batching over paged KV, sans-IO. `next_batch(now)` -> run it -> `complete(batch, steps, now)`.

A batch is some prompt chunks, or all running sequences' next token, or both (`pdlab/batching/` decides). A pure decode batch says in
`repeat` how many times in a row it would be chosen if nothing arrives, so that an engine can run that many steps, and the simulator
can sleep once for all of them. To make such a macro-step cost O(log batch) nothing is kept per sequence that changes per step: the
scheduler counts its own decode steps (`step`), a heap holds the step at which each sequence ends, `context_tokens` is a running sum,
and `growth[p]` counts the sequences that need a new block at steps congruent to p modulo the block size.

Whatever changes the answer `next_batch` would give sets `stirred`; a world that is inside a macro-step then ends it at the next step
boundary. `advance` books the steps already done, so that reports and reservations in the middle see what single steps would show.

A sequence that has computed its prompt either decodes here (`decodes_here`), or is *held*: its blocks are leased until `release`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from heapq import heapify, heappop, heappush
from typing import Protocol

from pdlab.core.batch import Batch
from pdlab.core.foresight import Foresight
from pdlab.core.holding import Holding
from pdlab.core.kv import BlockPool
from pdlab.core.sequence import Sequence
from pdlab.core.types import StepTime


class Batching(Protocol):
    """How an instance forms its next step while prompts wait; one a file in `pdlab/batching/`, chosen by the file's name."""

    def form(self, scheduler: Scheduler, now: float) -> tuple[list[tuple[Sequence, int]], bool]:
        """(prompt chunks, whether the running sequences decode)."""


class Commands(ABC):
    """What a Scheduler is told. Whoever stands between it and its worker has the same."""

    __slots__ = ()

    @abstractmethod
    def submit(self, seq: Sequence) -> None: ...
    @abstractmethod
    def reserve(self, seq: Sequence) -> bool: ...
    @abstractmethod
    def lend(self, seq: Sequence) -> bool: ...
    @abstractmethod
    def extend(self, seq: Sequence, tokens: int) -> bool: ...
    @abstractmethod
    def arrive(self, seq: Sequence, missing: int = 0) -> None: ...
    @abstractmethod
    def hold(self, seq: Sequence) -> None: ...
    @abstractmethod
    def stay(self, seq: Sequence, missing: int = 0) -> None: ...
    @abstractmethod
    def release(self, seq: Sequence) -> None: ...
    @abstractmethod
    def remove(self, seq: Sequence) -> None: ...
    @abstractmethod
    def rename(self, seq: Sequence, hashes: tuple[int, ...]) -> None: ...
    @abstractmethod
    def lengthen(self, seq: Sequence, output_tokens: int) -> None: ...
    @abstractmethod
    def profile(self, prefill: tuple[tuple[int, float], ...], decode: tuple[tuple[int, int, float], ...]) -> None: ...
    @abstractmethod
    def learn(self, steps: tuple[StepTime, ...]) -> None: ...
    @abstractmethod
    def next_batch(self, now: float) -> Batch | None: ...
    @abstractmethod
    def draft(self, seq: Sequence, tokens: int) -> int: ...
    @abstractmethod
    def accept(self, seq: Sequence, tokens: int) -> None: ...
    @abstractmethod
    def advance(self, batch: Batch, steps: int) -> None: ...
    @abstractmethod
    def complete(self, batch: Batch, steps: int, now: float) -> tuple[list[Sequence], list[Sequence]]: ...


STALE_ENDS = 256  # of the heap's, that drafts may leave behind
NOTHING: list[Sequence] = []  # never changed
NO_CHUNKS: list[tuple[Sequence, int]] = []


class Scheduler(Commands):
    """`max_batch_tokens` bounds a step's prompt chunks plus decodes; `max_seqs` the running sequences; `watermark` is the fraction of
    blocks that admitting a prompt must leave available."""

    __slots__ = (
        "batching",
        "bends",
        "computing",
        "context_tokens",
        "ends",
        "foresight",
        "growth",
        "held",
        "joined",
        "joins",
        "landed",
        "max_batch_tokens",
        "max_seqs",
        "most_tokens",
        "orders",
        "pool",
        "preemptions",
        "prefilling",
        "reserved",
        "running",
        "spare_blocks",
        "step",
        "stirred",
        "victims",
        "waiting",
        "waiting_tokens",
    )

    def __init__(
        self, pool: BlockPool, batching: Batching, *, max_batch_tokens: int = 8192, max_seqs: int = 256, watermark: float = 0.01
    ) -> None:
        self.pool = pool
        self.batching = batching
        self.foresight = batching if isinstance(batching, Foresight) else None
        self.max_batch_tokens = max_batch_tokens
        self.max_seqs = max_seqs
        self.spare_blocks = int(watermark * pool.total)
        self.most_tokens = pool.most_tokens(self.spare_blocks)  # of one sequence
        self.waiting: deque[Sequence] = deque()  # no blocks yet; by priority, then order
        self.prefilling: list[Sequence] = []  # blocks taken, prompt partly computed
        self.running: dict[int, Sequence] = {}  # decoding, by order of submission
        self.landed: deque[Sequence] = deque()  # KV complete, to join the running at the next boundary
        self.held: dict[Sequence, None] = {}  # prompt computed here, leased to a decode instance
        self.reserved: dict[Sequence, None] = {}  # blocks taken, KV on its way
        self.step = 0
        self.context_tokens = 0  # that the next decode step attends to
        self.ends: list[tuple[int, int, Sequence]] = []
        self.growth = [0] * pool.block_tokens
        self.bends: list[tuple[int, int, int, Sequence]] = []  # steps from which a sequence grows by less, a window being full
        self.waiting_tokens = 0  # prompt tokens of waiting and prefilling still to compute
        self.orders = 0
        self.joins = 0
        self.preemptions = 0
        self.computing: list[tuple[Sequence, int]] = []  # the chunks of the batch under way
        self.joined = NOTHING  # by the last `next_batch`: their first decode step is ahead
        self.victims = NOTHING  # and those it preempted
        self.stirred = False

    # ------------------------------------------------------------ what a world tells it

    def submit(self, seq: Sequence) -> None:
        """Queue a sequence whose prompt is to be computed here."""
        self.orders = seq.order = self.orders + 1
        self.waiting_tokens += seq.prompt_tokens
        self.stirred = True
        waiting = self.waiting
        if seq.priority and waiting:
            i = len(waiting)
            while i and waiting[i - 1].priority < seq.priority:
                i -= 1
            waiting.insert(i, seq)
        elif waiting and waiting[-1].priority < 0:
            i = len(waiting)
            while i and waiting[i - 1].priority < 0:
                i -= 1
            waiting.insert(i, seq)
        else:
            waiting.append(seq)

    def fits(self, tokens: int) -> bool:
        """Could a sequence of that many tokens, prompt and output, ever be served here?"""
        return tokens <= self.most_tokens

    def reserve(self, seq: Sequence) -> bool:
        """Take the blocks of a prompt that is computed elsewhere; False, and nothing taken, where there is no room now. Units that the
        prefix cache holds are shared: `seq.cached_tokens` need no transfer. Does not stir: whoever is inside a macro-step has to see to it
        that the blocks left suffice for the rest of it."""
        if len(self.running) + len(self.landed) + len(self.reserved) >= self.max_seqs:
            return False
        pool, hashes, tokens = self.pool, seq.hashes, seq.prompt_tokens
        units = pool.match(hashes, tokens - 1) if hashes else 0
        holding = pool.take(hashes, units, tokens, self.spare_blocks, computed=True)
        if holding is None:
            return False
        seq.holding = holding
        seq.cached_tokens = units * pool.hash_tokens
        self.orders = seq.order = self.orders + 1
        self.reserved[seq] = None
        return True

    def lend(self, seq: Sequence) -> bool:
        """Hold what the prefix cache has of the first units of a sequence that is nobody's, up to its `prompt_tokens`, which become as many
        as that is; False where it has none. Does not stir, like `reserve`. Where layers keep windows, what is cached lacks them."""
        pool, hashes = self.pool, seq.hashes
        units = pool.match(hashes, seq.prompt_tokens) if not pool.windows else 0
        tokens = units * pool.hash_tokens
        holding = pool.take(hashes, units, tokens, 0, computed=True) if units else None
        if holding is None:
            return False
        seq.holding, seq.prompt_tokens, seq.computed = holding, tokens, tokens
        self.orders = seq.order = self.orders + 1
        self.held[seq] = None
        return True

    def arrive(self, seq: Sequence, missing: int = 0) -> None:
        """The KV of a reserved sequence is complete: it decodes from the next step on; or first computes the last `missing` tokens of its
        prompt, where nobody has sampled its first token yet."""
        del self.reserved[seq]
        seq.computed = seq.prompt_tokens - missing
        if seq.hashes and seq.holding is not None:
            self.pool.cache(seq.holding, seq.hashes, seq.computed)
        if missing:
            self.prefilling.append(seq)
            self.waiting_tokens += missing
        else:
            self.landed.append(seq)
        self.stirred = True

    def stay(self, seq: Sequence, missing: int = 0) -> None:
        """A held sequence decodes here after all. The last `missing` tokens of its prompt are computed once more, where what was sampled of
        them is dropped."""
        del self.held[seq]
        seq.decodes_here = True
        if missing:
            seq.computed -= missing
            seq.made = 0
            self.prefilling.append(seq)
            self.waiting_tokens += missing
        else:
            self.landed.append(seq)
        self.stirred = True

    def hold(self, seq: Sequence) -> None:
        """Stop a sequence that decodes, or is about to, and lease its KV, for the last stage of a migration. At a step boundary only."""
        if seq in self.landed:
            self.landed.remove(seq)
        else:
            steps = self.step - seq.start_step
            self._leave(seq)
            seq.made += steps
            seq.prompt_tokens = seq.computed
        self.held[seq] = None

    def extend(self, seq: Sequence, tokens: int) -> bool:
        """Let a reserved sequence hold `tokens` in all; False, and nothing taken, where there is no room. Does not stir, like `reserve`."""
        more = self.pool.held(tokens) - self.pool.held(seq.prompt_tokens)
        if more > self.pool.available or seq.holding is None:
            return False
        seq.prompt_tokens = tokens
        if more:
            seq.holding.private += more
            self.pool.grow(more)
        return True

    def release(self, seq: Sequence) -> None:
        """A held sequence's KV is read, or its lease has ended."""
        del self.held[seq]
        self._free(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks. Must not be called between `next_batch` and `complete` for a sequence
        in that batch. Harmless where it has ended."""
        if self.running.get(seq.order) is seq:
            self._leave(seq)
        elif seq in self.held:
            del self.held[seq]
        elif seq in self.reserved:
            del self.reserved[seq]
        elif seq in self.landed:
            self.landed.remove(seq)
        elif seq in self.prefilling:
            self.prefilling.remove(seq)
            self.waiting_tokens -= seq.prompt_tokens - seq.computed
        elif seq in self.waiting:
            self.waiting.remove(seq)
            self.waiting_tokens -= seq.prompt_tokens
        else:
            return
        self._free(seq)

    def rename(self, seq: Sequence, hashes: tuple[int, ...]) -> None:
        """The sequence has grown: these are the names of its full blocks now."""
        seq.hashes = hashes

    def lengthen(self, seq: Sequence, output_tokens: int) -> None:
        """What is held shall make that many tokens here in all, now that it stays."""
        seq.output_tokens = output_tokens

    def profile(self, prefill: tuple[tuple[int, float], ...], decode: tuple[tuple[int, int, float], ...]) -> None:
        """How long this instance's steps take, as measured or modelled: for a batching with foresight."""
        if self.foresight is not None:
            self.foresight.profile(prefill, decode)

    def learn(self, steps: tuple[StepTime, ...]) -> None:
        """How long some of its steps took."""
        if self.foresight is not None:
            for step in steps:
                self.foresight.learn(step)

    # ------------------------------------------------------------ the step

    def next_batch(self, now: float) -> Batch | None:
        """The next step's work, or None. Blocks are taken here; `now` is for batchings that know deadlines."""
        self.stirred = False
        self.joined = self.victims = NOTHING
        if self.landed:
            self._join()
        if self.bends:
            self._bend()
        while True:
            if self.waiting or self.prefilling:
                chunks, decodes = self.batching.form(self, now)
            else:
                chunks, decodes = NO_CHUNKS, True
            n = len(self.running) if decodes else 0
            if not n:
                self.computing = chunks
                if not chunks:
                    return None
                prompt_tokens, squared_tokens = _prompt_sums(chunks)
                return Batch(chunks, 0, 0, 1, prompt_tokens, squared_tokens)
            repeat = self._repeat(n)
            if repeat:
                if chunks or self.victims:  # a victim may come back at the next step
                    repeat = 1
                elif self.foresight is not None and (self.waiting or self.prefilling):
                    repeat = min(repeat, self.foresight.lasts(self))
                if need := self.growth[self.step % self.pool.block_tokens]:
                    self.pool.grow(need)
                self.computing = chunks
                if chunks:
                    prompt_tokens, squared_tokens = _prompt_sums(chunks)
                    return Batch(chunks, n, self.context_tokens, repeat, prompt_tokens, squared_tokens)
                return Batch(chunks, n, self.context_tokens, repeat)
            for seq, _ in chunks:  # not started: their blocks stay theirs, unless preempted below
                if seq not in self.prefilling:
                    self.prefilling.append(seq)
            self._preempt()

    def advance(self, batch: Batch, steps: int) -> None:
        """`steps` of a decode batch are done and the next one is under way: bring the books there. `steps` < `batch.repeat`."""
        if steps:
            self._grow(self.step + 1, self.step + steps)
            self.step += steps
            self.context_tokens += batch.decodes * steps
            batch.context_tokens = self.context_tokens
            batch.repeat -= steps

    def draft(self, seq: Sequence, tokens: int) -> int:
        """In the step under way a running sequence verifies up to `tokens` drafted ones, beside its next: take their blocks. How many there
        is room for; nobody is preempted for them. To be followed by `accept`, before the step is complete."""
        pool, block_tokens = self.pool, self.pool.block_tokens
        assert not pool.windows and not seq.drafted, "an engine's, once a step"
        here = self.kv_tokens(seq) + 1
        room = (pool.blocks(here) + pool.available) * block_tokens - here
        seq.drafted = tokens = min(tokens, room)
        pool.grow(pool.blocks(here + tokens) - pool.blocks(here))
        return tokens

    def accept(self, seq: Sequence, tokens: int) -> None:
        """Of the drafted ones the first `tokens` were right, and the sequence has made so many more than the step under way counts: its
        books are as if it had begun to decode so many steps before. The blocks of the others are free again."""
        pool, block_tokens, start, prompt = self.pool, self.pool.block_tokens, seq.start_step, seq.prompt_tokens
        assert tokens <= seq.drafted and seq.end_step - tokens > self.step, f"{seq} cannot make {tokens} more"
        here = self.kv_tokens(seq) + 1
        pool.give_back(seq.holding, pool.blocks(here + seq.drafted) - pool.blocks(here + tokens), pool.blocks(here + tokens))
        seq.drafted = 0
        if not tokens:
            return
        seq.start_step = start - tokens
        seq.end_step -= tokens
        self.joins = joins = self.joins + 1
        heappush(self.ends, (seq.end_step, joins, seq))
        if len(self.ends) > STALE_ENDS + 4 * len(self.running):
            self.ends = [entry for entry in self.ends if entry[0] == entry[2].end_step]
            heapify(self.ends)
        self.context_tokens += tokens
        self.growth[(start - prompt) % block_tokens] -= seq.growth
        self.growth[(seq.start_step - prompt) % block_tokens] += seq.growth

    def complete(self, batch: Batch, steps: int, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """The batch ran `steps` <= `batch.repeat` times. Returns (prefilled, finished): sequences whose prompt is now computed and that
        have made a token of it (their first, or after a preemption a later one), in batch order; and those that are over. A sequence is in
        one of the two."""
        finished = NOTHING
        if batch.decodes:
            step = self.step
            if steps > 1:
                self._grow(step + 1, step + steps - 1)
            self.step = step = step + steps
            self.context_tokens += batch.decodes * steps
            ends = self.ends
            if ends[0][0] <= step:
                finished = []
                while ends and ends[0][0] <= step:
                    end, _, seq = heappop(ends)
                    if seq.end_step == end:
                        seq.made = seq.output_tokens
                        self._leave(seq)
                        self._free(seq)
                        finished.append(seq)
        if not batch.chunks:
            return NOTHING, finished
        prefilled: list[Sequence] = []
        self.computing = []
        for seq, tokens in batch.chunks:
            holding = seq.holding
            if holding is None:
                continue  # removed meanwhile
            seq.computed += tokens
            self.waiting_tokens -= tokens
            if seq.hashes:
                self.pool.cache(holding, seq.hashes, seq.computed)
            if seq.computed < seq.prompt_tokens:
                continue
            if seq in self.prefilling:
                self.prefilling.remove(seq)
            if holding.surplus:
                self.pool.slide(holding)
            seq.made += 1
            if seq.made >= seq.output_tokens:
                self._free(seq)
                if finished is NOTHING:
                    finished = []
                finished.append(seq)
                continue
            if seq.decodes_here:
                self.landed.append(seq)
            else:
                self.held[seq] = None
            prefilled.append(seq)
        return prefilled, finished

    # ------------------------------------------------------------ for batchings

    def admit(self, budget_tokens: int, *, chunked: bool) -> list[tuple[Sequence, int]]:
        """Prompt chunks for at most `budget_tokens`: those under way first, then from the queue in order, stopping at the first that
        does not fit. The prefix cache is matched before the budget is counted. Not `chunked`: whole prompts only, and the first one
        may exceed the budget alone. In a step that has preempted somebody the queue waits."""
        chunks: list[tuple[Sequence, int]] = []
        for seq in self.prefilling:
            tokens = seq.prompt_tokens - seq.computed
            if chunked and tokens > budget_tokens:
                tokens = budget_tokens
            if tokens <= 0 or (not chunked and chunks and tokens > budget_tokens):
                return chunks
            chunks.append((seq, tokens))
            budget_tokens -= tokens
        waiting, pool = self.waiting, self.pool
        if self.victims or not waiting:
            return chunks
        room = self.room
        while waiting and budget_tokens > 0 and room > 0:
            seq = waiting[0]
            hashes, prompt = seq.hashes, seq.prompt_tokens
            units = pool.match(hashes, prompt - 1) if hashes else 0
            cached = units * pool.hash_tokens
            tokens = prompt - cached
            if tokens > budget_tokens:
                if chunked:
                    tokens = budget_tokens
                elif chunks:
                    break
            holding = pool.take(hashes, units, prompt, self.spare_blocks)
            if holding is None:
                break
            waiting.popleft()
            self._enter(seq, holding, cached, tokens)
            chunks.append((seq, tokens))
            budget_tokens -= tokens
            room -= 1
        return chunks

    @property
    def room(self) -> int:
        """Sequences that may be admitted beside those that are here."""
        return self.max_seqs - len(self.running) - len(self.landed) - len(self.reserved) - len(self.prefilling)

    def cached(self, seq: Sequence) -> int:
        """Prompt tokens of a waiting sequence that the prefix cache holds now."""
        return self.pool.match(seq.hashes, seq.prompt_tokens - 1) * self.pool.hash_tokens if seq.hashes else 0

    def admit_one(self, seq: Sequence, tokens: int) -> bool:
        """Admit this one, wherever it waits, to compute `tokens` of what the prefix cache does not hold; False, and nothing done, where it
        has no blocks. The caller has looked for `room` and for `victims`."""
        cached = self.cached(seq)
        holding = self.pool.take(seq.hashes, cached // self.pool.hash_tokens, seq.prompt_tokens, self.spare_blocks)
        if holding is None:
            return False
        self.waiting.remove(seq)
        self._enter(seq, holding, cached, tokens)
        return True

    def _enter(self, seq: Sequence, holding: Holding, cached: int, tokens: int) -> None:
        """It has its blocks, `cached` tokens of its prompt in them, and computes `tokens` now."""
        seq.holding = holding
        seq.computed = cached
        if not seq.preempted:
            seq.cached_tokens = cached
        self.waiting_tokens -= cached
        if cached + tokens < seq.prompt_tokens:
            self.prefilling.append(seq)

    # ------------------------------------------------------------ what a world may ask

    def made(self, seq: Sequence) -> int:
        """Tokens the sequence has made, as of the last booked step."""
        if seq.order in self.running and self.running[seq.order] is seq:
            return seq.made + self.step - seq.start_step
        return seq.made

    def movable(self, seq: Sequence) -> bool:
        """Does it decode, or has it landed, to decode from the next step on?"""
        return self.running.get(seq.order) is seq or seq in self.landed

    def kv_tokens(self, seq: Sequence) -> int:
        """KV tokens the sequence holds: its prompt, and all tokens made here but the last."""
        if seq.order in self.running and self.running[seq.order] is seq:
            return seq.prompt_tokens + self.step - seq.start_step
        return seq.computed

    def table(self, seq: Sequence) -> list[int]:
        """The block ids an engine needs: of the whole prompt, and while the sequence decodes, of the step under way."""
        assert seq.holding is not None, f"{seq} has no blocks"
        running = seq.order in self.running and self.running[seq.order] is seq
        return self.pool.table(seq.holding, self.pool.blocks(self.kv_tokens(seq) + 1 + seq.drafted) if running else 0)

    @property
    def idle(self) -> bool:
        """Nothing here, running, waiting, leased or expected."""
        return not (self.running or self.waiting or self.prefilling or self.landed or self.held or self.reserved or self.computing)

    def check(self) -> None:
        """Invariant 1: blocks held by running, reserved, cached, in transfer, plus free, are the total. O(sequences)."""
        pool = self.pool
        computing = [seq for seq, _ in self.computing if seq not in self.prefilling]
        sequences = [*self.running.values(), *self.landed, *self.held, *self.reserved, *self.prefilling, *computing]
        units = {h for s in sequences if s.holding for h in s.holding.shared}
        private = sum(s.holding.private for s in sequences if s.holding)
        grown = sum(pool.held(self.kv_tokens(s) + 1) - pool.held(s.prompt_tokens) for s in self.running.values())
        assert units == set(pool.refs), "referenced units differ from those the sequences hold"
        slack = pool.used - private - grown - len(units) * pool.unit
        assert -len(self.running) * pool.shares <= slack <= 0, f"used blocks {pool.used} are not accounted for (by {slack})"
        assert pool.free >= 0, f"{pool.free} free blocks"
        assert self.waiting_tokens == sum(s.prompt_tokens - s.computed for s in [*self.waiting, *self.prefilling, *computing])
        assert self.context_tokens == sum(self.kv_tokens(s) + 1 for s in self.running.values())

    # ------------------------------------------------------------ inside

    def _join(self) -> None:
        """Landed sequences start to decode, as far as `max_seqs` goes."""
        landed, running, step, windows = self.landed, self.running, self.step, self.pool.windows
        joined = []
        while landed and len(running) < self.max_seqs:
            seq = landed.popleft()
            joined.append(seq)
            prompt = seq.prompt_tokens
            seq.start_step = step
            seq.end_step = end = step + seq.output_tokens - seq.made
            running[seq.order] = seq
            self.joins = joins = self.joins + 1
            heappush(self.ends, (end, joins, seq))
            self.context_tokens += prompt + 1
            seq.growth = 1 if not windows else self._window_growth(seq, joins)
            self.growth[(step - prompt) % self.pool.block_tokens] += seq.growth
        self.joined = joined

    def _window_growth(self, seq: Sequence, join: int) -> int:
        """What a further block of a sequence that joins takes, and the steps from which it takes less."""
        pool, prompt = self.pool, seq.prompt_tokens
        seq.join, growth = join, pool.layout.full
        for index, (share, window) in enumerate(pool.windows):
            last = (pool.window_blocks(window) - 1) * pool.block_tokens  # tokens at which the window's last block is begun
            if prompt <= last:
                growth += share
                heappush(self.bends, (self.step + last - prompt + 1, join, index, seq))
        return growth

    def _bend(self) -> None:
        """Those whose windows are full grow by less from this step on."""
        bends = self.bends
        while bends:
            step, join, index, seq = bends[0]
            decodes = seq.end_step >= 0 and seq.join == join
            if decodes and step > self.step:
                break
            heappop(bends)
            if decodes:
                share = self.pool.windows[index][0]
                seq.growth -= share
                self.growth[(seq.start_step - seq.prompt_tokens) % self.pool.block_tokens] -= share

    def _leave(self, seq: Sequence) -> None:
        """Out of the running; the blocks it grew are added to its holding. Its heap entry goes stale."""
        del self.running[seq.order]
        prompt, start_step, holding, block_tokens = seq.prompt_tokens, seq.start_step, seq.holding, self.pool.block_tokens
        seq.computed = tokens = prompt + self.step - start_step
        self.context_tokens -= tokens + 1
        self.growth[(start_step - prompt) % block_tokens] -= seq.growth
        if holding is not None:
            if not self.pool.windows:
                holding.private += -(-tokens // block_tokens) - -(-prompt // block_tokens)
            else:
                holding.private += self.pool.held(tokens) - self.pool.held(prompt)
        seq.end_step = -1

    def _free(self, seq: Sequence) -> None:
        holding = seq.holding
        if holding is not None:
            seq.holding = None
            if seq.hashes or holding.ids:
                self.pool.cache(holding, seq.hashes, seq.computed)
                self.pool.release(holding)
            else:
                self.pool.used -= holding.private
        if self.waiting or self.landed:
            self.stirred = True

    def _grow(self, first: int, last: int) -> None:
        """Take the blocks needed to run steps `first` to `last`."""
        block_tokens, growth, steps = self.pool.block_tokens, self.growth, last - first + 1
        if steps <= 0:
            return
        rest = steps % block_tokens
        start = first % block_tokens
        end = start + rest
        blocks = sum(growth[start:end]) if end <= block_tokens else sum(growth[start:]) + sum(growth[: end - block_tokens])
        if steps > rest:
            blocks += steps // block_tokens * self._round()
        if blocks:
            self.pool.grow(blocks)

    def _round(self) -> int:
        """What the running take in as many steps as a block has tokens."""
        return len(self.running) if not self.pool.windows else sum(self.growth)

    def _repeat(self, running: int) -> int:
        """Steps until the first of the `running` sequences ends or blocks run out; 0 when not even one step has its blocks."""
        ends, pool = self.ends, self.pool
        end, _, seq = ends[0]
        while seq.end_step != end:
            heappop(ends)
            end, _, seq = ends[0]
        steps = end - self.step
        if self.bends:
            steps = min(steps, self.bends[0][0] - self.step)
        block_tokens, available = pool.block_tokens, pool.total - pool.used
        if running * pool.shares * (steps // block_tokens + 1) <= available:
            return steps
        each = self._round()
        rounds = min(available // each, steps // block_tokens) if each else steps // block_tokens
        available -= rounds * each
        possible = rounds * block_tokens
        while possible < steps:
            available -= self.growth[(self.step + possible) % block_tokens]
            if available < 0:
                break
            possible += 1
        return min(possible, steps)

    def _preempt(self) -> None:
        """Blocks have run out: of the offline ones, or else of all, the latest, least urgent sequence gives its own up."""
        candidates = [*self.running.values(), *self.prefilling]
        victim = max(candidates, key=lambda s: (s.offline, -s.priority, s.order))
        assert len(candidates) > 1 or self.reserved or self.held or self.landed, (
            f"{victim} alone does not fit into {self.pool.total} blocks"
        )
        self.preempt(victim)

    def preempt(self, victim: Sequence) -> None:
        """It runs, or its prompt is partly computed; it gives its blocks up, and is computed anew from the head of the queue."""
        if victim.order in self.running and self.running[victim.order] is victim:
            steps = self.step - victim.start_step
            self._leave(victim)
            victim.made += steps
            victim.prompt_tokens += steps + 1
        else:
            self.prefilling.remove(victim)
            self.waiting_tokens -= victim.prompt_tokens - victim.computed
        if victim.holding is not None:
            self.pool.release(victim.holding)
            victim.holding = None
        self.victims = [*self.victims, victim]
        victim.computed = 0
        victim.preempted += 1
        self.preemptions += 1
        self.waiting_tokens += victim.prompt_tokens
        self.waiting.appendleft(victim)


def _prompt_sums(chunks: list[tuple[Sequence, int]]) -> tuple[int, int]:
    """`Batch.prompt_tokens` and `Batch.squared_tokens`."""
    prompt_tokens = squared_tokens = 0
    for seq, tokens in chunks:
        prompt_tokens += tokens
        squared_tokens += tokens * (2 * seq.computed + tokens)
    return prompt_tokens, squared_tokens
