"""Prompts are held back while others decode: by steps, by tokens, or until the engine looks."""

from __future__ import annotations

from pdlab.batching.delayed import Delayed
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.sequence import Sequence
from pdlab.experiment.experiment import Experiment
from pdlab.sim import simulate
from tests.experiment.test_spec import PLAIN


def scheduler(batching: Delayed) -> Scheduler:
    return Scheduler(BlockPool(4000, 16), batching, max_batch_tokens=2000, max_seqs=64, watermark=0.0)


def steps(s: Scheduler, count: int) -> list[tuple[int, int]]:
    """(prompts, decodes) of each of so many single steps."""
    found = []
    for _ in range(count):
        batch = s.next_batch(0.0)
        assert batch is not None
        found.append((len(batch.chunks), batch.decodes))
        s.complete(batch, 1, 0.0)
        s.check()
    return found


def decoding(batching: Delayed) -> Scheduler:
    """One sequence decodes, since its first step."""
    s = scheduler(batching)
    s.submit(Sequence(0, 1, 100, 500))
    assert steps(s, 1) == [(1, 0)]
    return s


def test_a_prompt_waits_for_so_many_steps_and_then_rides_on_the_decodes():
    s = decoding(Delayed(steps=3))
    s.submit(Sequence(1, 1, 100, 500))
    assert steps(s, 5) == [(0, 1), (0, 1), (0, 1), (1, 1), (0, 2)]


def test_the_count_is_the_first_prompts_and_later_ones_go_with_it():
    s = decoding(Delayed(steps=3))
    s.submit(Sequence(1, 1, 100, 500))
    steps(s, 2)
    s.submit(Sequence(2, 1, 100, 500))
    assert steps(s, 2) == [(0, 1), (2, 1)]


def test_so_many_tokens_that_wait_end_it():
    s = decoding(Delayed(steps=30, tokens=250))
    for k in range(1, 4):
        assert steps(s, 2) == [(0, 1), (0, 1)]
        s.submit(Sequence(k, 1, 100, 500))
    assert steps(s, 1) == [(3, 1)]


def test_polled_steps_are_counted_from_the_last_prompts_on_whether_any_waits_or_not():
    s = decoding(Delayed(steps=4, polled=True))
    assert steps(s, 3) == [(0, 1)] * 3
    s.submit(Sequence(1, 1, 100, 500))
    assert steps(s, 2) == [(0, 1), (1, 1)]  # at the fourth and eighth step


def test_prompts_first_and_whole():
    s = decoding(Delayed(steps=1, prompts_first=True))
    s.submit(Sequence(1, 1, 3000, 500))
    assert steps(s, 3) == [(0, 1), (1, 0), (0, 2)]


def test_a_world_is_told_for_how_many_steps_it_need_not_ask():
    s = decoding(Delayed(steps=30))
    s.submit(Sequence(1, 1, 100, 500))
    batch = s.next_batch(0.0)
    assert batch is not None and batch.repeat == 30
    s.complete(batch, 30, 0.0)
    assert steps(s, 1) == [(1, 1)]


def test_where_nothing_decodes_nothing_is_held_back():
    s = scheduler(Delayed(steps=50))
    s.submit(Sequence(1, 1, 100, 2))
    assert steps(s, 1) == [(1, 0)]


def test_a_simulated_engine_is_as_much_later_as_it_waits():
    one = {
        "workload": {
            "source": "synthetic",
            "requests": 40,
            "prompt": 100,
            "output": 100,
            "arrival": {"process": "closed", "concurrency": 4},
        }
    }
    mixed = {"cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]}, "policy": "least_loaded"}
    plain = simulate(Experiment.parse({**PLAIN, **one, **mixed}))
    later = simulate(Experiment.parse({**PLAIN, **one, **mixed, "engine": {"batching": {"name": "delayed", "steps": 8}}}))
    first, held = (float(result.requests["ttft_s"].mean()) for result in (plain, later))
    tpot_s = float(later.requests["tpot_s"].mean())
    assert 0.4 * 8 * tpot_s < held - first < 8 * tpot_s
