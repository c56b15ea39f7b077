"""The engine core as a small world: requests come, stop, are cancelled and refused; nothing leaks, and the log replays."""

from __future__ import annotations

import gc
import inspect
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pdlab.core.types import UsageError
from pdlab.real.engine.engine import Engine
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling, Submit
from pdlab.real.engine.options import EngineOptions
from pdlab.replay.scheduler_log import Recorded, replay
from tests.support.engine_driver import Driver

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]


def greedy(**fields: object) -> Sampling:
    return Sampling(temperature=0.0, **fields)  # type: ignore[arg-type]


def test_a_stop_token_ends_a_sequence_and_is_told(driver: Callable[..., Driver]) -> None:
    d = driver("llama")
    d.submit(0, [1, 2, 3], greedy(max_tokens=30))
    d.run()
    whole = d.tokens[0, 0]
    stop = whole[10]
    d.submit(1, [1, 2, 3], greedy(max_tokens=30, stop_token_ids=(stop,)))
    d.run()
    assert d.tokens[1, 0] == whole[: whole.index(stop) + 1]
    assert d.finish[1, 0] == "stop"


def test_end_of_sequence_counts_unless_ignored(tiny: Tiny) -> None:
    options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=100)
    plain = Driver(load(options).engine)
    plain.submit(0, [5, 6], greedy(max_tokens=20))
    plain.run()
    eos = plain.tokens[0, 0][4]
    d = Driver(load(EngineOptions(model=options.model, block_tokens=4, kv_blocks=100, eos_ids=(eos,))).engine)
    d.submit(0, [5, 6], greedy(max_tokens=20))
    d.submit(1, [5, 6], greedy(max_tokens=20, ignore_eos=True))
    d.run()
    assert d.finish == {(0, 0): "stop", (1, 0): "length"}
    assert d.tokens[1, 0] == plain.tokens[0, 0]
    assert d.tokens[0, 0][-1] == eos


def test_candidates_share_the_prompt_and_differ(driver: Callable[..., Driver]) -> None:
    d = driver("llama")
    d.submit(0, list(range(40)), Sampling(max_tokens=8, best_of=4, seed=5))
    d.run()
    outputs = [d.tokens[0, i] for i in range(4)]
    assert all(len(o) == 8 for o in outputs)
    assert len({tuple(o) for o in outputs}) > 1
    assert [d.outputs[0, i][0].cached_tokens for i in range(4)] == [0, 36, 36, 36]


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_candidates_come_even_when_the_first_ends_at_once(max_tokens: int, driver: Callable[..., Driver]) -> None:
    d = driver("llama")
    d.submit(0, [3, 4, 5], Sampling(max_tokens=max_tokens, best_of=3, seed=1))
    d.run()
    assert {key: len(tokens) for key, tokens in d.tokens.items()} == {(0, i): max_tokens for i in range(3)}


def test_the_same_seed_gives_the_same_text_in_any_company(driver: Callable[..., Driver]) -> None:
    alone = driver("qwen3")
    alone.submit(0, [1, 2, 3, 4], Sampling(max_tokens=10, seed=11))
    alone.run()
    crowd = driver("qwen3", max_batch_tokens=16)
    for i in range(1, 9):
        crowd.submit(i, [i] * (3 * i), Sampling(max_tokens=6))
    crowd.submit(0, [1, 2, 3, 4], Sampling(max_tokens=10, seed=11))
    crowd.run()
    assert crowd.tokens[0, 0] == alone.tokens[0, 0]


def test_cancelling_one_candidate_leaves_the_others(driver: Callable[..., Driver]) -> None:
    d = driver("llama")
    d.submit(0, [1] * 9, Sampling(max_tokens=10, best_of=3, seed=2))
    d.engine.cancel(0, 0)  # before anything ran: another has to compute the prompt
    d.run()
    assert d.finish == {(0, 0): "abort", (0, 1): "length", (0, 2): "length"}


def test_cancelled_at_any_point_nothing_stays(driver: Callable[..., Driver]) -> None:
    for after in range(12):
        d = driver("llama", max_batch_tokens=8)
        d.submit(0, list(range(30)), Sampling(max_tokens=6, best_of=2))
        d.submit(1, list(range(50)), Sampling(max_tokens=6))
        for _ in range(after):
            d.step()
        d.engine.cancel(0)
        d.engine.cancel(0)
        d.engine.cancel(99)
        d.run()
        assert d.finish[1, 0] == "length"
        assert {d.finish[0, 0], d.finish[0, 1]} <= {"abort", "length"}


@pytest.mark.parametrize(
    ("submit", "says"),
    [
        (Submit(0, []), "the prompt is empty"),
        (Submit(0, [1, 300]), "token 300 is not in the vocabulary of 300"),
        (Submit(0, [1], Sampling(logit_bias={-1: 1.0})), "token -1 is not in the vocabulary of 300"),
        (Submit(0, [1], Sampling(stop_token_ids=(1000,))), "token 1000 is not in the vocabulary"),
        (Submit(0, [1] * 400, Sampling(max_tokens=113)), "prompt of 400 and output of 113 tokens exceed the 512 tokens that fit here"),
        (Submit(0, [1], Sampling(max_tokens=0)), "max_tokens 0"),
    ],
)
def test_what_can_never_run_is_refused_with_a_reason(submit: Submit, says: str, driver: Callable[..., Driver]) -> None:
    d = driver("llama")
    d.engine.submit(submit, 0.0)
    d.run()
    assert d.finish[0, 0] == "error"
    assert says in d.outputs[0, 0][0].error


