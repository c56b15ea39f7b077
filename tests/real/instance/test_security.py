"""What an instance does for those who have no credentials, and whom it connects to: listeners that must hear nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from pdlab.core.types import InstanceSpec, Role
from pdlab.real.api.legs import MOST_DESCRIPTOR, MOST_NAME, MOST_SECONDS
from pdlab.real.engine.messages import Receive, Source
from pdlab.real.instance.registered import FRESH_S, NamedByProxies, Registered
from pdlab.real.net import http
from pdlab.real.net.wire import MOST_IDS, ExportAnswer, KvParams
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.registry import Registry
from pdlab.real.transfer.descriptor import Descriptor, Geometry, Tcp
from tests.support.local_instances import Instance, instance, until

PROMPT = list(b"abcdefghij")
ASKED: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4}
KEY = {"Authorization": "Bearer key-of-clients"}
CREDENTIALS: list[dict[str, str]] = [{}, {"X-PDLab-Token": "wrong"}, {"Authorization": "Bearer wrong"}, KEY]


class Listener:
    """An attacker's: what it has heard."""

    def __init__(self) -> None:
        self.heard = b""
        self.calls = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def descriptor(self, name: str = "p") -> str:
        geometry = Geometry(2, 2, 4, 8, "float32", "tiny")
        return Descriptor(name, "1", "elsewhere", geometry, 1 << 20, tcp=Tcp("127.0.0.1", self.port)).encode().decode()


@asynccontextmanager
async def listening() -> AsyncIterator[Listener]:
    found = Listener()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.calls += 1
        try:
            while part := await reader.read(1 << 16):
                found.heard += part
        finally:
            writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    async with server:
        yield found


def hostile(listener: Listener, name: str = "p") -> list[dict[str, Any]]:
    """Legs that would make an instance connect to it."""
    pull = {"remote_request_id": "lease", "remote_block_ids": [[1, 2, 3]], "remote_num_tokens": 10}
    return [
        {"do_remote_prefill": True, "pdlab": {"migrate": {"url": listener.url, "leg": "r1"}, "events": True}},
        {"do_remote_prefill": True, **pull, "pdlab": {"descriptor": listener.descriptor(name)}},
        {"do_remote_decode": True, "pdlab": {"push": {"descriptor": listener.descriptor(name), "ticket": "t", "block_ids": [1, 2, 3]}}},
    ]


def fields(params: dict[str, Any]) -> dict[str, Any]:
    streams = "migrate" in params.get("pdlab", {})
    return {**ASKED, "max_tokens": 1 if params.get("do_remote_decode") else 4, "stream": streams, "kv_transfer_params": params}


def registry() -> Registry:
    return Registry(MemoryStore())


async def without_credentials(one: Instance, listener: Listener) -> None:
    async with httpx.AsyncClient(base_url=one.url, timeout=60) as http:
        for headers in CREDENTIALS:
            for path in ("/v1/completions", "/v1/chat/completions"):
                asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} if "chat" in path else ASKED
                plain = await http.post(path, json=asked, headers=headers)
                assert plain.status_code == (200 if headers is KEY and one.service.api_key else 401)
                for params in [{"do_remote_decode": True}, {}, {"pdlab": {"events": True}}, *hostile(listener)]:
                    more = {key: value for key, value in fields(params).items() if key != "prompt"}
                    answer = await http.post(path, json={**asked, **more}, headers=headers)
                    assert answer.status_code == 401, (headers, params, answer.text)
                    assert answer.json()["error"]["code"] in ("invalid_token", "invalid_api_key")
            for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/pdlab/v1/instance")):
                answer = await http.request(method, path, headers=headers, json={"prompt": "x", "tokens": [1]})
                opened = headers is KEY and one.service.api_key and not path.startswith("/pdlab")
                assert answer.status_code == (200 if opened else 401), (path, headers)
    assert listener.calls == 0 and not one.engine.shelf and not one.engine.inbound


@pytest.mark.parametrize("key", [None, "key-of-clients"])
def test_without_the_token_nothing_is_computed_held_or_connected_to(folder: Path, key: str | None) -> None:
    async def play() -> None:
        async with listening() as listener, registry() as members, instance(folder, "d", registry=members) as one:
            one.service.api_key = key
            await without_credentials(one, listener)

    asyncio.run(play())


@pytest.mark.parametrize("registered", [True, False])
def test_with_the_token_too_only_registered_members_are_connected_to(folder: Path, registered: bool) -> None:
    async def play() -> None:
        async with listening() as listener, registry() as members, instance(folder, "d", registry=members) as one:
            if registered:  # as another: a name alone opens nothing
                other = InstanceSpec(name="p", role=Role.PREFILL, kv_blocks=1, url="http://127.0.0.1:1", descriptor="{}")
                await members.register(other)
            for params in hostile(listener):
                answer = await one.ask(**fields(params))
                assert answer.status_code == 409 or "kv_lost" in answer.text, answer.text
            leg = {**ASKED, "stream": True, "kv_transfer_params": {"do_remote_prefill": True, "pdlab": {"reserve": True}}}
            async with one.stream("r1", **{key: value for key, value in leg.items() if key != "stream"}) as stream:
                assert (await stream.event())["event"] == "reserved"
                go = await one.ask("/pdlab/v1/continue", leg="r1", kv_transfer_params=hostile(listener)[1])
                assert (go.status_code, go.json()["error"]["code"]) == (409, "kv_lost")
            await until(one.at_rest)
            assert listener.calls == 0 and not any(isinstance(heard, Receive) and heard.source for heard in one.engine.heard)
            assert not one.engine.submitted or all(submit.push is None for submit in one.engine.submitted)

    asyncio.run(play())


