from __future__ import annotations

import asyncio
import sys
from functools import partial

import pytest

from pdlab.core.types import Report, UsageError
from pdlab.real.registry import Registry, open_registry
from pdlab.real.registry.memory import MemoryStore
from tests.support.registry_worlds import spec


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("zookeeper://a:1", "use one of memory://, etcd://host"),
        ("etdc://a:1", r"did you mean etcd://\?"),
        ("127.0.0.1:2379", "use one of"),
        ("etcd://", "use one of"),
        ("etcd://localhost", "'localhost' is not host:port"),
        ("etcd://a:1,b", "'b' is not host:port"),
        ("etcd://me:secret@a:1/path", "paths are not supported"),
        ("etcd://me@a:1", "give both user and password"),
        ("etcds://me:secret@a", "is not host:port"),
        ("etcds://me:secret@a:1?name=b", "unknown option .name."),
        ("rediss://me:sec/ret@a:1?name=b", "."),
        ("redis://a:many", "registry redis://a:many"),
        ("redis://a:1?name=b", "unknown option 'name'; the only one is namespace"),
        ("redis://a:1?namespace=a/b", "registry namespace 'a/b'"),
    ],
)
def test_a_wrong_url_gets_one_line_with_the_remedy(url: str, said: str) -> None:
    pytest.importorskip("redis")
    pytest.importorskip("etcd3aio")
    with pytest.raises(UsageError, match=said) as raised:
        asyncio.run(open_registry(url))
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize("kind", ["etcd", "redis"])
def test_a_server_that_is_not_there_gets_one_line_with_the_remedy(kind: str) -> None:
    pytest.importorskip({"etcd": "etcd3aio"}.get(kind, kind))
    for host in ("me:secret@127.0.0.1", "127.0.0.1", "no-such-host.invalid"):
        with pytest.raises(
            UsageError, match=rf"no {kind} server answers there \(.*\): start one \({kind}.* or correct the address"
        ) as raised:
            asyncio.run(open_registry(f"{kind}://{host}:1", timeout_s=1.0))
        assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(("kind", "package"), [("etcd", "etcd3aio"), ("redis", "redis.asyncio")])
def test_a_backend_whose_package_is_missing_says_what_to_install(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"pdlab.real.registry.{kind}", raising=False)
    for module in [name for name in sys.modules if name.split(".")[0] == package.split(".")[0]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package.split(".")[0], None)
    with pytest.raises(UsageError, match=f"pip install {package.split('.')[0]}"):
        asyncio.run(open_registry(f"{kind}://127.0.0.1:1"))


def test_what_cannot_be_registered_is_said_before_the_store_is_asked() -> None:
    async def main() -> None:
        registry = await open_registry("memory://")
        with pytest.raises(UsageError, match="instance name 'a/b'"):
            await registry.register(spec("a/b"))
        with pytest.raises(UsageError, match="lease_s 0"):
            await registry.register(spec(), lease_s=0)
        with pytest.raises(UsageError, match="a size is negative"):
            await registry.register(spec(block_bytes=-1))
        with pytest.raises(UsageError, match="candidate ''"):
            await registry.elect("")
        held = await registry.register(spec())
        with pytest.raises(UsageError, match="can't become 'p1'"):
            await held.update(spec("p1"))
        with pytest.raises(UsageError, match="send `stored` and `evicted` in parts"):
            await held.report(Report("p0", stored=tuple(range(1 << 60, (1 << 60) + 60_000))))
        await registry.close()

    asyncio.run(main())


def test_a_store_that_is_away_is_the_users_to_start() -> None:
    async def main() -> None:
        store = MemoryStore()
        store.stop()
        with pytest.raises(UsageError, match=r"memory:// can't be used \(stopped\): is the server running\?"):
            await Registry(store).register(spec())

    asyncio.run(main())


async def _says_it_is(version: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server of that version, as far as its INFO goes; it knows no script."""
    info = f"# Server\r\nredis_version:{version}\r\n".encode()
    while line := await reader.readline():
        words = []
        for _ in range(int(line[1:])):
            size = int((await reader.readline())[1:])
            words.append((await reader.readexactly(size + 2))[:-2].upper())
        answers = {b"INFO": b"$%d\r\n%b\r\n" % (len(info), info), b"EVAL": b"-ERR no scripts here\r\n"}
        writer.write(answers.get(words[0], b"+OK\r\n"))
    writer.close()


@pytest.mark.parametrize(("version", "old"), [("6.0.16", True), ("5.0.7", True), ("6.2.0", False), ("7.0.15", False), ("unstable", False)])
def test_an_old_redis_is_told_from_one_that_will_do(version: str, old: bool) -> None:
    pytest.importorskip("redis")

    async def play() -> None:
        async with await asyncio.start_server(partial(_says_it_is, version), "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            says = f"redis {version} answers there, and 6.2 or newer is needed" if old else "no scripts here"
            with pytest.raises(UsageError, match=says) as raised:
                await open_registry(f"redis://127.0.0.1:{port}")
            assert "\n" not in str(raised.value)

    asyncio.run(play())
