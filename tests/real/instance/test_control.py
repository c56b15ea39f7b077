"""/pdlab/v1, and whatever a peer may send there or in kv_transfer_params."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.instance_spec import Placed, instance_spec
from pdlab.core.types import InstanceSpec, Report, Role
from pdlab.real.api.app import create_app
from pdlab.real.api.exchange import KvExchange
from pdlab.real.api.service import Service
from pdlab.real.instance.control import ROUTES
from pdlab.real.instance.member import Member, measured_of
from pdlab.real.instance.migrate import Migrations
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.wire import About
from tests.support.api_world import JSON as HEADERS
from tests.support.echo_engine import EchoEngine
from tests.support.kv_engine import KvEngine
from tests.support.local_instances import Lending, instance

CONTROL = "/pdlab/v1"


def test_an_instance_tells_what_it_is_and_its_load(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p", role=Role.PREFILL) as p:
            about = msgspec.json.decode((await p.http.get(f"{CONTROL}/instance")).content, type=About)
            assert (about.protocol, about.engine_id, about.state, about.in_flight) == (1, "engine-p", "ready", 0)
            spec = msgspec.json.decode(about.spec, type=InstanceSpec)
            assert (spec.name, spec.role, spec.url) == ("p", Role.PREFILL, p.url)
            assert "pull" in spec.capabilities
            report = msgspec.convert((await p.http.get(f"{CONTROL}/report")).json(), Report)
            assert (report.instance, report.running) == ("p", 0)

    asyncio.run(play())


def test_the_clusters_token_is_asked_for_and_stands_in_for_the_api_key(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            p.service.api_key = "secret"
            assert (await p.http.get("/v1/models")).status_code == 200
            for headers in ({}, {"X-PDLab-Token": "wrong"}, {"X-PDLab-Token": "\u00e4".encode().decode("latin-1")}):
                p.http.headers = httpx.Headers(headers, encoding="latin-1")
                refused = await p.http.get(f"{CONTROL}/instance")
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_token")
                assert (await p.http.get("/v1/models")).status_code == 401
            p.service.token = None
            assert (await p.http.get(f"{CONTROL}/instance")).status_code == 200

    asyncio.run(play())


def test_leases_are_released_and_renewed(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            await p.ask(prompt="abcd", max_tokens=1, kv_transfer_params={"do_remote_decode": True})
            (lease,) = p.engine.shelf
            assert (await p.ask(f"{CONTROL}/renew", lease=lease, lease_s=12)).status_code == 200
            assert (await p.ask(f"{CONTROL}/release", lease=lease)).status_code == 200
            assert p.engine.heard == [("renew", lease, 12.0), ("release", lease)]
            ended = await p.ask(f"{CONTROL}/renew", lease=lease)
            assert (ended.status_code, ended.json()["error"]["code"]) == (404, "lease_unknown")
            p.engine.down = "gone"
            answer = await p.ask(f"{CONTROL}/renew", lease="a")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")

    asyncio.run(play())


def test_transfers_and_leases_are_told_under_vllms_names(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            await p.ask(prompt="abcd", max_tokens=1, kv_transfer_params={"do_remote_decode": True})
            told = (await p.http.get("/metrics")).text
            labels = '{engine="0",instance="p",model_name="tiny",role="mixed"}'
            assert f"pdlab:leases{labels} 1.0" in told
            assert f"vllm:nixl_bytes_transferred_sum{labels} 0.0" in told
            assert f"vllm:nixl_num_failed_transfers_total{labels} 0.0" in told

    asyncio.run(play())


def test_a_leg_that_is_not_here_is_unknown(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p", engine=KvEngine("p", step_s=0.005)) as p:
            p.engine.holds_at = 3
            for path in ("continue", "export"):
                answer = await p.ask(f"{CONTROL}/{path}", leg="r1")
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "leg_unknown")
            async with p.stream("r1", prompt="ab", n=2, max_tokens=200) as stream:
                await stream.next()
                assert (await p.ask(f"{CONTROL}/continue", leg="r1")).json()["error"]["code"] == "leg_unknown"
                answer = await p.ask(f"{CONTROL}/export", leg="r1")
                assert (answer.status_code, answer.json()["error"]["message"]) == (
                    400,
                    "this leg has several candidates, and cannot be moved",
                )

    asyncio.run(play())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 2, "kv_transfer_params": {"do_remote_decode": True}}, "max_tokens must be 1 where"),
    ({"n": 2, "kv_transfer_params": {"do_remote_decode": True}}, "n and best_of must be 1 where"),
    ({"stream": True, "kv_transfer_params": {"do_remote_decode": True}}, "stream must be false where"),
    ({"prompt": ["a", "b"], "kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params goes with one prompt, not 2"),
    ({"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": True}}, "exclude each other"),
    ({"kv_transfer_params": {"do_remote_prefill": "yes"}}, "kv_transfer_params.do_remote_prefill: expected `bool`, got `str`"),
    (
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [[1], [2]]}},
        "kv_transfer_params.remote_block_ids has 2 groups",
    ),
    (
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [-1]}},
        "kv_transfer_params.remote_block_ids must be block ids",
    ),
    (
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_request_id": "a", "pdlab": {"made": [1]}}},
        "kv_transfer_params.pdlab.made needs all of remote_block_ids",
    ),
    ({"kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"made": [300]}}}, "kv_transfer_params.pdlab.made has token 300"),
    (
        {"kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"reserve": True}}},
        "kv_transfer_params.pdlab.reserve needs stream: true",
    ),
    (
        {"stream": True, "n": 2, "kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"reserve": True, "made": [1]}}},
        "belong to one candidate",
    ),
    (
        {"stream": True, "max_tokens": 2, "kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"reserve": True, "made": [1, 2]}}},
        "kv_transfer_params.pdlab.made has 2 tokens, which leaves none of max_tokens 2",
    ),
    (
        {"stream": True, "kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"migrate": {"url": "file:///etc", "leg": "r"}}}},
        "kv_transfer_params.pdlab.migrate.url 'file:///etc' is neither http nor https",
    ),
    (
        {"kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"deadline_s": 1e9}}},
        "kv_transfer_params.pdlab.deadline_s must be above 0",
    ),
    (
        {"kv_transfer_params": {"do_remote_decode": True, "pdlab": {"push": {"descriptor": "x", "ticket": "t", "block_ids": [2**40]}}}},
        "kv_transfer_params.pdlab.push.block_ids must be block ids",
    ),
    ({"ttft_slo_ms": 0}, "ttft_slo_ms must be above 0, not 0"),
    ({"detokenize": False, "stop": "x"}, "stop needs text"),
    ({"detokenize": False, "echo": True}, "echo needs text"),
]


def app_of(folder: Path, exchanges: bool = True) -> Any:
    engine = Lending("fuzzed")
    service = Service(engine, Tokenizer.load(folder), "tiny", exchange=KvExchange(engine, Migrations(engine)) if exchanges else None)
    app = create_app(service, ROUTES)
    placed = Placed(name="fuzzed", role=Role.MIXED, host="here", url="http://x", model="tiny")
    app.state.member = Member(service, engine, None, instance_spec(placed, measured_of(engine.ready)))
    return app


@pytest.mark.parametrize("path", [path for method, path, _ in ROUTES if method == "POST"])
def test_no_order_comes_from_a_web_page_with_a_body_or_without(folder: Path, path: str) -> None:
    async def refused() -> set[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app_of(folder)), base_url="http://x") as client:
            answers = [await client.post(path), await client.post(path, content="{}", headers={"Content-Type": "text/plain"})]
        return {answer.status_code for answer in answers}

    assert asyncio.run(refused()) == {415}


async def post(app: Any, path: str, body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", verify=False) as client:
        answer = await client.post(path, content=json.dumps(body), headers=HEADERS)
        await app.state.member.close()
        return answer


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_wrong_is_named(folder: Path, fields: dict[str, Any], message: str) -> None:
    answer = asyncio.run(post(app_of(folder), "/v1/completions", {"prompt": "abc", **fields}))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_server_without_exchange_computes_all_itself_and_refuses_what_only_pdlab_asks(folder: Path) -> None:
    app = app_of(folder, exchanges=False)
    for asked in ({"do_remote_decode": True}, {"do_remote_prefill": True, "remote_block_ids": [1]}):
        answer = asyncio.run(post(app, "/v1/completions", {"prompt": "abc", "kv_transfer_params": asked}))
        assert answer.status_code == 200
        assert answer.json().get("kv_transfer_params") is None
    refused = asyncio.run(post(app, "/v1/completions", {"prompt": "abc", "kv_transfer_params": {"pdlab": {"reserve": True}}}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "kv_transfer_params")
    assert asyncio.run(post(app, f"{CONTROL}/release", {"lease": "x"})).status_code == 400


def test_a_plain_engine_may_serve_the_same_api(folder: Path) -> None:
    app = create_app(Service(EchoEngine(), Tokenizer.load(folder), "tiny"), ROUTES)

    async def play() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", verify=False) as client:
            return await client.post(f"{CONTROL}/drain", headers=HEADERS)

    assert asyncio.run(play()).status_code == 503


NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 300)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["http://127.0.0.1:1", "engine-fuzzed", "layer", "{}"])
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)


def bodies(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with the known fields, right or wrong, or anything else."""
    return st.fixed_dictionaries({}, optional={name: value | JSON for name, value in known.items()})


