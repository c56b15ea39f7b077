"""An instance of two ranks in their own processes: it answers as one does, and goes down at once when a rank does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from transformers import PreTrainedModel

from pdlab.real.engine.messages import FromQueue, Missed, Push, Receive, Reserved, Sampling, Submit, Tokens
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
            assert engine.ready.tp == 2
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


@pytest.mark.slow
def test_a_rank_that_dies_while_it_pushes_by_layer_leaves_nothing_at_the_reader(tiny: Tiny) -> None:
    options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=200, max_batch_tokens=8, kv_transport="tcp")

    async def main() -> None:
        p, d = await asyncio.gather(
            *(EngineClient.start(msgspec.structs.replace(options, kv_name=name, tp=tp)) for name, tp in (("p", 2), ("d", 1)))
        )
        try:
            inbound = asyncio.Queue[FromQueue]()
            asked = Submit(1, [7] * 500, Sampling(max_tokens=4, temperature=0.0))
            d.receive(Receive(asked, last=False, deadline_s=20.0), inbound)
            place = await asyncio.wait_for(inbound.get(), 60)
            assert isinstance(place, Reserved)
            push = Push(d.ready.descriptor, place.ticket, place.blocks, place.cached_tokens, "layer", deadline_s=20.0)
            arriving = p.submit(msgspec.structs.replace(asked, decodes_here=False, push=push))
            while p.load.report.used_blocks < 10:
                await asyncio.sleep(0.001)
            (rank,) = psutil.Process(p.process.pid).children()
            os.kill(rank.pid, signal.SIGKILL)
            said = await asyncio.wait_for(arriving.get(), 10)
            assert isinstance(said, Tokens) and "killed by signal 9" in said.error
            missed = await asyncio.wait_for(inbound.get(), 60)
            assert isinstance(missed, Missed) and missed.cause != "deadline", missed
            assert isinstance(end := await asyncio.wait_for(inbound.get(), 10), Tokens) and end.finish == "error"
            while d.load.report.used_blocks:
                await asyncio.sleep(0.001)
            assert (d.load.leases, d.load.leaked_blocks, d.down) == (0, 0, None)
        finally:
            await asyncio.gather(p.close(), d.close())

    asyncio.run(main())
