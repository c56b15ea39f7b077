"""All layers in one call give what the layer loop gives, for every family, quantised or not, at every batch size it takes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pdlab.real.engine.load import load
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from tests.support import tiny_models

PLAIN = [f for f in tiny_models.FAMILIES if f not in ("gemma3", "gpt-oss", "llama4", "mixtral") and "moe" not in f and "deepseek" not in f]


@pytest.mark.parametrize("quantization", ["", "wint8", "wint4"])
@pytest.mark.parametrize("family", PLAIN)
def test_one_call_is_the_layer_loop(family: str, quantization: str, tiny: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    options = EngineOptions(model=str(tiny(family)[0]), block_tokens=4, kv_blocks=200, quantization=quantization, threads=2)
    runner = load(options).engine.runner
    assert runner.fast is not None, "a compiler is needed here"
    fast = dataclasses.replace(runner.fast, most=8)
    rng = random.Random(1)
    lengths = [rng.randint(1, 70) for _ in range(8)]
    tables = [list(range(20 * i, 20 * i + 20)) for i in range(8)]
    runner.run([Piece([rng.randrange(300) for _ in range(n)], 0, table, False) for n, table in zip(lengths, tables, strict=True)])
    steps = [[Piece([7 * i + batch], lengths[i], tables[i], 1) for i in range(batch)] for batch in range(1, 9)]
    steps += [[Piece(range(9, 9 + n), lengths[i], tables[i], n) for i, n in enumerate(several)] for several in ((5,), (2, 1, 5), (3, 4))]
    for pieces in steps:
        found = {}
        for name, chosen in (("loop", None), ("one call", fast)):
            runner.fast = chosen
            found[name] = runner.run(pieces), runner.kv.clone()
        torch.testing.assert_close(found["one call"][0], found["loop"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["one call"][1], found["loop"][1], rtol=1e-4, atol=1e-4)


def test_prompts_and_large_batches_take_the_loop(tiny: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    runner = load(EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=200)).engine.runner
    assert runner.fast is not None
    assert runner.fast.takes(runner.inputs([Piece([1], 3, [0], True)]))
    assert not runner.fast.takes(runner.inputs([Piece([1, 2], 3, [0, 1], True)])), "a prompt's"
    assert not runner.fast.takes(runner.inputs([Piece([1], 3, [i], True) for i in range(9)]))
