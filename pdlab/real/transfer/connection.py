"""One authenticated connection between two endpoints: blocking socket calls in whatever thread holds it, all of them under its deadline."""

from __future__ import annotations

import contextlib
import hmac
import mmap
import os
import secrets
import select
import socket
import time
from typing import TypeVar

import numpy as np

from pdlab.real.net.credentials import loopback
from pdlab.real.net.local_peer import stranger
from pdlab.real.net.sockets import keep_alive
from pdlab.real.transfer import wire
from pdlab.real.transfer.blocks import Blocks
from pdlab.real.transfer.cuda_ipc import CudaIpc, Opened
from pdlab.real.transfer.descriptor import Descriptor, Way, decode, incompatible
from pdlab.real.transfer.nixl import Nixl
from pdlab.real.transfer.pair import KvPair, layout_of, pair_of
from pdlab.real.transfer.pieces import Addresses, send_pieces
from pdlab.real.transfer.result import TransferStopped
from pdlab.real.transfer.shared import Mapping, Mappings, Segment

SLOTS = 2  # of a staging buffer: one is filled while the other is emptied
HANDSHAKE_S = 5.0
M = TypeVar("M", bound=wire.WireMessage)


class Self:
    """What an endpoint is, for its connections: all of it outlives them."""

    def __init__(
        self, descriptor: Descriptor, blocks: Blocks, token: bytes, nixl: Nixl | None, checksums: bool, cuda_ipc: CudaIpc | None = None
    ) -> None:
        self.descriptor = descriptor
        self.encoded = descriptor.encode()
        self.blocks = blocks
        self.token = token
        self.nixl = nixl
        self.checksums = checksums
        self.cuda_ipc = cuda_ipc
        self.mappings = Mappings()


