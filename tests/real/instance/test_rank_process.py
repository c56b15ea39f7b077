"""An instance of two ranks in their own processes: it answers as one does, and goes down at once when a rank does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from transformers import PreTrainedModel

from pdlab.real.engine.messages import Sampling, Submit
from pdlab.real.engine.options import EngineOptions
from pdlab.real.instance.engine_client import EngineClient
from tests.support import tiny_models

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]


def test_two_ranks_answer_and_end_together(tiny: Tiny) -> None:
    folder, model = tiny("llama")
    prompt = list(range(30))

    async def main() -> None:
        engine = await EngineClient.start(EngineOptions(model=str(folder), block_tokens=4, kv_blocks=200, tp=2))
        try:
            arriving = engine.submit(Submit(1, prompt, Sampling(max_tokens=8, temperature=0.0)))
            tokens: list[int] = []
            while not (news := await asyncio.wait_for(arriving.get(), 120)).finish:
                tokens += news.tokens
            assert [*tokens, *news.tokens] == tiny_models.greedy(model, prompt, 8)

            (rank,) = psutil.Process(engine.process.pid).children()
            arriving = engine.submit(Submit(2, prompt, Sampling(max_tokens=400, temperature=0.0)))
            await asyncio.wait_for(arriving.get(), 120)
            os.kill(rank.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            while not (news := await asyncio.wait_for(arriving.get(), 120)).finish:
                pass
            assert time.monotonic() - killed_s < 30
            assert engine.down == news.error == f"the engine has failed: rank 1 (process {rank.pid}) was killed by signal 9"
        finally:
            await engine.close()

    asyncio.run(main())
