"""Ranks on other hosts than rank 0's: they come to its port, and each end shows by HMAC that it has the cluster's token."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Callable

import msgspec

from pdlab.core.types import UsageError
from pdlab.real.instance.rank_messages import frame
from pdlab.real.net.sockets import keep_alive

NONCE_BYTES = 32
MOST_BYTES = 1 << 12
GREETING_S = 5.0
AGAIN_S = 0.5  # before a rank tries again to reach rank 0
DEAD_MS = 10_000  # a host that takes no bytes for so long has gone
JOIN_S = 300.0  # that it tries, and that rank 0 waits for all


class RankJoin(msgspec.Struct, frozen=True, tag=True):
    rank: int
    ranks: int
    nonce: bytes


class RankLetIn(msgspec.Struct, frozen=True, tag=True):
    nonce: bytes
    proof: bytes
    refused: str = ""


class RankProof(msgspec.Struct, frozen=True, tag=True):
    proof: bytes


_LET_IN = msgspec.msgpack.Decoder(RankLetIn)
_JOIN = msgspec.msgpack.Decoder(RankJoin)
_PROOF = msgspec.msgpack.Decoder(RankProof)


def address_of(master: str) -> tuple[str, int]:
    """Of `host:port`. Raises UsageError."""
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--master {master!r} is not host:port: give where rank 0's host is reached by the others, such as 10.0.0.1:29500")
    return host.strip("[]"), int(port)


def come_to(master: str, rank: int, ranks: int, token: str, say: Callable[[str], None]) -> socket.socket:
    """A connection to rank 0, as one of its ranks. Raises UsageError where it is not there in time, or does not want us."""
    host, port = address_of(master)
    until_s, said = time.monotonic() + JOIN_S, False
    while True:
        try:
            sock = socket.create_connection((host, port), GREETING_S)
        except OSError as error:
            if time.monotonic() > until_s:
                raise UsageError(f"--master {master}: rank 0 cannot be reached: {error}") from None
            if not said:
                say(f"rank {rank} waits for rank 0 at {master}")
                said = True
            time.sleep(AGAIN_S)
            continue
        try:
            _introduce(sock, master, rank, ranks, token)
        except BaseException:
            sock.close()
            raise
        return _settled(sock)


def _introduce(sock: socket.socket, master: str, rank: int, ranks: int, token: str) -> None:
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        sock.sendall(frame(RankJoin(rank, ranks, nonce)))
        answer = _LET_IN.decode(_receive(sock))
        if answer.refused:
            raise UsageError(f"--master {master}: {answer.refused}")
        if not hmac.compare_digest(answer.proof, _proof(token, b"rank 0", answer.nonce, nonce)):
            raise UsageError(f"--master {master} has another token: give all nodes the same --internal-token")
        sock.sendall(frame(RankProof(_proof(token, b"rank", nonce, answer.nonce))))
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"--master {master}: rank 0 hung up: {error}") from None


def let_in(sock: socket.socket, missing: set[int], ranks: int, token: str) -> int | None:
    """Which of the `missing` ranks this is; None: none of them, and it has been told."""
    sock.settimeout(GREETING_S)
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        join = _JOIN.decode(_receive(sock))
        refused = f"rank 0 has {ranks} ranks, not {join.ranks}" if join.ranks != ranks else ""
        if not refused and join.rank not in missing:
            refused = f"rank {join.rank} is not waited for: give each node its own --node-rank"
        proof = b"" if refused else _proof(token, b"rank 0", nonce, join.nonce)
        sock.sendall(frame(RankLetIn(nonce, proof, refused)))
        if refused:
            return None
        proved = _PROOF.decode(_receive(sock)).proof
        if not hmac.compare_digest(proved, _proof(token, b"rank", join.nonce, nonce)):
            return None
    except (OSError, msgspec.MsgspecError):
        return None
    _settled(sock)
    return join.rank


def _settled(sock: socket.socket) -> socket.socket:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(sock)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # either end reads at once, so that only a dead one lets bytes lie
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MS)
    return sock


def _receive(sock: socket.socket) -> bytes:
    """One frame, bounded. Raises OSError."""
    size = int.from_bytes(_exactly(sock, 4), "little")
    if size > MOST_BYTES:
        raise OSError("not a rank")
    return _exactly(sock, size)


def _exactly(sock: socket.socket, size: int) -> bytes:
    raw = b""
    while len(raw) < size:
        part = sock.recv(size - len(raw))
        if not part:
            raise OSError("it hung up")
        raw += part
    return raw


def _proof(token: str, side: bytes, ours: bytes, theirs: bytes) -> bytes:
    """That `side` has the token, bound to both nonces; the sides' proofs differ, so that none can be sent back."""
    return hmac.digest(token.encode(), b"\0".join((b"pdlab-ranks-1", side, ours, theirs)), "sha256")


def listener(master: str) -> socket.socket:
    """At rank 0's. Raises UsageError."""
    host, port = address_of(master)
    try:
        return socket.create_server((host, port), backlog=64)
    except OSError as error:
        raise UsageError(f"--master {master}: rank 0 cannot listen there: {error.strerror or error}") from None


def meet(sock: socket.socket, missing: set[int], ranks: int, token: str, joined: Callable[[int, socket.socket, str], None]) -> None:
    """Let in all the missing ranks. Raises UsageError where they do not come in time."""
    until_s = time.monotonic() + JOIN_S
    with contextlib.closing(sock):
        while missing:
            sock.settimeout(max(0.01, until_s - time.monotonic()))
            try:
                one, where = sock.accept()
            except TimeoutError:
                names = ", ".join(map(str, sorted(missing)))
                raise UsageError(f"ranks {names} have not come within {JOIN_S:g} s: start the other nodes, too") from None
            rank = let_in(one, missing, ranks, token)
            if rank is None:
                one.close()
                continue
            missing.discard(rank)
            joined(rank, one, where[0])
