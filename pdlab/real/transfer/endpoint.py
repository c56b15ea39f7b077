"""What the engine calls: asyncio on this side, threads behind it. One Endpoint for each KV memory of an instance."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
from torch import Tensor

from pdlab.real.transfer import descriptor as descriptors
from pdlab.real.transfer import move, nixl, rdma, wire
from pdlab.real.transfer.blocks import Blocks, Ids, Layers, copy_pieces
from pdlab.real.transfer.connection import Connection, Self
from pdlab.real.transfer.descriptor import Descriptor, Shm, Tcp, incompatible
from pdlab.real.transfer.leases import Lease, Leases
from pdlab.real.transfer.pool import Pool
from pdlab.real.transfer.result import Result, Trouble
from pdlab.real.transfer.server import Server
from pdlab.real.transfer.tickets import Tickets
from pdlab.types import UsageError

Route = Literal["tcp", "shm", "nixl"]
ROUTES: tuple[Route, ...] = ("shm", "nixl", "tcp")
GRACE_S = 0.25
LeaseEnded = Callable[[str, list[int], str], None]


class _Job:
    """A transfer in a thread, or waiting for one. Whoever calls `abort` must still wait for its thread: only then is it over."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._lock = threading.Lock()
        self._begun = self._aborted = False
        self._connection: Connection | None = None

    def begin(self) -> bool:
        with self._lock:
            self._begun = True
            return not self._aborted

    def drop(self) -> bool:
        """True: it had not begun, and now will do nothing."""
        with self._lock:
            self._aborted = self._aborted or not self._begun
            return not self._begun

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            if self._connection is not None:
                self._connection.abort()

    @contextmanager
    def holding(self, connection: Connection, pool: Pool) -> Iterator[None]:
        """The connection goes back to the pool if all went well, and is closed if not."""
        with self._lock:
            self._connection = connection
        try:
            self.check()
            yield
        except BaseException:
            with self._lock:
                self._connection = None
            connection.close()
            raise
        with self._lock:
            self._connection = None
            aborted = self._aborted
        if aborted:
            connection.close()
        else:
            pool.give(connection)

    def check(self) -> None:
        if self._aborted:
            raise Trouble("cancelled")
        if time.monotonic() >= self.deadline:
            raise Trouble("the deadline has passed")

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.check()
        yield


