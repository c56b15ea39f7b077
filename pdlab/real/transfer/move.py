"""KV bytes over a connection. The receiving functions write only under `writing()`, which raises Trouble once the transfer is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from pdlab.real.transfer import wire
from pdlab.real.transfer.blocks import KvPart, pack_from
from pdlab.real.transfer.connection import SLOTS, PeerConnection
from pdlab.real.transfer.landing import Landing
from pdlab.real.transfer.nixl import Nixl
from pdlab.real.transfer.pair import KvPair
from pdlab.real.transfer.result import TransferStopped


def send_blocks(connection: PeerConnection, part: KvPart, still_held: Callable[[], None], *, gathered: bool = False) -> None:
    """As Chunks: by slots of staging memory where this end has them for this connection, or is to gather for READs, else raw. `still_held`
    raises Trouble once it is useless to go on: whether what was sent is sound is said at the end."""
    blocks = connection.own.blocks
    per, size = blocks.per_chunk(part, _most(connection.outward, gathered)), blocks.run_bytes(part)
    under_way = 0
    with _slots(connection, gathered) as slots:
        for number, start in enumerate(range(0, len(part), per)):
            chunk = part.some(start, per)
            still_held()
            if not slots:
                _send_raw(connection, chunk)
                continue
            if under_way == len(slots):
                connection.receive(wire.Taken)
                under_way -= 1
            slot, address = slots[number % len(slots)]
            blocks.pack(chunk, address)
            connection.send(wire.Chunk(len(chunk), len(chunk) * size, slot))
            under_way += 1
        for _ in range(under_way):
            connection.receive(wire.Taken)


def _slots(connection: PeerConnection, gathered: bool) -> AbstractContextManager[list[tuple[int, int]]]:
    """(number, address) of each."""
    if gathered:
        return _nixl(connection).lent(_deadline(connection))
    segment, size = connection.outgoing, connection.outward.chunk_bytes
    return contextlib.nullcontext([] if segment is None else [(slot, segment.address + slot * size) for slot in range(SLOTS)])


def _send_raw(connection: PeerConnection, chunk: KvPart) -> None:
    blocks = connection.own.blocks
    pieces = blocks.pieces(chunk)
    connection.send(wire.Chunk(len(chunk), len(chunk) * blocks.run_bytes(chunk), -1))
    if pieces is None:
        buffer, address = connection.buffer()
        connection.send_bytes(buffer[: blocks.pack(chunk, address)])
    else:
        connection.send_pieces(*pieces)


def receive_blocks(connection: PeerConnection, landing: Landing, *, gathered: bool = False) -> None:
    """The other end of `send_blocks`. Sizes are checked against our own figures before a byte is taken."""
    most, size, runs, done = _most(connection.inward, gathered), landing.run_bytes, len(landing.target), 0
    if gathered:
        _nixl(connection)  # before a chunk is waited for
    while done < runs:
        chunk = connection.receive(wire.Chunk)
        if not 0 < chunk.runs <= runs - done or chunk.size != chunk.runs * size or chunk.size > most:
            raise TransferStopped(
                f"a chunk of {chunk.runs} blocks, {chunk.size} bytes, where {runs - done} of {size} are to come", broken=True
            )
        with _bytes_of(connection, chunk, gathered) as address:
            landing.put(address, done, chunk.runs)
        done += chunk.runs


def _most(pair: KvPair, gathered: bool) -> int:
    """Bytes of a chunk."""
    return Nixl.chunk_bytes(pair) if gathered else pair.chunk_bytes


@contextmanager
def _bytes_of(connection: PeerConnection, chunk: wire.Chunk, gathered: bool) -> Iterator[int]:
    """Where a chunk's bytes are; its slot is told of as taken as soon as it may be."""
    staging, there = connection.incoming, connection.peer.nixl
    slots = there.slots if gathered and there is not None else SLOTS if staging is not None else 0
    if not (0 <= chunk.slot < slots if slots else chunk.slot == -1):
        raise TransferStopped(f"a chunk in slot {chunk.slot}", broken=True)
    if gathered:
        assert there is not None, "NIXL is at both ends"
        with _nixl(connection).fetched(there, chunk.slot, chunk.size, connection.hung_up, _deadline(connection)) as address:
            connection.send(wire.Taken(chunk.slot))
            yield address
    elif staging is None:
        buffer, address = connection.buffer()
        connection.receive_into(buffer[: chunk.size])
        yield address
    else:
        yield staging.address + chunk.slot * connection.inward.chunk_bytes
        connection.send(wire.Taken(chunk.slot))


def copy_blocks(connection: PeerConnection, source: KvPart, landing: Landing) -> None:
    """From the peer's mapped KV memory, that of a GPU or not, once; by way of a buffer where elements are converted, or come from a CPU's
    memory to a device's. Whether it was sound is for the peer to say afterwards."""
    blocks, mapped, pair = landing.blocks, connection.mapped, landing.pair
    assert mapped is not None
    host = connection.way == "shm"
    if (pair.converts and blocks.on_cpu) or (host and not blocks.on_cpu):
        _, buffer = connection.buffer()
        per = max(1, pair.chunk_bytes // landing.run_bytes)
        for start in range(0, len(source), per):
            chunk = source.some(start, per)
            pack_from(mapped.address, pair.source, chunk, buffer)
            landing.put(buffer, start, len(chunk))
        return
    per = blocks.per_copy(landing.target)
    for start in range(0, len(source), per):
        with landing.writing():
            blocks.copy_from(
                mapped.address, pair.source, source.some(start, per), landing.target.some(start, per), landing.dtype, landing.see
            )


def read_blocks(connection: PeerConnection, source: KvPart, landing: Landing) -> None:
    """By NIXL, with the connection as a witness of the peer's life."""
    nixl, there = _nixl(connection), connection.peer.nixl
    assert there is not None, "NIXL is at both ends"
    nixl.read(there, source, landing, connection.hung_up, _deadline(connection))


def _nixl(connection: PeerConnection) -> Nixl:
    nixl = connection.own.nixl
    if nixl is None or connection.peer.nixl is None:
        raise TransferStopped("NIXL is not at both ends")
    return nixl


def _deadline(connection: PeerConnection) -> float:
    assert connection.deadline is not None
    return connection.deadline
