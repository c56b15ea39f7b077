"""All layers in one call give what the layer loop gives, for every family, quantised or not, at every batch size it takes, on one rank or
several."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece, Runner
from tests.support import tiny_models
from tests.support.engine_driver import Driver
from tests.support.rank_threads import RankThreads

PLAIN = [f for f in tiny_models.FAMILIES if f not in ("gemma3", "gpt-oss", "llama4", "mixtral") and "moe" not in f and "deepseek" not in f]
RANKS = [("llama", 2), ("llama-tied-biased", 4), ("qwen3", 4)]  # qwen3 has one KV head


def runners(options: EngineOptions, stack: ExitStack) -> list[Runner]:
    """Rank 0's first."""
    if options.tp == 1:
        return [load(options).engine.runner]
    ranks = RankThreads(options, stack)
    return [ranks.loaded.engine.runner, *ranks.runners.values()]


@pytest.mark.parametrize("quantization", ["", "wint8", "wint4"])
@pytest.mark.parametrize(("family", "tp"), [*((family, 1) for family in PLAIN), *RANKS])
def test_one_call_is_the_layer_loop(family: str, tp: int, quantization: str, tiny: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    options = EngineOptions(model=str(tiny(family)[0]), block_tokens=4, kv_blocks=200, quantization=quantization, threads=2, tp=tp)
    with ExitStack() as stack:
        ranks = runners(options, stack)
        fast = [dataclasses.replace(each.fast, most=8) for each in ranks if each.fast is not None]
        assert len(fast) == tp, "a compiler is needed here"
        rng = random.Random(1)
        lengths = [rng.randint(1, 70) for _ in range(8)]
        tables = [list(range(20 * i, 20 * i + 20)) for i in range(8)]
        ranks[0].run([Piece([rng.randrange(300) for _ in range(n)], 0, table, False) for n, table in zip(lengths, tables, strict=True)])
        steps = [[Piece([7 * i + batch], lengths[i], tables[i], 1) for i in range(batch)] for batch in range(1, 9)]
        steps += [
            [Piece(range(9, 9 + n), lengths[i], tables[i], n) for i, n in enumerate(several)] for several in ((5,), (2, 1, 5), (3, 4))
        ]
        for pieces in steps:
            found = {}
            for name in ("loop", "one call"):
                for each, one_call in zip(ranks, fast, strict=True):
                    each.fast = one_call if name == "one call" else None
                found[name] = [ranks[0].run(pieces), *(each.kv.clone() for each in ranks)]
            torch.testing.assert_close(found["one call"], found["loop"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tp", [2, 4])
def test_one_call_of_ranks_makes_the_tokens_of_one_rank(tp: int, driver: Callable[..., Driver]) -> None:
    """And logits within 1e-4; ranks that share no memory go on layer by layer."""
    prompts = [[random.Random(i).randrange(300) for _ in range(20 + i)] for i in range(4)]
    one, several = driver("llama"), driver("llama", tp=tp)
    assert one.engine.runner.fast is not None and several.engine.runner.fast is not None
    for each in (one, several):
        for id, prompt in enumerate(prompts):
            each.submit(id, prompt, Sampling(max_tokens=16, temperature=0.0))
        each.run()
    assert one.tokens == several.tokens
    piece = Piece([7], 3, [0], True)
    a, b = one.engine.runner.run([piece]), several.engine.runner.run([piece])
    assert (a - b).norm() / a.norm() < 1e-4


def test_ranks_that_share_no_memory_take_the_loop(tiny: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=20, threads=1)
    pieces = [Piece(list(range(9)), 0, [0, 1, 2], True), Piece([5], 9, [0, 1, 2], True)]
    with ExitStack() as stack:
        one = load(options).engine.runner
        several = RankThreads(msgspec.structs.replace(options, tp=2), stack, shared=False).loaded.engine.runner
        assert several.fast is None
        for piece in pieces:
            torch.testing.assert_close(several.run([piece]), one.run([piece]), rtol=1e-4, atol=1e-4)


def test_prompts_and_large_batches_take_the_loop(tiny: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    runner = load(EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=200)).engine.runner
    assert runner.fast is not None
    assert runner.fast.takes(runner.inputs([Piece([1], 3, [0], True)]))
    assert not runner.fast.takes(runner.inputs([Piece([1, 2], 3, [0, 1], True)])), "a prompt's"
    assert not runner.fast.takes(runner.inputs([Piece([1], 3, [i], True) for i in range(9)]))
