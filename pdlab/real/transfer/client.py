"""What this endpoint asks of peers: each transfer is a Job in a thread, over the best way that is open."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pdlab.real.transfer import move, wire
from pdlab.real.transfer.blocks import Ids, KvPart, Layers
from pdlab.real.transfer.connection import PeerConnection, Self
from pdlab.real.transfer.descriptor import Descriptor, Way
from pdlab.real.transfer.landing import Landing
from pdlab.real.transfer.pair import KvPair
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
        self, job: TransferJob, peer: Descriptor, lease_id: str, source: Ids, target: Ids, unit: int, layers: Layers, release: bool
    ) -> TransferResult:
        """Those heads that this rank reads there, of runs of `unit` tokens."""
        began = time.monotonic()
        route = ""
        try:
            route, connection = self._connect(job, peer)
            pair, transfer = connection.inward, secrets.randbits(63)
            here, there = _parts(pair, source, target, unit, layers)
            told = wire.part_of(there)
            finish = wire.Finish(lease_id, transfer, told, release)
            landing = Landing(self._blocks, pair, here, job.writing, checked=self._own.checksums)
            fetched = False
            try:
                with job.holding(connection, self._pool):
                    wire.checked_part(told, pair.source)
                    self._fetch(job, connection, route, lease_id, there, landing)
                    if self._own.checksums:
                        finish = wire.Finish(lease_id, transfer, told, release, landing.crc32())
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
            return TransferResult("done", len(target) * landing.run_bytes, time.monotonic() - began, "", route)
        except TransferStopped as trouble:
            return TransferResult(trouble.status, 0, time.monotonic() - began, trouble.reason, route)

    def push(self, job: TransferJob, peer: Descriptor, ticket: str, source: Ids, target: Ids, unit: int, layers: Layers) -> TransferResult:
        """Those heads that the peer's rank is to get from here."""
        began = time.monotonic()
        route = ""
        try:
            route, connection = self._connect(job, peer)
            there, here = _parts(connection.outward, source, target, unit, layers)
            with job.holding(connection, self._pool):
                mapped = route == "cuda_ipc" or (route == "shm" and self._blocks.segment is not None)
                how = self._by_nixl(here, connection.outward, connection.peer) if route == "nixl" else "mapped" if mapped else "wire"
                if how in ("nixl", "mapped"):
                    self._blocks.settle()
                left_s, checked = job.deadline - time.monotonic(), self._own.checksums
                connection.send(wire.PushRequest(ticket, wire.part_of(here), wire.part_of(there), left_s, how, checked))
                if not connection.receive(wire.Go).arrived:
                    if how in ("wire", "gathered"):
                        self._send(connection, here, job, gathered=how == "gathered")
                    else:
                        connection.receive(wire.Copied)
                    job.check()
                    connection.send(wire.Commit(self._blocks.crc32(here) if checked else None))
                    connection.receive(wire.TransferFinished)
            return TransferResult("done", len(here) * self._blocks.run_bytes(here), time.monotonic() - began, "", route)
        except TransferStopped as trouble:
            return TransferResult(trouble.status, 0, time.monotonic() - began, trouble.reason, route)

    def renew(self, job: TransferJob, peer: Descriptor, leases: list[str], lease_s: float, known: list[str]) -> TransferResult:
        """Adds those that hold to `known`."""
        try:
            _, connection = self._connect(job, peer)
            with job.holding(connection, self._pool):
                connection.send(wire.RenewLeases(leases, lease_s))
                known += connection.receive(wire.Renewed).known
            return TransferResult("done")
        except TransferStopped as trouble:
            return TransferResult("failed", reason=trouble.reason)

    def _fetch(self, job: TransferJob, connection: PeerConnection, route: Route, lease_id: str, source: KvPart, landing: Landing) -> None:
        if not len(source):
            return
        gathered = route == "nixl" and self._by_nixl(source, landing.pair, connection.peer) == "gathered"
        if route == "nixl" and not gathered:
            move.read_blocks(connection, source, landing)
        elif connection.mapped is not None:
            move.copy_blocks(connection, source, landing)
        else:
            connection.send(wire.Read(lease_id, wire.part_of(source), job.deadline - time.monotonic(), gathered))
            move.receive_blocks(connection, landing, gathered=gathered)

    def _by_nixl(self, source: KvPart, pair: KvPair, peer: Descriptor) -> Literal["nixl", "gathered"]:
        nixl, there = self._own.nixl, peer.nixl
        assert nixl is not None and there is not None
        return "gathered" if len(source) and nixl.gathers(source, pair, there) else "nixl"

    def _send(self, connection: PeerConnection, part: KvPart, job: TransferJob, *, gathered: bool) -> None:
        try:
            move.send_blocks(connection, part, job.check, gathered=gathered)
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

    def _connect(self, job: TransferJob, peer: Descriptor) -> tuple[Route, PeerConnection]:
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


def _parts(pair: KvPair, source: Ids, target: Ids, unit: int, layers: Layers) -> tuple[KvPart, KvPart]:
    """The target's part, and the source's, of the heads that the one reads from the other."""
    read = pair.read
    assert read is not None, "this rank reads nothing there"
    here, there = (range(first, first + read.count) for first in (read.target_first, read.source_first))
    return KvPart(target, unit, here, layers), KvPart(source, unit, there, layers)
