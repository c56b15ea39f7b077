"""etcd: leases, transactions, and a watch from a revision. One lease a claim; its report hangs on it too.

Uses etcd3aio's services on a channel of our own, since its client resolves no host names and waits up to two minutes before it
reconnects; and our own watch, since its resumes after the newest revision that it heard of, which can lie after events it has yet to
deliver, waits for ever where a store lost its data, and leaves a pending task behind at each reconnection.
"""

from __future__ import annotations

import asyncio
import math
import socket
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc.aio
from etcd3aio._protobuf import Compare, WatchCreateRequest, WatchRequest, WatchStub
from etcd3aio.auth import AuthService
from etcd3aio.errors import EtcdError
from etcd3aio.kv import KVService, prefix_range_end
from etcd3aio.lease import LeaseService

from pdlab.core.types import UsageError
from pdlab.real.net.credentials import REGISTRY_PASSWORD
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.registry.lease import answering
from pdlab.real.registry.settling import Seen
from pdlab.real.registry.store import Change, Claim, Denied, Peek, Snapshot, StoreAway

CHANNEL = [
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 6000),  # etcd refuses pings more often than every 5 s
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 64 << 20),
]
RETRY_S = 0.2
DELETE = 1  # an event's type
DENIALS = ("authentication failed", "permission denied", "user name is empty")
CALL_S = 5.0  # a bound for each attempt; callers set tighter ones


async def connect(url: str, namespace: str, timeout_s: float, tls: Tls = PLAIN) -> EtcdStore:
    """Raises StoreAway, and UsageError for an address that can't be one."""
    split = urlsplit(url)
    hosts = split.netloc.rpartition("@")[2]
    where = f"{split.scheme}://{hosts}"
    if split.path.strip("/"):
        raise UsageError(f"registry {where}: give only [user:password@]host:port[,host:port]; paths are not supported")
    user, password = unquote(split.username or ""), unquote(split.password or "")
    if bool(user) != bool(password):
        raise UsageError(f"registry {where}: give both user and password ({split.scheme}://USER:PASSWORD@..., or {REGISTRY_PASSWORD})")
    addresses = []
    for endpoint in hosts.split(","):
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UsageError(f"registry {where}: {endpoint!r} is not host:port (etcd's usual port is 2379)")
        addresses.append((host.strip("[]"), int(port)))
    target = f"dns:///{hosts}" if len(addresses) == 1 else await _resolved(addresses)
    if split.scheme == "etcds":
        channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(tls.authorities()), options=CHANNEL)
    else:
        channel = grpc.aio.insecure_channel(target, options=CHANNEL)
    store = EtcdStore(channel, where, namespace, (user, password) if user else None)
    try:
        async with answering(timeout_s):
            await store.check()
    except BaseException:
        await store.close()
        raise
    return store


async def _resolved(addresses: list[tuple[str, int]]) -> str:
    """gRPC takes several addresses only as numbers."""
    loop = asyncio.get_running_loop()
    try:
        found = [await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM) for host, port in addresses]
    except OSError as error:
        raise StoreAway(str(error)) from None
    return "ipv4:" + ",".join("{}:{}".format(*each[0][4]) for each in found)


@contextmanager
def troubles() -> Iterator[None]:
    try:
        yield
    except (EtcdError, TimeoutError) as error:
        raise _away(str(error) or "no answer in time") from None
    except grpc.aio.AioRpcError as error:
        raise _away(str(error.details())) from None


def _away(said: str) -> StoreAway:
    return (Denied if any(words in said for words in DENIALS) else StoreAway)(said[:200])


