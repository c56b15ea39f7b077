"""What this endpoint asks of peers: each transfer is a Job in a thread, over the best way that is open."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pdlab.real.transfer import descriptor as descriptors
from pdlab.real.transfer import move, wire
from pdlab.real.transfer.blocks import Ids, Layers
from pdlab.real.transfer.connection import PeerConnection, Self
from pdlab.real.transfer.descriptor import Descriptor, Way, incompatible
from pdlab.real.transfer.pool import Pool
from pdlab.real.transfer.result import TransferResult, TransferStopped

Route = Literal["tcp", "shm", "cuda_ipc", "nixl"]
ROUTES: tuple[Route, ...] = ("cuda_ipc", "shm", "nixl", "tcp")


class TransferJob:
    """A transfer in a thread, or waiting for one. Whoever calls `abort` must still wait for its thread: only then is it over."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._lock = threading.Lock()
        self._begun = self._aborted = False
        self._connection: PeerConnection | None = None

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
    def holding(self, connection: PeerConnection, pool: Pool) -> Iterator[None]:
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
            raise TransferStopped("cancelled")
        if time.monotonic() >= self.deadline:
            raise TransferStopped("the deadline has passed")

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.check()
        yield


class TransferClient:
    """Its methods block, in a thread each, and give a Result whatever happens. `transport`: that of the endpoint."""

    def __init__(self, own: Self, transport: str) -> None:
        self._own, self._blocks, self._transport = own, own.blocks, transport
        self._pool = Pool(own)

    def close(self) -> None:
        self._pool.close()

    def pull(
        self, job: TransferJob, peer_descriptor: bytes, lease_id: str, source: Ids, target: Ids, layers: Layers, release: bool
    ) -> TransferResult:
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
                    if self._own.checksums:
                        finish = wire.Finish(lease_id, transfer, packed, *layers, release, self._blocks.crc32(target, layers))
                    connection.send(finish)
                    fetched = True
                    connection.receive(wire.TransferFinished)
            except TransferStopped as trouble:
                if not trouble.broken or not fetched:
                    raise
                job.check()
                again = self._pool.take(connection.peer, way=connection.way, deadline=job.deadline)
                with job.holding(again, self._pool):
                    again.send(finish)
                    again.receive(wire.TransferFinished)
            return TransferResult("done", len(target) * self._blocks.block_bytes(layers), time.monotonic() - began, "", route)
        except TransferStopped as trouble:
            return TransferResult(trouble.status, 0, time.monotonic() - began, trouble.reason, route)

    def push(self, job: TransferJob, peer_descriptor: bytes, ticket: str, source: Ids, target: Ids, layers: Layers) -> TransferResult:
        began = time.monotonic()
        route = ""
        try:
            route, connection = self._connect(job, peer_descriptor)
            with job.holding(connection, self._pool):
                mapped = route == "cuda_ipc" or (route == "shm" and self._blocks.segment is not None)
                how = self._by_nixl(source, connection.peer) if route == "nixl" else "mapped" if mapped else "wire"
                if how in ("nixl", "mapped"):
                    self._blocks.settle()
                connection.send(
                    wire.PushRequest(ticket, wire.pack_ids(source), wire.pack_ids(target), *layers, job.deadline - time.monotonic(), how)
                )
                if not connection.receive(wire.Go).arrived:
                    if how in ("wire", "gathered"):
                        self._send(connection, source, layers, job, gathered=how == "gathered")
                    else:
                        connection.receive(wire.Copied)
                    job.check()
                    connection.send(wire.Commit(self._blocks.crc32(source, layers) if self._own.checksums else None))
                    connection.receive(wire.TransferFinished)
            return TransferResult("done", len(source) * self._blocks.block_bytes(layers), time.monotonic() - began, "", route)
        except TransferStopped as trouble:
            return TransferResult(trouble.status, 0, time.monotonic() - began, trouble.reason, route)

    def renew(self, job: TransferJob, peer_descriptor: bytes, leases: list[str], lease_s: float, known: list[str]) -> TransferResult:
        """Adds those that hold to `known`."""
        try:
            _, connection = self._connect(job, peer_descriptor)
            with job.holding(connection, self._pool):
                connection.send(wire.RenewLeases(leases, lease_s))
                known += connection.receive(wire.Renewed).known
            return TransferResult("done")
        except TransferStopped as trouble:
            return TransferResult("failed", reason=trouble.reason)

    def _fetch(
        self, job: TransferJob, connection: PeerConnection, route: Route, lease_id: str, source: Ids, target: Ids, layers: Layers
    ) -> None:
        if not len(source):
            return
        gathered = route == "nixl" and self._by_nixl(source, connection.peer) == "gathered"
        if route == "nixl" and not gathered:
            move.read_blocks(connection, source, target, layers, job.writing)
        elif connection.mapped is not None:
            move.copy_blocks(connection, source, target, layers, job.writing)
        else:
            connection.send(wire.Read(lease_id, wire.pack_ids(source), *layers, job.deadline - time.monotonic(), gathered))
            move.receive_blocks(connection, target, layers, job.writing, gathered=gathered)

    def _by_nixl(self, source: Ids, peer: Descriptor) -> Literal["nixl", "gathered"]:
        nixl, there = self._own.nixl, peer.nixl
        assert nixl is not None and there is not None
        return "gathered" if len(source) and nixl.gathers(source, there) else "nixl"

    def _send(self, connection: PeerConnection, source: Ids, layers: Layers, job: TransferJob, *, gathered: bool) -> None:
        try:
            move.send_blocks(connection, source, layers, job.check, gathered=gathered)
        except TransferStopped as trouble:
            if trouble.broken:  # because the peer refused and hung up?
                connection.deadline = time.monotonic() + 0.05
                with contextlib.suppress(TimeoutError):
                    try:
                        connection.receive(wire.TransferFinished)
                    except TransferStopped as told:
                        if not told.broken:
                            raise
            raise

    def _connect(self, job: TransferJob, peer_descriptor: bytes) -> tuple[Route, PeerConnection]:
        peer = descriptors.decode(peer_descriptor)
        refusal = incompatible(self._own.descriptor, peer)
        if refusal is not None:
            raise TransferStopped(refusal)
        routes = self._routes(peer)
        if not routes:
            there = [route for route in ROUTES if getattr(peer, route) is not None]
            where = "" if peer.host == self._own.descriptor.host else ", on another host"
            raise TransferStopped(
                f"no way to {peer.name}: it offers {', '.join(there) or 'nothing'}{where}; this endpoint uses {self._transport}"
            )
        for route in routes:
            job.check()
            way: Way = "tcp" if route == "nixl" else route
            try:
                return route, self._pool.take(peer, way=way, deadline=job.deadline)
            except TransferStopped as trouble:
                if not trouble.broken or route == routes[-1]:
                    raise
        raise AssertionError("the last route raises or returns")

    def _routes(self, peer: Descriptor) -> list[Route]:
        """Those that may be open, the best first."""
        own, gpu = self._own.descriptor, self._own.cuda_ipc
        here = own.host == peer.host
        nixl = (own.nixl, peer.nixl) if own.nixl is not None and peer.nixl is not None and peer.tcp is not None else ()
        if self._transport == "nixl":
            return ["nixl"] if nixl else []
        alone = self._transport == "cuda_ipc"  # then trying again says why it does not work
        open_ways: dict[Route, bool] = {
            "cuda_ipc": here and gpu is not None and peer.cuda_ipc is not None and (alone or gpu.works_with(*peer.key)),
            "shm": here and own.shm is not None and peer.shm is not None,
            "nixl": bool(nixl) and all(end.rdma for end in nixl),
            "tcp": own.tcp is not None and peer.tcp is not None,
        }
        return [route for route in ROUTES if open_ways[route]]
