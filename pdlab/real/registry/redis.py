"""Redis: a hash with a time to live for each claim, scripts for compare-and-set, pub/sub for changes.

Redis tells nobody in time when a key expires, so an index of the held keys is swept by whoever watches, and the sweep publishes what
it misses. Every change has the next revision, so a watcher sees when pub/sub lost one. Keep a server's data (`appendonly yes`): the
counters are in it. All keys share a hash tag. One server (or its cluster slot).

A server that was killed, or whose replica has taken over, may be without the last writes that it had acknowledged. So a claim is made in
the run of the server in which its holder has looked, or not at all; and in a new run nobody leads for the first lease.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from pdlab.core.types import UsageError
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.registry.lease import answering
from pdlab.real.registry.settling import Seen
from pdlab.real.registry.store import INSTANCE, REPORT, Change, Claim, Denied, Peek, Snapshot, StoreAway

log = logging.getLogger(__name__)
OLDEST = (6, 2)

# KEYS of all scripts: live keys' prefix, counters' prefix, index, revision, channel, the store's own name
HEAD = """
local live, numbers, index, revision, channel, store = unpack(KEYS)
local function publish(op, key, value)
    local r = redis.call('INCR', revision)
    redis.call('PUBLISH', channel, r .. ' ' .. op .. ' ' .. key .. '\\n' .. value)
end
local function sweep()
    for _, key in ipairs(redis.call('SMEMBERS', index)) do
        if redis.call('EXISTS', live .. key) == 0 then
            redis.call('SREM', index, key)
            publish('del', key, '')
        end
    end
    return tonumber(redis.call('GET', revision) or 0)
end
local function run()
    local server = redis.call('INFO', 'server')
    return string.match(server, 'run_id:(%x+)'), tonumber(string.match(server, 'uptime_in_seconds:(%d+)'))
end
local function put(key, ...)
    redis.call('HSET', live .. key, ...)
    redis.call('SADD', index, key)
end
"""
PEEK = """
redis.call('SETNX', store, ARGV[2])
local id, up_s = run()
local last = redis.call('GET', numbers .. ARGV[1]) or '0'
return {redis.call('EXISTS', live .. ARGV[1]), last, redis.call('GET', store) .. ' ' .. id, up_s}
"""
CLAIM = """
local key, last, number, value, ttl_ms, seen = unpack(ARGV)
local id = run()
if (redis.call('GET', store) or '') .. ' ' .. id ~= seen then return false end
if redis.call('EXISTS', live .. key) == 1 or (redis.call('GET', numbers .. key) or '0') ~= last then return false end
redis.call('SET', numbers .. key, number)
put(key, 'number', number, 'value', value)
redis.call('PEXPIRE', live .. key, ttl_ms)
publish('put', key, value)
return id
"""
RENEW = """
local key, report, number, ttl_ms = unpack(ARGV)
local found = redis.call('HGET', live .. key, 'number')
if not found then return (run()) end
if found ~= number then return 0 end
redis.call('PEXPIRE', live .. key, ttl_ms)
redis.call('PEXPIRE', live .. report, ttl_ms)
return 1
"""
PUT = """
local key, number, target, value = unpack(ARGV)
if redis.call('HGET', live .. key, 'number') ~= number then return 0 end
put(target, 'value', value)
redis.call('PEXPIRE', live .. target, redis.call('PTTL', live .. key))
publish('put', target, value)
return 1
"""
RELEASE = """
local key, report, number = unpack(ARGV)
if redis.call('HGET', live .. key, 'number') == number then
    redis.call('DEL', live .. key, live .. report)
    sweep()