def test_memory_too_small_for_the_context_bounds_the_request(driver: Callable[..., Driver]) -> None:
    d = driver("llama", kv_blocks=20)
    assert d.engine.worker.most_tokens == 81, "the last token's KV is never written"
    d.submit(0, [1] * 70, greedy(max_tokens=12))
    d.submit(1, [1] * 70, greedy(max_tokens=11))
    d.run()
    assert d.finish == {(0, 0): "error", (1, 0): "length"}


def scramble(d: Driver, requests: int, seed: int) -> None:
    """Requests of every kind at random times, some cancelled, some impossible."""
    rng = random.Random(seed)
    shared = [rng.randrange(300) for _ in range(60)]

    def arrive(i: int) -> None:
        prompt = shared[: rng.choice((0, 0, 8, 30, 60))] + [rng.randrange(300) for _ in range(rng.randint(1, 24))]
        if rng.random() < 0.03:
            prompt = [rng.randrange(300)] * 600 if rng.random() < 0.5 else [777]
        sampling = Sampling(
            max_tokens=rng.randint(1, 24),
            temperature=rng.choice((0.0, 1.0)),
            best_of=rng.choice((1, 1, 1, 1, 2, 3)),
            stop_token_ids=tuple(range(rng.choice((0, 0, 60)))),
            min_tokens=rng.choice((0, 2)),
            presence_penalty=rng.choice((0.0, 0.0, 0.3)),
            logprobs=rng.choice((None, None, 2)),
        )
        d.submit(i, prompt, sampling, cached=rng.random() < 0.8, priority=rng.choice((0, 0, 1, -1)))

    def arrive_together(first: int, count: int) -> None:
        for i in range(first, first + count):
            arrive(i)

    i = 0
    while i < requests:
        count = min(rng.choice((1, 1, 2, 6)), requests - i)
        d.arrivals.append(lambda i=i, count=count: arrive_together(i, count))  # type: ignore[misc]
        i += count
        if rng.random() < 0.3:
            d.arrivals.append(lambda i=i: d.engine.cancel(rng.randrange(i), rng.choice((-1, -1, 0, 1))))  # type: ignore[misc]


@pytest.mark.parametrize("each", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_four_times_so_many_random_requests_leave_no_trace(each: int, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=64, max_batch_tokens=48, max_seqs=12, threads=1)
    with path.open("wb") as log:
        d = Driver(load(options, log).engine)
        scramble(d, each, seed=1)
        d.run()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for part in range(3):
            e = d.engine
            d.tokens, d.finish, d.outputs = {}, {}, {}
            scramble(d, each, seed=2 + part)
            d.run()
            assert e is d.engine
        d.tokens, d.finish, d.outputs = {}, {}, {}
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert d.engine.scheduler.preemptions > 0
    assert d.engine.prefix_hits > 0
    assert not d.engine.groups
    assert grown < 1_000_000
    with path.open("rb") as lines:
        alike, difference = replay(lines)
    assert not difference
    assert alike > 2 * each


def test_a_changed_decision_shows_in_the_replay(tiny: Tiny) -> None:
    log = io.BytesIO()
    d = Driver(load(EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=60), log).engine)
    scramble(d, 20, seed=4)
    d.run()
    lines = log.getvalue().splitlines()
    assert replay(lines)[1] == ""
    at = next(i for i, line in enumerate(lines) if b'"batch"' in line)
    chunks, decodes, repeat = (line := json.loads(lines[at]))["batch"]
    lines[at] = json.dumps({**line, "batch": [chunks, decodes + 1, repeat]}).encode()
    assert f"line {at + 1}:" in replay(lines)[1]
    with pytest.raises(UsageError, match=r"line 1 of the decision log cannot be replayed"):
        replay([b"{}"])
    with pytest.raises(UsageError, match=r"line 2 .* cannot be replayed"):
        replay([lines[0], b'{"remove": 77}'])


def test_the_scheduler_is_the_simulators() -> None:
    from pdlab.core.scheduler import Commands, Scheduler

    told = {name for name in vars(Commands) if not name.startswith("_")}
    assert {name for name in vars(Recorded) if not name.startswith("_")} == told  # each is noted, and passed on
    assert all(inspect.signature(getattr(Recorded, name)) == inspect.signature(getattr(Scheduler, name)) for name in told)
    assert Engine.step.__module__ == "pdlab.real.engine.engine"