IDS = st.lists(st.integers(-1, 300), max_size=4)
SECONDS = st.floats(-1, 4000)
PUSH = bodies(descriptor=st.text(), ticket=st.text(), block_ids=IDS, cached_tokens=st.integers(), granularity=st.text(), deadline_s=SECONDS)
EXTRA = bodies(
    made=IDS,
    events=st.booleans(),
    reserve=st.booleans(),
    push=PUSH,
    migrate=bodies(url=st.text(), leg=st.text()),
    descriptor=st.text(),
    kv_tokens=st.integers(),
    deadline_s=SECONDS,
)
PARAMS = bodies(
    do_remote_prefill=st.booleans(),
    do_remote_decode=st.booleans(),
    remote_engine_id=st.just("engine-fuzzed"),
    remote_request_id=st.text(),
    remote_block_ids=IDS | st.lists(IDS),
    remote_host=st.text(),
    remote_port=st.integers(),
    remote_num_tokens=st.integers(),
    pdlab=EXTRA,
)
ASKED = {
    "/v1/completions": bodies(kv_transfer_params=PARAMS, max_tokens=st.just(1)).map(lambda b: {"prompt": "abc", **b, "stream": False}),
    f"{CONTROL}/continue": bodies(leg=st.text(), made=IDS, kv_transfer_params=PARAMS) | JSON,
    f"{CONTROL}/export": bodies(leg=st.text(), stop=st.booleans(), resume=st.booleans(), lease_s=SECONDS) | JSON,
    f"{CONTROL}/release": bodies(lease=st.text(), lease_s=SECONDS) | JSON,
    f"{CONTROL}/renew": bodies(lease=st.text(), lease_s=SECONDS) | JSON,
    f"{CONTROL}/role": bodies(role=st.sampled_from(["prefill", "decode", "both"])) | JSON,
}


@pytest.mark.parametrize("path", ASKED)
def test_whatever_a_peer_sends_is_answered_by_one_line_at_most(folder: Path, path: str) -> None:
    app = app_of(folder)

    @settings(max_examples=100, deadline=None, database=None)
    @given(ASKED[path])
    def play(body: Any) -> None:
        answer = asyncio.run(post(app, path, body))
        assert 200 <= answer.status_code < 300 or 400 <= answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert "\n" not in answer.json()["error"]["message"]

    play()
