"""Greedy output equals transformers', token for token, however the work was cut up; logits agree in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.runner import Piece
from tests.support import tiny_models
from tests.support.engine_driver import Driver

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.choice((1, 3, 4, 5, 17, 40, 90)))] for _ in range(count)]


@pytest.fixture(scope="session")
def expected(tiny: Tiny) -> Callable[[str], list[list[int]]]:
    known: dict[str, list[list[int]]] = {}

    def of(family: str) -> list[list[int]]:
        if family not in known:
            known[family] = [tiny_models.greedy(tiny(family)[1], p, GREEDY.max_tokens) for p in prompts(10)]
        return known[family]

    return of


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_agree_whole_and_in_chunks(family: str, tiny: Tiny, driver: Callable[..., Driver]) -> None:
    runner = driver(family).engine.runner
    prompt = [random.Random(5).randrange(300) for _ in range(150)]
    with torch.no_grad():
        reference = tiny(family)[1](torch.tensor([prompt]), use_cache=False).logits[0]
    for first in (150, 149, 64, 1):
        table = list(range(first, first + 40))
        runner.run([Piece(prompt[:first], 0, table, True)])
        logits = runner.run([Piece(prompt[first:], first, table, True)]) if first < 150 else runner.run([Piece(prompt, 0, table, True)])
        error = (logits[0] - reference[-1]).norm() / reference[-1].norm()
        assert error < 1e-4


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_mixed_batch_in_chunks(family: str, driver: Callable[..., Driver], expected: Callable[[str], list[list[int]]]) -> None:
    d = driver(family, max_batch_tokens=24)
    for i, prompt in enumerate(prompts(10)):
        d.submit(i, prompt, GREEDY)
    d.run()
    assert [d.tokens[i, 0] for i in range(10)] == expected(family)
    assert set(d.finish.values()) == {"length"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("batching", ["chunked", "prefill_first", "decode_first", "slide_batching", "online_first"])
def test_arrivals_in_the_middle(
    family: str, batching: str, driver: Callable[..., Driver], expected: Callable[[str], list[list[int]]]
) -> None:
    d = driver(family, batching=batching, max_batch_tokens=128)
    for i, prompt in enumerate(prompts(10)):
        d.arrivals.append(lambda i=i, prompt=prompt: d.submit(i, prompt, GREEDY))  # type: ignore[misc]
    d.run()
    assert [d.tokens[i, 0] for i in range(10)] == expected(family)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_after_preemption(family: str, driver: Callable[..., Driver], expected: Callable[[str], list[list[int]]]) -> None:
    d = driver(family, kv_blocks=32)
    for i, prompt in enumerate(prompts(10)):
        d.submit(i, prompt, GREEDY)
    d.run()
    assert d.engine.scheduler.preemptions > 0
    assert [d.tokens[i, 0] for i in range(10)] == expected(family)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_prefix_hits_change_nothing(family: str, driver: Callable[..., Driver], expected: Callable[[str], list[list[int]]]) -> None:
    d = driver(family)
    for repeat in range(3):
        for i, prompt in enumerate(prompts(10)):
            d.submit(100 * repeat + i, prompt, GREEDY)
        d.run()
    for repeat in range(3):
        assert [d.tokens[100 * repeat + i, 0] for i in range(10)] == expected(family)
    assert d.engine.prefix_hits > 400


def test_the_next_turn_finds_the_answer_in_the_cache(driver: Callable[..., Driver]) -> None:
    d, fresh = driver("llama"), driver("llama")
    prompt = prompts(1, seed=3)[0] + [7] * 20
    d.submit(0, prompt, GREEDY)
    d.run()
    longer = [*prompt, *d.tokens[0, 0], 9, 10, 11]
    d.submit(1, longer, GREEDY)
    d.run()
    fresh.submit(1, longer, GREEDY, cached=False)
    fresh.run()
    assert d.tokens[1, 0] == fresh.tokens[1, 0]
    assert d.outputs[1, 0][0].cached_tokens >= len(prompt) + 8
    assert fresh.outputs[1, 0][0].cached_tokens == 0
