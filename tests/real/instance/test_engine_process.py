"""The engine in its own process: answers, interleaves, survives cancellation, says why it cannot start, and is missed when it dies."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdlab.core.types import UsageError
from pdlab.real.engine.messages import Sampling, StructuredOutputs, Submit, Tokens, Vocabulary
from pdlab.real.engine.options import EngineOptions
from pdlab.real.host.processes import MODULE
from pdlab.real.instance.engine_client import EngineClient
from pdlab.replay.scheduler_log import replay
from tests.support import served, tiny_models

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]


@asynccontextmanager
async def started(folder: Path, **options: object) -> AsyncIterator[EngineClient]:
    given = {"block_tokens": 4, "kv_blocks": 200, "threads": 1, **options}
    client = await EngineClient.start(EngineOptions(model=str(folder), **given))  # type: ignore[arg-type]
    try:
        yield client
    finally:
        await client.close()


async def collect(arriving: asyncio.Queue[Tokens]) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        news = await asyncio.wait_for(arriving.get(), 120)
        assert news.start == len(tokens) or news.finish == "error"
        tokens += news.tokens
        if news.finish:
            return tokens, news.finish


def test_whoever_waits_is_told_of_each_stage(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # no kernel is built yet
    if compiler := shutil.which("c++"):
        hasty = tmp_path / "c++"  # optimising takes most of the twenty seconds, and matters to none of the stages
        hasty.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
        hasty.chmod(0o755)
        monkeypatch.setenv("CXX", str(hasty))

    async def main() -> None:
        options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=20, threads=1)
        await (await EngineClient.start(options, stages.append)).close()

    asyncio.run(main())
    assert stages[:2] == ["loading torch", "loading weights"]
    assert stages[-1] == "warming up"
    if compiler:
        assert "building kernels, once on this machine: all_reduce, decode, experts, fused, kv_blocks, linear, paged_attention" in stages[2]


GREEDY = Sampling(max_tokens=10, temperature=0.0)


def test_requests_side_by_side_get_transformers_tokens_and_the_log_replays(tiny: Tiny, tmp_path: Path) -> None:
    folder, reference = tiny("llama")
    prompts = [[i, 2 * i, 3 * i] * (i + 1) for i in range(1, 8)]
    log = tmp_path / "decisions.jsonl"

    async def main() -> None:
        async with started(folder, decisions=str(log)) as client:
            assert client.ready.kv_blocks == 200
            assert client.ready.max_tokens == 512
            arriving = [client.submit(Submit(i, prompt, GREEDY)) for i, prompt in enumerate(prompts)]
            found = await asyncio.gather(*map(collect, arriving))
            assert found == [(tiny_models.greedy(reference, prompt, 10), "length") for prompt in prompts]
            assert client.load.report.running == 0
            assert client.load.leaked_blocks == 0
            process = client.process
        assert process.returncode == 0

    asyncio.run(main())
    with log.open("rb") as lines:
        alike, difference = replay(lines)
    assert alike > 0
    assert not difference


def test_an_engine_that_is_asked_to_measures_itself_before_it_is_ready_and_answers_as_ever(tiny: Tiny) -> None:
    folder, reference = tiny("llama")
    prompt = [3, 5, 7, 9, 11]

    async def main() -> None:
        stages: list[str] = []
        options = EngineOptions(model=str(folder), block_tokens=4, kv_blocks=200, threads=1, self_profile=True)
        client = await EngineClient.start(options, stages.append)
        try:
            assert stages[-1] == "measuring itself"
            prefill, decode = client.ready.prefill_profile, client.ready.decode_profile
            assert [tokens for tokens, _ in prefill] == [1, 64, 128, 256, 512][: len(prefill)]
            assert decode[:2] == ((1, 128, decode[0][2]), (2, 256, decode[1][2]))
            assert all(0.0 < point[-1] < 5.0 for point in (*prefill, *decode))
            assert await collect(client.submit(Submit(1, prompt, GREEDY))) == (tiny_models.greedy(reference, prompt, 10), "length")
            report = client.report("a", 1)
            assert (report.running, report.used_blocks, report.stored) == (0, 0, ())
            assert (report.decode_steps, [step.prompt_tokens for step in report.steps]) == (9, [5, 0])
            assert report.decode_s >= max(step.seconds for step in report.steps if step.batch)
        finally:
            await client.close()

    asyncio.run(main())


def test_one_that_is_not_asked_to_does_not(tiny: Tiny) -> None:
    async def main() -> None:
        async with started(tiny("llama")[0]) as client:
            assert client.ready.prefill_profile == client.ready.decode_profile == ()

    asyncio.run(main())


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose hundreds of tokens take longer than a test needs to break in on them."""
    folder = tmp_path_factory.mktemp("slow")
    tiny_models.make("llama", folder, **tiny_models.SLOW)
    return folder


