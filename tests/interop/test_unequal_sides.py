"""vLLM servers of unequal tensor parallelism under pdlab's router: its CPU backend keeps KV by heads (HND), so that each rank of the decode
server reads its heads of what the one prefill rank has."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.interop.test_cluster import AT_ONCE, check, needs_redis
from tests.support.vllm_cluster import cluster
from tests.support.vllm_servers import VllmServer

pytestmark = [pytest.mark.interop, needs_redis]
OUTPUT = 12


@pytest.fixture(scope="module")
def two_headed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that two ranks can share: the embedded model has three KV heads. Its tokenizer."""
    folder = tmp_path_factory.mktemp("two-headed")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # so that the likeliest token is so by a margin
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def unequal(vllm_python: Path, two_headed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, VllmServer]]:
    logs, cores = tmp_path_factory.mktemp("vllm"), set(os.sched_getaffinity(0))
    servers = tuple(VllmServer(vllm_python, two_headed, logs / f"{role}.log", cores, tp) for role, tp in (("prefill", 1), ("decode", 2)))
    try:
        for server in servers:
            server.start()
            server.wait()
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.kill()


def test_one_prefill_rank_hands_over_to_two_decode_ranks(unequal: tuple[VllmServer, VllmServer], two_headed: Path, tmp_path: Path) -> None:
    p, d = unequal
    rng = random.Random(4)
    asked = [[rng.randrange(100, 40000) for _ in range(rng.randint(8, 200))] for _ in range(12)]
    computed = d.metric("vllm:prompt_tokens_by_source_total", source="local_compute")
    with cluster(tmp_path, two_headed, {"dispatch": "round_robin"}, {"p0": ("prefill", p), "d0": ("decode", d)}) as here:
        outcomes = asyncio.run(here.ask(asked, OUTPUT, AT_ONCE))
    assert d.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == computed, "the decode server computed prompts"
    check(outcomes, asked, p, OUTPUT)
