"""pdlab's router, sidecars and registry around two vLLM servers: one prefills, the other decodes."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdlab.real.models.tokenizer import Tokenizer
from tests.support.vllm_cluster import Outcome, cluster, summary
from tests.support.vllm_servers import VllmServer

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server: apt-get install redis-server")
pytestmark = [pytest.mark.interop, needs_redis]
Pair = tuple[VllmServer, VllmServer]

REQUESTS, AT_ONCE, OUTPUT = 50, 4, 12
POLICIES = {
    "round_robin": {"dispatch": "round_robin"},
    "prefix_aware": {"dispatch": "prefix_aware", "handoff": "least_kv"},
    "llumnix": {"dispatch": "llumnix"},
}
TEXT = Path(__file__).parents[2] / "docs" / "reference" / "protocol.md"


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def prompts(tokenizer: Tokenizer, requests: int, seed: int) -> list[list[int]]:
    """Pieces of prose of 8 to 300 tokens; every other one begins with the same 150. Prose, since after random tokens the two likeliest
    next ones are too often as good as equal."""
    rng = random.Random(seed)
    tokens = tokenizer.encode(TEXT.read_text())
    first = rng.randrange(len(tokens) - 150)
    common = tokens[first : first + 150]
    found = []
    for number in range(requests):
        length = rng.randint(8, 150 if number % 2 else 300)
        start = rng.randrange(len(tokens) - length)
        found.append([*(common if number % 2 else ()), *tokens[start : start + length]])
    return found


def check(outcomes: list[Outcome], asked: list[list[int]], alone: VllmServer, output: int = OUTPUT) -> None:
    """Each has all its tokens, and they are those of one server alone."""
    assert [(one.error, one.finish, len(one.tokens)) for one in outcomes] == [("", "length", output)] * len(outcomes)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        expected = list(pool.map(lambda prompt: alone.generate(prompt, output), asked))
    differ = [n for n, (one, tokens) in enumerate(zip(outcomes, expected, strict=True)) if one.tokens != tokens]
    assert not differ, f"{len(differ)} of {len(asked)} outputs differ from one server's: {differ}"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_drives_one_that_prefills_and_one_that_decodes(
    policy: str, pair: Pair, model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    p, d = pair
    asked = prompts(tokenizer, REQUESTS, seed=list(POLICIES).index(policy))
    names = "vllm:nixl_bytes_transferred_sum", "vllm:nixl_bytes_transferred_count", "vllm:nixl_num_failed_transfers_total"
    computed = d.metric("vllm:prompt_tokens_by_source_total", source="local_compute")
    before = [d.metric(name) for name in names]
    with cluster(tmp_path, model, POLICIES[policy], {"p0": ("prefill", p), "d0": ("decode", d)}) as here:
        began_s = time.monotonic()
        outcomes = asyncio.run(here.ask(asked, OUTPUT, AT_ONCE))
        took_s = time.monotonic() - began_s
    moved, transfers, failed = (d.metric(name) - one for name, one in zip(names, before, strict=True))
    print(f"{policy}: {summary(outcomes)}, {took_s:.0f} s in all, {transfers:.0f} transfers of {moved / 1e6:.0f} MB together")
    assert transfers == REQUESTS and failed == 0
    assert d.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == computed, "the decode server computed prompts"
    check(outcomes, asked, p)


@pytest.mark.parametrize("killed", [0, 1], ids=["prefill", "decode"])
def test_when_a_server_is_killed_the_other_serves_on_and_no_token_is_lost_or_doubled(
    killed: int, pair: Pair, model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    asked, output = prompts(tokenizer, 8, seed=9), 32
    victim, left = pair[killed], pair[1 - killed]
    both = {"p0": ("prefill", pair[0]), "d0": ("decode", pair[1])}
    with cluster(tmp_path, model, {"dispatch": "round_robin"}, both, lease_s=15.0) as here:
        before = here.rows()

        async def run() -> list[Outcome]:
            asking = asyncio.create_task(here.ask(asked, output, AT_ONCE))
            generated = pair[1].metric("vllm:generation_tokens_total")
            while await asyncio.to_thread(pair[1].metric, "vllm:generation_tokens_total") < generated + 20:
                await asyncio.sleep(0.05)
            victim.kill()
            return await asking

        outcomes = asyncio.run(run())
        print(f"killed {('prefill', 'decode')[killed]}: {summary(outcomes)}, slowest {max(one.times_s[-1] for one in outcomes):.0f} s")
        here.until(**{("d0", "p0")[killed]: "ready"})  # the other's lease has ended
        check(outcomes, asked, left, output)
        victim.start()
        victim.wait()
        found = here.until(p0="ready", d0="ready")
        name = ("p0", "d0")[killed]
        assert found[name]["spec"]["incarnation"] > before[name]["spec"]["incarnation"]
        transfers = pair[1].metric("vllm:nixl_bytes_transferred_count")
        again = asyncio.run(here.ask(asked[:4], output, AT_ONCE))
        assert [one.tokens for one in again] == [one.tokens for one in outcomes[:4]]
        assert pair[1].metric("vllm:nixl_bytes_transferred_count") == transfers + 4


def test_pdlabs_own_engine_beside_vllm_is_refused_with_a_reason(pair: Pair, model: Path, tmp_path: Path) -> None:
    """Neither can read the other's KV."""
    with cluster(tmp_path, model, {"dispatch": "round_robin"}, {"p0": ("prefill", pair[0])}) as here:
        own = "--model", str(model), "--served-model-name", "smol", "--port", "0", "--threads", "1", "--dtype", "float32"
        here.serve("d0", "--role", "decode", *own, "--kv-gib", "0.5", str(tmp_path / "experiment.json"))
        found = here.until(p0="ready", d0="refused")
        assert "vllm" in found["d0"]["refusal"]
