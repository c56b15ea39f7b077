"""Peers that say anything at all: parsers take no memory and no harm, a server goes on serving, nothing lands where it should not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.real.transfer import descriptor, server, wire
from pdlab.real.transfer.connection import PeerConnection, Self
from pdlab.real.transfer.descriptor import incompatible
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.result import TransferResult, TransferStopped
from pdlab.real.transfer.shared import Mapping, shared_kv
from tests.real.transfer.peer import BLOCK_BYTES_F32, LAYERS, endpoint, memory


def wire_ids(*ids: int) -> bytes:
    return np.array(ids, "<i4").tobytes()


ONE = wire.PartOf(wire_ids(1, 2), 4, 0, 2, 0, LAYERS)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

numbers = st.integers(-(2**63), 2**64 - 1)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8) | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from([kind.__name__ for kind in wire.WireMessage.__subclasses__()])
fields = st.sampled_from(sorted({field for kind in wire.WireMessage.__subclasses__() for field in kind.__struct_fields__}))
nearly = st.builds(lambda kind, found: {"type": kind, **found}, names, st.dictionaries(fields, values, max_size=7))


@FUZZ
@given(st.binary(max_size=200) | st.builds(msgspec.msgpack.encode, nearly | values))
def test_any_bytes_are_a_message_or_trouble(body: bytes) -> None:
    with contextlib.suppress(TransferStopped):
        assert isinstance(wire.parse(body), wire.WireMessage)


def test_deep_nesting_is_trouble() -> None:
    for body in (b"\x91" * 100_000, b"\x81\xa4type" * 50_000):
        with pytest.raises(TransferStopped):
            wire.parse(body)


@FUZZ
@given(st.binary(min_size=4, max_size=4), st.integers(1, 2**31))
def test_frames_over_the_limit_are_refused_before_memory_is_taken(header: bytes, limit: int) -> None:
    with contextlib.suppress(TransferStopped):
        assert 0 < wire.body_bytes(header, limit) <= limit


def test_a_frame_has_a_bound_at_both_ends() -> None:
    with pytest.raises(TransferStopped, match="give fewer blocks at a time"):
        wire.frame(wire.Hello(b"d" * wire.MAX_FRAME_BYTES, b""))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = PeerConnection(ours, None, time.monotonic() + 60.0)  # type: ignore[arg-type]
        theirs.sendall(wire.HEADER.pack(wire.MAX_FRAME_BYTES + 1))
        with pytest.raises(TransferStopped, match=f"at most {wire.MAX_FRAME_BYTES} are taken"):
            connection.receive_any()
        connection.close()


@FUZZ
@given(st.binary(max_size=64), st.integers(0, 1000))
def test_block_ids_are_in_range_or_trouble(packed: bytes, blocks: int) -> None:
    with contextlib.suppress(TransferStopped):
        assert all(0 <= block < blocks for block in wire.block_ids(packed, blocks))


@FUZZ
@given(st.binary(max_size=100) | st.builds(msgspec.json.encode, values) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_a_descriptor_or_trouble(text: bytes) -> None:
    with contextlib.suppress(TransferStopped):
        assert isinstance(descriptor.decode(text), descriptor.Descriptor)
    assert incompatible(text, text) is None or incompatible(text, text)


WHOLE = descriptor.Descriptor(
    "p",
    "1",
    "here",
    descriptor.Geometry(4, 2, 4, 8, "float32", "tiny"),
    16,
    descriptor.Tcp("127.0.0.1", 1),
    descriptor.Shm("pdlab-none", True),
    descriptor.CudaIpcAddress("pdlab-none"),
    descriptor.NixlAddress("agent", b"metadata", 4096, 0, "DRAM", True),
    ("mlx5_0:1",),
    "192.168.100.101",
)


def test_a_descriptor_that_is_too_long_is_not_read() -> None:
    text = WHOLE.encode()
    most = descriptor.MAX_DESCRIPTOR_BYTES
    descriptor.decode(text + b" " * (most - len(text)))
    with pytest.raises(TransferStopped, match=f"has {most + 1} bytes"):
        descriptor.decode(text + b" " * (most + 1 - len(text)))


@FUZZ
@given(st.data())
def test_a_descriptor_with_any_field_changed_is_one_or_trouble(draw: st.DataObject) -> None:
    changed = msgspec.json.decode(WHOLE.encode())
    at = changed
    while isinstance(at[field := draw.draw(st.sampled_from(sorted(at)))], dict) and draw.draw(st.booleans()):
        at = at[field]
    at[field] = draw.draw(values)
    with contextlib.suppress(TransferStopped):
        found = descriptor.decode(msgspec.json.encode(changed))
        assert 0 <= found.blocks <= 2**31 and set(found.ways) <= {"tcp", "shm", "cuda_ipc"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tcp": descriptor.Tcp("a\0b", 80)},
        {"tcp": descriptor.Tcp("", 80)},
        {"tcp": descriptor.Tcp("127.0.0.1", 70000)},
        {"tcp": None, "host": "", "shm": descriptor.Shm("a" * 200, True)},
        {"tcp": None, "host": "", "shm": descriptor.Shm("a\0b", True)},
        {"blocks": 2**62},
        {"blocks": -1},
    ],
)
def test_a_transfer_with_a_descriptor_that_leads_nowhere_fails(wrong: dict[str, object]) -> None:
    async def go() -> None:
        async with endpoint(memory(16, seed=1), "auto") as own:
            here = descriptor.decode(own.descriptor())
            odd = msgspec.structs.replace(WHOLE, **{**wrong, "host": here.host if "host" in wrong else "elsewhere"})
            for result in (
                await own.pull(odd.encode(), "lease", [1], [1], deadline_s=60),
                await own.push(odd.encode(), "ticket", [1], [1], deadline_s=60),
            ):
                assert result.status == "failed" and result.reason
            assert await own.renew_at(odd.encode(), ["lease"], lease_s=1, deadline_s=60) is None

    asyncio.run(go())


@contextmanager
def serving(**more: object) -> Iterator[KvEndpoint]:
    """An endpoint whose event loop runs in another thread, block 1 and 2 of it leased as "lease" and 3 and 4 expected as "ticket"."""
    loop, made = asyncio.new_event_loop(), endpoint(memory(16, seed=1), "auto", **more)

    async def begin() -> None:
        await made.start()
        made.offer("lease", [1, 2])
        made.expect("ticket", [3, 4], deadline_s=3600)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(made.close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[KvEndpoint]:
    with serving() as found:
        yield found


@contextmanager
def stranger(served: KvEndpoint, **more: object) -> Iterator[PeerConnection]:
    """A connection by hand, introduced as it should be."""
    own = served._own  # it plays another one of the same geometry
    other = msgspec.structs.replace(own.descriptor, name="stranger", **more)  # type: ignore[arg-type]
    found = PeerConnection.connect(own.descriptor, Self(other, own.blocks, b"", None, False), way="tcp", deadline=time.monotonic() + 60)
    try:
        yield found
    finally:
        found.close()


def still_serves(served: KvEndpoint) -> bool:
    with stranger(served) as connection:
        connection.send(wire.RenewLeases(["lease", "none"], 60.0))
        return connection.receive(wire.Renewed).known == ["lease"]


@FUZZ
@given(st.binary(max_size=300) | st.builds(wire.HEADER.pack, st.integers(0, 2**32 - 1)))
def test_garbage_instead_of_an_introduction(served: KvEndpoint, garbage: bytes) -> None:
    assert served._own.descriptor.tcp is not None
    at = "127.0.0.1", served._own.descriptor.tcp.port
    with socket.create_connection(at, 5) as sock, contextlib.suppress(OSError):  # it may hang up before we do
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        assert len(sock.recv(1 << 20)) < 1000


@FUZZ
@given(st.lists(nearly | values, min_size=1, max_size=3))
def test_wild_messages_from_a_peer_with_the_token(served: KvEndpoint, messages: list[object]) -> None:
    before = served._blocks.kv.clone()
    with stranger(served) as connection, contextlib.suppress(TransferStopped, OSError):
        for message in messages:
            body = msgspec.msgpack.encode(message)
            connection.send_bytes(wire.HEADER.pack(len(body)) + body)
        connection.sock.shutdown(socket.SHUT_WR)
        while True:
            connection.receive_any()
    assert torch.equal(before.view(torch.uint8), served._blocks.kv.view(torch.uint8))
    assert still_serves(served)


def test_requests_that_are_wrong_in_one_field(served: KvEndpoint) -> None:
    def changed(**fields: object) -> wire.PartOf:
        return msgspec.structs.replace(ONE, **fields)  # type: ignore[arg-type]

    far, odd = changed(runs=wire_ids(2**31 - 1)), changed(runs=ONE.runs[:5])
    beyond = [far, odd, changed(first=3, last=2), changed(last=2**62), changed(unit=3), changed(unit=0), changed(first_head=1)]
    beyond += [changed(heads=0), changed(heads=2**62), changed(first_head=-1), changed(unit=2)]
    both = changed(runs=wire_ids(3, 4))
    push = wire.PushRequest("ticket", ONE, ONE, 5.0, "wire")
    wrong: list[wire.WireMessage] = [
        *(wire.Read("lease", part, 5.0) for part in beyond),
        wire.Read("lease", ONE, 5.0, gathered=True),
        *(msgspec.structs.replace(push, target=part) for part in [ONE, *beyond]),
        *(msgspec.structs.replace(push, source=part) for part in beyond),
        *(msgspec.structs.replace(push, target=both, how=how) for how in ("magic", "mapped", "nixl", "gathered")),
        *(wire.Finish("lease", 1, part, True) for part in beyond[:-1]),
        wire.Finish("lease", 1, ONE, True, crc32=1),
        wire.Copied(),
    ]
    for message in wrong:
        with stranger(served) as connection:
            connection.send(message)
            answer: wire.AnyMessage | str = wire.Go(False)
            while isinstance(answer, wire.Go):
                try:
                    answer = connection.receive_any()
                except TransferStopped as trouble:
                    answer = trouble.reason
            assert isinstance(answer, wire.TransferRefused) or (isinstance(message, wire.Copied) and "broke" in str(answer))
    assert still_serves(served)


def test_late_bytes_of_a_push_do_not_land(served: KvEndpoint) -> None:
    """The pusher stops in the middle; the destination gives the ticket up and its blocks to somebody else; the pusher goes on."""
    with serving() as here:
        ids = msgspec.structs.replace(ONE, runs=wire_ids(3, 4))
        with stranger(here) as pusher:
            pusher.send(wire.PushRequest("ticket", ONE, ids, 30.0, "wire"))
            assert not pusher.receive(wire.Go).arrived
            pusher.send(wire.Chunk(1, BLOCK_BYTES_F32, -1))
            pusher.send_bytes(b"\x55" * BLOCK_BYTES_F32)
            pusher.send(wire.Chunk(1, BLOCK_BYTES_F32, -1))
            while not (here._blocks.kv[:, :, 3].view(torch.uint8) == 0x55).all():
                time.sleep(0.001)
            assert here.cancel("ticket")
            while len(here._tickets):
                time.sleep(0.001)
            here._blocks.kv[:, :, [3, 4]] = 7.0
            pusher.send_bytes(b"\x55" * BLOCK_BYTES_F32)
            with pytest.raises(TransferStopped, match="ticket ticket is over: cancelled") as told:
                pusher.receive(wire.TransferFinished)
            assert told.value.status == "expired"
        assert (here._blocks.kv[:, :, [3, 4]] == 7.0).all()


def test_a_push_replaced_by_another_does_not_overwrite_it(served: KvEndpoint) -> None:
    with serving() as here:
        ids = msgspec.structs.replace(ONE, runs=wire_ids(3, 4))
        push = wire.PushRequest("ticket", ONE, ids, 30.0, "wire")
        with stranger(here) as first, stranger(here) as second:
            first.send(push)
            first.receive(wire.Go)
            second.send(push)
            second.deadline = time.monotonic() + 0.2
            with pytest.raises(TransferStopped, match="deadline"):  # it waits for the first
                second.receive(wire.Go)
            first.close()
            second.deadline = time.monotonic() + 60
            with contextlib.suppress(TransferStopped):
                assert not second.receive(wire.Go).arrived
                second.send(wire.Chunk(2, 2 * BLOCK_BYTES_F32, -1))
                second.send_bytes(b"\x55" * (2 * BLOCK_BYTES_F32))
                second.send(wire.Commit())
                second.receive(wire.TransferFinished)
        assert (here._blocks.kv[:, :, [3, 4]].view(torch.uint8) == 0x55).all()
        assert not len(here._tickets)


def source_that(answers: Callable[[PeerConnection], None], own: KvEndpoint) -> tuple[bytes, threading.Thread, socket.socket]:
    """A source by hand: after the introduction and a Read, `answers`."""
    listener = socket.create_server(("127.0.0.1", 0))
    described = msgspec.structs.replace(
        own._own.descriptor, name="source", shm=None, tcp=descriptor.Tcp("127.0.0.1", listener.getsockname()[1])
    )

    def serve() -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # nobody came before the deadline
            return
        connection = PeerConnection.accept(sock, Self(described, own._blocks, b"", None, False))
        connection.deadline = time.monotonic() + 60
        try:
            connection.receive(wire.Read)
            answers(connection)
        except TransferStopped:
            pass
        finally:
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return described.encode(), thread, listener


def pulled(
    own_memory: torch.Tensor, answers: Callable[[PeerConnection], None], deadline_s: float = 60.0, after: float = 0.0
) -> TransferResult:
    async def go() -> TransferResult:
        async with endpoint(own_memory) as own:
            at, thread, listener = source_that(answers, own)
            result = await own.pull(at, "lease", [1, 2], [3, 4], deadline_s=deadline_s)
            own_memory[:, :, [3, 4]] = 7.0
            await asyncio.sleep(after)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes who still waits for the puller
            await asyncio.to_thread(thread.join)
            listener.close()
            return result

    return asyncio.run(go())


@pytest.mark.parametrize(
    "chunk",
    [(3, 3 * BLOCK_BYTES_F32, -1), (1, 2**62, -1), (0, 0, -1), (-1, -BLOCK_BYTES_F32, -1), (1, BLOCK_BYTES_F32, 0), (1, 8, -1)],
)
def test_chunks_of_wrong_size_are_refused(chunk: tuple[int, int, int]) -> None:
    kv = memory(16, seed=1)
    result = pulled(kv, lambda connection: connection.send(wire.Chunk(*chunk)))
    assert result.status == "failed" and "chunk" in result.reason


def test_late_bytes_of_a_pull_do_not_land() -> None:
    kv = memory(16, seed=1)

    def slow(connection: PeerConnection) -> None:
        connection.send(wire.Chunk(1, BLOCK_BYTES_F32, -1))
        connection.send_bytes(b"\x55" * BLOCK_BYTES_F32)
        connection.send(wire.Chunk(1, BLOCK_BYTES_F32, -1))
        time.sleep(0.5)
        connection.send_bytes(b"\x55" * BLOCK_BYTES_F32)

    result = pulled(kv, slow, deadline_s=0.3, after=0.5)
    assert result.status == "failed" and "deadline" in result.reason
    assert (kv[:, :, [3, 4]] == 7.0).all()


def test_a_source_that_trickles_still_meets_the_deadline() -> None:
    def trickle(connection: PeerConnection) -> None:
        connection.send(wire.Chunk(1, BLOCK_BYTES_F32, -1))
        for _ in range(12_000):  # for two minutes, if it is let
            connection.send_bytes(b"\x55")
            time.sleep(0.01)

    began = time.monotonic()
    result = pulled(memory(16, seed=1), trickle, deadline_s=0.3)
    assert result.status == "failed" and result.seconds < 60 and time.monotonic() - began < 60


def test_memory_that_could_shrink_or_is_too_small_is_not_mapped() -> None:
    small = shared_kv((1, 2, 1, 1, 1, 1), torch.float32)
    with pytest.raises(ValueError, match="has 8 bytes, not 4096"):
        Mapping(os.dup(small.pdlab_segment.fd), 4096)  # type: ignore[attr-defined]
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="could shrink"):
        Mapping(fd, 4096)
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(ValueError, match="shared memory"):
        Mapping(read, 4096)


def test_a_descriptor_survives_base64_and_json() -> None:
    async def go() -> None:
        async with endpoint(memory(4, seed=1), "auto") as own:
            text = base64.b64decode(base64.b64encode(own.descriptor()))
            found = msgspec.json.decode(text)
            assert found["geometry"] == {
                "layers": 4,
                "kv_heads": 2,
                "block_tokens": 4,
                "head_dim": 8,
                "dtype": "float32",
                "model_hash": "tiny",
                "protocol": 2,
                "planes": 2,
            }
            newer = msgspec.json.encode({**found, "geometry": {**found["geometry"], "protocol": 3}})
            assert own.refusal(newer) == "KV does not fit: protocol 2 at here and 3 at here: run the same version of pdlab everywhere"

    asyncio.run(go())


def test_connections_beyond_the_bound_are_hung_up_and_room_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)

    async def main() -> None:
        async with endpoint(memory(4, seed=1)) as owner:
            tcp = descriptor.decode(owner.descriptor()).tcp
            assert tcp is not None

            def hung_up() -> bool:
                with socket.create_connection((tcp.host, tcp.port), timeout=0.5) as sock:
                    try:
                        return sock.recv(1) == b""
                    except TimeoutError:
                        return False

            held = [socket.create_connection((tcp.host, tcp.port)) for _ in range(2)]
            try:
                await asyncio.sleep(0.2)
                assert await asyncio.to_thread(hung_up)
            finally:
                for sock in held:
                    sock.close()
            for _ in range(50):
                if not await asyncio.to_thread(hung_up):
                    return
            raise AssertionError("no room again")

    asyncio.run(main())