class EtcdStore:
    poll_s = 0.25

    def __init__(self, channel: grpc.aio.Channel, where: str, namespace: str, login: tuple[str, str] | None = None) -> None:
        """`login`: user and password."""
        self.where, self.login = where, login
        self.auth = AuthService(channel, max_attempts=1)
        self._token = ""
        self.live, self.numbers, self.name = f"/{namespace}/live/", f"/{namespace}/last/", f"/{namespace}/store"
        self.channel = channel
        self.kv = KVService(channel, max_attempts=1)
        self.leases = LeaseService(channel, max_attempts=1)
        self.watches = WatchStub(channel)
        self._seen = Seen()

    async def peek(self, key: str, settle_s: float) -> Peek:
        """etcd loses no write, but may have been started without its data: then a key looks as if it was never claimed."""
        kv = self.kv
        look = [kv.txn_op_get(self.name), kv.txn_op_get(self.live + key), kv.txn_op_get(self.numbers + key)]
        async with self._session():
            named = kv.txn_op_put(self.name, uuid.uuid4().hex)
            answer = await kv.txn([kv.txn_compare_version(self.name, 0)], [named, *look], look, timeout=CALL_S)
        name, held, numbers = (part.response_range.kvs for part in answer.responses[-3:])
        store, last = name[0].value.decode(errors="replace"), self._number(key, numbers)
        settling = not last and self._seen.for_s(store, asyncio.get_running_loop().time()) < settle_s
        return Peek(bool(held) or settling, last, store)

    async def claim(self, key: str, seen: Peek, number: int, value: bytes, lease_s: float) -> Claim | None:
        return await self._take(key, seen.last, number, value, lease_s, self.kv.txn_compare_value(self.name, seen.store))

    async def _take(self, key: str, last: int, number: int, value: bytes, lease_s: float, *more: Compare) -> Claim | None:
        kv = self.kv
        async with self._session():
            lease = (await self.leases.grant(math.ceil(lease_s), timeout=CALL_S)).ID
            counted = kv.txn_compare_value(self.numbers + key, str(last)) if last else kv.txn_compare_version(self.numbers + key, 0)
            taken = await kv.txn(
                [kv.txn_compare_version(self.live + key, 0), counted, *more],
                [kv.txn_op_put(self.numbers + key, str(number)), kv.txn_op_put(self.live + key, value, lease=lease)],
                [],
                timeout=CALL_S,
            )
            if not taken.succeeded:
                await self.leases.revoke(lease, timeout=CALL_S)
        return Claim(key, number, lease_s, str(lease)) if taken.succeeded else None

    async def renew(self, claim: Claim, value: bytes, retake: bool = False) -> Claim | None:
        lease, left_s = int(claim.token), 0
        async with self._session():
            stream = self.leases.keep_alive(lease)
            try:
                async for response in stream:
                    left_s = response.TTL
                    break
            finally:
                stream.cancel()
            held = (await self.kv.get(self.live + claim.key, keys_only=True, timeout=CALL_S)).kvs
        if left_s > 0 and held:
            return claim if held[0].lease == lease else None
        last = 0 if held else await self._last(claim.key)
        if held or last >= claim.number + retake:
            return None
        return await self._take(claim.key, last, claim.number, value, claim.lease_s)

    async def put(self, claim: Claim, key: str, value: bytes) -> bool:
        kv, lease = self.kv, int(claim.token)
        async with self._session():
            try:
                done = await kv.txn(
                    [
                        kv.txn_compare_version(self.live + claim.key, 0, result=Compare.GREATER),
                        kv.txn_compare_value(self.numbers + claim.key, str(claim.number)),
                    ],
                    [kv.txn_op_put(self.live + key, value, lease=lease)],
                    [],
                    timeout=CALL_S,
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:  # the lease
                    return False
                raise
        return bool(done.succeeded)

    async def release(self, claim: Claim) -> None:
        async with self._session():
            try:
                await self.leases.revoke(int(claim.token), timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

    async def snapshot(self) -> Snapshot:
        async with self._session():
            found = await self.kv.get(self.live, prefix_range_end(self.live), timeout=CALL_S)
        return Snapshot(found.header.revision, {self._key(each.key): each.value for each in found.kvs})

    async def changes(self) -> AsyncIterator[Change | None]:
        """Resumes after the last revision that was delivered; where the store no longer has that one, a new watch has to begin."""
        newest, first = 0, True
        while True:
            async with self._session():
                stream = self.watches.Watch(metadata=(("token", self._token),) if self._token else None)
            try:
                request = WatchCreateRequest(
                    key=self.live.encode(), range_end=prefix_range_end(self.live), start_revision=0 if first else newest + 1
                )
                await stream.write(WatchRequest(create_request=request))
                async for response in stream:
                    self._token = "" if response.canceled else self._token  # it may have been what was wrong
                    if response.canceled or response.compact_revision or response.header.revision < newest:
                        raise StoreAway("the store no longer has what came next")
                    if response.created:  # what came between may have been in a store that has lost its data since
                        newest, first = response.header.revision if first else newest, False
                        yield None
                    for event in response.events:
                        newest = event.kv.mod_revision
                        yield Change(newest, self._key(event.kv.key), None if event.type == DELETE else event.kv.value)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise StoreAway(str(error.details())[:200]) from None
            finally:
                stream.cancel()
            await asyncio.sleep(RETRY_S)

    async def check(self) -> int:
        async with self._session():
            await self.kv.get(self.live, prefix_range_end(self.live), count_only=True, timeout=CALL_S)
        return 0

    async def close(self) -> None:
        await self.channel.close()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        """Logged in, where there is a password. A token that etcd has forgotten, as after a restart, is had anew by the next call."""
        with troubles():
            if self.login is not None and not self._token:
                self._token = str((await self.auth.authenticate(*self.login, timeout=CALL_S)).token)
                self.kv.set_token(self._token)
                self.leases.set_token(self._token)
            try:
                yield
            except (EtcdError, grpc.aio.AioRpcError) as error:
                if "auth" in str(error):
                    self._token = ""
                raise

    def _key(self, key: bytes) -> str:
        return key[len(self.live) :].decode("utf-8", "replace")

    async def _last(self, key: str) -> int:
        async with self._session():
            return self._number(key, (await self.kv.get(self.numbers + key, timeout=CALL_S)).kvs)

    def _number(self, key: str, found: Sequence[Any]) -> int:
        """What a counter holds."""
        if not found:
            return 0
        if len(found[0].value) > 19 or not found[0].value.isdigit():
            raise StoreAway(f"{self.numbers}{key} should count incarnations and holds {found[0].value[:40]!r}: delete it")
        return int(found[0].value)