def test_a_registered_member_that_names_another_in_its_answer_is_not_followed(folder: Path) -> None:
    """The source of a migration says where its KV lies: it lies with a member, or nowhere."""

    async def play() -> None:
        async with listening() as listener, registry() as members, instance(folder, "d", registry=members) as one:
            answer = msgspec.json.encode(ExportAnswer("lease", listener.descriptor(), [1, 2, 3], 10, [1]))

            async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(answer), answer))
                await writer.drain()
                writer.close()

            async with await asyncio.start_server(tell, "127.0.0.1", 0) as server:
                url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                await members.register(InstanceSpec(name="s", role=Role.MIXED, kv_blocks=1, url=url))
                moved = await one.ask(**fields({"do_remote_prefill": True, "pdlab": {"migrate": {"url": url, "leg": "r1"}}}))
                assert "kv_lost" in moved.text and "no instance is registered under the descriptor" in moved.text
            await until(one.at_rest)
            assert listener.calls == 0

    asyncio.run(play())


def test_a_proxy_that_sends_the_token_as_its_api_key_drives_two_instances(folder: Path) -> None:
    async def play() -> None:
        async with registry() as members, instance(folder, "p", registry=members) as p, instance(folder, "d", registry=members) as d:
            for one in (p, d):
                one.http.headers.pop("X-PDLab-Token")
                one.http.headers["Authorization"] = "Bearer of-the-cluster"
            first = await p.ask(**ASKED | {"max_tokens": 1}, kv_transfer_params={"do_remote_decode": True})
            answer = await d.ask(**ASKED, kv_transfer_params=first.json()["kv_transfer_params"])
            assert answer.status_code == 200 and (await p.ask(**ASKED)).json()["choices"] == answer.json()["choices"]
            assert [type(heard) for heard in d.engine.heard] == [Receive]

    asyncio.run(play())


def test_who_has_left_is_forgotten_and_while_the_registry_is_away_those_last_seen_count() -> None:
    async def play() -> None:
        now = 0.0
        store = MemoryStore(lambda: now)
        members = Registry(store, lambda: now)
        directory = Registered(members, lambda: now)
        spec = InstanceSpec(name="p", role=Role.PREFILL, kv_blocks=1, url="http://p:1", descriptor="of p")
        place = await members.register(spec, lease_s=3600.0)
        await directory.check_descriptor(b"of p")
        await directory.check_url("http://p:1")
        store.stop()
        now += 2 * FRESH_S
        await directory.check_descriptor(b"of p")
        await directory.check_url("http://p:1")
        with pytest.raises(Exception, match="no instance is registered"):
            await directory.check_descriptor(b"of q")
        store.start()
        now += 2 * FRESH_S
        await place.close()
        for check in (directory.check_descriptor(b"of p"), directory.check_url("http://p:1")):
            with pytest.raises(Exception, match="no instance is registered"):
                await check
        await members.close()

    asyncio.run(play())


def test_without_a_registry_the_token_is_sent_to_nobody() -> None:
    async def play() -> None:
        await NamedByProxies().check_descriptor(Source(b"anybody", "lease", [1], 1).descriptor)
        with pytest.raises(Exception, match="migrations need a --registry"):
            await NamedByProxies().check_url("http://127.0.0.1:1")

    asyncio.run(play())


def test_what_a_peer_names_and_asks_for_is_bounded(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "d") as one:
            pull: dict[str, Any] = {"do_remote_prefill": True, "remote_request_id": "lease", "remote_num_tokens": 10}
            pull |= {"remote_block_ids": [1, 2, 3], "pdlab": {"descriptor": "{}"}}
            for change, says in (
                ({"remote_request_id": "x" * (MOST_NAME + 1)}, "must have 1 to 1024"),
                ({"pdlab": {"descriptor": "x" * (MOST_DESCRIPTOR + 1)}}, "must have 1 to 262144"),
                ({"pdlab": {"descriptor": "{}", "deadline_s": MOST_SECONDS + 1}}, "at most 3600 s"),
            ):
                answer = await one.ask(**ASKED, kv_transfer_params=pull | change)
                assert answer.status_code == 400 and says in answer.text, answer.text[:300]
            for body in ({"lease": "x" * (MOST_NAME + 1)}, {"lease": "x", "lease_s": MOST_SECONDS + 1}):
                assert (await one.ask("/pdlab/v1/renew", **body)).status_code == 400
            assert not one.engine.heard
        with pytest.raises(ValueError, match="must be block ids"):
            KvParams(remote_block_ids=[1] * (MOST_IDS + 1)).block_ids()

    asyncio.run(play())


def test_a_migration_source_that_answers_without_end_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_BODY_BYTES", 10_000)

    async def play() -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            try:
                while sent < 1 << 30:
                    writer.write(b" " * 4096)
                    sent += 4096
                    await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        async with instance(folder, "d") as one, await asyncio.start_server(flood, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            moved = await one.ask(**fields({"do_remote_prefill": True, "pdlab": {"migrate": {"url": url, "leg": "r1"}}}))
            assert "kv_lost" in moved.text
            await until(one.at_rest)
        assert sent < 64 << 20

    asyncio.run(play())
