"""A proxy that knows vLLM's dialogue and nothing of pdlab drives two of pdlab's servers, which have no registry: two legs, the first
one's `kv_transfer_params` passed on untouched. Needs no vLLM."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import served

Servers = tuple[httpx.Client, httpx.Client]
PREFILL_LEG = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
NEEDED = {"remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids", "tp_size"}  # by vLLM's decode leg
PROMPT = "KV caches travel from prefill to decode instances. " * 3


KEYS = {"nothing": "none", "a token": "of-the-cluster", "a key": "of-clients"}  # what the servers ask for, and the proxy sends


@pytest.fixture(scope="module", params=KEYS)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    model = served.make(tmp_path_factory.mktemp("tiny"))
    key = KEYS[request.param]
    asks = {"nothing": (), "a token": ("--internal-token", key), "a key": ("--api-key", key)}[request.param]
    options = "--kv-gib", "0.01", "--served-model-name", "tiny", *asks
    with (
        served.server(model, "--role", "prefill", *options) as (p_url, _),
        served.server(model, "--role", "decode", *options) as (d_url, _),
        httpx.Client(base_url=p_url, timeout=120, headers={"Authorization": f"Bearer {key}"}) as p,
        httpx.Client(base_url=d_url, timeout=120, headers={"Authorization": f"Bearer {key}"}) as d,
    ):
        yield p, d


def headers() -> dict[str, str]:
    return {"X-Request-Id": str(uuid.uuid4())}


def prefill(p: httpx.Client, path: str, body: dict[str, Any], named: dict[str, str]) -> dict[str, Any]:
    """As vLLM's example proxy does it: the client's body, cut down to one token."""
    leg = {key: value for key, value in body.items() if key not in ("stream_options", "min_tokens")}
    leg |= {"stream": False, "max_tokens": 1, "kv_transfer_params": PREFILL_LEG}
    if "max_completion_tokens" in body:
        leg["max_completion_tokens"] = 1
    answer = p.post(path, json=leg, headers=named)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["usage"]["completion_tokens"] == 1
    return found


def figure(server: httpx.Client, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def chunks(d: httpx.Client, path: str, body: dict[str, Any], named: dict[str, str]) -> list[dict[str, Any]]:
    with d.stream("POST", path, json=body, headers=named) as stream:
        assert stream.status_code == 200
        said = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert said.pop() == "[DONE]"
    return [json.loads(one) for one in said]


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return str(choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or "")


@pytest.mark.parametrize(
    ("path", "asks"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "min_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 12}),
    ],
)
def test_the_decode_server_answers_as_if_it_had_computed_the_prompt(servers: Servers, path: str, asks: dict[str, Any]) -> None:
    p, d = servers
    body = {"model": "tiny", "temperature": 0, "ignore_eos": True, **asks}
    alone = p.post(path, json=body).json()
    named, computed, moved = headers(), figure(d, "vllm:prompt_tokens_total"), figure(d, "vllm:nixl_bytes_transferred_sum")
    params = prefill(p, path, body, named)["kv_transfer_params"]
    assert params["do_remote_prefill"] is True and params["do_remote_decode"] is False and params.keys() >= NEEDED
    whole = d.post(path, json={**body, "kv_transfer_params": params}, headers=named)
    assert whole.status_code == 200, whole.text
    assert text_of(whole.json()) == text_of(alone) and whole.json()["usage"]["completion_tokens"] == 12
    named = headers()
    params = prefill(p, path, body, named)["kv_transfer_params"]
    streamed = chunks(d, path, {**body, "stream": True, "kv_transfer_params": params}, named)
    assert "".join(text_of(one) for one in streamed) == text_of(alone)
    assert not any("pdlab" in one for one in streamed), "who speaks vLLM's dialect gets nothing else"
    assert figure(d, "vllm:nixl_bytes_transferred_sum") > moved
    assert figure(d, "vllm:prompt_tokens_total") <= computed + 2, "but for each one's last token it was all computed elsewhere"


def test_kv_that_was_read_is_freed_and_so_is_what_nobody_reads_when_the_decode_leg_is_hung_up(servers: Servers) -> None:
    p, d = servers
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 200, "ignore_eos": True}
    named = headers()
    params = prefill(p, "/v1/completions", body, named)["kv_transfer_params"]
    with d.stream("POST", "/v1/completions", json={**body, "stream": True, "kv_transfer_params": params}, headers=named) as stream:
        next(stream.iter_lines())
    for server in servers:
        until_s = time.monotonic() + 60
        while server.get("/pdlab/v1/report").json()["used_blocks"]:
            assert time.monotonic() < until_s
            time.sleep(0.02)
        assert server.get("/pdlab/v1/instance").json().get("leaked_blocks", 0) == 0


def test_params_that_lead_nowhere_are_an_error_or_a_plain_request_never_a_wrong_answer(servers: Servers) -> None:
    p, d = servers
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    alone = text_of(p.post("/v1/completions", json=body).json())
    named = headers()
    params = prefill(p, "/v1/completions", body, named)["kv_transfer_params"]
    lost = d.post("/v1/completions", json={**body, "kv_transfer_params": {**params, "remote_request_id": "nobody"}}, headers=named)
    assert lost.status_code == 409 and lost.json()["error"]["code"] == "kv_lost"
    for nothing in (None, {"do_remote_prefill": False, "do_remote_decode": False}):
        plain = d.post("/v1/completions", json={**body, "kv_transfer_params": nothing}, headers=headers())
        assert plain.status_code == 200 and text_of(plain.json()) == alone
