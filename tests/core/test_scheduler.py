"""One instance's batches, step by step, without any world."""

from __future__ import annotations

from pdlab import batching
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence


def scheduler(blocks: int = 100, *, batch: str = "chunked", budget: int = 256, max_seqs: int = 8, prefix_cache: bool = True) -> Scheduler:
    pool = BlockPool(blocks, 16, prefix_cache=prefix_cache)
    return Scheduler(pool, batching.load(batch), max_batch_tokens=budget, max_seqs=max_seqs, watermark=0.0)


def step(s: Scheduler, now: float = 0.0) -> tuple[list[int], int, list[int], list[int]]:
    """One batch in full: (chunk tokens, steps, ids prefilled, ids finished)."""
    batch = s.next_batch(now)
    assert batch is not None
    prefilled, finished = s.complete(batch, batch.repeat, now)
    s.check()
    return [t for _, t in batch.chunks], batch.repeat, [x.request_id for x in prefilled], [x.request_id for x in finished]


def test_a_prompt_is_chunked_then_decoded_in_one_macro_step() -> None:
    s = scheduler()
    s.submit(Sequence(1, 1, 600, 50))
    assert [step(s)[0] for _ in range(3)] == [[256], [256], [88]]
    assert step(s) == ([], 49, [], [1])
    assert s.next_batch(0.0) is None
    assert (s.pool.used, s.idle) == (0, True)


def test_repeat_ends_at_the_first_completion() -> None:
    s = scheduler()
    s.submit(Sequence(1, 1, 20, 30))
    s.submit(Sequence(2, 1, 20, 10))
    step(s)
    assert step(s)[1::2] == (9, [2])
    assert step(s)[1::2] == (20, [1])


def test_repeat_ends_where_blocks_run_out_and_the_latest_is_preempted() -> None:
    s = scheduler(blocks=8)
    s.submit(Sequence(1, 1, 48, 60))
    s.submit(Sequence(2, 1, 48, 60))
    step(s)
    assert step(s)[1] == 16, "each takes a fourth block at once and would need a fifth after sixteen steps"
    batch = s.next_batch(0.0)
    assert batch is not None
    assert [v.request_id for v in s.victims] == [2]
    assert batch.decodes == 1
    second = s.waiting[0]
    assert (second.request_id, second.prompt_tokens, second.made) == (2, 48 + 17, 17)


def test_higher_priority_goes_first_and_is_preempted_last() -> None:
    s = scheduler(blocks=8, budget=48)
    s.submit(Sequence(1, 1, 48, 60))
    s.submit(Sequence(2, 1, 48, 60, priority=1))
    assert step(s)[2] == [2]
    step(s)
    while not s.preemptions:
        step(s)
    assert [v.request_id for v in s.victims] == [1]


def test_the_prefix_is_matched_before_the_budget_is_counted() -> None:
    s = scheduler(budget=64)
    hashes = tuple(range(100, 120))
    s.submit(Sequence(1, 1, 320, 1, hashes))
    while not s.idle:
        step(s)
    s.submit(Sequence(2, 1, 330, 1, hashes))
    assert step(s)[0] == [10]


def test_decodes_come_first_in_chunked_batches_and_the_rest_is_prompt() -> None:
    s = scheduler(budget=64)
    s.submit(Sequence(1, 1, 32, 100))
    step(s)
    s.submit(Sequence(2, 1, 200, 5))
    batch = s.next_batch(0.0)
    assert batch is not None
    assert (batch.decodes, [t for _, t in batch.chunks], batch.repeat) == (1, [63], 1)


def test_prefill_first_pauses_decodes_and_decode_first_pauses_prompts() -> None:
    for name, chunks, decodes in (("prefill_first", [32], 0), ("decode_first", [], 1)):
        s = scheduler(batch=name)
        s.submit(Sequence(1, 1, 32, 100))
        step(s)
        s.submit(Sequence(2, 1, 32, 5))
        batch = s.next_batch(0.0)
        assert batch is not None
        assert ([t for _, t in batch.chunks], batch.decodes) == (chunks, decodes), name


def test_the_queue_is_served_in_order_even_where_a_later_prompt_would_fit() -> None:
    s = scheduler(blocks=10)
    s.submit(Sequence(1, 1, 100, 40))
    s.submit(Sequence(2, 1, 120, 5))
    s.submit(Sequence(3, 1, 10, 5))
    assert step(s)[2] == [1]
    assert [x.request_id for x in s.waiting] == [2, 3]


def test_a_held_sequence_keeps_its_blocks_until_released() -> None:
    s = scheduler()
    seq = Sequence(1, 1, 64, 10, decodes_here=False)
    s.submit(seq)
    step(s)
    assert (s.pool.used, s.next_batch(0.0)) == (4, None)
    s.release(seq)
    assert s.pool.used == 0


def test_a_full_instance_refuses_to_reserve_and_takes_nothing() -> None:
    s = scheduler(blocks=4)
    assert s.reserve(Sequence(1, 1, 48, 10))
    assert not s.reserve(Sequence(2, 1, 32, 10))
    assert s.pool.used == 3


