"""KV bytes over a connection. What arrives is written only under `writing()`, which raises Trouble once the transfer is over."""

from __future__ import annotations

from collections.abc import Callable

from pdlab.real.transfer import wire
from pdlab.real.transfer.blocks import KvPart, pack_from
from pdlab.real.transfer.connection import SLOTS, PeerConnection
from pdlab.real.transfer.landing import Landing
from pdlab.real.transfer.result import TransferStopped


def send_blocks(connection: PeerConnection, part: KvPart, still_held: Callable[[], None]) -> None:
    """As Chunks: by the staging buffer where this end has one, else raw. `still_held` raises Trouble once it is useless to go on: whether
    what was sent is sound is said at the end."""
    blocks, segment, most = connection.own.blocks, connection.outgoing, connection.outward.chunk_bytes
    per, size = blocks.per_chunk(part, most), blocks.run_bytes(part)
    under_way = 0
    for number, start in enumerate(range(0, len(part), per)):
        chunk, slot = part.some(start, per), -1 if segment is None else number % SLOTS
        head = wire.frame(wire.Chunk(len(chunk), len(chunk) * size, slot))
        still_held()
        if segment is None:
            pieces = blocks.pieces(chunk)
            if pieces is None:
                buffer, address = connection.buffer()
                pieces = [buffer[: blocks.pack(chunk, address)]]
            connection.send_pieces([head, *pieces])
            continue
        if under_way == SLOTS:
            connection.receive(wire.Taken)
            under_way -= 1
        blocks.pack(chunk, segment.address + slot * most)
        connection.send_bytes(head)
        under_way += 1
    if segment is not None:
        for _ in range(under_way):
            connection.receive(wire.Taken)


def receive_blocks(connection: PeerConnection, landing: Landing) -> None:
    """The other end of `send_blocks`. Sizes are checked against our own figures before a byte is taken."""
    staging, most, size, runs = connection.incoming, connection.inward.chunk_bytes, landing.run_bytes, len(landing.target)
    done = 0
    while done < runs:
        chunk = connection.receive(wire.Chunk)
        if not 0 < chunk.runs <= runs - done or chunk.size != chunk.runs * size or chunk.size > most:
            raise TransferStopped(
                f"a chunk of {chunk.runs} blocks, {chunk.size} bytes, where {runs - done} of {size} are to come", broken=True
            )
        if (staging is None) != (chunk.slot == -1) or not -1 <= chunk.slot < SLOTS:
            raise TransferStopped(f"a chunk in slot {chunk.slot}", broken=True)
        if staging is None:
            buffer, address = connection.buffer()
            connection.receive_into(buffer[: chunk.size])
        else:
            address = staging.address + chunk.slot * most
        landing.put(address, done, chunk.runs)
        if staging is not None:
            connection.send(wire.Taken(chunk.slot))
        done += chunk.runs


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
    nixl = connection.own.nixl
    if nixl is None or connection.peer.nixl is None:
        raise TransferStopped("NIXL is not at both ends")
    assert connection.deadline is not None
    nixl.read(connection.peer.nixl, source, landing, lambda: not connection.alive(), connection.deadline)