def test_the_same_seed_gives_the_same_log_and_tokens(tiny: Tiny) -> None:
    logs, tokens = [], []
    for _ in range(2):
        log = io.BytesIO()
        d = Driver(load(EngineOptions(model=str(tiny("qwen2")[0]), block_tokens=4, kv_blocks=60, max_batch_tokens=40, seed=8), log).engine)
        scramble(d, 60, seed=6)
        d.run()
        logs.append(log.getvalue())
        tokens.append(d.tokens)
    assert logs[0] == logs[1]
    assert tokens[0] == tokens[1]


def test_the_wait_for_a_step_under_way_counts_as_queueing(driver: Callable[..., Driver]) -> None:
    engine = driver("llama").engine
    told: list[float] = []
    for id, sent_s in ((0, 5.0), (1, None)):  # looked at, at 7, which is when a step that took until then ended
        engine.submit(Submit(id, [1, 2, 3], greedy(max_tokens=1), sent_s=sent_s), 7.0)
        engine.step(8.0, lambda outputs: told.extend(output.queue_s for output in outputs), lambda: True)
    assert told == [3.0, 1.0]


def test_a_sequence_knows_its_objectives_and_since_when_its_client_waits(driver: Callable[..., Driver]) -> None:
    engine = driver("llama").engine
    engine.submit(Submit(0, [1, 2], greedy(), ttft_slo_s=0.3, tpot_slo_s=0.1, sent_s=5.0, waited_s=0.5), 7.0)
    engine.submit(Submit(1, [1, 2], greedy()), 7.0)
    assert [(s.arrived_s, s.ttft_slo_s, s.tpot_slo_s) for s in engine.scheduler.waiting] == [(4.5, 0.3, 0.1), (7.0, 1.0, 0.05)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prompts_log_probabilities_are_those_of_one_pass(driver: Callable[..., Driver], tiny: Tiny, family: str) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(200) for _ in range(n)] for n in (150, 40, 1, 2)]  # the first in three chunks
    d = driver(family)
    for id, prompt in enumerate(prompts):
        for again in range(2):  # the second time all of it lies in the prefix cache
            d.submit(10 * id + again, prompt, greedy(max_tokens=3, prompt_logprobs=4 * again, best_of=1 + again))
        d.submit(10 * id + 2, prompt, greedy(max_tokens=3))
    d.run()
    model = tiny(family)[1]
    for id, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        for again in range(2):
            key = 10 * id + again
            first, *others = d.outputs[key, 0]
            assert first.prompt is not None
            assert len(first.prompt) == len(prompt) - 1
            assert all(one.prompt is None for one in others)
            for at, (token, one) in enumerate(zip(prompt[1:], first.prompt, strict=True)):
                assert one.logprob == pytest.approx(float(expected[at, token]), abs=2e-3)
                assert len(one.top) == 4 * again
                assert not one.top or one.top[0][1] == pytest.approx(float(expected[at].max()), abs=2e-3)
            assert d.tokens[key, 0] == d.tokens[10 * id + 2, 0]
            assert again == 0 or all(one.prompt is None for one in d.outputs[key, 1])
        assert all(one.prompt is None for one in d.outputs[10 * id + 2, 0])


def test_a_prompts_log_probabilities_survive_preemption(driver: Callable[..., Driver]) -> None:
    prompts = [[(7 * i + j) % 200 for j in range(60)] for i in range(6)]
    found = []
    for blocks in (400, 60):  # with few, some are computed again
        d = driver("llama", kv_blocks=blocks, max_batch_tokens=32)
        for id, prompt in enumerate(prompts):
            d.submit(id, prompt, greedy(max_tokens=40, prompt_logprobs=0))
        d.run()
        assert (d.engine.scheduler.preemptions > 0) == (blocks == 60)
        found.append([[one.logprob for one in d.outputs[id, 0][0].prompt or []] for id in range(6)])
        assert all(sum(o.prompt is not None for o in d.outputs[id, 0]) == 1 for id in range(6))
    for whole, cut in zip(*found, strict=True):
        assert whole == pytest.approx(cut, abs=1e-3) and len(whole) == 59


def test_allowed_tokens_and_bad_words_hold(driver: Callable[..., Driver]) -> None:
    d = driver("llama")
    d.submit(0, [1, 2, 3], greedy(max_tokens=30))
    d.run()
    whole = d.tokens[0, 0]
    pair = (whole[3], whole[4])
    d.submit(1, [1, 2, 3], greedy(max_tokens=30, bad_words={"w": (pair,)}))
    d.submit(2, [1, 2, 3], greedy(max_tokens=30, allowed_token_ids=(5, 6, 7), ignore_eos=True))
    d.run()
    assert d.tokens[1, 0][:4] == whole[:4] and d.tokens[1, 0][4] != whole[4]
    assert all(both != pair for both in pairwise(d.tokens[1, 0]))
    assert set(d.tokens[2, 0]) <= {5, 6, 7}
    vocab = d.engine.runner.model.config.vocab
    d.submit(3, [1], greedy(allowed_token_ids=(vocab,)))
    d.submit(4, [1], greedy(bad_words={"w": ((1, vocab),)}))
    d.run()
    assert d.finish[3, 0] == d.finish[4, 0] == "error"
