"""KV bytes over a connection. The receiving functions write only under `writing()`, which raises Trouble once the transfer is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from pdlab.real.transfer import wire
from pdlab.real.transfer.blocks import Ids, Layers
from pdlab.real.transfer.connection import SLOTS, PeerConnection
from pdlab.real.transfer.nixl import Nixl
from pdlab.real.transfer.result import TransferStopped

Writing = Callable[[], AbstractContextManager[None]]


def send_blocks(connection: PeerConnection, ids: Ids, layers: Layers, still_held: Callable[[], None], *, gathered: bool = False) -> None:
    """As Chunks: by slots of staging memory where this end has them for this connection, or is to gather for READs, else raw. `still_held`
    raises Trouble once it is useless to go on: whether what was sent is sound is said at the end."""
    blocks = connection.own.blocks
    per, size = blocks.per_chunk(layers), blocks.block_bytes(layers)
    under_way = 0
    with _slots(connection, gathered) as slots:
        for number, start in enumerate(range(0, len(ids), per)):
            chunk = ids[start : start + per]
            still_held()
            if not slots:
                _send_raw(connection, chunk, layers)
                continue
            if under_way == len(slots):
                connection.receive(wire.Taken)
                under_way -= 1
            slot, address = slots[number % len(slots)]
            blocks.pack(chunk, layers, address)
            connection.send(wire.Chunk(len(chunk), len(chunk) * size, slot))
            under_way += 1
        for _ in range(under_way):
            connection.receive(wire.Taken)


def _slots(connection: PeerConnection, gathered: bool) -> AbstractContextManager[list[tuple[int, int]]]:
    """(number, address) of each."""
    if gathered:
        return _nixl(connection).lent(_deadline(connection))
    segment, size = connection.outgoing, connection.own.blocks.chunk_bytes
    return contextlib.nullcontext([] if segment is None else [(slot, segment.address + slot * size) for slot in range(SLOTS)])


def _send_raw(connection: PeerConnection, chunk: Ids, layers: Layers) -> None:
    blocks = connection.own.blocks
    pieces = blocks.pieces(chunk, layers)
    connection.send(wire.Chunk(len(chunk), len(chunk) * blocks.block_bytes(layers), -1))
    if pieces is None:
        buffer, address = connection.buffer()
        connection.send_bytes(buffer[: blocks.pack(chunk, layers, address)])
    else:
        connection.send_pieces(pieces, blocks.piece_bytes)


def receive_blocks(connection: PeerConnection, ids: Ids, layers: Layers, writing: Writing, *, gathered: bool = False) -> None:
    """The other end of `send_blocks`. Sizes are checked against our own figures before a byte is taken."""
    blocks = connection.own.blocks
    size, done = blocks.block_bytes(layers), 0
    if gathered:
        _nixl(connection)  # before a chunk is waited for
    while done < len(ids):
        chunk = connection.receive(wire.Chunk)
        if not 0 < chunk.blocks <= len(ids) - done or chunk.size != chunk.blocks * size or chunk.size > blocks.chunk_bytes:
            raise TransferStopped(
                f"a chunk of {chunk.blocks} blocks, {chunk.size} bytes, where {len(ids) - done} of {size} are to come", broken=True
            )
        with _bytes_of(connection, chunk, gathered) as address, writing():
            blocks.unpack(address, ids[done : done + chunk.blocks], layers)
        done += chunk.blocks


@contextmanager
def _bytes_of(connection: PeerConnection, chunk: wire.Chunk, gathered: bool) -> Iterator[int]:
    """Where a chunk's bytes are; its slot is told of as taken as soon as it may be."""
    staging, there = connection.incoming, connection.peer.nixl
    slots = there.slots if gathered and there is not None else SLOTS if staging is not None else 0
    if not (0 <= chunk.slot < slots if slots else chunk.slot == -1):
        raise TransferStopped(f"a chunk in slot {chunk.slot}", broken=True)
    if gathered:
        with _nixl(connection).fetched(connection.peer, chunk.slot, chunk.size, connection.hung_up, _deadline(connection)) as address:
            connection.send(wire.Taken(chunk.slot))
            yield address
    elif staging is None:
        buffer, address = connection.buffer()
        connection.receive_into(buffer[: chunk.size])
        yield address
    else:
        yield staging.address + chunk.slot * connection.own.blocks.chunk_bytes
        connection.send(wire.Taken(chunk.slot))


def copy_blocks(connection: PeerConnection, source: Ids, ids: Ids, layers: Layers, writing: Writing) -> None:
    """From the peer's mapped KV memory, that of a GPU or not, once. Whether it was sound is for the peer to say afterwards."""
    blocks, mapped = connection.own.blocks, connection.mapped
    assert mapped is not None
    staged = connection.way == "shm" and not blocks.on_cpu
    per = blocks.per_chunk(layers) if staged else blocks.per_copy(layers)
    for start in range(0, len(ids), per):
        with writing():
            here, there = ids[start : start + per], source[start : start + per]
            if staged:
                _, buffer = connection.buffer()
                blocks.pack_from(mapped.address, connection.peer.blocks, there, layers, buffer)
                blocks.unpack(buffer, here, layers)
            else:
                blocks.copy_from(mapped.address, connection.peer.blocks, there, here, layers)


def read_blocks(connection: PeerConnection, source: Ids, ids: Ids, layers: Layers, writing: Writing) -> None:
    """By NIXL, with the connection as a witness of the peer's life."""
    _nixl(connection).read(connection.peer, source, ids, layers, writing, connection.hung_up, _deadline(connection))


def _nixl(connection: PeerConnection) -> Nixl:
    nixl = connection.own.nixl
    if nixl is None or connection.peer.nixl is None:
        raise TransferStopped("NIXL is not at both ends")
    return nixl


def _deadline(connection: PeerConnection) -> float:
    assert connection.deadline is not None
    return connection.deadline