def test_what_a_decode_instance_has_cached_needs_no_transfer() -> None:
    s = scheduler()
    hashes = tuple(range(5))
    first = Sequence(1, 1, 80, 2, hashes, made=1)
    s.reserve(first)
    s.arrive(first)
    step(s)
    second = Sequence(2, 1, 80, 2, hashes, made=1)
    s.reserve(second)
    assert second.cached_tokens == 64


def test_a_migrating_sequence_stops_and_goes_on_where_it_was() -> None:
    s = scheduler()
    seq = Sequence(1, 1, 40, 30)
    s.submit(seq)
    step(s)
    batch = s.next_batch(0.0)
    assert batch is not None
    s.complete(batch, 10, 0.0)
    assert (s.made(seq), s.kv_tokens(seq)) == (11, 50)
    s.hold(seq)
    s.check()
    assert (seq.made, s.kv_tokens(seq), s.context_tokens) == (11, 50, 0)
    s.stay(seq)
    assert step(s)[1::2] == (19, [1])


def test_a_sequence_that_has_landed_and_does_not_run_yet_can_be_moved() -> None:
    s = scheduler()
    seq = Sequence(1, 1, 40, 30)
    s.submit(seq)
    assert not s.movable(seq)
    step(s)
    assert not s.running and s.movable(seq)
    s.hold(seq)
    s.check()
    assert not s.movable(seq)
    assert (seq.made, s.kv_tokens(seq), s.next_batch(0.0)) == (1, 40, None)
    s.stay(seq)
    assert step(s)[1::2] == (29, [1])


def test_advance_shows_what_single_steps_would() -> None:
    whole, single = scheduler(), scheduler()
    for s in (whole, single):
        s.submit(Sequence(1, 1, 40, 200))
        s.submit(Sequence(2, 1, 25, 150))
        step(s)
    batch = whole.next_batch(0.0)
    assert batch is not None
    for _ in range(37):
        one = single.next_batch(0.0)
        assert one is not None
        single.complete(one, 1, 0.0)
    single.next_batch(0.0)
    whole.advance(batch, 37)
    assert (whole.pool.used, whole.context_tokens, whole.step) == (single.pool.used, single.context_tokens, single.step)


# ---------------------------------------------------------------- drafts


def test_what_was_drafted_and_right_counts_as_steps_that_are_past() -> None:
    s = scheduler()
    first, second = Sequence(1, 1, 20, 30), Sequence(2, 1, 20, 30)
    s.submit(first)
    s.submit(second)
    step(s)
    batch = s.next_batch(0.0)
    assert batch is not None
    assert (s.draft(first, 14), s.draft(second, 4)) == (14, 4)
    assert s.pool.used == 3 + 2, "20 tokens, the next and 14 drafted; 20, the next and 4"
    assert len(s.table(first)) == 3
    s.accept(first, 12)
    s.accept(second, 0)
    assert s.pool.used == 3 + 2
    assert s.complete(batch, 1, 0.0)[1] == []
    s.check()
    assert [(s.made(seq), s.kv_tokens(seq)) for seq in (first, second)] == [(14, 33), (2, 21)]
    assert step(s)[1::2] == (16, [1])
    assert step(s)[1::2] == (12, [2])
    assert s.pool.used == 0


def test_blocks_of_drafts_that_were_wrong_are_free_again() -> None:
    s = scheduler(blocks=5)
    first, second = Sequence(1, 1, 31, 20), Sequence(2, 1, 31, 20)
    s.submit(first)
    s.submit(second)
    step(s)
    batch = s.next_batch(0.0)
    assert batch is not None
    tables = s.table(first), s.table(second)
    assert s.draft(first, 40) == 16, "one block is left, and nobody is preempted for drafts"
    assert s.draft(second, 4) == 0
    assert len({*s.table(first), *s.table(second)}) == 5
    s.accept(first, 0)
    s.accept(second, 0)
    assert (s.table(first), s.table(second)) == tables
    s.complete(batch, 1, 0.0)
    s.check()
    assert s.pool.used == 4
    s.next_batch(0.0)
    assert [v.request_id for v in s.victims] == [2]
    assert s.table(first)[:2] == tables[0]


def test_a_sequence_ends_with_what_was_drafted() -> None:
    s = scheduler()
    s.submit(seq := Sequence(1, 1, 20, 6))
    step(s)
    for right, ends in ((2, []), (1, [1])):
        batch = s.next_batch(0.0)
        assert batch is not None
        s.draft(seq, 4)
        s.accept(seq, right)
        assert [one.request_id for one in s.complete(batch, 1, 0.0)[1]] == ends
        s.check()
    assert (s.idle, s.pool.used) == (True, 0)


def test_books_of_many_drafts_stay_small() -> None:
    s = scheduler(blocks=1000)
    s.submit(seq := Sequence(1, 1, 20, 4000))
    step(s)
    for _ in range(1300):
        batch = s.next_batch(0.0)
        assert batch is not None
        s.draft(seq, 2)
        s.accept(seq, 2)
        s.complete(batch, 1, 0.0)
    assert s.made(seq) == 1 + 3 * 1300
    assert len(s.ends) < 300
