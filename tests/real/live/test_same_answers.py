"""What the OpenAI front honours is honoured through the router, too: real engines apart for prefill and decode, every way between them, and
migrations in the middle, give the answers of one engine alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from pdlab.core.types import Role
from pdlab.real.api.app import create_app
from pdlab.real.api.http_server import bind
from pdlab.real.api.service import Service
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.router.cluster_engine import ClusterEngine
from pdlab.real.router.world import LiveWorld
from tests.real.live.test_same_tokens import WAYS, Shuttle, experiment, play, world
from tests.support import served, tiny_models
from tests.support.local_instances import Instance as Server
from tests.support.local_instances import until

PROMPT = "the quick brown fox 🦊 jumps"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 10, "ignore_eos": True}


@asynccontextmanager
async def front(cluster: LiveWorld, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer = Tokenizer.load(folder)
    app = create_app(Service(ClusterEngine(cluster, "tiny", tokenizer.vocab, context_tokens=400), tokenizer, "tiny", comment_s=0.05))
    with bind("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1))
        running = asyncio.create_task(server._serve([sock]))
        try:
            await until(lambda: server.started)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=120) as http:
                yield http
        finally:
            server.should_exit = True
            await running


async def answer(http: httpx.AsyncClient, asked: dict[str, Any]) -> Any:
    """But for what differs each time; a stream's choices put together."""
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    got = await http.post(path, json=asked)
    assert got.status_code == 200, got.text
    if not asked.get("stream"):
        found = got.json()
        return {"choices": found["choices"], "prompt_logprobs": found.get("prompt_logprobs"), "usage": counts(found["usage"])}
    chunks = [json.loads(line[6:]) for line in got.text.split("\n") if line.startswith("data: {")]
    whole: dict[int, dict[str, Any]] = {}
    for choice in (c for chunk in chunks for c in chunk["choices"]):
        one = whole.setdefault(choice["index"], {"text": "", "token_logprobs": [], "text_offset": [], "prompt_logprobs": None})
        one["text"] += choice["text"]
        for key in ("token_logprobs", "text_offset"):
            one[key] += (choice["logprobs"] or {}).get(key, [])
        one["prompt_logprobs"] = choice.get("prompt_logprobs", one["prompt_logprobs"])
        one["finish_reason"] = choice["finish_reason"]
    return whole


def counts(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


def alike(found: Any, expected: Any) -> bool:
    """Numbers up to rounding: a batch of another size adds in another order."""
    if isinstance(expected, float) and isinstance(found, float):
        return abs(found - expected) < 1e-3
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(alike(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return bool(found == expected)


def questions(tokens: list[int]) -> list[dict[str, Any]]:
    """`tokens` are what is made of the prompt without more ado."""
    twice = {"n": 2, "temperature": 0.8, "seed": 4}
    return [
        {**GREEDY, "echo": True, "logprobs": 1, "max_tokens": 0},
        {**GREEDY, "echo": True, "logprobs": 2, "max_tokens": 1},
        {**GREEDY, "echo": True, "logprobs": 2},
        {**GREEDY, "echo": True, "logprobs": 0, "stream": True},
        {**GREEDY, "prompt_logprobs": 3},
        {**GREEDY, "prompt_logprobs": 0, "stream": True},
        {**GREEDY, "prompt_logprobs": 1, **twice},
        {**GREEDY, "prompt": [PROMPT, "another one"], "echo": True, "logprobs": 1, "max_tokens": 2},
        {**GREEDY, "allowed_token_ids": [97, 98, 99], "max_tokens": 20},
        {**GREEDY, "bad_words": [bytes(tokens[:2]).decode("latin-1")] if max(tokens[:2]) < 128 else ["a"]},
        {**GREEDY, "logit_bias": {"256": 100}, "ignore_eos": False, "min_tokens": 3},
        {**GREEDY, "stop_token_ids": [tokens[4]], "include_stop_str_in_output": True, "skip_special_tokens": False},
        {**GREEDY, "truncate_prompt_tokens": 7, "echo": True, "logprobs": 0},
        {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4, "prompt_logprobs": 1},
    ]


async def asked_of_one(servers: dict[str, Server], name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """(questions, the answers of one instance alone, asked directly)."""
    http = servers[name].http
    tokens = (await http.post("/v1/completions", json={**GREEDY, "return_token_ids": True})).json()["choices"][0]["token_ids"]
    asked = questions(tokens)
    expected = [await answer(http, one) for one in asked]
    assert expected[10]["usage"][1] == 4  # the end of the sequence had to wait
    return asked, expected


def test_every_way_gives_the_answers_of_one_engine(tmp_path: Path) -> None:
    folder = served.make(tmp_path)

    async def scenario(servers: dict[str, Server]) -> None:
        asked, expected = await asked_of_one(servers, "d")
        roles = {"p": Role.PREFILL, "d": Role.DECODE}
        for way in ("pull", "pull, D samples the first token", "reserve, then pull", "push by layer"):
            async with world(servers, roles, experiment(**WAYS[way])) as cluster, front(cluster, folder) as http:
                for one, before in zip([*asked, *asked[:3]], [*expected, *expected[:3]], strict=True):  # then prompts lie in the cache
                    found = await answer(http, one)
                    assert alike(found, before), (way, one, found, before)
        async with world({"d": servers["d"]}, {"d": Role.MIXED}, experiment()) as alone, front(alone, folder) as http:
            for one, before in zip(asked, expected, strict=True):
                assert alike(await answer(http, one), before), one

    play(folder, "auto", scenario, eos_ids=(256,))


def test_migrations_change_no_answer(tmp_path: Path) -> None:
    folder = served.make(tmp_path, **tiny_models.SLOW)
    asked = [
        {
            **GREEDY,
            "max_tokens": 150,
            "allowed_token_ids": list(range(97, 110)),
            "bad_words": ["bc", "aa", "g"],
            "echo": True,
            "logprobs": 0,
        },
        {**GREEDY, "max_tokens": 150, "temperature": 0.9, "seed": 3, "allowed_token_ids": list(range(97, 123)), "bad_words": ["ab", "c"]},
    ]

    async def scenario(servers: dict[str, Server]) -> None:
        expected = [await answer(servers["d0"].http, one) for one in asked]
        roles = {"p": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
        async with world(servers, roles, experiment(mode="pull"), policy=Shuttle()) as cluster, front(cluster, folder) as http:
            for one, before in zip(asked, expected, strict=True):
                assert alike(await answer(http, one), before)
            assert sum(int(cluster.timeline(i)["migrations"]) for i in range(2)) >= 2  # type: ignore[call-overload]
        text = expected[0]["choices"][0]["text"].removeprefix(PROMPT)
        assert set(text) <= set("abcdefhijklm") and "bc" not in text and "aa" not in text

    play(folder, "auto", scenario, names="p d0 d1")
