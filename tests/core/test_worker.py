"""An instance's own side, without any world: what it is told, in whatever order, and what it says."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdlab import batching
from pdlab.core.batch import Batch
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import Role
from pdlab.core.worker import LEASE_S, Worker


def worker(blocks: int = 100, *, budget: int = 256, max_seqs: int = 8, prefix_cache: bool = True, context_tokens: int = 0) -> Worker:
    pool = BlockPool(blocks, 16, prefix_cache=prefix_cache)
    scheduler = Scheduler(pool, batching.load("chunked"), max_batch_tokens=budget, max_seqs=max_seqs, watermark=0.0)
    return Worker(scheduler, context_tokens=context_tokens)


def candidates(first: Sequence, count: int) -> list[Sequence]:
    return [Sequence(first.request_id, k, first.prompt_tokens, first.output_tokens, first.hashes) for k in range(1, count)]


def step(w: Worker, now: float = 0.0, ended: tuple[Sequence, ...] = ()) -> tuple[list[int], list[int]]:
    """One batch in full: the ids prefilled and finished."""
    batch = w.next_batch(now)
    assert batch is not None
    prefilled, finished = w.complete(batch, batch.repeat, now, list(ended))
    w.settle()
    w.check()
    return [x.request_id for x in prefilled], [x.request_id for x in finished]


def to_rest(w: Worker) -> list[int]:
    """The ids of what finishes until nothing can run."""
    finished: list[int] = []
    while (batch := w.next_batch(0.0)) is not None:
        finished += [x.request_id for x in w.complete(batch, batch.repeat, 0.0)[1]]
        w.check()
    return finished


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("output_tokens", [1, 3])
def test_the_other_candidates_follow_the_first_and_find_its_prompt(output_tokens: int) -> None:
    w = worker()
    first = Sequence(1, 0, 40, output_tokens, (1, 2))
    w.submit(first, candidates(first, 3))
    computed, finished = 0, []
    while (batch := w.next_batch(0.0)) is not None:
        computed += sum(tokens for _, tokens in batch.chunks)
        finished += [x.request_id for x in w.complete(batch, batch.repeat, 0.0)[1]]
        w.check()
    assert computed == 40 + 8 + 8, "two full blocks of three are found in the cache"
    assert finished == [1], "the request ends once, with its last candidate"
    assert (w.scheduler.idle, w.scheduler.pool.used, w.families) == (True, 0, 0)


def test_candidates_of_a_prompt_computed_elsewhere_follow_when_it_arrives() -> None:
    w = worker()
    first = Sequence(1, 0, 40, 5, (1, 2), made=1)
    assert w.reserve(first, candidates(first, 3))
    assert w.next_batch(0.0) is None
    w.arrive(first)
    assert [x.attempt for x in w.scheduler.waiting] == [1, 2]
    assert to_rest(w) == [1]


def test_a_candidate_that_stops_early_ends_alone() -> None:
    w = worker()
    first = Sequence(1, 0, 40, 5, (1, 2))
    w.submit(first, others := candidates(first, 3))
    assert step(w, ended=(first,)) == ([], []), "its first token was its last; the others have their own"
    assert w.scheduler.orders == 3
    step(w)
    batch = w.next_batch(0.0)
    assert batch is not None
    assert w.complete(batch, 1, 0.0, [others[0]]) == ([], [])
    assert to_rest(w) == [1]
    assert w.scheduler.pool.used == 0


def test_the_first_candidate_goes_on_when_the_others_have_stopped() -> None:
    w = worker()
    first = Sequence(1, 0, 40, 9, (1, 2))
    w.submit(first, others := candidates(first, 3))
    step(w)
    assert step(w, ended=tuple(others)) == ([], [])
    assert (first.holding is None, to_rest(w)) == (False, [1])


def test_a_request_that_stops_at_its_length_ends_once() -> None:
    w = worker()
    seq = Sequence(1, 0, 40, 1)
    w.submit(seq)
    assert step(w, ended=(seq,)) == ([], [1])


def test_dropping_a_request_drops_its_candidates_wherever_they_are() -> None:
    for steps in (0, 1, 2):
        w = worker()
        first = Sequence(1, 0, 96, 20, tuple(range(6)))
        w.submit(first, others := candidates(first, 4))
        for _ in range(steps):
            step(w) if steps == 1 else w.complete(w.next_batch(0.0), 1, 0.0)  # type: ignore[arg-type]
        w.settle()
        w.abort(others[2])
        assert (w.scheduler.idle, w.scheduler.pool.used, w.families) == (True, 0, 0)


def test_without_the_first_candidate_the_next_computes_the_prompt() -> None:
    w = worker()
    first = Sequence(1, 0, 40, 5, (1, 2))
    w.submit(first, others := candidates(first, 3))
    w.withdraw(first)
    w.check()
    assert [x.attempt for x in w.scheduler.waiting] == [1]
    w.withdraw(others[1])
    assert to_rest(w) == [1]
    assert (w.families, w.scheduler.pool.used) == (0, 0)


# ---------------------------------------------------------------- leases, deadlines


def test_a_prompt_for_another_instance_is_held_until_read_or_until_its_lease_ends() -> None:
    w = worker()
    read, forgotten = Sequence(1, 1, 64, 10, decodes_here=False), Sequence(2, 1, 64, 10, decodes_here=False)
    w.submit(read)
    w.submit(forgotten)
    assert step(w, 5.0) == ([1, 2], [])
    assert (w.wake_s(), w.overdue(5.0 + LEASE_S - 0.1)) == (5.0 + LEASE_S, [])
    w.release(read)
    w.release(read)
    assert w.scheduler.pool.used == 4
    assert w.renew(forgotten, 50.0) and w.renew(forgotten, 40.0)
    assert (w.wake_s(), w.overdue(50.0)) == (50.0, [forgotten])
    w.lapse(forgotten)
    w.check()
    assert (w.scheduler.idle, w.scheduler.pool.used, w.wake_s()) == (True, 0, None)
    assert not w.renew(forgotten, 60.0)


def test_what_does_not_come_by_its_deadline_is_dropped() -> None:
    w = worker()
    late, patient = Sequence(1, 1, 64, 10), Sequence(2, 1, 64, 10)
    assert w.reserve(late, due_s=3.0) and w.reserve(patient)
    assert (w.wake_s(), w.overdue(3.0)) == (3.0, [late])
    w.lapse(late)
    assert (w.wake_s(), list(w.scheduler.reserved)) == (None, [patient])
    w.arrive(patient)
    assert to_rest(w) == [2]


def test_what_waits_at_its_own_instance_is_no_bound_on_time() -> None:
    w = worker()
    seq = Sequence(1, 1, 64, 10)
    assert w.reserve(seq, due_s=3.0)
    assert w.renew(seq, inf)
    assert w.wake_s() is None


def test_what_is_held_can_stay() -> None:
    w = worker()
    seq = Sequence(1, 1, 64, 10, (1, 2, 3), decodes_here=False)
    w.submit(seq)
    step(w)
    w.stay(seq, candidates(seq, 2), 5)
    assert (w.wake_s(), seq.output_tokens) == (None, 5)
    assert to_rest(w) == [1]


def test_candidates_of_what_stays_each_sample_their_first_token_from_the_held_prompt() -> None:
    w = worker()
    seq = Sequence(1, 1, 64, 10, (1, 2, 3), decodes_here=False)
    w.submit(seq)
    step(w)
    others = candidates(seq, 3)
    w.stay(seq, others)
    batch = w.next_batch(0.0)
    assert batch is not None
    assert [(one.prompt_tokens, tokens) for one, tokens in batch.chunks] == [(64, 1)]
    assert w.complete(batch, 1, 0.0)[0] == [seq]
    assert [one.made for one in (seq, *others)] == [1, 0, 0]
    w.settle()
    assert to_rest(w) == [1]
    assert [one.made for one in (seq, *others)] == [10, 10, 10]
    assert w.scheduler.idle


# ---------------------------------------------------------------- migrations


def running(w: Worker, output: int = 30) -> Sequence:
    seq = Sequence(1, 1, 40, output)
    w.submit(seq)
    assert w.export(seq) == "it does not run here"
    step(w)
    batch = w.next_batch(0.0)
    assert batch is not None
    w.complete(batch, 10, 0.0)
    w.settle()
    return seq


def test_a_request_that_is_stopped_goes_on_when_its_lease_ends_unread() -> None:
    w = worker()
    seq = running(w)
    assert (w.export(seq), w.stop(seq, 7.0, 3.0), w.wake_s()) == ("", "", 10.0)
    assert w.export(seq) == "it does not run here"
    assert w.next_batch(8.0) is None
    w.lapse(w.overdue(10.0)[0])
    assert w.export(seq) == "", "a new migration may begin"
    assert to_rest(w) == [1]


def test_a_request_that_was_preempted_is_not_copied_on() -> None:
    w = worker(blocks=8)
    seq = Sequence(2, 1, 48, 60)
    w.submit(Sequence(1, 1, 48, 60))
    w.submit(seq)
    step(w)
    w.settle()
    assert w.export(seq) == ""
    while not seq.preempted:
        step(w)
    assert w.export(seq) == "it does not run here"
    while seq not in w.scheduler.landed:
        step(w)
    assert w.stop(seq, 0.0) == "it was preempted"
    w.resume(seq)
    assert w.stop(seq, 0.0) == ""
    w.release(seq)
    assert to_rest(w) == []


def test_several_candidates_are_not_moved() -> None:
    w = worker()
    first = Sequence(1, 0, 40, 5, (1, 2))
    w.submit(first, others := candidates(first, 2))
    step(w)
    step(w)
    assert w.export(first) == w.export(others[0]) == "it has several candidates"


# ---------------------------------------------------------------- what waits for the end of a step


def test_a_step_under_way_keeps_what_it_runs() -> None:
    w = worker()
    seq, order = Sequence(1, 1, 40, 30), []
    w.submit(seq)
    batch = w.next_batch(0.0)
    assert batch is not None
    w.abort(seq)
    w.between_steps(lambda: order.append("then"))
    assert (w.scheduler.pool.used, w.scheduler.stirred, order) == (3, True, [])
    assert w.complete(batch, 1, 0.0)[0] == [seq]
    assert (w.scheduler.pool.used, order) == (3, []), "its news come first"
    w.settle()
    assert (w.scheduler.pool.used, order) == (0, ["then"])
    w.between_steps(lambda: order.append("at once"))
    assert order == ["then", "at once"]


def test_a_drain_is_over_when_nothing_is_here_and_says_so_once() -> None:
    w = worker()
    seq = Sequence(1, 1, 40, 30, decodes_here=False)
    w.submit(seq)
    w.drain(Role.DECODE)
    step(w)
    assert not w.drained(), "somebody has yet to read"
    w.release(seq)
    assert (w.drained(), w.drained(), w.goal) == (True, False, Role.DECODE)
    w.switch(Role.DECODE)
    assert (w.role, w.goal) == (Role.DECODE, None)


def test_the_dead_do_nothing() -> None:
    w = worker()
    seq = Sequence(1, 1, 40, 30, decodes_here=False)
    w.submit(seq)
    step(w)
    w.submit(Sequence(2, 1, 40, 30))
    w.drain(None)
    w.die()
    assert (w.wake_s(), w.drained()) == (None, False)


def test_what_can_never_be_held_is_refused() -> None:
    assert worker().refusal(1000, 601) == ""
    assert worker().refusal(1000, 602) == "prompt of 1000 and output of 602 tokens exceed the 1601 tokens that fit here"
    assert worker(context_tokens=512).refusal(500, 13) == "prompt of 500 and output of 13 tokens exceed the 512 tokens that fit here"


# ---------------------------------------------------------------- in any order


class Commands(RuleBasedStateMachine):
    """Whatever it is told, blocks are conserved; when all that is left has ended, nothing is held."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = worker(blocks=40, max_seqs=6)
        self.now = 0.0
        self.ids = 0
        self.batch: Batch | None = None
        self.taken = False  # blocks were, since the batch began: its rest may not fit, and whoever runs it has to end it early
        self.here: dict[int, Sequence] = {}  # by request, while not ended
        self.ended: set[int] = set()

    def make(self, prompt: int, output: int, family: int, *, made: int = 0, decodes_here: bool = True) -> Sequence:
        self.ids += 1
        hashes = tuple(family << 20 | unit for unit in range(prompt // 16)) if family else ()
        seq = self.here[self.ids] = Sequence(self.ids, 0, prompt, output, hashes, made=made, decodes_here=decodes_here)
        return seq

    def pick(self, data: st.DataObject, among: list[Sequence]) -> Sequence:
        return data.draw(st.sampled_from(sorted(among, key=lambda seq: seq.request_id)))

    def gone(self, seq: Sequence) -> None:
        assert seq.request_id not in self.ended, "ended twice"
        self.ended.add(seq.request_id)
        del self.here[seq.request_id]

    @rule(prompt=st.integers(1, 300), output=st.integers(1, 60), family=st.integers(0, 2), best_of=st.sampled_from([1, 1, 3]))
    def submit(self, prompt: int, output: int, family: int, best_of: int) -> None:
        if not self.worker.refusal(prompt, output):
            seq = self.make(prompt, output, family)
            self.worker.submit(seq, candidates(seq, best_of))

    @rule(prompt=st.integers(1, 300), family=st.integers(0, 2))
    def submit_for_another(self, prompt: int, family: int) -> None:
        self.worker.submit(self.make(prompt, 10, family, decodes_here=False))

    @rule(prompt=st.integers(1, 300), best_of=st.sampled_from([1, 1, 3]), due=st.sampled_from([inf, 5.0]))
    def reserve(self, prompt: int, best_of: int, due: float) -> None:
        seq = self.make(prompt, 20, 1, made=1)
        if self.worker.reserve(seq, candidates(seq, best_of), self.now + due):
            self.taken = True
        else:
            self.gone(seq)

    @precondition(lambda self: self.worker.scheduler.reserved)
    @rule(data=st.data(), missing=st.sampled_from([0, 1]))
    def arrive(self, data: st.DataObject, missing: int) -> None:
        self.worker.arrive(self.pick(data, list(self.worker.scheduler.reserved)), missing)

    @precondition(lambda self: self.worker.scheduler.reserved)
    @rule(data=st.data(), more=st.integers(1, 40))
    def extend(self, data: st.DataObject, more: int) -> None:
        seq = self.pick(data, list(self.worker.scheduler.reserved))
        self.taken |= self.worker.extend(seq, seq.prompt_tokens + more)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        seq = self.pick(data, list(self.here.values()))
        self.worker.between_steps(lambda: self.worker.stop(seq, self.now, 3.0) and None)

    @precondition(lambda self: self.worker.scheduler.held)
    @rule(data=st.data(), how=st.sampled_from(["read", "stays", "renewed"]))
    def held(self, data: st.DataObject, how: str) -> None:
        seq = self.pick(data, list(self.worker.scheduler.held))
        if how == "read":
            self.worker.release(seq)
            if seq.request_id in self.here:  # else it was aborted while a step ran
                self.gone(seq)
        elif how == "stays":
            self.worker.stay(seq, candidates(seq, 3) if not seq.decodes_here else [])
        else:
            assert self.worker.renew(seq, self.now + 2.0)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = self.pick(data, list(self.here.values()))
        self.worker.abort(seq)
        self.gone(seq)

    @precondition(lambda self: self.here and self.batch is None)
    @rule(data=st.data(), index=st.integers(0, 2))
    def withdraw(self, data: st.DataObject, index: int) -> None:
        seq = self.pick(data, list(self.here.values()))
        if seq.others and not seq.over:
            self.worker.withdraw([seq, *seq.others][index % (1 + len(seq.others))])
            if seq.others is None and not seq.over:  # another computes the prompt
                heir = next(one for one in self.worker.scheduler.waiting if one.request_id == seq.request_id)
                self.here[seq.request_id] = heir

    @rule(seconds=st.floats(0.0, 4.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for seq in self.worker.overdue(self.now):
            if not (seq in self.worker.scheduler.held and seq.decodes_here) and seq.request_id in self.here:
                self.gone(seq)  # else it was aborted while a step ran
            self.worker.lapse(seq)
        assert not (self.worker.wake_s() or inf) <= self.now or self.batch is not None

    @precondition(lambda self: self.batch is None)
    @rule()
    def begin(self) -> None:
        if self.worker.next_batch(self.now) is not None:
            self.batch, self.taken = self.worker.batch, False

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        batch, self.batch = self.batch, None
        assert batch is not None
        steps = data.draw(st.integers(1, 1 if self.taken else batch.repeat))
        last = [seq for seq, tokens in batch.chunks if seq.computed + tokens == seq.prompt_tokens]
        sampled = [*last, *(self.worker.scheduler.running.values() if batch.decodes else ())]
        stopped = [seq for seq in sampled if data.draw(st.integers(0, 9)) == 0]
        if batch.decodes and data.draw(st.booleans()):
            self.worker.advance(batch, steps - 1)
            steps = 1
            self.draft(data)
        prefilled, finished = self.worker.complete(batch, steps, self.now, stopped)
        for seq in finished:
            assert seq.holding is None
            if seq.request_id in self.here:  # else it was dropped while the step ran
                self.gone(seq)
        assert all(seq.parent is None and seq.holding is not None for seq in prefilled)
        self.worker.settle()

    def draft(self, data: st.DataObject) -> None:
        """For some of those that decode, at once; then as much as is right of each."""
        s = self.worker.scheduler
        drafted = [(seq, self.worker.draft(seq, tokens)) for seq in s.running.values() if (tokens := data.draw(st.integers(0, 40)))]
        for seq, tokens in drafted:
            made, kv_tokens = s.made(seq), s.kv_tokens(seq)
            right = data.draw(st.integers(0, min(tokens, seq.output_tokens - made - 1)))
            self.worker.accept(seq, right)
            assert (s.made(seq), s.kv_tokens(seq)) == (made + right, kv_tokens + right)

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.worker.check()

    def teardown(self) -> None:
        if self.batch is not None:
            self.worker.complete(self.batch, 1, self.now)
            self.worker.settle()
        for seq in list(self.here.values()):
            self.worker.abort(seq)
        w = self.worker
        assert (w.scheduler.idle, w.scheduler.pool.used, w.due, w.families) == (True, 0, {}, 0)
        assert not w.scheduler.waiting_tokens and not w.scheduler.context_tokens


Commands.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCommands = Commands.TestCase
