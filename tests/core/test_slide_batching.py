"""Batches by deadline: steps of 10 ms, 1 ms more for each that decodes, 0.1 ms more for each prompt token."""

from __future__ import annotations

import io
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.batching.slide_batching import SlideBatching
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import StepTime
from pdlab.replay.scheduler_log import Recorded, Setup, replay

PREFILL = tuple((tokens, 0.01 + 1e-4 * tokens) for tokens in (100, 500, 1000, 4000))
DECODE = tuple((b, t, 0.01 + 1e-3 * b) for b in (1, 8, 32) for t in (1000, 10_000, 100_000))


def scheduler(batching: SlideBatching | None = None, *, blocks: int = 4000, budget: int = 4000, max_seqs: int = 8) -> Scheduler:
    s = Scheduler(BlockPool(blocks, 16), batching or SlideBatching(), max_batch_tokens=budget, max_seqs=max_seqs, watermark=0.0)
    s.profile(PREFILL, DECODE)
    return s


def asked(
    id: int, prompt: int, output: int = 10, *, at_s: float = 0.0, ttft_s: float = 1.0, tpot_s: float = 0.1, priority: int = 0
) -> Sequence:
    seq = Sequence(id, 1, prompt, output, priority=priority)
    seq.aim(at_s, ttft_s, tpot_s)
    return seq


def batch(s: Scheduler, now: float) -> tuple[list[tuple[int, int]], int]:
    """([(request, tokens, to the next ten)], decodes) of a whole step."""
    found = s.next_batch(now)
    assert found is not None
    made = [(seq.request_id, round(tokens, -1)) for seq, tokens in found.chunks], found.decodes
    s.complete(found, found.repeat, now)
    s.check()
    return made


def test_a_step_ends_before_the_nearest_deadline_that_can_be_met():
    s = scheduler()
    s.submit(asked(1, 3000, ttft_s=5.0))
    s.submit(asked(2, 300, ttft_s=0.2))
    assert batch(s, 0.0) == ([(2, 300), (1, 1600)], 0)  # B 0.2 s: 10 ms for any step, 30 ms for request 2, 160 ms for 1,600 tokens


def test_of_the_urgent_the_short_prompt_goes_first_and_priority_outweighs_length():
    s = scheduler(budget=1000)
    for seq in (asked(1, 1000, tpot_s=1.0), asked(2, 400, tpot_s=1.0), asked(3, 800, tpot_s=1.0, priority=2)):
        s.submit(seq)
    assert batch(s, 0.95) == ([(3, 800), (2, 200)], 0)  # weight / e: 1 / 0.1, 1 / 0.04, 4 / 0.08


def test_who_is_late_by_more_than_its_objective_leads_the_urgent_prompts():
    for starvation, first in ((1.0, 1), (3.0, 2)):
        s = scheduler(SlideBatching(starvation=starvation), budget=1000)
        s.submit(asked(1, 1000))
        s.submit(asked(2, 400, at_s=1.5))
        assert batch(s, 2.5)[0][0][0] == first  # 1 is late by 1.5 s


def test_the_others_go_by_their_deadline():
    s = scheduler(budget=500)
    s.submit(asked(1, 400, ttft_s=9.0))
    s.submit(asked(2, 400, ttft_s=8.0))
    assert batch(s, 0.0) == ([(2, 400), (1, 100)], 0)


def test_no_chunk_has_fifty_tokens_or_fewer_but_for_the_rest_of_a_prompt():
    s = scheduler(budget=440)
    s.submit(asked(1, 400, ttft_s=8.0))
    s.submit(asked(2, 400, ttft_s=9.0))
    assert batch(s, 0.0) == ([(1, 400)], 0)  # 40 tokens were left
    s = scheduler(budget=440)
    s.submit(asked(1, 400, ttft_s=8.0))
    s.submit(asked(2, 40, ttft_s=9.0))
    assert batch(s, 0.0) == ([(1, 400), (2, 40)], 0)


def test_decodes_that_have_time_let_a_late_prompt_go_alone_and_go_first_once_they_are_late():
    s = scheduler(budget=100_000)
    s.submit(asked(1, 100, 50, tpot_s=0.5))
    batch(s, 0.0)
    s.submit(asked(2, 8000, at_s=0.1, ttft_s=0.4, tpot_s=0.5))
    chunks, decodes = batch(s, 0.2)
    assert (chunks[0][0], decodes) == (2, 1)
    s = scheduler(SlideBatching(urgency=1e-9))
    s.submit(asked(1, 100, 50, tpot_s=0.5))
    batch(s, 0.0)
    s.submit(asked(2, 100, at_s=0.1, ttft_s=0.0117))  # its step may take 11.7 ms, and would take 21 ms beside the decode
    assert batch(s, 0.1) == ([(2, 100)], 1)  # 0.65 x 0.1 s is the greater bound


