"""The messages of a connection and their frames: four bytes of length, then msgpack. KV bytes follow a `Chunk` raw, as many as it says.

    connect    Hello, Welcome, Prove, Accepted            each end shows by HMAC that it has the token, if there is one; over shm each then
                                                          passes a file descriptor: its KV memory, or its side's staging buffer;
                                                          over cuda_ipc each then sends Exported
    pull, tcp  Read, (Chunk, bytes)*, Finish, Finished    the source stops once the lease has ended
    pull, shm  [D copies from P's mapped blocks] Finish, Finished;      staged: Read, (Chunk, Taken)*, Finish, Finished
    pull, cuda_ipc                               likewise, from P's GPU
    pull, nixl [D READs] Finish, Finished;                              gathered: Read, (Chunk, [D READs] Taken)*, Finish, Finished
    push, tcp  Push, Go, (Chunk, bytes)*, Commit, Finished
    push, shm  Push, Go, [D copies] Copied, Commit, Finished            staged: Push, Go, (Chunk, Taken)*, Commit, Finished
    push, cuda_ipc                               likewise
    push, nixl Push, Go, [D READs] Copied, Commit, Finished;            gathered: Push, Go, (Chunk, [D READs] Taken)*, Commit, Finished

`Finish` is answered by `TransferFinished` only if the lease has been valid all along, so what was read before is sound. `Commit` says the
same of a pushed part: the pusher still held its blocks when they had been copied. `TransferRefused` may stand for any answer.
"""

from __future__ import annotations

import hmac
import struct
from typing import TypeVar

import msgspec
import numpy as np

from pdlab.core.kv_plan import KvLayout
from pdlab.real.transfer.blocks import Ids, KvPart
from pdlab.real.transfer.descriptor import MAX_DESCRIPTOR_BYTES
from pdlab.real.transfer.result import Status, TransferStopped

HEADER = struct.Struct(">I")
MAX_HELLO_BYTES = MAX_DESCRIPTOR_BYTES + 4096
MAX_FRAME_BYTES = 1 << 20
NONCE_BYTES = 32


class PartOf(msgspec.Struct, frozen=True, array_like=True):
    """A `KvPart` of one end's memory. `runs` are little-endian int32; first <= layer < last."""

    runs: bytes
    unit: int
    first_head: int
    heads: int
    first: int
    last: int


class WireMessage(msgspec.Struct, frozen=True, tag=True):
    """What one end sends the other."""


class Hello(WireMessage, frozen=True):
    """`cuda_ipc`: what local connections pass on afterwards is Exported, not file descriptors."""

    descriptor: bytes
    nonce: bytes
    cuda_ipc: bool = False


class Welcome(WireMessage, frozen=True):
    """`incarnation`: a port may have passed on to another process."""

    incarnation: str
    nonce: bytes
    proof: bytes


class Prove(WireMessage, frozen=True):
    proof: bytes


class Accepted(WireMessage, frozen=True):
    pass


class CudaHandle(WireMessage, frozen=True):
    """A CUDA IPC handle of an allocation; `offset` bytes into it begin `size` bytes of KV memory."""

    handle: bytes
    offset: int
    size: int


class TransferRefused(WireMessage, frozen=True):
    status: Status
    reason: str


class Read(WireMessage, frozen=True):
    """`budget_s`: when the reader gives up. `gathered`: into slots that it READs by NIXL."""

    lease: str
    part: PartOf
    budget_s: float
    gathered: bool = False


class Chunk(WireMessage, frozen=True):
    """`runs` more of them: the `size` bytes that follow, or those at `slot` of the staging (-1: they follow)."""

    runs: int
    size: int
    slot: int


class Taken(WireMessage, frozen=True):
    slot: int


class Finish(WireMessage, frozen=True):
    """`transfer` names the attempt, so that the same question asked twice gets the same answer. `release`: the lease has served."""

    lease: str
    transfer: int
    part: PartOf
    release: bool
    crc32: int | None = None


