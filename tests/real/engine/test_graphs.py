"""Decode steps through captured graphs, rehearsed on the CPU: a graph here is the same pass run again on the same tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pdlab.real.engine.graphs import GraphRunner
from pdlab.real.engine.messages import Sampling
from tests.support.engine_driver import Driver


class Rehearsed(GraphRunner):
    replays = 0

    def _record(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        logits = forward().clone()

        def replay() -> None:
            self.replays += 1
            logits.copy_(forward())

        return replay, logits


def test_graphs_of_fixed_sizes_give_the_same_tokens(
    driver: Callable[..., Driver], tiny: Callable[[str], tuple[Path, PreTrainedModel]]
) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 30))] for _ in range(19)]
    plain, graphed = driver("qwen3", max_seqs=32), driver("qwen3", max_seqs=32)
    engine = graphed.engine
    runner = Rehearsed(engine.runner.model, kv_blocks=400, block_tokens=4, max_tokens=512, max_seqs=19)
    runner.warm_up()
    assert sorted(runner.captured) == [1, 2, 4, 8, 16, 32]
    engine.runner = runner
    for d in (plain, graphed):
        for i, prompt in enumerate(prompts):
            d.submit(i, prompt, Sampling(max_tokens=2 + i, temperature=0.0))
        d.run()
    assert graphed.tokens == plain.tokens
    assert runner.replays > 10
    assert sorted(runner.captured) == [1, 2, 4, 8, 16, 32]
    assert torch.isfinite(runner.kv).all()
