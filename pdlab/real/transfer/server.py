"""What peers ask of this endpoint: a thread for each listener, and one for each connection, blocking."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from pdlab.real.transfer import move, wire
from pdlab.real.transfer.connection import PeerConnection, Self
from pdlab.real.transfer.descriptor import Descriptor
from pdlab.real.transfer.landing import Landing
from pdlab.real.transfer.leases import Leases
from pdlab.real.transfer.result import TransferStopped
from pdlab.real.transfer.tickets import Tickets

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
MAX_BUDGET_S = 600.0
ANSWER_S = 30.0
DRAIN_S = 0.3
PROBE_S = 0.6  # with the accept loop's own delay, a dead peer is known within a second
WATCH_S = 0.1


class TransferServer:
    """Serves until `close`. Called from any thread: `lease_read(id, blocks)`, when a reader has had all it wants, `renewed(ids, seconds)`,
    when readers want leases that hold for longer."""

    def __init__(
        self,
        own: Self,
        leases: Leases,
        tickets: Tickets,
        lease_read: Callable[[str, frozenset[int]], None],
        renewed: Callable[[list[str], float], None],
        listeners: Sequence[socket.socket],
    ) -> None:
        self._own, self._leases, self._tickets, self._lease_read, self._renewed = own, leases, tickets, lease_read, renewed
        self._listeners = listeners
        self._lock = threading.Lock()
        self._closed = False
        self._threads: set[threading.Thread] = set()
        self._sockets: set[socket.socket] = set()
        self._live: Counter[tuple[str, str]] = Counter()
        self._accepting = [threading.Thread(target=self._accept, args=(one,), name="kv-accept", daemon=True) for one in listeners]
        for thread in self._accepting:
            thread.start()

    def close(self) -> None:
        """Hangs up on everybody and waits for the threads."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        for thread in (*self._accepting, *threads):
            thread.join()
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warning("KV transfer cannot accept: %s", error)
                time.sleep(0.1)
                continue
            with self._lock:
                if self._closed or len(self._sockets) >= MAX_CONNECTIONS:
                    sock.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(sock,), name="kv-serve", daemon=True)
                self._threads.add(thread)
                self._sockets.add(sock)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        peer: Descriptor | None = None
        try:
            connection = PeerConnection.accept(sock, self._own)
            peer = connection.peer
            with self._lock:
                self._live[peer.key] += 1
            try:
                self._converse(connection)
            finally:
                with self._lock:
                    self._sockets.discard(sock)
                connection.close()
        except (TransferStopped, OSError) as error:
            log.debug("a KV connection ended: %s", error)
        finally:
            last = False
            with self._lock:
                self._sockets.discard(sock)
                sock.close()
                if peer is not None:
                    self._live[peer.key] -= 1
                    last = not self._live[peer.key]
                    if last:
                        del self._live[peer.key]
            if last and peer is not None:
                self._watch(peer)
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _converse(self, connection: PeerConnection) -> None:
        while True:
            connection.deadline = None
            request = connection.receive_any()
            connection.deadline = time.monotonic() + ANSWER_S
            try:
                self._answer(connection, request)
            except TransferStopped as trouble:
                if trouble.broken:
                    raise
                self._refuse(connection, trouble)
                return
            except Exception:
                log.exception("a KV request failed")
                self._refuse(connection, TransferStopped("internal error"))
                return

    def _refuse(self, connection: PeerConnection, trouble: TransferStopped) -> None:
        """Says so, then reads on for a while: hanging up on unread bytes could overtake the message."""
        connection.deadline = time.monotonic() + DRAIN_S
        with contextlib.suppress(TransferStopped, OSError):
            connection.send(wire.TransferRefused(trouble.status, trouble.reason[:4096]))
            connection.sock.shutdown(socket.SHUT_WR)
            scratch = memoryview(bytearray(1 << 16))
            while True:
                connection.receive_into(scratch)

    def _answer(self, connection: PeerConnection, request: wire.AnyMessage) -> None:
        match request:
            case wire.Read():
                self._read(connection, request)
            case wire.Finish():
                self._finish(connection, request)
            case wire.PushRequest():
                self._push(connection, request)
            case wire.RenewLeases():
                known = [lease for lease in request.leases if lease in self._leases]
                self._renewed(known, min(max(0.0, request.lease_s), MAX_BUDGET_S))
                connection.send(wire.Renewed(known))
            case _:
                raise TransferStopped(f"{type(request).__name__} is no request", broken=True)

    def _read(self, connection: PeerConnection, request: wire.Read) -> None:
        blocks = self._own.blocks
        part, pair = wire.checked_part(request.part, blocks.layout), connection.outward
        if part.unit != pair.unit or len(part.heads) > pair.target.heads:
            raise TransferStopped(f"runs of {part.unit} tokens of {len(part.heads)} heads, more than pass between the two at once")
        connection.deadline = _until(request.budget_s)

        def still_held() -> None:
            self._leases.check(request.lease, part.runs[:0])

        self._leases.check(request.lease, part.blocks(blocks.block_tokens))
        move.send_blocks(connection, part, still_held, gathered=request.gathered)

    def _finish(self, connection: PeerConnection, request: wire.Finish) -> None:
        blocks = self._own.blocks
        part = wire.checked_part(request.part, blocks.layout)
        ids = part.blocks(blocks.block_tokens)
        if request.crc32 is not None and request.crc32 != blocks.crc32(part):
            self._leases.check(request.lease, ids)  # one that has ended explains it better
            raise _differs(f"lease {request.lease}")
        ended = self._leases.finish(request.lease, ids, transfer=request.transfer, release=request.release)
        if ended is not None:
            self._lease_read(request.lease, ended)
        connection.send(wire.TransferFinished())

    def _push(self, connection: PeerConnection, request: wire.PushRequest) -> None:
        blocks, pair = self._own.blocks, connection.inward
        source, target = wire.checked_part(request.source, pair.source), wire.checked_part(request.target, pair.target)
        if (len(source), source.unit, len(source.heads), source.layers) != (len(target), target.unit, len(target.heads), target.layers):
            raise TransferStopped(f"{len(source)} blocks for {len(target)}, or not of the same heads and layers")
        if target.unit != pair.unit:
            raise TransferStopped(f"runs of {target.unit} tokens, where both ends have {pair.unit}")
        connection.deadline = _until(request.budget_s)
        run_bytes = target.unit * pair.source.halves * pair.source.token_bytes
        part = self._tickets.begin(request.ticket, connection.peer.key, target, run_bytes, connection.deadline)
        try:
            connection.send(wire.Go(part.arrived))
            if part.arrived:
                return
            landing = Landing(blocks, pair, target, part.writing, checked=request.checked)
            if request.how in ("wire", "gathered"):
                move.receive_blocks(connection, landing, gathered=request.how == "gathered")
            else:
                if request.how == "nixl":
                    move.read_blocks(connection, source, landing)
                elif request.how == "mapped" and connection.mapped is not None:
                    move.copy_blocks(connection, source, landing)
                else:
                    raise TransferStopped(f"no way {request.how!r} to push")
                connection.send(wire.Copied())
            crc32 = connection.receive(wire.Commit).crc32
            if crc32 is not None and landing.crc32() != crc32:
                raise _differs(f"ticket {request.ticket}")
            part.commit()
        finally:
            part.leave()
        connection.send(wire.TransferFinished())

    def _watch(self, peer: Descriptor) -> None:
        """The last connection from a peer that pushes has gone: is the peer gone too? Asks it, and stays while it matters."""
        while not self._closed and self._tickets.of_peer(peer.key):
            try:
                probe = PeerConnection.connect(peer, self._own, way=(*peer.ways, "tcp")[0], deadline=time.monotonic() + PROBE_S)
            except (TransferStopped, AssertionError):
                for ticket in self._tickets.of_peer(peer.key):
                    self._tickets.close(ticket, "failed", f"{peer.name} has gone")
                if self._own.nixl is not None and peer.nixl is not None:
                    self._own.nixl.forget(peer.nixl.agent)
                return
            try:
                while probe.alive() and not self._closed and not self._live[peer.key] and self._tickets.of_peer(peer.key):
                    time.sleep(WATCH_S)
                if self._live[peer.key]:
                    return
            finally:
                probe.close()


def _until(budget_s: float) -> float:
    return time.monotonic() + min(max(0.0, budget_s), MAX_BUDGET_S)


def _differs(what: str) -> TransferStopped:
    return TransferStopped(f"{what}: the checksum of what arrived differs")