def test_where_nobody_can_be_in_time_a_step_lasts_065_tpot_and_as_found_as_long_as_it_likes():
    for as_found, tokens in ((False, 550), (True, 4000)):
        s = scheduler(SlideBatching(as_found=as_found))
        s.submit(asked(1, 8000))
        assert batch(s, 10.0) == ([(1, tokens)], 0)  # 65 ms, 10 of them for any step


def test_on_a_prefill_instance_tpot_is_no_bound():
    s = scheduler()
    seq = Sequence(1, 1, 8000, 10, decodes_here=False)
    seq.aim(0.0, 1.0, 0.1)
    s.submit(seq)
    assert batch(s, 10.0) == ([(1, 4000)], 0)


def test_a_step_too_short_for_any_chunk_is_made_all_the_same_where_nothing_decodes():
    s = scheduler()
    s.submit(asked(1, 3000, tpot_s=0.01))
    assert batch(s, 10.0) == ([(1, 3000)], 0)


def test_prompts_that_get_no_chunk_are_looked_at_again_after_one_step():
    s = scheduler()
    s.submit(asked(1, 100, 50, tpot_s=0.016))
    batch(s, 0.0)
    s.submit(asked(2, 3000, ttft_s=0.001, tpot_s=0.016))
    found = s.next_batch(1.5)
    assert found is not None
    assert (found.chunks, found.decodes, found.repeat) == ([], 1, 1)  # B 10.4 ms: the decode alone takes 11


def test_it_learns_from_steps_how_slow_they_are():
    s = scheduler()
    s.learn(tuple(StepTime(0, 0, 1000, 1_000_000, 4 * 0.11) for _ in range(40)))
    s.submit(asked(1, 8000))
    ((_, tokens),), _ = batch(s, 10.0)
    assert 60 <= tokens <= 80  # (65 - 38 ms) / 0.38 ms; 550 at first


def test_without_objectives_or_profiles_it_is_chunked():
    s = Scheduler(BlockPool(100, 16), SlideBatching(), max_batch_tokens=60, max_seqs=8, watermark=0.0)
    s.submit(Sequence(1, 1, 100, 5))
    assert [batch(s, 0.0), batch(s, 0.0)] == [([(1, 60)], 0), ([(1, 40)], 0)]
    assert batch(s, 0.0) == ([], 1)


requests = st.lists(
    st.tuples(
        st.integers(1, 900), st.integers(1, 40), st.sampled_from([0.01, 0.5, 5.0]), st.sampled_from([0.005, 0.1]), st.integers(-1, 2)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(60, 200), st.booleans())
def test_every_request_ends_within_the_bounds_and_a_replay_decides_alike(many, blocks, as_found):
    log = io.BytesIO()
    setup = Setup(blocks, max_batch_tokens=512, max_seqs=4, batching="slide_batching")
    s = setup.scheduler()
    s.batching.as_found = False
    recorded = Recorded(setup, s, log)
    recorded.profile(PREFILL, DECODE)
    now, ended = 0.0, 0
    for number, (prompt, output, ttft_s, tpot_s, priority) in enumerate(many):
        recorded.submit(asked(number, prompt, output, at_s=now, ttft_s=ttft_s, tpot_s=tpot_s, priority=priority))
        now += 0.02
        ended += one_step(recorded, s, now)
    while ended < len(many):
        now += 0.02
        assert s.waiting or s.prefilling or s.running or s.landed
        ended += one_step(recorded, s, now)
    assert s.idle
    alike, difference = replay(log.getvalue().splitlines())
    assert (alike > 0, difference) == (True, "")


def one_step(recorded: Recorded, s: Scheduler, now: float) -> int:
    found = recorded.next_batch(now)
    if found is None:
        return 0
    assert sum(tokens for _, tokens in found.chunks) + found.decodes <= 512
    assert len(s.running) + len(s.prefilling) <= 4
    _, finished = recorded.complete(found, found.repeat, now)
    s.check()
    return len(finished)


def test_aims_without_an_end_pass_the_log():
    log = io.BytesIO()
    setup = Setup(100, batching="slide_batching")
    s = setup.scheduler()
    recorded = Recorded(setup, s, log)
    seq = Sequence(1, 1, 40, 2)
    seq.aim(3.0, 1.0, inf)
    recorded.submit(seq)
    assert b'"aims":[3.0,1.0,null]' in log.getvalue()
