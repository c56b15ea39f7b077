"""Prefill on one engine and decode on another, or move in the middle: the same tokens as one engine alone, and nothing stays behind."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from pdlab.core.prefix import chain
from pdlab.kernels.kv_blocks import gather_blocks, scatter_blocks
from pdlab.real.engine.handover import Handover, Lease
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling, Submit
from pdlab.real.engine.options import EngineOptions, SpeculationOptions
from pdlab.replay.scheduler_log import replay
from tests.support.engine_driver import Driver

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
BLOCK = 4


@pytest.fixture(params=["qwen3", "deepseek-v3", "qwen3 drafted by qwen3"])
def pair(tiny: Tiny, request: pytest.FixtureRequest) -> Callable[[], tuple[Driver, Driver, Driver, io.BytesIO]]:
    """(one alone, prefill, decode, the decode engine's log). Those two draft, where it says so: the draft model's KV does not go along."""
    family, _, drafts = request.param.partition(" drafted by ")
    speculation = SpeculationOptions(method="draft_model", tokens=3, model=str(tiny(drafts)[0])) if drafts else None

    def make() -> tuple[Driver, Driver, Driver, io.BytesIO]:
        log = io.BytesIO()
        options = EngineOptions(model=str(tiny(family)[0]), block_tokens=BLOCK, kv_blocks=300, max_batch_tokens=48, threads=1)
        drafting = msgspec.structs.replace(options, speculation=speculation)
        return Driver(load(options).engine), Driver(load(drafting).engine), Driver(load(drafting, log).engine), log

    return make


def submit(id: int, prompt: list[int], sampling: Sampling, *, decodes_here: bool = True) -> Submit:
    return Submit(id, prompt, sampling, chain(prompt, BLOCK), decodes_here=decodes_here)


def move(lease: Lease, src: Driver, dst: Driver, request: Submit, made: list[int]) -> bool:
    """Copy the blocks that the destination does not hold; False where it has no room."""
    to = Handover(dst.engine)
    place = to.receive(request, made, dst.now)
    if place is None:
        return False
    assert place.kv_tokens == len(request.tokens) + max(len(made) - 1, 0)
    skip = place.cached_tokens // BLOCK
    count = -(-min(place.kv_tokens, lease.kv_tokens) // BLOCK)
    buffer = gather_blocks(src.engine.runner.kv, torch.tensor(lease.blocks[skip:count], dtype=torch.int64))
    scatter_blocks(buffer, dst.engine.runner.kv, torch.tensor(place.blocks[skip:count], dtype=torch.int64))
    to.arrived(request.id)
    return True


def collect(d: Driver, id: int) -> list[int]:
    """An engine's tokens of a request that came with some already made: their first index is not 0."""
    found: list[int] = []

    def emit(outputs: object) -> None:
        for o in outputs:  # type: ignore[attr-defined]
            if o.id == id:
                found.extend(o.tokens)

    while not d.engine.idle:
        d.engine.step(d.now, emit, lambda: False)
        d.engine.scheduler.check()
    return found


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=15, temperature=0.0), Sampling(max_tokens=15, seed=3, top_p=0.9, frequency_penalty=0.5)]
)
def test_prefill_here_decode_there(
    sampling: Sampling, first_token: str, pair: Callable[..., tuple[Driver, Driver, Driver, io.BytesIO]]
) -> None:
    alone, prefill, decode, log = pair()
    rng = random.Random(1)
    shared = [rng.randrange(300) for _ in range(21)]
    for id in range(8):
        prompt = shared[: rng.choice((0, 8, 21))] + [rng.randrange(300) for _ in range(rng.choice((1, 3, 4, 30, 90)))]
        alone.submit(id, prompt, sampling)
        alone.run()
        prefill.engine.submit(submit(id, prompt, sampling, decodes_here=False), 0.0)
        while not prefill.engine.holds(id):
            prefill.step()
        assert prefill.finish[id, 0] == "held"
        lease = Handover(prefill.engine).lease(id)
        assert lease.kv_tokens == len(prompt)
        made = prefill.tokens[id, 0] if first_token == "prefill" else []
        assert move(lease, prefill, decode, submit(id, prompt, sampling), made)
        Handover(prefill.engine).release(id)
        assert made + collect(decode, id) == alone.tokens[id, 0]
    for d in (prefill, decode):
        assert d.engine.scheduler.idle
        assert d.engine.load([], 0.0).leaked_blocks == d.engine.scheduler.pool.used == 0
    assert replay(log.getvalue().splitlines())[1] == ""


