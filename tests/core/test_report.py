"""What a report says of an instance, whoever runs it."""

from __future__ import annotations

import pytest

from pdlab import batching
from pdlab.core.batch import Batch
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import Report, StepTime
from pdlab.core.worker import Worker


class One:
    """A worker on a clock of our own."""

    def __init__(self, blocks: int = 100, *, max_batch_tokens: int = 64, max_seqs: int = 8) -> None:
        pool = BlockPool(blocks, 16)
        self.scheduler = Scheduler(pool, batching.load("chunked"), max_batch_tokens=max_batch_tokens, max_seqs=max_seqs, watermark=0.0)
        self.worker, self.now = Worker(self.scheduler, name="x", incarnation=3), 0.0

    def begin(self) -> Batch:
        batch = self.worker.next_batch(self.now)
        assert batch is not None
        return batch

    def end(self, batch: Batch, seconds: float) -> None:
        self.worker.meter.took(batch, len(self.scheduler.joined), self.now, seconds, 1, seconds)
        self.now += seconds
        self.worker.complete(batch, 1, self.now)
        self.worker.settle()

    def step(self, seconds: float) -> None:
        self.end(self.begin(), seconds)

    def report(self) -> Report:
        return self.worker.report(self.now)


def test_what_has_no_blocks_waits_and_what_has_runs():
    one = One()
    for number in range(3):
        one.scheduler.submit(Sequence(number, 1, 100, 5))
    first = one.report()
    assert (first.instance, first.incarnation, first.waiting, first.running) == ("x", 3, 3, 0)
    assert (first.waiting_tokens, first.waiting_head_blocks, first.waiting_blocks) == (300, 7, 21)
    batch = one.begin()  # 64 tokens of the first prompt
    under_way = one.report()
    assert (under_way.waiting, under_way.running, under_way.waiting_tokens, under_way.used_blocks) == (2, 1, 300, 7)
    one.end(batch, 0.1)
    assert (one.report().running, one.report().waiting_tokens) == (1, 236)
    one.step(0.1)
    between = one.report()
    assert (between.waiting, between.running, between.waiting_blocks, between.waiting_tokens) == (1, 2, 7, 172)


def test_a_prompt_that_is_computed_whole_in_the_step_under_way_runs():
    one = One()
    one.scheduler.submit(Sequence(0, 1, 40, 5))
    batch = one.begin()
    assert (one.report().waiting, one.report().running) == (0, 1)
    one.end(batch, 0.1)
    assert (one.report().running, one.report().waiting_tokens) == (1, 0)


def test_the_candidates_of_a_request_come_to_the_queue_when_its_prompt_is_computed():
    one = One()
    one.worker.submit(Sequence(0, 1, 40, 5, tuple(range(2))), [Sequence(0, 1, 40, 5, tuple(range(2))) for _ in range(2)])
    assert one.report().waiting == 1
    one.step(0.1)
    assert one.report().running == 1
    batch = one.begin()
    assert one.report().waiting + one.report().running == 3
    one.end(batch, 0.1)


def test_what_is_leased_or_reserved_counts_in_the_blocks_alone():
    one = One()
    one.scheduler.submit(Sequence(0, 1, 40, 5, decodes_here=False))
    one.step(0.1)
    one.scheduler.reserve(Sequence(1, 1, 100, 5))
    held = one.report()
    assert (held.waiting, held.running, held.used_blocks, held.free_blocks) == (0, 0, 3 + 7, 90)


def test_decode_time_is_from_token_to_token_pauses_and_prompts_beside_included():
    one = One()
    one.scheduler.submit(Sequence(0, 1, 16, 50))
    one.step(0.5)  # its prompt
    assert (one.report().decode_steps, one.report().decode_s) == (0, 0.0)
    one.step(0.02)
    one.step(0.03)
    one.scheduler.submit(Sequence(1, 1, 16, 50))
    one.step(0.2)  # beside the other's prompt
    one.now += 1.0  # and it stood still
    one.step(0.02)
    report = one.report()
    assert (report.decode_steps, report.decode_s) == (4, pytest.approx(0.02 + 0.03 + 0.2 + 1.0 + 0.02))


def test_steps_are_told_once_and_of_each_kind_the_one_that_says_most():
    one = One(max_batch_tokens=1000)
    for tokens, seconds in ((20, 0.1), (300, 0.5), (50, 0.2)):
        one.scheduler.submit(Sequence(tokens, 1, tokens, 30, decodes_here=False))
        one.step(seconds)
    one.scheduler.submit(Sequence(1, 1, 40, 30))
    one.step(0.3)
    one.step(0.02)
    one.step(0.021)
    one.scheduler.submit(Sequence(2, 1, 60, 30))
    one.step(0.4)
    assert one.report().steps == (
        StepTime(0, 0, 300, 300 * 300, 0.5),
        StepTime(1, 42, 0, 0, 0.021),
        StepTime(1, 43, 60, 60 * 60, 0.4),
    )
    assert one.report().steps == ()


def test_a_chunk_after_others_tells_what_attention_has_to_do():
    one = One(max_batch_tokens=64)
    one.scheduler.submit(Sequence(0, 1, 128, 5, decodes_here=False))
    one.step(0.1)
    one.report()
    one.step(0.2)
    assert one.report().steps == (StepTime(0, 0, 64, 128**2 - 64**2, 0.2),)
