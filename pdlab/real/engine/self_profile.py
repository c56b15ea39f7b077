"""An engine that measures itself before it joins a cluster, for the predictors of routers: how long prompts of a few lengths take, and
decode steps of a few sizes. The points are those of a simulated instance's profile, from the smallest on, as far as `BUDGET_S` goes.

What is attended to is whatever the KV memory holds, which takes as long to read as anything. Nothing of it is named in the prefix cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import product

from pdlab.cost.spec import DECODE_BATCHES, DECODE_CONTEXTS, PREFILL_TOKENS
from pdlab.real.engine.engine import Engine
from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.runner import Piece
from pdlab.real.engine.sampler import SamplerRow, sample

BUDGET_S = 2.4  # half for prompts, half for decodes
REPEATS = 2  # of a point: the first run of a size makes kernels ready, the quicker one counts
GREEDY = Sampling(temperature=0.0)

PrefillProfile = tuple[tuple[int, float], ...]
DecodeProfile = tuple[tuple[int, int, float], ...]


class SelfProfile:
    """`prefill()` and `decode()` are profiles as in an InstanceSpec."""

    def __init__(self, engine: Engine, *, budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter) -> None:
        self.runner, self.scheduler, self.clock = engine.runner, engine.scheduler, clock
        self.longest = min(engine.worker.most_tokens, self.scheduler.pool.total * self.runner.block_tokens)
        self.budget_s = budget_s

    def prefill(self) -> PrefillProfile:
        """One prompt computed alone, in chunks of the most that a step takes."""
        lengths = [n for n in PREFILL_TOKENS if n <= self.longest]
        found: list[tuple[int, float]] = []
        until_s = self.clock() + self.budget_s / 2
        for tokens in lengths:
            foretold_s = REPEATS * found[-1][1] * tokens / found[-1][0] if len(found) > 1 else 0.0
            if self.clock() + foretold_s > until_s:
                break
            found.append((tokens, min(self._prompt_s(tokens) for _ in range(REPEATS))))
        return tuple(found)

    def decode(self) -> DecodeProfile:
        found: list[tuple[int, int, float]] = []
        until_s = self.clock() + self.budget_s / 2
        for batch, each in sorted(product(DECODE_BATCHES, DECODE_CONTEXTS), key=lambda point: (point[0] * point[1], point[0])):
            blocks = -(-each // self.runner.block_tokens)
            if batch > self.scheduler.max_seqs or each >= self.longest or batch * blocks > self.scheduler.pool.total:
                continue
            if self.clock() + (REPEATS * found[-1][2] if found else 0.0) > until_s:
                break
            found.append((batch, batch * each, min(self._step_s(batch, each) for _ in range(REPEATS))))
        return tuple(found)

    def _prompt_s(self, tokens: int) -> float:
        most = self.scheduler.max_batch_tokens
        table = list(range(-(-tokens // self.runner.block_tokens)))
        began_s = self.clock()
        for start in range(0, tokens, most):
            end = min(start + most, tokens)
            self._run([Piece([0] * (end - start), start, table, end == tokens)])
        return self.clock() - began_s

    def _step_s(self, batch: int, each: int) -> float:
        """`batch` sequences make a token each, the last of `each` that they hold then."""
        blocks = -(-each // self.runner.block_tokens)
        pieces = [Piece([0], each - 1, list(range(i * blocks, (i + 1) * blocks)), True) for i in range(batch)]
        began_s = self.clock()
        self._run(pieces)
        return self.clock() - began_s

    def _run(self, pieces: list[Piece]) -> None:
        rows = [SamplerRow(GREEDY, random.Random(0), ()) for piece in pieces if piece.samples]
        sample(self.runner.run(pieces), rows)