class PeerConnection:
    """`peer` is known once `connect` or `accept` returned. `deadline` (monotonic seconds; None: none) is the holder's to set."""

    def __init__(self, sock: socket.socket, own: Self, deadline: float | None) -> None:
        self.sock = sock
        self.own = own
        self.deadline = deadline
        self.peer: Descriptor
        self.local = sock.family == socket.AF_UNIX
        self.way: Way = "shm" if self.local else "tcp"
        self.mapped: Mapping | Opened | None = None  # the peer's KV memory
        self.incoming: Mapping | None = None  # the peer's staging buffer
        self.outgoing: Segment | None = None  # ours
        self._buffer: mmap.mmap | None = None
        if not self.local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)  # while it transfers, its deadline ends it

    @classmethod
    def connect(cls, peer: Descriptor, own: Self, *, way: Way, deadline: float) -> PeerConnection:
        """By one of the peer's `ways`. Trouble: it is not there, is another one, or does not want us."""
        local = peer.shm if way == "shm" else peer.cuda_ipc if way == "cuda_ipc" else None
        if local is None and peer.tcp is not None and not own.token and not loopback(peer.tcp.host):
            raise TransferStopped(
                f"{peer.name} is on another host, {peer.tcp.host}, and without a token nobody there can prove who it is", broken=True
            )
        sock = socket.socket(socket.AF_INET if local is None else socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left(deadline))
            if local is not None:
                sock.connect("\0" + local.socket)
            else:
                assert peer.tcp is not None
                sock.connect((peer.tcp.host, peer.tcp.port))
            connection = cls(sock, own, deadline)
            connection.way = way
            connection._check_user()
            connection._introduce(peer)
        except (OSError, UnicodeError) as error:
            sock.close()
            raise TransferStopped(f"cannot connect to {peer.name}: {error}", broken=True) from error
        except BaseException:
            sock.close()
            raise
        return connection

    @classmethod
    def accept(cls, sock: socket.socket, own: Self) -> PeerConnection:
        """The other side of `connect`. The socket is closed where it fails."""
        connection = cls(sock, own, time.monotonic() + HANDSHAKE_S)
        try:
            connection._check_user()
            connection._receive_peer()
        except BaseException:
            connection.close()
            raise
        connection.deadline = None
        return connection

    @property
    def inward(self) -> KvPair:
        """How the peer's KV comes here."""
        return pair_of(self.peer, self.own.descriptor)

    @property
    def outward(self) -> KvPair:
        """How ours goes there."""
        return pair_of(self.own.descriptor, self.peer)

    def _introduce(self, peer: Descriptor) -> None:
        self.peer, nonce, token = peer, secrets.token_bytes(wire.NONCE_BYTES), self.own.token
        self.send(wire.Hello(self.own.encoded, nonce, self.way == "cuda_ipc"))
        theirs = self.receive(wire.Welcome, limit=wire.MAX_HELLO_BYTES)
        if theirs.incarnation != peer.incarnation:
            raise TransferStopped(f"{peer.name} is incarnation {theirs.incarnation} now, not {peer.incarnation}")
        expected = wire.proof(token, "server", theirs.nonce, nonce, self.own.encoded)
        if len(theirs.nonce) != wire.NONCE_BYTES or (token and not hmac.compare_digest(expected, theirs.proof)):
            raise TransferStopped(f"{peer.name} has another token")
        self.send(wire.Prove(wire.proof(token, "client", nonce, theirs.nonce, self.own.encoded)))
        self.receive(wire.Accepted, limit=wire.MAX_HELLO_BYTES)
        if self.way == "shm":
            self._send_memory()
            self._receive_memory()
        elif self.way == "cuda_ipc":
            self._exchange_gpu_memory()

    def _receive_peer(self) -> None:
        token, nonce = self.own.token, secrets.token_bytes(wire.NONCE_BYTES)
        hello = self.receive(wire.Hello, limit=wire.MAX_HELLO_BYTES)
        if len(hello.nonce) != wire.NONCE_BYTES:
            raise TransferStopped("a nonce of the wrong length")
        self.send(wire.Welcome(self.own.descriptor.incarnation, nonce, wire.proof(token, "server", nonce, hello.nonce, hello.descriptor)))
        proved = self.receive(wire.Prove, limit=wire.MAX_HELLO_BYTES).proof
        if token and not hmac.compare_digest(wire.proof(token, "client", hello.nonce, nonce, hello.descriptor), proved):
            self.send(wire.TransferRefused("failed", "wrong token"))
            raise TransferStopped("wrong token")
        try:
            self.peer = decode(hello.descriptor)
            refusal = incompatible(self.own.descriptor, self.peer)
            if refusal is not None:
                raise TransferStopped(refusal)
            self.send(wire.Accepted())
            if hello.cuda_ipc:
                self.way = "cuda_ipc"
                self._open_gpu_memory()
                self.send(self._cuda_ipc().exported)
        except TransferStopped as trouble:
            if not trouble.broken:
                self.send(wire.TransferRefused("failed", trouble.reason))
            raise
        if self.way == "shm":
            self._receive_memory()
            self._send_memory()

    def _check_user(self) -> None:
        """Before anything is said: who maps memory sees all of it, and a GPU's handle gives leave to write."""
        if self.local and (why := stranger(self.sock)):
            raise TransferStopped(why, broken=True)

    def _cuda_ipc(self) -> CudaIpc:
        if self.own.cuda_ipc is None or not self.local:
            raise TransferStopped("no cuda_ipc here")
        return self.own.cuda_ipc

    def _exchange_gpu_memory(self) -> None:
        """Where it cannot be, that is remembered and the connection is of no use: another way is."""
        assert self.own.cuda_ipc is not None
        try:
            self.send(self._cuda_ipc().exported)
            self._open_gpu_memory()
        except TransferStopped as trouble:
            if not trouble.broken:
                self.own.cuda_ipc.give_up(*self.peer.key, trouble.reason)
            raise TransferStopped(trouble.reason, broken=True) from trouble

    def _open_gpu_memory(self) -> None:
        """That which the peer tells of next."""
        ours = self._cuda_ipc()
        told = self.receive(wire.CudaHandle, limit=wire.MAX_HELLO_BYTES)
        self.mapped = ours.open(told, layout_of(self.peer).bytes)

    def _send_memory(self) -> None:
        """Our KV memory's descriptor, or that of a staging buffer made for this connection."""
        segment, kind = self.own.blocks.segment, b"K"
        if segment is None:
            segment, kind = Segment("pdlab-staging", SLOTS * self.outward.chunk_bytes), b"S"
            self.outgoing = segment
        self.sock.settimeout(_left(self.deadline))
        socket.send_fds(self.sock, [kind], [segment.fd])

    def _receive_memory(self) -> None:
        self.sock.settimeout(_left(self.deadline))
        kind, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        for fd in fds:
            os.set_inheritable(fd, False)
        if len(fds) != 1 or kind not in (b"K", b"S"):
            for fd in fds:
                os.close(fd)
            raise TransferStopped("the peer passed no memory", broken=True)
        try:
            if kind == b"K":
                self.mapped = self.own.mappings.map(fds[0], layout_of(self.peer).bytes)
            else:
                self.incoming = self.own.mappings.map(fds[0], SLOTS * self.inward.chunk_bytes)
        except ValueError as error:
            raise TransferStopped(str(error)) from error

    def send(self, message: wire.WireMessage) -> None:
        self.send_bytes(wire.frame(message))

    def send_bytes(self, what: bytes | memoryview) -> None:
        try:
            self.sock.settimeout(_left(self.deadline))
            self.sock.sendall(what)  # one time-out for all of it
        except OSError as error:
            raise self._broken(error) from error

    def send_pieces(self, source: Addresses, piece_bytes: int) -> None:
        """One after another, from where they lie."""

        def wait() -> None:
            left = _left(self.deadline)
            if not room.poll(None if left is None else left * 1000):
                raise TimeoutError("deadline")

        try:
            room = select.poll()
            room.register(self.sock, select.POLLOUT)
            send_pieces(self.sock.fileno(), source, piece_bytes, wait)
        except OSError as error:
            raise self._broken(error) from error

    def receive(self, kind: type[M], limit: int = wire.MAX_FRAME_BYTES) -> M:
        """The next message, which must be of this kind. `Refused` is raised as the Trouble it tells of."""
        message = self.receive_any(limit)
        if isinstance(message, wire.TransferRefused):
            raise TransferStopped(message.reason, message.status)
        if not isinstance(message, kind):
            raise TransferStopped(f"{type(message).__name__} came instead of {kind.__name__}", broken=True)
        return message

    def receive_any(self, limit: int = wire.MAX_FRAME_BYTES) -> wire.AnyMessage:
        header = bytearray(wire.HEADER.size)
        self.receive_into(memoryview(header))
        body = bytearray(wire.body_bytes(header, limit))
        self.receive_into(memoryview(body))
        return wire.parse(body)

    def receive_into(self, target: memoryview) -> None:
        """Fills it."""
        done = 0
        try:
            while done < len(target):
                self.sock.settimeout(_left(self.deadline))
                got = self.sock.recv_into(target[done:], 0, socket.MSG_WAITALL)
                if not got:
                    raise ConnectionResetError("closed")
                done += got
        except OSError as error:
            raise self._broken(error) from error

    def buffer(self) -> tuple[memoryview, int]:
        """A chunk of memory of our own, and its address."""
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, max(self.inward.chunk_bytes, self.outward.chunk_bytes))
        return memoryview(self._buffer), int(np.frombuffer(self._buffer, np.uint8).ctypes.data)

    def alive(self) -> bool:
        """False: the peer has hung up, or said something unasked. For connections at rest."""
        try:
            self.sock.settimeout(0)
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def hung_up(self) -> bool:
        """Has the peer, whatever of its words is still to be read?"""
        end = select.poll()
        end.register(self.sock, select.POLLRDHUP)
        return bool(end.poll(0))

    def abort(self) -> None:
        """From any thread: whatever its holder waits for fails now."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """By its holder. The peer's memory is unmapped when nobody reads it."""
        self.abort()
        self.sock.close()
        self.mapped = self.incoming = self.outgoing = self._buffer = None

    def _broken(self, error: OSError) -> TransferStopped:
        name = self.peer.name if hasattr(self, "peer") else "peer"
        if isinstance(error, TimeoutError):
            return TransferStopped(f"{name} did not answer before the deadline", broken=True)
        return TransferStopped(f"the connection to {name} broke: {error}", broken=True)


def _left(deadline: float | None) -> float | None:
    """Seconds until then, as a socket's time-out."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline")
    return left