def test_a_cancelled_request_says_so_and_others_go_on(slow: Path) -> None:
    async def main() -> None:
        async with started(slow) as client:
            long = client.submit(Submit(1, [1, 2], Sampling(max_tokens=400, temperature=0.0)))
            other = client.submit(Submit(2, [3, 4], GREEDY))
            first = await asyncio.wait_for(long.get(), 120)
            assert first.tokens
            client.cancel(1)
            while (news := await asyncio.wait_for(long.get(), 120)).finish is None:
                pass
            assert news.finish == "abort"
            assert (await collect(other))[1] == "length"
            client.cancel(1)
            client.cancel(77)

    asyncio.run(main())


def test_a_killed_engine_ends_every_request_with_the_reason(slow: Path) -> None:
    async def main() -> None:
        async with started(slow) as client:
            arriving = client.submit(Submit(1, [1, 2], Sampling(max_tokens=500, best_of=2)))
            await asyncio.wait_for(arriving.get(), 120)
            os.kill(client.process.pid, signal.SIGKILL)
            ended: set[int] = set()
            while len(ended) < 2:
                news = await asyncio.wait_for(arriving.get(), 120)
                if news.finish:
                    assert news.finish == "error"
                    assert "has ended with status -9" in news.error
                    ended.add(news.candidate)
            assert client.down is not None
            later = await asyncio.wait_for(client.submit(Submit(2, [1], GREEDY)).get(), 60)
            assert later.finish == "error"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "torch sees no cuda device here; use --device cpu"),
        ({"device": "npu:0"}, "needs torch_npu, which is not installed"),
        ({"device": "tpu"}, "--device tpu is not one of cpu, cuda"),
        ({"dtype": "float8"}, "--dtype float8 is not one of auto, float32"),
        ({"dtype": "float16"}, "use float32 or bfloat16"),
        ({"quantization": "fp8"}, "--quantization fp8 is not one of wint8, wint4"),
        ({"max_model_len": 4096}, "--max-model-len 4096 exceeds the model's 512 positions"),
        ({"kv_blocks": 0, "kv_gib": 1e5}, "KV memory of 100000.0 GiB exceeds the"),
        ({"kv_blocks": 0, "kv_gib": 1e-6}, "is too small to serve anything: give at least --kv-gib"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, object], says: str, tiny: Tiny) -> None:
    from pdlab.real.engine.load import load

    with pytest.raises(UsageError, match=re.escape(says)) as raised:
        load(EngineOptions(model=str(tiny("llama")[0]), **{"kv_blocks": 50, **options}))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_mistake_is_told_by_the_process_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--model .*/nowhere: no such folder or file"):
        asyncio.run(EngineClient.start(EngineOptions(model=str(tmp_path / "nowhere"))))


def test_a_log_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--log .*: Is a directory"):
        asyncio.run(EngineClient.start(EngineOptions(model=str(tmp_path / "nowhere"), decisions=str(tmp_path))))


def test_grammars_are_compiled_beside_the_steps(tmp_path: Path) -> None:
    folder = served.make(tmp_path)
    vocabulary = Vocabulary([bytes([byte]) for byte in range(256)] + [b"<eos>", b"<start>", b"<end>"], [256, 257, 258], (served.EOS,))
    yes = StructuredOutputs(choice=("yes",))

    async def main() -> None:
        async with started(folder, eos_ids=(served.EOS,)) as client:
            early = client.submit(Submit(0, [1, 2, 3], Sampling(max_tokens=5, structured=yes)))
            assert "the vocabulary" in (await asyncio.wait_for(early.get(), 120)).error
            reasons = await asyncio.gather(
                client.compile(yes, vocabulary),
                client.compile(StructuredOutputs(regex="("), vocabulary),
                client.compile(StructuredOutputs(json="true"), vocabulary),
            )
            assert reasons[0] == reasons[2] == ""
            assert "unclosed group" in reasons[1]
            tokens, finish = await collect(client.submit(Submit(1, [1, 2, 3], Sampling(max_tokens=5, structured=yes))))
            assert (bytes(tokens[:-1]), finish) == (b"yes", "stop")
        assert await client.compile(yes, vocabulary) == "the engine was stopped"

    asyncio.run(main())


def test_a_vocabulary_without_an_end_is_told(tmp_path: Path) -> None:
    folder = served.make(tmp_path)

    async def main() -> None:
        async with started(folder) as client:
            endless = Vocabulary([bytes([byte]) for byte in range(256)], [], ())
            assert "no end-of-sequence token" in await client.compile(StructuredOutputs(regex="a"), endless)

    asyncio.run(main())


def test_no_option_and_so_no_secret_is_on_its_command_line(tiny: Tiny) -> None:
    folder, _ = tiny("llama")

    async def main() -> None:
        async with started(folder, kv_name="p", kv_token="of-the-cluster") as client:
            assert client.ready.kv_blocks == 200
            words = Path(f"/proc/{client.process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            assert words[:5] == [*(os.fsencode(word) for word in MODULE), b"pdlab.real.instance.engine_process"] and len(words) == 6
            assert words[5].isdigit()

    asyncio.run(main())