end
"""
SNAPSHOT = """
local found = {sweep()}
for _, key in ipairs(redis.call('SMEMBERS', index)) do
    found[#found + 1] = key
    local value = redis.pcall('HGET', live .. key, 'value')
    found[#found + 1] = type(value) == 'string' and value or ''
end
return found
"""
SWEEP = "return sweep()"


class _TlsConnection(SSLConnection):
    """One whose socket is closed when it is left. TLS ends with a word from the peer, for which the client does not wait where a call was
    given up; the peer may never say it, and the event loop may end before."""

    async def disconnect(self, nowait: bool = False, *given: Any, **more: Any) -> None:
        writer = self._writer
        try:
            if nowait and writer is not None:
                writer.transport.abort()
            await super().disconnect(nowait, *given, **more)
        except BaseException:
            if writer is not None:
                writer.transport.abort()
            raise


async def connect(url: str, namespace: str, timeout_s: float, tls: Tls = PLAIN) -> RedisStore:
    """Raises StoreAway, and UsageError for a URL that can't be one."""
    secure: dict[str, Any] = {"ssl_ca_certs": tls.ca_certs} if url.startswith("rediss:") and tls.ca_certs else {}
    try:
        client = Redis.from_url(url, **secure, retry=Retry(NoBackoff(), 0), socket_connect_timeout=timeout_s, socket_timeout=None)
        if client.connection_pool.connection_class is SSLConnection:
            client.connection_pool.connection_class = _TlsConnection
    except ValueError as error:
        raise UsageError(f"registry {_where(url)}: {error}") from None
    store = RedisStore(client, _where(url), namespace)
    try:
        async with answering(timeout_s):
            await store.check_version()
            await store.check()
            await store.warn_of_data_loss()
    except BaseException:
        await store.close()
        raise
    return store


def _where(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


class RedisStore:
    poll_s = 0.25

    def __init__(self, client: Redis, where: str, namespace: str) -> None:
        self.client, self.where = client, where
        self.closed = False
        base = f"{{{namespace}}}:"
        self.live, self.numbers, self.channel = f"{base}live/", f"{base}last/", f"{base}changes"
        self.keys = [self.live, self.numbers, f"{base}index", f"{base}revision", self.channel, f"{base}store"]
        self._seen = Seen()

    async def peek(self, key: str, settle_s: float) -> Peek:
        held, last, named, up_s = await self._run(PEEK, key, uuid.uuid4().hex)
        if len(last) > 19 or not last.isdigit():
            raise StoreAway(f"{self.numbers}{key} should count incarnations and holds {last[:40]!r}: delete it")
        store = named.decode(errors="replace")
        known_s = self._seen.for_s(store, asyncio.get_running_loop().time())
        young = not int(last) or self._seen.changed or up_s < settle_s + 1  # whole seconds, begun ones too
        return Peek(bool(held) or (known_s < settle_s and young), int(last), store)

    async def claim(self, key: str, seen: Peek, number: int, value: bytes, lease_s: float) -> Claim | None:
        run = await self._run(CLAIM, key, seen.last, number, value, int(lease_s * 1000), seen.store)
        return Claim(key, number, lease_s, run.decode()) if run else None

    async def renew(self, claim: Claim, value: bytes, retake: bool = False) -> Claim | None:
        done = await self._run(RENEW, claim.key, _report(claim.key), claim.number, int(claim.lease_s * 1000))
        if isinstance(done, int):
            return claim if done else None
        if not retake and done.decode() == claim.token:
            return None  # it expired
        found = await self.peek(claim.key, 0.0)
        return await self.claim(claim.key, found, claim.number, value, claim.lease_s) if found.last <= claim.number else None

    async def put(self, claim: Claim, key: str, value: bytes) -> bool:
        return bool(await self._run(PUT, claim.key, claim.number, key, value))

    async def release(self, claim: Claim) -> None:
        await self._run(RELEASE, claim.key, _report(claim.key), claim.number)

    async def snapshot(self) -> Snapshot:
        revision, *found = await self._run(SNAPSHOT)
        keys = (key.decode("utf-8", "replace") for key in found[::2])
        return Snapshot(revision, dict(zip(keys, found[1::2], strict=True)))

    async def changes(self) -> AsyncIterator[Change | None]:
        async with self.client.pubsub() as pubsub:
            async with self._troubles():
                await pubsub.subscribe(self.channel)
            while True:
                async with self._troubles():
                    message = await pubsub.get_message(timeout=None)
                if message is not None and message["type"] == "subscribe":
                    yield None
                elif message is not None and message["type"] == "message":
                    yield _read(message["data"])

    async def check_version(self) -> None:
        """Raises UsageError for one that is too old; who may not ask, or hears nothing, goes on."""
        try:
            found = str((await self.client.info("server")).get("redis_version", ""))
        except (AuthenticationError, AuthorizationError, NoPermissionError):
            return  # what needs a right is told by what needs it
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreAway(str(error)[:200] or type(error).__name__) from None
        version = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        if len(version) == 2 and version < OLDEST:
            raise UsageError(f"registry {self.where}: redis {found[:20]} answers there, and {OLDEST[0]}.{OLDEST[1]} or newer is needed")

    async def check(self) -> int:
        return int(await self._run(SWEEP))

    async def warn_of_data_loss(self) -> None:
        try:
            kept = (await self.client.config_get("appendonly")).get("appendonly", "yes")
        except RedisError:  # not allowed to ask
            return
        if kept == "no":
            log.warning("registry: %s forgets incarnations when it restarts: start it with --appendonly yes", self.where)

    async def close(self) -> None:
        self.closed = True
        await self.client.aclose()

    async def _run(self, script: str, *arguments: str | int | bytes) -> Any:
        async with self._troubles():
            return await self.client.eval(HEAD + script, len(self.keys), *self.keys, *arguments)

    @asynccontextmanager
    async def _troubles(self) -> AsyncIterator[None]:
        """A call that was connecting while the store was closed, or comes later, would leave a connection behind: the client opens one."""
        if self.closed:
            raise StoreAway("the registry was closed here")
        try:
            yield
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise Denied(str(error)[:200]) from None
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreAway(str(error)[:200] or type(error).__name__) from None
        finally:
            await self._leave_nothing()

    async def _leave_nothing(self) -> None:
        if self.closed:
            await self.client.connection_pool.disconnect()


def _report(key: str) -> str:
    return key.replace(INSTANCE, REPORT, 1)


def _read(message: bytes) -> Change | None:
    """None, take a snapshot, for what none of our scripts wrote."""
    head, newline, value = message.partition(b"\n")
    revision, _, rest = head.partition(b" ")
    op, _, key = rest.partition(b" ")
    if not newline or not revision.isdigit() or len(revision) > 15 or op not in (b"put", b"del"):
        log.warning("registry: skipped a message on the redis channel: %.100r", message)
        return None
    return Change(int(revision), key.decode("utf-8", "replace"), value if op == b"put" else None)