class TransferFinished(WireMessage, frozen=True):
    pass


class RenewLeases(WireMessage, frozen=True):
    leases: list[str]
    lease_s: float


class Renewed(WireMessage, frozen=True):
    known: list[str]


class PushRequest(WireMessage, frozen=True):
    """`budget_s`: when the pusher gives up. `how` the bytes come: "wire" (Chunks), "nixl", "gathered" (Chunks of which NIXL READs the
    bytes), "mapped" (from its KV memory, by shm or cuda_ipc). `checked`: Commit will tell a checksum."""

    ticket: str
    source: PartOf
    target: PartOf
    budget_s: float
    how: str
    checked: bool = False


class Go(WireMessage, frozen=True):
    """`arrived`: these blocks are here already, by an earlier attempt; send nothing."""

    arrived: bool


class Copied(WireMessage, frozen=True):
    pass


class Commit(WireMessage, frozen=True):
    crc32: int | None = None


AnyMessage = (
    Hello
    | Welcome
    | Prove
    | Accepted
    | CudaHandle
    | TransferRefused
    | Read
    | Chunk
    | Taken
    | Finish
    | TransferFinished
    | RenewLeases
    | Renewed
    | PushRequest
    | Go
    | Copied
    | Commit
)
M = TypeVar("M", bound=WireMessage)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def frame(message: WireMessage) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise TransferStopped(f"a message of {len(body)} bytes is over {MAX_FRAME_BYTES}: give fewer blocks at a time")
    return HEADER.pack(len(body)) + body


def body_bytes(header: bytes | bytearray, limit: int) -> int:
    """Length of the body that follows; Trouble if it is over `limit`, before any memory is taken for it."""
    (length,) = HEADER.unpack(header)
    if not 0 < length <= limit:
        raise TransferStopped(f"a frame of {length} bytes came; at most {limit} are taken", broken=True)
    return int(length)


def parse(body: bytes | bytearray) -> AnyMessage:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransferStopped(f"not a message: {error}", broken=True) from error


def part_of(part: KvPart) -> PartOf:
    return PartOf(part.runs.astype("<i4").tobytes(), part.unit, part.heads.start, len(part.heads), *part.layers)


def checked_part(told: PartOf, layout: KvLayout) -> KvPart:
    """It, all of it within that memory, or Trouble."""
    if not 0 <= told.first < told.last <= layout.layers:
        raise TransferStopped(f"layers {told.first} to {told.last} of {layout.layers}")
    if not 0 < told.unit <= layout.block_tokens or layout.block_tokens % told.unit:
        raise TransferStopped(f"runs of {told.unit} tokens, of blocks of {layout.block_tokens}")
    if told.heads < 1 or not 0 <= told.first_head <= layout.heads - told.heads:
        raise TransferStopped(f"{told.heads} heads from {told.first_head} on, of {layout.heads}")
    runs = block_ids(told.runs, layout.blocks * (layout.block_tokens // told.unit))
    return KvPart(runs, told.unit, range(told.first_head, told.first_head + told.heads), (told.first, told.last))


def block_ids(packed: bytes, blocks: int) -> Ids:
    """Ids as they came, each within 0 <= id < blocks, or Trouble."""
    if len(packed) % 4:
        raise TransferStopped("block ids are cut off")
    found = np.frombuffer(packed, "<i4").astype(np.int32)
    if len(found) and (found.min() < 0 or found.max() >= blocks):
        raise TransferStopped(f"block ids from {found.min()} to {found.max()}, of {blocks} blocks")
    return found


def proof(token: bytes, side: str, ours: bytes, theirs: bytes, descriptor: bytes) -> bytes:
    """That `side` has the token, bound to both nonces and to the descriptor that was shown. The sides' proofs differ, so none can be
    sent back."""
    return hmac.digest(token, b"\0".join((b"pdlab-transfer-2", side.encode(), ours, theirs, descriptor)), "sha256")