@pytest.mark.parametrize(
    ("after", "more"), [(1, 0), (1, 1), (3, 1), (7, 1), (10, 1)]
)  # after the first it has landed, and does not run yet
def test_a_migration_in_the_middle_changes_nothing(
    after: int, more: int, pair: Callable[..., tuple[Driver, Driver, Driver, io.BytesIO]]
) -> None:
    alone, first, second, log = pair()
    sampling = Sampling(max_tokens=24, seed=5)
    prompt = [random.Random(4).randrange(300) for _ in range(33)]
    for d in (alone, first):
        d.engine.step_limit = 1
        d.submit(0, prompt, sampling)
        d.submit(1, prompt[:20], sampling)  # stays
    alone.run()
    while len(first.tokens.get((0, 0), [])) < after:
        first.step()
    for _ in range(more):
        first.step()
    made = list(first.tokens[0, 0])
    snapshot = Handover(first.engine).snapshot(0)
    assert isinstance(snapshot, Lease)
    assert snapshot.tokens == prompt + made
    lease = Handover(first.engine).stop(0, 0.0, 30.0)
    assert isinstance(lease, Lease)
    assert lease.tokens == prompt + made
    assert move(lease, first, second, submit(0, prompt, sampling), made)
    Handover(first.engine).release(0)
    assert made + collect(second, 0) == alone.tokens[0, 0]
    first.run()
    assert first.tokens[1, 0] == alone.tokens[1, 0]
    assert second.engine.scheduler.pool.used == 0
    assert replay(log.getvalue().splitlines())[1] == ""


def test_full_means_wait_and_what_is_held_can_stay(pair: Callable[..., tuple[Driver, Driver, Driver, io.BytesIO]], tiny: Tiny) -> None:
    alone, src, _, _ = pair()
    small = Driver(load(EngineOptions(model=str(tiny("qwen3")[0]), block_tokens=BLOCK, kv_blocks=12, threads=1)).engine)
    sampling = Sampling(max_tokens=10, temperature=0.0)
    for d in (alone, src):
        d.engine.step_limit = 1
        d.submit(0, list(range(60)), sampling)
        for _ in range(4):
            d.step()
    exchange = Handover(src.engine)
    lease = exchange.stop(0, 0.0, 30.0)
    assert isinstance(lease, Lease)
    assert not move(lease, src, small, submit(0, list(range(60)), sampling), src.tokens[0, 0])
    assert small.engine.scheduler.pool.used == 0
    exchange.resume(0)
    src.run()
    alone.run()
    assert src.tokens == alone.tokens
    assert exchange.stop(0, 0.0, 30.0) == "it does not run here"


def test_kv_that_does_not_come_frees_its_place(pair: Callable[..., tuple[Driver, Driver, Driver, io.BytesIO]]) -> None:
    _, _, decode, _ = pair()
    exchange = Handover(decode.engine)
    request = submit(0, list(range(30)), Sampling(max_tokens=5))
    assert exchange.receive(request, [7], 0.0) is not None
    assert decode.engine.scheduler.pool.used > 0
    exchange.failed(0)
    exchange.failed(0)
    exchange.arrived(0)
    assert decode.engine.idle
    assert decode.engine.scheduler.pool.used == 0
    assert exchange.receive(request, [7], 0.0) is not None
    decode.engine.cancel(0)  # while it is on its way
    exchange.arrived(0)
    assert collect(decode, 0) == []
    assert decode.engine.scheduler.pool.used == 0
