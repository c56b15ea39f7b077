"""What passes between rank 0 and the other ranks of an instance: length-prefixed msgpack over a socket each, never pickle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.passes import Pass
from pdlab.real.transfer.rank_wire import FromRankKv, ToRankKv

MOST_BYTES = 1 << 30  # of a message: a batch with its block tables is far below


class Begin(msgspec.Struct, frozen=True, tag=True):
    """A rank's first news: who it is, how rank 0 is set up, and where the ranks meet for their exchange. Its model, device and threads are
    its own host's affair."""

    rank: int
    options: EngineOptions
    host: str
    port: int
    address: str  # by which the others reach it; empty: by which it has reached rank 0


class Settled(msgspec.Struct, frozen=True, tag=True):
    """The first passes are over."""


class RankReady(msgspec.Struct, frozen=True, tag=True):
    """Its part of the model is loaded. `fingerprint`: as rank 0's, where both have the same weights. `descriptor`: of its KV memory, where
    the instance exchanges any."""

    fingerprint: str
    descriptor: bytes = b""


class RankBroken(msgspec.Struct, frozen=True, tag=True):
    """It cannot start (`usage`: the user's mistake), or a pass failed, and it ends."""

    reason: str
    usage: bool = False


ToRank = Begin | Pass | Settled | ToRankKv
FromRank = RankReady | RankBroken | FromRankKv
TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def endpoint_options(options: EngineOptions, fingerprint: str, rank: int, incarnation: str, kv_heads: int) -> dict[str, Any]:
    """Of a rank's KvEndpoint; the port asked for is rank 0's. `kv_heads`: of the model."""
    return {
        "name": f"{options.kv_name}.{rank}" if rank else options.kv_name,
        "incarnation": incarnation,
        "block_tokens": options.block_tokens,
        "model_hash": fingerprint,
        "transport": options.kv_transport,
        "host": options.kv_host,
        "port": 0 if rank else options.kv_port,
        "advertise": options.kv_advertise,
        "token": options.kv_token,
        "checksums": options.kv_checksums,
        "rank": rank,
        "tp": options.tp,
        "kv_heads": kv_heads,
    }


def frame(message: msgspec.Struct) -> bytes:
    raw = msgspec.msgpack.encode(message)
    return len(raw).to_bytes(4, "little") + raw


def read_frame(file: BinaryIO) -> bytes:
    """The next message; b"": the other end has gone, or speaks something else."""
    try:
        head = file.read(4)
        size = int.from_bytes(head, "little")
        raw = file.read(size) if len(head) == 4 and size <= MOST_BYTES else b""
    except OSError:
        return b""
    return raw if len(raw) == size else b""


class RankSocket:
    """One end. Messages may be sent from any thread; one thread reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Of this end, of a TCP connection."""
        return str(self.sock.getsockname()[0])

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError where the other end has gone."""
        self.send_raw(frame(message))

    def send_raw(self, raw: bytes) -> None:
        with self._lock:
            self.sock.sendall(raw)

    def raw(self) -> Iterator[bytes]:
        """What comes, until the other end has gone."""
        while raw := read_frame(self.file):
            yield raw