class Endpoint:
    """KV memory [layers, 2, blocks, kv_heads, block_tokens, head_dim] that peers may read from and push to.

    transport: "tcp", "shm" (same host), "nixl", or "auto", which offers what there is and takes for each peer shm on one host, else NIXL
    where both have an RDMA NIC, else TCP. `host` and `port` are listened on, `advertise` is told to peers. `token`: only who has the same
    may connect. `checksums`: every transfer compares CRC-32 of both ends. `lease_ended(lease id, block ids, "read" | "expired")` is called
    in the event loop: the blocks are the engine's again.

        async with Endpoint(kv, name="decode-0", incarnation="a1", block_tokens=16, model_hash="...") as endpoint:
            result = await endpoint.pull(descriptor, lease, [3, 9], [0, 7], deadline_s=5.0)
    """

    def __init__(
        self,
        kv: Tensor,
        *,
        name: str,
        incarnation: str,
        block_tokens: int,
        model_hash: str,
        transport: str = "auto",
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str = "",
        token: str = "",
        checksums: bool = False,
        threads: int = 8,
        lease_ended: LeaseEnded | None = None,
    ) -> None:
        if transport == "cuda_ipc":
            raise UsageError("transport cuda_ipc is not available: use shm on one host (staged through host memory for a GPU), or nixl")
        if transport not in ("auto", *ROUTES):
            raise UsageError(f"transport {transport!r} is unknown: take auto, tcp, shm or nixl")
        if transport == "nixl" and nixl.api() is None:
            raise UsageError("transport nixl needs NIXL: pip install nixl-cu12 (on CUDA 13 machines nixl-cu13), or take tcp")
        self._transport = transport
        if host in ("", "0.0.0.0") and not advertise:
            raise UsageError(f"an endpoint on {host!r} cannot be found by that name: set `advertise` to the address that peers reach it by")
        self._advertise = advertise or host
        self._geometry = descriptors.geometry(kv, block_tokens, model_hash)
        self._blocks = Blocks(kv)
        self._name, self._incarnation, self._host, self._port = name, incarnation, host, port
        self._token, self._checksums = token.encode(), checksums
        self._lease_ended = lease_ended
        self._leases, self._tickets = Leases(), Tickets()
        self._size = threads
        self._timer: asyncio.TimerHandle | None = None
        self._own: Self
        self._pool: Pool
        self._server: Server
        self._threads: ThreadPoolExecutor
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[_Job] = set()
        self._expected: dict[str, tuple[asyncio.Future[Result], asyncio.TimerHandle]] = {}

    async def __aenter__(self) -> Endpoint:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen. UsageError: the address cannot be had."""
        assert self._loop is None, "started before"
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._open)
        except BaseException:
            self._loop = None
            raise

    async def close(self) -> None:
        """Ends every transfer under way, as failed, then everything else. Leases end without a callback."""
        if self._loop is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        for job in self._jobs:
            job.abort()
        for ticket in list(self._expected):
            self._tickets.close(ticket, "failed", "the endpoint closed")
        await asyncio.to_thread(self._shut)
        await asyncio.sleep(0)  # futures resolved by threads
        self._loop = None

    def descriptor(self) -> bytes:
        """What peers need to know, as JSON."""
        return self._own.encoded

    def refusal(self, peer_descriptor: bytes) -> str | None:
        """Why no KV can pass between this endpoint and that one; None: it can."""
        return incompatible(self._own.descriptor, peer_descriptor)

    def offer(self, lease_id: str, block_ids: Iterable[int], *, tokens: int, lease_s: float = 30.0) -> None:
        """Peers may read these blocks until they have, or the lease ends. A lease id is used once. May be called from any thread, like
        `renew` and `release`."""
        assert self._loop is not None, "start the endpoint first"
        self._leases.offer(lease_id, self._ids(block_ids), tokens, time.monotonic() + lease_s)
        self._from_thread(self._arm)

    def renew(self, lease_id: str, lease_s: float = 30.0) -> bool:
        """From now on; never shortens. False: it has ended."""
        return self._leases.renew(lease_id, time.monotonic() + lease_s)

    def release(self, lease_id: str) -> bool:
        """Ends it, without a callback: a read under way ends as expired. False: it had ended, and its callback came or comes."""
        return self._leases.end(lease_id, "released") is not None

    async def renew_at(self, peer_descriptor: bytes, lease_ids: Sequence[str], *, lease_s: float, deadline_s: float) -> list[str] | None:
        """A destination's heartbeat to the source. Those of the leases that still hold; None: the peer cannot be asked."""
        job = _Job(time.monotonic() + deadline_s)
        known: list[str] = []
        result = await self._run(job, deadline_s, partial(self._renew, job, peer_descriptor, list(lease_ids), lease_s, known))
        return known if result.status == "done" else None

    async def pull(
        self,
        peer_descriptor: bytes,
        lease_id: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        layers: Layers | None = None,
        deadline_s: float,
        release: bool | None = None,
    ) -> Result:
        """The peer's blocks, in layers first <= l < last, into blocks of ours. With `release` (default: if the last layer is among them)
        success ends the lease; so does pulling no block at all, where all of them are here already. When this returns, or raises
        CancelledError, nothing of it writes any more."""
        source, target = np.fromiter(src_block_ids, np.int32), self._ids(dst_block_ids)
        assert len(source) == len(target), f"{len(source)} blocks for {len(target)}"
        assert len(np.unique(target)) == len(target), "a block is written twice"
        span = self._span(layers)
        end = span[1] == self._blocks.layers if release is None else release
        job = _Job(time.monotonic() + deadline_s)
        return await self._run(job, deadline_s, partial(self._pull, job, peer_descriptor, lease_id, source, target, span, end))

    async def push(
        self,
        peer_descriptor: bytes,
        ticket: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        layers: Layers | None = None,
        deadline_s: float,
    ) -> Result:
        """A part of what the peer expects under `ticket`. Our blocks must stay as they are until this returns."""
        source, target = self._ids(src_block_ids), np.fromiter(dst_block_ids, np.int32)
        assert len(source) == len(target), f"{len(source)} blocks for {len(target)}"
        job = _Job(time.monotonic() + deadline_s)
        return await self._run(job, deadline_s, partial(self._push, job, peer_descriptor, ticket, source, target, self._span(layers)))

    def expect(
        self, ticket: str, dst_block_ids: Iterable[int], *, layers: Layers | None = None, deadline_s: float
    ) -> asyncio.Future[Result]:
        """Peers may push into these blocks under `ticket`, which is used once. Resolves when all of every block and layer has come, or at
        the deadline, or when a peer that pushed has died; from then on nothing writes there."""
        assert self._loop is not None, "start the endpoint first"
        span, future = self._span(layers), self._loop.create_future()
        timer = self._loop.call_later(deadline_s, self._tickets.close, ticket, "failed", f"not all had come after {deadline_s:g} s")
        self._expected[ticket] = future, timer
        try:
            self._tickets.open(
                ticket, self._ids(dst_block_ids), span, self._blocks.block_bytes((0, 1)), partial(self._from_thread, self._resolve, ticket)
            )
        except BaseException:
            timer.cancel()
            del self._expected[ticket]
            raise
        return future

    def cancel(self, ticket: str, reason: str = "cancelled") -> bool:
        """Its future resolves as failed once nothing writes there. False: it had ended."""
        return self._tickets.close(ticket, "failed", reason)

    def _ids(self, ids: Iterable[int]) -> Ids:
        found = np.fromiter(ids, np.int32)
        assert not len(found) or (found.min() >= 0 and found.max() < self._blocks.count), "no such block here"
        return found

    def _span(self, layers: Layers | None) -> Layers:
        span = layers or (0, self._blocks.layers)
        assert 0 <= span[0] < span[1] <= self._blocks.layers, f"layers {span} of {self._blocks.layers}"
        return span

    def _open(self) -> None:
        copy_pieces(np.zeros(0, np.int64), np.zeros(0, np.int64), 1)  # compiled now rather than within some transfer's deadline
        with contextlib.ExitStack() as opened:
            self._listen(opened)
            opened.pop_all()  # all went well: they stay open

    def _listen(self, opened: contextlib.ExitStack) -> None:
        listeners, tcp, shm, agent = [], None, None, None
        if self._transport != "shm":
            try:
                listener = socket.create_server((self._host, self._port), backlog=128)
            except OSError as error:
                raise UsageError(f"cannot listen on {self._host}:{self._port} for KV transfers: {error}") from error
            listeners.append(opened.enter_context(listener))
            tcp = Tcp(self._advertise, listener.getsockname()[1])
        if self._transport in ("auto", "shm"):
            listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            path = f"pdlab-kv-{secrets.token_hex(12)}"
            listener.bind("\0" + path)
            listener.listen(128)
            listeners.append(listener)
            shm = Shm(path, self._blocks.segment is not None)
        with_rdma = any(nic.active for nic in rdma.nics())
        if self._transport == "nixl" or (self._transport == "auto" and with_rdma and nixl.api() is not None):
            agent = nixl.Nixl(f"{self._name}-{self._incarnation}", self._blocks, rdma=with_rdma)
        host = descriptors.host_id()
        address = agent.address if agent is not None else None
        own = Descriptor(self._name, self._incarnation, host, self._geometry, self._blocks.count, tcp, shm, address)
        self._own = Self(own, self._blocks, self._token, agent, self._checksums)
        self._pool = Pool(self._own)
        self._threads = ThreadPoolExecutor(self._size, thread_name_prefix="kv-transfer")
        self._server = Server(self._own, self._leases, self._tickets, self._read_by_peer, listeners)

    def _shut(self) -> None:
        self._pool.close()
        self._server.close()
        self._threads.shutdown(wait=True, cancel_futures=False)
        if self._own.nixl is not None:
            self._own.nixl.close()

    async def _run(self, job: _Job, deadline_s: float, work: Callable[[], Result]) -> Result:
        assert self._loop is not None, "start the endpoint first"
        future = self._loop.run_in_executor(self._threads, _begun, job, work)
        self._jobs.add(job)
        try:
            await asyncio.wait({future}, timeout=deadline_s)
            if not future.done():
                if job.drop():
                    return Result("failed", 0, deadline_s, "the deadline has passed: no thread was free for it")
                await asyncio.wait({future}, timeout=GRACE_S)  # its own time-outs say what it was waiting for
                job.abort()
                await asyncio.wait({future})
            return future.result()
        except asyncio.CancelledError:
            job.abort()
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({future})
            raise
        finally:
            self._jobs.discard(job)

    def _pull(self, job: _Job, peer_descriptor: bytes, lease_id: str, source: Ids, target: Ids, layers: Layers, release: bool) -> Result:
        began = time.monotonic()
        route = ""
        try:
            route, connection = self._connect(job, peer_descriptor)
            packed, transfer = wire.pack_ids(source), secrets.randbits(63)
            finish = wire.Finish(lease_id, transfer, packed, *layers, release)
            fetched = False
            try:
                with job.holding(connection, self._pool):
                    wire.block_ids(packed, connection.peer.blocks)
                    self._fetch(job, connection, route, lease_id, source, target, layers)
                    if self._checksums:
                        finish = wire.Finish(lease_id, transfer, packed, *layers, release, self._blocks.crc32(target, layers))
                    connection.send(finish)
                    fetched = True
                    connection.receive(wire.Finished)
            except Trouble as trouble:
                if not trouble.broken or not fetched:
                    raise
                job.check()
                again = self._pool.take(connection.peer, local=connection.local, deadline=job.deadline)
                with job.holding(again, self._pool):
                    again.send(finish)
                    again.receive(wire.Finished)
            return Result("done", len(target) * self._blocks.block_bytes(layers), time.monotonic() - began, "", route)
        except Trouble as trouble:
            return Result(trouble.status, 0, time.monotonic() - began, trouble.reason, route)

    def _fetch(self, job: _Job, connection: Connection, route: Route, lease_id: str, source: Ids, target: Ids, layers: Layers) -> None:
        if not len(source):
            return
        if route == "nixl":
            move.read_blocks(connection, source, target, layers, job.writing)
        elif connection.mapped is not None and self._blocks.on_cpu:
            move.copy_blocks(connection, source, target, layers, job.writing)
        else:
            connection.send(wire.Read(lease_id, wire.pack_ids(source), *layers, job.deadline - time.monotonic()))
            move.receive_blocks(connection, target, layers, job.writing)

    def _push(self, job: _Job, peer_descriptor: bytes, ticket: str, source: Ids, target: Ids, layers: Layers) -> Result:
        began = time.monotonic()
        route = ""
        try:
            route, connection = self._connect(job, peer_descriptor)
            with job.holding(connection, self._pool):
                how = "nixl" if route == "nixl" else "mapped" if route == "shm" and self._blocks.segment is not None else "wire"
                connection.send(
                    wire.Push(ticket, wire.pack_ids(source), wire.pack_ids(target), *layers, job.deadline - time.monotonic(), how)
                )
                if not connection.receive(wire.Go).arrived:
                    if how == "wire":
                        self._send(connection, source, layers, job)
                    else:
                        connection.receive(wire.Copied)
                    job.check()
                    connection.send(wire.Commit(self._blocks.crc32(source, layers) if self._checksums else None))
                    connection.receive(wire.Finished)
            return Result("done", len(source) * self._blocks.block_bytes(layers), time.monotonic() - began, "", route)
        except Trouble as trouble:
            return Result(trouble.status, 0, time.monotonic() - began, trouble.reason, route)

    def _send(self, connection: Connection, source: Ids, layers: Layers, job: _Job) -> None:
        try:
            move.send_blocks(connection, source, layers, job.check)
        except Trouble as trouble:
            if trouble.broken:  # because the peer refused and hung up?
                connection.deadline = time.monotonic() + 0.05
                with contextlib.suppress(TimeoutError):
                    try:
                        connection.receive(wire.Finished)
                    except Trouble as told:
                        if not told.broken:
                            raise
            raise

    def _renew(self, job: _Job, peer_descriptor: bytes, leases: list[str], lease_s: float, known: list[str]) -> Result:
        try:
            _, connection = self._connect(job, peer_descriptor)
            with job.holding(connection, self._pool):
                connection.send(wire.Renew(leases, lease_s))
                known += connection.receive(wire.Renewed).known
            return Result("done")
        except Trouble as trouble:
            return Result("failed", reason=trouble.reason)

    def _connect(self, job: _Job, peer_descriptor: bytes) -> tuple[Route, Connection]:
        """The best way to the peer that is open."""
        peer = descriptors.decode(peer_descriptor)
        refusal = incompatible(self._own.descriptor, peer)
        if refusal is not None:
            raise Trouble(refusal)
        routes = self._routes(peer)
        if not routes:
            there = [route for route in ROUTES if getattr(peer, route) is not None]
            where = "" if peer.host == self._own.descriptor.host else ", on another host"
            raise Trouble(f"no way to {peer.name}: it offers {', '.join(there) or 'nothing'}{where}; this endpoint uses {self._transport}")
        for route in routes:
            job.check()
            try:
                return route, self._pool.take(peer, local=route == "shm", deadline=job.deadline)
            except Trouble as trouble:
                if not trouble.broken or route == routes[-1]:
                    raise
        raise AssertionError("the last route raises or returns")

    def _routes(self, peer: Descriptor) -> list[Route]:
        own = self._own.descriptor
        shm = own.shm is not None and peer.shm is not None and own.host == peer.host
        both = own.nixl is not None and peer.nixl is not None and peer.tcp is not None
        if self._transport == "nixl":
            return ["nixl"] if both else []
        with_rdma = both and own.nixl is not None and peer.nixl is not None and own.nixl.rdma and peer.nixl.rdma
        found: list[tuple[Route, bool]] = [("shm", shm), ("nixl", with_rdma), ("tcp", own.tcp is not None and peer.tcp is not None)]
        return [route for route, there in found if there]

    def _read_by_peer(self, lease_id: str, lease: Lease) -> None:
        self._from_thread(self._tell, lease_id, lease, "read")

    def _tell(self, lease_id: str, lease: Lease, how: str) -> None:
        if self._lease_ended is not None:
            self._lease_ended(lease_id, sorted(lease.blocks), how)

    def _arm(self) -> None:
        """A timer for the next lease to expire."""
        if self._loop is None:
            return
        due = self._leases.next_s()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_later(max(0.0, due - time.monotonic()), self._expire)

    def _expire(self) -> None:
        for lease_id, lease in self._leases.expire(time.monotonic()):
            self._tell(lease_id, lease, "expired")
        self._arm()

    def _resolve(self, ticket: str, result: Result) -> None:
        future, timer = self._expected.pop(ticket)
        timer.cancel()
        if not future.done():
            future.set_result(result)

    def _from_thread(self, call: Callable[..., None], *args: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has gone
                self._loop.call_soon_threadsafe(call, *args)


def _begun(job: _Job, work: Callable[[], Result]) -> Result:
    return work() if job.begin() else Result("failed", reason="cancelled before it began")
