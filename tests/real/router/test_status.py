"""What an operator sees of a cluster, and asks of its instances."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdlab.core.types import Report, Role, UsageError
from pdlab.real.registry import Registry, open_registry
from pdlab.real.router import status
from pdlab.real.router.status import InstanceRow, Source, View
from tests.support import echo_engine
from tests.support.local_instances import TOKEN, Instance, instance
from tests.support.registry_worlds import spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_engine.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def cluster(folder: Path, main: Callable[[Registry, Source, dict[str, Instance]], Coroutine[Any, Any, None]], *roles: Role) -> None:
    """Instances that have joined a registry in memory, one of each role."""

    async def all_of_it() -> None:
        async with await open_registry("memory://") as registry, asyncio.timeout(120):
            await nested(registry, list(roles), {})

    async def nested(registry: Registry, left: list[Role], made: dict[str, Instance]) -> None:
        if not left:
            await main(registry, lambda: status.of_registry(registry), made)
            return
        name = f"i{len(made)}"
        async with instance(folder, name, role=left[0], registry=registry, report_s=0.02, lease_s=60.0) as one:
            await nested(registry, left[1:], {**made, name: one})

    asyncio.run(all_of_it())


def text(view: View, unix_s: float = 100.0) -> str:
    written = StringIO()
    Console(width=200, file=written).print(status.table(view, unix_s))
    return written.getvalue()


def test_the_table_shows_load_age_refusals_and_who_leads() -> None:
    busy = InstanceRow(spec("p0", model="m"), "ready", report=Report("p0", 1, 98.5, waiting=4, running=2, used_blocks=250))
    view = View([busy, InstanceRow(spec("d0", role=Role.DECODE), "refused", "its KV does not fit")], "r1")
    shown = text(view)
    assert "4/2" in shown and "250/1,000" in shown and "1.5 s ago" in shown and "never" in shown
    assert "r1 leads" in shown and "d0 is refused: its KV does not fit" in shown
    assert "nobody is registered" in text(View()) and "no router leads" in text(View())


def test_urls_are_left_out_where_the_terminal_is_too_narrow_for_them() -> None:
    view = View([InstanceRow(spec("prefill-0"), "ready"), InstanceRow(spec("decode-0", role=Role.DECODE), "draining")])
    for width, there in ((80, False), (120, True)):
        written = StringIO()
        console = Console(width=width, file=written)
        console.print(status.fitting(view, console))
        assert ("http://127.0.0.1/decode-0" in written.getvalue()) is there
        assert "prefill-0" in written.getvalue() and "draining" in written.getvalue()


def test_a_watch_goes_on_while_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "WATCH_S", 0.0)
    written = StringIO()
    console = Console(width=200, file=written)
    answers: list[View | UsageError] = [UsageError("http://a:1 does not answer"), View([InstanceRow(spec("d0"), "ready")], "r2")]

    async def views() -> View:
        if not answers:
            raise asyncio.CancelledError
        if isinstance(answer := answers.pop(0), UsageError):
            raise answer
        return answer

    first = status.fitting(View([InstanceRow(spec("p0"), "ready")], "r1"), console)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(status.watching(views, console, first, console.print))
    before, during, after = written.getvalue().split("instance")[1:]
    assert "p0" in before and "p0" in during and "http://a:1 does not answer" in during
    assert "d0" in after and "r2 leads" in after and "does not answer" not in after


def test_a_switch_waits_until_the_registry_says_so(folder: Path) -> None:
    async def main(registry: Registry, views: Source, made: dict[str, Instance]) -> None:
        assert await status.switch(views, "i0", Role.DECODE, TOKEN) == "i0 is decode"
        assert (await views()).find("i0").spec.role is Role.DECODE
        assert await status.switch(views, "i0", Role.DECODE, TOKEN) == "i0 is decode already"

    cluster(folder, main, Role.PREFILL, Role.MIXED)


def test_a_drain_waits_until_it_has_left(folder: Path) -> None:
    async def main(registry: Registry, views: Source, made: dict[str, Instance]) -> None:
        assert await status.drain(views, "i1", TOKEN) == "i1 has drained and left"
        assert [row.spec.name for row in (await views()).rows] == ["i0"]

    cluster(folder, main, Role.MIXED, Role.DECODE)


def test_no_role_is_left_empty_unless_forced(folder: Path) -> None:
    async def main(registry: Registry, views: Source, made: dict[str, Instance]) -> None:
        for ask in (status.drain(views, "i1", TOKEN), status.switch(views, "i1", Role.PREFILL, TOKEN)):
            with pytest.raises(UsageError, match="i1 stays decode: nobody else can decode; start another instance, or use --force"):
                await ask
        assert await status.switch(views, "i1", Role.MIXED, TOKEN) == "i1 is mixed"
        assert await status.drain(views, "i1", TOKEN, force=True, wait=False) == "i1 drains"

    cluster(folder, main, Role.PREFILL, Role.DECODE)


def test_mistakes_are_one_line(folder: Path) -> None:
    async def main(registry: Registry, views: Source, made: dict[str, Instance]) -> None:
        await registry.register(spec("v0", engine="vllm", capabilities=("pull",)))
        for ask, says in (
            (status.drain(views, "i9", TOKEN), "no instance is named 'i9'; nearest is i"),
            (status.drain(views, "i0", "wrong"), "wants the cluster's token: give --internal-token"),
            (status.drain(views, "v0", TOKEN), "v0 is a vllm server, which cannot drain"),
        ):
            with pytest.raises(UsageError, match=says):
                await ask

    cluster(folder, main, Role.MIXED, Role.MIXED)


@pytest.mark.parametrize(
    ("registry", "router", "says"),
    [
        (None, None, "give either --registry URL, or --router URL"),
        ("etcd://a:1", "http://a:2", "give either --registry URL, or --router URL"),
        ("memory://", None, "a memory:// registry is inside its router: give --router URL"),
        (None, "http://127.0.0.1:1", "http://127.0.0.1:1 does not answer"),
        (None, "127.0.0.1:1", "must be like http://host:8000"),
    ],
)
def test_where_to_look_must_be_said(registry: str | None, router: str | None, says: str) -> None:
    async def main() -> None:
        async with status.source(registry, router) as views:
            await views()

    with pytest.raises(UsageError, match=says):
        asyncio.run(main())


def test_as_json_it_is_told_to_programs() -> None:
    busy = InstanceRow(spec("p0", model="m"), "ready", report=Report("p0", 1, 98.5, waiting=4, running=2, used_blocks=250, stored=(1, 2)))
    view = View([busy, InstanceRow(spec("d0", role=Role.DECODE), "refused", "its KV does not fit")], "r1")
    found = status.plain(view)
    assert found["leader"] == "r1" and [one["name"] for one in found["instances"]] == ["p0", "d0"]
    first, second = found["instances"]
    assert (first["role"], first["state"], first["kv_blocks"], second["role"]) == ("prefill", "ready", 1000, "decode")
    assert first["report"] == {
        "taken_s": 98.5,
        "waiting": 4,
        "waiting_tokens": 0,
        "running": 2,
        "context_tokens": 0,
        "used_blocks": 250,
        "free_blocks": 0,
        "preempted": 0,
        "decode_steps": 0,
        "decode_s": 0.0,
    }
    assert second["report"] is None and second["refusal"] == "its KV does not fit"
    assert json.loads(json.dumps(found)) == found
    assert status.plain(View()) == {"leader": "", "instances": []}


def test_the_command_prints_json_once_or_a_line_each_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "WATCH_S", 0.01)
    written = StringIO()

    async def main(registry: Registry, views: Source, made: dict[str, Instance]) -> None:
        @asynccontextmanager
        async def here(*_: object) -> AsyncIterator[Source]:
            yield views

        monkeypatch.setattr(status, "source", here)
        console = Console(file=written, width=10)
        await status.show_json("etcd://x", None, "", console, watch=False)
        watching = asyncio.create_task(status.show_json("etcd://x", None, "", console, watch=True))
        while written.getvalue().count("\n") < 3:
            await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    cluster(folder, main, Role.MIXED)
    lines = written.getvalue().splitlines()
    assert all(json.loads(line)["instances"][0]["url"].startswith("http://127.0.0.1:") for line in lines[:3])
