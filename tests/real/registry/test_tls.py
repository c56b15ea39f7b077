"""etcd and redis over TLS, with users and passwords: real servers, and an authority that the test makes."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest
from etcd3aio.auth import AuthService, PermissionType
from etcd3aio.errors import EtcdError
from etcd3aio.kv import prefix_range_end
from etcd3aio.maintenance import MaintenanceService

from pdlab.core.types import Joined, UsageError
from pdlab.real.net.credentials import registry_url
from pdlab.real.net.tls import Tls
from pdlab.real.registry import Registry, open_registry
from pdlab.real.registry.etcd import EtcdStore
from tests.real.registry.conftest import missing
from tests.support import certificates
from tests.support.certificates import Certificates
from tests.support.ports import free_port
from tests.support.registry_worlds import spec

PASSWORD = "pass/word:with@signs"
QUOTED = "pass%2Fword%3Awith%40signs"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("ca"))


@contextmanager
def process(command: list[str], ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + 60
        while not ready():
            assert running.poll() is None and time.monotonic() < until_s, f"{command[0]} is not ready"
            time.sleep(0.1)
        yield running
    finally:
        running.kill()
        running.wait()


def redis_command(folder: Path, certs: Certificates) -> tuple[list[str], Callable[[], bool], str]:
    """What starts a server, whether it is ready, and its address. Its user `me` has the password."""
    port = free_port()
    lines = [
        f'port 0\ntls-port {port}\nbind 127.0.0.1\nsave ""\nappendonly yes\ndir {folder}',
        f"tls-cert-file {certs.cert}\ntls-key-file {certs.key}\ntls-ca-cert-file {certs.ca}\ntls-auth-clients no",
        f"user me on >{PASSWORD} ~* &* +@all\nuser default off\n",
    ]
    (folder / "redis.conf").write_text("\n".join(lines))
    asked = ["redis-cli", "-p", str(port), "--tls", "--cacert", str(certs.ca), "ping"]

    def ready() -> bool:
        return b"NOAUTH" in subprocess.run(asked, capture_output=True, check=False).stdout

    return ["redis-server", str(folder / "redis.conf")], ready, f"127.0.0.1:{port}"


@contextmanager
def redis(folder: Path, certs: Certificates) -> Iterator[str]:
    """Its address."""
    command, ready, at = redis_command(folder, certs)
    with process(command, ready):
        yield at


class Etcd:
    """With users; started and stopped by the test."""

    def __init__(self, folder: Path, certs: Certificates) -> None:
        self.at, self.certs = f"127.0.0.1:{free_port()}", certs
        peers = f"http://127.0.0.1:{free_port()}"
        self.command = ["etcd", "--data-dir", str(folder / "data"), "--listen-client-urls", f"https://{self.at}"]
        self.command += ["--advertise-client-urls", f"https://{self.at}", "--listen-peer-urls", peers]
        self.command += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
        self.command += ["--cert-file", str(certs.cert), "--key-file", str(certs.key)]

    def running(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return process(self.command, lambda: asyncio.run(self._answers()))

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        async with grpc.aio.secure_channel(self.at, grpc.ssl_channel_credentials(self.certs.ca.read_bytes())) as channel:
            yield channel

    async def _answers(self) -> bool:
        async with self.channel() as channel:
            try:
                await MaintenanceService(channel, max_attempts=1).status(timeout=1.0)
            except (EtcdError, grpc.aio.AioRpcError, TimeoutError) as error:
                return "UNAVAILABLE" not in str(error) and "DEADLINE" not in str(error)
            return True

    async def add_user(self) -> None:
        async with self.channel() as channel:
            auth = AuthService(channel)
            for user, password in (("root", "root"), ("me", PASSWORD)):
                await auth.user_add(user, password)
            await auth.role_add("pdlab")
            await auth.role_grant_permission("pdlab", "/pdlab/", prefix_range_end("/pdlab/"), perm_type=PermissionType.READWRITE)
            await auth.role_add("root")
            await auth.user_grant_role("root", "root")
            await auth.user_grant_role("me", "pdlab")
            await auth.auth_enable()


async def opened(url: str, tls: Tls) -> Registry:
    """A server that has just been started may close the first connection."""
    for _ in range(20):
        with contextlib.suppress(UsageError):
            return await open_registry(url, tls=tls, timeout_s=20.0)
        await asyncio.sleep(0.5)
    return await open_registry(url, tls=tls, timeout_s=20.0)


async def serves(url: str, tls: Tls) -> None:
    """An instance registers, another registry sees it, and sees it leave."""
    async with await opened(url, tls) as one, await opened(url, tls) as other:
        assert PASSWORD not in one.store.where and QUOTED not in one.store.where
        place = await one.register(spec("p0"), lease_s=5.0)
        async with aclosing(other.watch()) as events:
            assert isinstance(await asyncio.wait_for(anext(events), 30), Joined)
        await place.close()


def refused(url: str, tls: Tls, why: str) -> None:
    with pytest.raises(UsageError, match=why) as raised:
        asyncio.run(open_registry(url, tls=tls, timeout_s=5.0))
    assert PASSWORD not in str(raised.value) and QUOTED not in str(raised.value) and "\n" not in str(raised.value)


def test_redis_over_tls_with_a_user(tmp_path: Path, certs: Certificates) -> None:
    if reason := missing("redis"):
        pytest.skip(reason)
    tls = Tls(ca_certs=str(certs.ca))
    with redis(tmp_path, certs) as at:
        url = f"rediss://me:{QUOTED}@{at}"
        asyncio.run(serves(url, tls))
        refused(url, Tls(), "certificate verify failed")
        refused(url, Tls(ca_certs=str(certs.other_ca)), "certificate verify failed")
        refused(f"rediss://me:wrong@{at}", tls, "correct the user or the password")
        refused(f"rediss://{at}", tls, "correct the user or the password")
        refused(f"redis://me:{QUOTED}@{at}", tls, "no redis server answers there")


def test_etcd_over_tls_with_a_user_also_after_it_has_forgotten_its_tokens(tmp_path: Path, certs: Certificates) -> None:
    if reason := missing("etcd"):
        pytest.skip(reason)
    tls, etcd = Tls(ca_certs=str(certs.ca)), Etcd(tmp_path, certs)
    url = f"etcds://me:{QUOTED}@{etcd.at}"
    with etcd.running():
        asyncio.run(etcd.add_user())
        asyncio.run(serves(url, tls))
        refused(url, Tls(), "no etcd server answers there")
        refused(url, Tls(ca_certs=str(certs.other_ca)), "no etcd server answers there")
        refused(f"etcds://me:wrong@{etcd.at}", tls, "correct the user or the password")
        refused(f"etcds://{etcd.at}", tls, "correct the user or the password")
        refused(f"etcd://me:{QUOTED}@{etcd.at}", tls, "no etcd server answers there")
    with contextlib.ExitStack() as stack:
        stack.enter_context(etcd.running())

        async def main() -> None:
            async with await opened(url, tls) as one:
                place = await one.register(spec("p1"), lease_s=60.0)
                stack.close()
                await asyncio.to_thread(stack.enter_context, etcd.running())
                store = cast(EtcdStore, one.store)  # it may find its tokens again in its log: this one it never gave out
                store._token = "forgotten.1"
                for service in (store.kv, store.leases):
                    service.set_token(store._token)
                async with asyncio.timeout(60):
                    while not await place.update(place.spec):
                        await asyncio.sleep(0.2)
                await seen(one)

        asyncio.run(main())


async def seen(registry: Registry) -> None:
    async with aclosing(registry.watch()) as events:
        event = await asyncio.wait_for(anext(events), 60)
        assert isinstance(event, Joined) and event.spec.name == "p1"


def test_the_password_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    monkeypatch.setenv("PDLAB_REGISTRY_PASSWORD_FILE", str(tmp_path / "password"))
    assert registry_url("etcds://me@host:1") == f"etcds://me:{QUOTED}@host:1"
    assert registry_url("rediss://host:1/2?namespace=a") == f"rediss://:{QUOTED}@host:1/2?namespace=a"
    assert registry_url("memory://") == "memory://" and registry_url("") == ""
    with pytest.raises(UsageError, match="remove one of them") as raised:
        registry_url("etcds://me:other@host:1")
    assert "other" not in str(raised.value).replace("another", "")
    (tmp_path / "url").write_text("redis://me:secret@host:1")
    monkeypatch.delenv("PDLAB_REGISTRY_PASSWORD_FILE")
    monkeypatch.setenv("PDLAB_REGISTRY_FILE", str(tmp_path / "url"))
    assert registry_url("") == "redis://me:secret@host:1"
