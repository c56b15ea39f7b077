"""KV bytes over a connection. The receiving functions write only under `writing()`, which raises Trouble once the transfer is over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from pdlab.real.transfer import wire
from pdlab.real.transfer.blocks import Ids, Layers
from pdlab.real.transfer.connection import SLOTS, PeerConnection
from pdlab.real.transfer.result import TransferStopped

Writing = Callable[[], AbstractContextManager[None]]


def send_blocks(connection: PeerConnection, ids: Ids, layers: Layers, still_held: Callable[[], None]) -> None:
    """As Chunks: by the staging buffer where this end has one, else raw. `still_held` raises Trouble once it is useless to go on: whether
    what was sent is sound is said at the end."""
    blocks, segment = connection.own.blocks, connection.outgoing
    per, size = blocks.per_chunk(layers), blocks.block_bytes(layers)
    under_way = 0
    for number, start in enumerate(range(0, len(ids), per)):
        chunk, slot = ids[start : start + per], -1 if segment is None else number % SLOTS
        head = wire.frame(wire.Chunk(len(chunk), len(chunk) * size, slot))
        still_held()
        if segment is None:
            pieces = blocks.pieces(chunk, layers)
            connection.send_bytes(head)
            if pieces is None:
                buffer, address = connection.buffer()
                connection.send_bytes(buffer[: blocks.pack(chunk, layers, address)])
            else:
                connection.send_pieces(pieces, blocks.piece_bytes)
            continue
        if under_way == SLOTS:
            connection.receive(wire.Taken)
            under_way -= 1
        blocks.pack(chunk, layers, segment.address + slot * blocks.chunk_bytes)
        connection.send_bytes(head)
        under_way += 1
    if segment is not None:
        for _ in range(under_way):
            connection.receive(wire.Taken)


def receive_blocks(connection: PeerConnection, ids: Ids, layers: Layers, writing: Writing) -> None:
    """The other end of `send_blocks`. Sizes are checked against our own figures before a byte is taken."""
    blocks, staging = connection.own.blocks, connection.incoming
    size, done = blocks.block_bytes(layers), 0
    while done < len(ids):
        chunk = connection.receive(wire.Chunk)
        if not 0 < chunk.blocks <= len(ids) - done or chunk.size != chunk.blocks * size or chunk.size > blocks.chunk_bytes:
            raise TransferStopped(
                f"a chunk of {chunk.blocks} blocks, {chunk.size} bytes, where {len(ids) - done} of {size} are to come", broken=True
            )
        if (staging is None) != (chunk.slot == -1) or not -1 <= chunk.slot < SLOTS:
            raise TransferStopped(f"a chunk in slot {chunk.slot}", broken=True)
        if staging is None:
            buffer, address = connection.buffer()
            connection.receive_into(buffer[: chunk.size])
        else:
            address = staging.address + chunk.slot * blocks.chunk_bytes
        with writing():
            blocks.unpack(address, ids[done : done + chunk.blocks], layers)
        if staging is not None:
            connection.send(wire.Taken(chunk.slot))
        done += chunk.blocks


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
    nixl = connection.own.nixl
    if nixl is None or connection.peer.nixl is None:
        raise TransferStopped("NIXL is not at both ends")
    assert connection.deadline is not None
    nixl.read(connection.peer, source, ids, layers, writing, lambda: not connection.alive(), connection.deadline)
