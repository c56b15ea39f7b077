"""Online and offline work on one instance, step by step."""

from __future__ import annotations

from pdlab.batching.online_first import OnlineFirst
from pdlab.core.batch import Batch
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence


def scheduler(blocks: int = 1000, max_seqs: int = 8, **parameters: int) -> Scheduler:
    return Scheduler(BlockPool(blocks, 16), OnlineFirst(**parameters), max_batch_tokens=512, max_seqs=max_seqs, watermark=0.0)


def sequence(id: int, prompt: int = 100, *, offline: bool, output: int = 50, decodes_here: bool = True) -> Sequence:
    seq = Sequence(id, 1, prompt, output, decodes_here=decodes_here)
    seq.offline = offline
    return seq


def step(s: Scheduler) -> Batch:
    batch = s.next_batch(0.0)
    assert batch is not None
    return batch


def ids(batch: Batch) -> list[tuple[int, int]]:
    return [(seq.request_id, tokens) for seq, tokens in batch.chunks]


def test_a_step_is_all_online_or_all_offline_and_online_work_goes_first() -> None:
    s = scheduler()
    for id, offline in ((1, True), (2, False), (3, True)):
        s.submit(sequence(id, offline=offline, decodes_here=offline))
    first = step(s)
    assert (ids(first), first.decodes) == ([(2, 100)], 0)
    s.complete(first, 1, 0.0)
    second = step(s)
    assert (ids(second), second.decodes) == ([(1, 100), (3, 100)], 0)


def test_an_online_prompt_interrupts_an_offline_one_and_offline_decodes_at_the_next_step() -> None:
    s = scheduler(offline_tokens=300)
    s.submit(sequence(1, offline=True))
    s.complete(step(s), 1, 0.0)
    s.submit(sequence(2, 1000, offline=True))
    batch = step(s)
    assert (ids(batch), batch.decodes) == ([(2, 300)], 1), "an offline step is no longer than an online prompt may wait"
    s.submit(sequence(3, 600, offline=False, decodes_here=False))
    s.complete(batch, 1, 0.0)
    for expected in ([(3, 512)], [(3, 88)]):
        batch = step(s)
        assert (ids(batch), batch.decodes) == (expected, 0)
        s.complete(batch, 1, 0.0)
    batch = step(s)
    assert (ids(batch), batch.decodes) == ([(2, 300)], 1)
    s.check()


def test_an_online_prompt_takes_the_blocks_of_the_latest_offline_ones() -> None:
    s = scheduler(blocks=24)
    for id in (1, 2, 3):
        s.submit(sequence(id, offline=True))  # of 7 blocks each
    s.complete(step(s), 1, 0.0)
    s.complete(step(s), 1, 0.0)
    s.submit(sequence(4, 150, offline=False, decodes_here=False))  # 10 of the 3 that are left
    batch = step(s)
    assert (ids(batch), batch.decodes) == ([(4, 150)], 0)
    assert [seq.request_id for seq in s.victims] == [3]
    assert sorted(seq.request_id for seq in s.running.values()) == [1, 2]
    s.complete(batch, 1, 0.0)
    s.release(next(iter(s.held)))
    batch = step(s)
    assert (ids(batch), batch.decodes) == ([(3, 102)], 2), "it comes back, with the two tokens that it had made"
    s.check()


def test_no_place_for_a_sequence_is_found_like_no_blocks() -> None:
    s = scheduler(max_seqs=1)
    s.submit(sequence(1, offline=True))
    s.complete(step(s), 1, 0.0)
    s.submit(sequence(2, offline=False))
    assert ids(step(s)) == [(2, 100)]


def test_beside_online_decodes_offline_prompts_get_little_a_step_and_are_not_starved() -> None:
    s = scheduler(beside_tokens=64)
    s.submit(sequence(1, offline=False))
    s.complete(step(s), 1, 0.0)
    s.submit(sequence(2, offline=True))
    batch = step(s)
    assert (ids(batch), batch.decodes) == ([(2, 64)], 1)


def test_of_sequences_that_run_out_of_blocks_an_offline_one_gives_way_first() -> None:
    s = scheduler(blocks=15)
    s.submit(sequence(1, 110, offline=True, output=100))
    s.submit(sequence(2, 110, offline=False, output=100))
    while not s.victims:
        batch = step(s)
        s.complete(batch, 1, 0.0)
    assert [seq.request_id for seq in s.victims] == [1], "though the other came later"
