"""Every transfer ends once, in time, whatever happens to its peer, and the same blocks can be tried again."""

from __future__ import annotations

import asyncio
import base64
import signal
import time

import pytest
import torch

from pdlab import UsageError
from pdlab.real.transfer import endpoint as transfer_endpoint
from tests.real.transfer.peer import LAYERS, Peer, endpoint, memory
from tests.real.transfer.test_moves import moved, same

SOON_S = 10.0  # within a second where the machine is not busy, and in any case long before the deadlines of 30 s


def test_a_killed_peer_is_noticed_soon(mortal: Peer, way: tuple[str, bool]) -> None:
    transport, shared = way
    at = mortal.make("p", transport, blocks=16, seed=1, dtype="float32", shared=shared)
    mortal.ask("offer", name="p", lease="during", blocks=[1, 2])
    mortal.ask("offer", name="p", lease="after", blocks=[1, 2])
    mortal.ask("expect", name="p", ticket="to it", blocks=[5], deadline_s=30)

    async def go() -> None:
        here = memory(16, seed=2, shared=shared)
        async with endpoint(here, transport) as own:
            arriving = own.expect("from it", [4, 5], deadline_s=30)
            told = {"to": base64.b64encode(own.descriptor()).decode(), "ticket": "from it", "source": [1, 2], "target": [4, 5]}
            assert mortal.ask("push", name="p", **told, layers=[0, 1], deadline_s=60)["status"] == "done"
            mortal.signal(signal.SIGSTOP)
            pull = asyncio.ensure_future(own.pull(at, "during", [1, 2], [6, 7], deadline_s=30))
            push = asyncio.ensure_future(own.push(at, "to it", [3], [5], deadline_s=30))
            await asyncio.sleep(0.2)
            assert not pull.done() and not push.done() and not arriving.done()
            mortal.signal(signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.gather(pull, push, arriving)
            assert time.monotonic() - killed < SOON_S
            assert [result.status for result in results] == ["failed"] * 3, results
            assert "p has gone" in results[2].reason
            killed = time.monotonic()
            assert (await own.pull(at, "after", [1, 2], [6, 7], deadline_s=30)).status == "failed"
            assert (await own.push(at, "to it", [3], [5], deadline_s=30)).status == "failed"
            assert time.monotonic() - killed < SOON_S
            again = own.expect("from another", [4, 5], deadline_s=30)  # its blocks are free
            own.cancel("from another")
            assert (await again).reason == "cancelled"

    asyncio.run(go())


def test_killed_while_bytes_flow(mortal: Peer, way: tuple[str, bool]) -> None:
    transport, shared = way
    blocks = list(range(40_000))
    at = mortal.make("p", transport, blocks=40_000, seed=1, dtype="float32", shared=shared)
    mortal.ask("offer", name="p", lease="one", blocks=blocks)
    mortal.ask("stand_still", after_chunks=1)  # which it sends where it does not only lay its memory open

    async def go() -> None:
        here = memory(40_000, seed=2, shared=shared)
        first = here[0, 0, 0, 0].clone()
        async with endpoint(here, transport) as own:
            pull = asyncio.ensure_future(own.pull(at, "one", blocks, blocks, deadline_s=30))
            while same(here[0, 0, 0, 0], first):
                await asyncio.sleep(0)
            mortal.signal(signal.SIGKILL)
            killed = time.monotonic()
            result = await pull
            assert time.monotonic() - killed < SOON_S
            if (shared or transport == "cuda_ipc") and result.status == "done":  # mapped memory is fast, and what it said is true
                assert same(here, memory(40_000, seed=1))
            else:
                assert result.status == "failed" and result.reason, result

    asyncio.run(go())


def test_a_peer_that_hangs_costs_no_more_than_the_deadline_and_can_be_tried_again(
    peer: Peer, name: str, way: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, shared = way
    monkeypatch.setattr(transfer_endpoint, "GRACE_S", 2 * SOON_S)  # on a slow machine, too, it is the transfer's own time-out that ends it
    at = peer.make(name, transport, blocks=16, seed=1, dtype="float32", shared=shared)
    peer.ask("offer", name=name, lease=name, blocks=[1, 2])
    peer.ask("expect", name=name, ticket=name, blocks=[8, 9], deadline_s=30)
    there = memory(16, seed=1)

    async def go() -> None:
        here = memory(16, seed=2, shared=shared)
        async with endpoint(here, transport) as own:
            peer.signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                pull = own.pull(at, name, [1, 2], [6, 7], deadline_s=0.3)
                push = own.push(at, name, [3, 4], [8, 9], deadline_s=0.3)
                results = await asyncio.gather(pull, push)
                assert 0.25 < time.monotonic() - began < SOON_S
                assert [result.status for result in results] == ["failed"] * 2
                assert all("deadline" in result.reason for result in results), results
            finally:
                peer.signal(signal.SIGCONT)
            assert (await own.push(at, name, [3, 4], [8, 9], deadline_s=60)).status == "done"
            assert peer.ask("arrived", ticket=name)["status"] == "done"
            expected = moved(here, there, [1, 2], [6, 7])
            assert (await own.pull(at, name, [1, 2], [6, 7], deadline_s=60)).status == "done"
            assert same(here, expected)

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_cancelling_the_task_ends_the_transfer_first(peer: Peer, name: str, way: tuple[str, bool]) -> None:
    transport, shared = way
    at = peer.make(name, transport, blocks=16, seed=1, dtype="float32", shared=shared)
    peer.ask("offer", name=name, lease=name, blocks=[1, 2])

    async def go() -> None:
        here = memory(16, seed=2, shared=shared)
        async with endpoint(here, transport) as own:
            assert (await own.pull(at, name, [1], [3], deadline_s=60, release=False)).status == "done"
            peer.signal(signal.SIGSTOP)
            try:
                pull = asyncio.ensure_future(own.pull(at, name, [1, 2], [6, 7], deadline_s=30))
                await asyncio.sleep(0.1)
                began = time.monotonic()
                pull.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await pull
                assert time.monotonic() - began < SOON_S
                here.zero_()  # its blocks are somebody else's
            finally:
                peer.signal(signal.SIGCONT)
            await asyncio.sleep(0.2)
            assert not here.any()

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_leases_end(peer: Peer, name: str, way: tuple[str, bool]) -> None:
    transport, shared = way
    at = peer.make(name, transport, blocks=16, seed=1, dtype="float32", shared=shared)

    async def go() -> None:
        async with endpoint(memory(16, seed=2, shared=shared), transport) as own:
            short, renewed = f"{name} short", f"{name} renewed"
            peer.ask("offer", name=name, lease=short, blocks=[1])
            peer.ask("offer", name=name, lease=renewed, blocks=[2])
            peer.ask("expire", name=name, lease=short)
            assert await own.renew_at(at, [renewed, short, "no such"], lease_s=60, deadline_s=60) == [renewed]
            assert peer.ask("renewals", name=name) == [[[renewed], 60.0]]
            result = await own.pull(at, short, [1], [6], deadline_s=60)
            assert (result.status, result.reason) == ("expired", f"lease {short} has ended: expired")
            assert (await own.pull(at, renewed, [2], [6], deadline_s=60)).status == "done"
            assert peer.ask("read_leases", name=name) == [[renewed, [2]]]
            assert (await own.pull(at, renewed, [2], [6], deadline_s=60)).status == "expired"  # it was read
            assert (await own.pull(at, "no such", [2], [6], deadline_s=60)).status == "expired"
            peer.ask("offer", name=name, lease=name, blocks=[3])
            result = await own.pull(at, name, [4], [6], deadline_s=60)
            assert result.status == "failed" and "does not cover block 4" in result.reason
            assert (await own.pull(at, name, [99], [6], deadline_s=60)).status == "failed"

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_blocks_reused_under_a_reader_are_never_taken_for_sound(peer: Peer, name: str, way: tuple[str, bool]) -> None:
    """A lease that ends within the transfer: each pull is bit-exact or not done."""
    transport, shared = way
    blocks = list(range(600))
    at = peer.make(name, transport, blocks=600, seed=1, dtype="float32", shared=shared)
    there = memory(600, seed=1)
    statuses = set()

    async def go() -> None:
        here = memory(600, seed=2, shared=shared)
        async with endpoint(here, transport) as own:
            for k, lease_s in enumerate((0.0, 0.0005, 0.002, 0.004, 0.006, 0.01, 0.015, 60.0)):
                here.zero_()
                peer.ask("offer", name=name, lease=f"{name} {k}", blocks=blocks)
                peer.ask("expire", name=name, lease=f"{name} {k}", after_s=lease_s)
                result = await own.pull(at, f"{name} {k}", blocks, blocks, deadline_s=60)
                statuses.add(result.status)
                if result.status == "done":
                    assert same(here, there)

    asyncio.run(go())
    assert statuses == {"done", "expired"}
    peer.ask("drop", name=name)


def test_pushes_that_do_not_fit_their_ticket(peer: Peer, name: str, way: tuple[str, bool]) -> None:
    transport, shared = way
    at = peer.make(name, transport, blocks=16, seed=1, dtype="float32", shared=shared)
    peer.ask("expect", name=name, ticket=name, blocks=[1, 2], deadline_s=30)

    async def go() -> None:
        async with endpoint(memory(16, seed=2, shared=shared), transport) as own:
            for ticket, source, target, reason in (
                (name, [1], [3], "does not expect block 3"),
                (name, [1], [99], "of 16 blocks"),
                (name, [1, 2], [1, 1], "named twice"),
                ("other", [1], [1], "is not expected here"),
            ):
                result = await own.push(at, ticket, source, target, deadline_s=60)
                assert result.status == "failed" and reason in result.reason
            assert (await own.push(at, name, [1], [1], deadline_s=60)).status == "done"
            assert (await own.push(at, name, [1], [1], deadline_s=60)).status == "done"  # it is there
            result = await own.push(at, name, [1, 2], [1, 2], deadline_s=60)
            assert "some of these blocks and layers have arrived" in result.reason
            assert (await own.push(at, name, [2], [2], layers=(1, LAYERS), deadline_s=60)).status == "done"
            assert (await own.push(at, name, [2], [2], layers=(0, 1), deadline_s=60)).status == "done"
            assert peer.ask("arrived", ticket=name)["status"] == "done"
            assert (await own.push(at, name, [1, 2], [1, 2], deadline_s=60)).status == "done"  # its answer may have been lost

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_a_ticket_has_a_deadline(way: tuple[str, bool]) -> None:
    async def go() -> None:
        async with endpoint(memory(8, seed=1, shared=way[1]), way[0]) as own, endpoint(memory(8, seed=2), way[0], name="p") as other:
            for deadline_s in (0.5, 2, 10, 60):  # the first in which this machine moves a block
                ticket = f"late {deadline_s}"
                late = own.expect(ticket, [1, 2], deadline_s=deadline_s)
                if (await other.push(own.descriptor(), ticket, [1], [2], deadline_s=60)).status == "done":
                    break
            result = await late
            assert (result.status, result.reason) == ("failed", f"not all had come after {deadline_s} s")
            assert result.bytes == memory(1, seed=0).nbytes
            assert (await other.push(own.descriptor(), ticket, [1], [1], deadline_s=60)).status == "expired"
            assert (await own.expect("empty", [], deadline_s=1)).status == "done"

    asyncio.run(go())


def test_a_restarted_peer_is_another_one(peer: Peer, name: str) -> None:
    at = peer.make(name, "tcp", blocks=8, seed=1, dtype="float32", shared=False)
    old = at.replace(b'"incarnation":"1"', b'"incarnation":"0"')
    peer.ask("offer", name=name, lease=name, blocks=[1])

    async def go() -> None:
        async with endpoint(memory(8, seed=2)) as own:
            result = await own.pull(old, name, [1], [1], deadline_s=60)
            assert result.status == "failed" and f"{name} is incarnation 1 now, not 0" in result.reason

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_wrong_tokens(peer: Peer, name: str) -> None:
    for transport in ("tcp", "shm"):
        at = peer.make(f"{name} {transport}", transport, blocks=8, seed=1, dtype="float32", shared=True, token="secret")
        peer.ask("offer", name=f"{name} {transport}", lease=name, blocks=[1])

        async def go(at: bytes = at, transport: str = transport) -> None:
            for token, status in (("", "failed"), ("guess", "failed"), ("secret", "done")):
                async with endpoint(memory(8, seed=2, shared=True), transport, token=token) as own:
                    result = await own.pull(at, name, [1], [1], deadline_s=60)
                    assert result.status == status and ("token" in result.reason) == (status == "failed"), result

        asyncio.run(go())


def test_peers_that_do_not_fit_are_told_why() -> None:
    async def go() -> None:
        kv = torch.zeros(4, 2, 8, 3, 16, 8)
        async with (
            endpoint(memory(8, seed=2)) as own,
            endpoint(kv, name="p", block_tokens=16) as wide,
        ):
            reason = "KV does not fit: kv_heads 2 at here and 3 at p (block_tokens would be converted)"
            assert own.refusal(wide.descriptor()) == reason
            assert own.refusal(own.descriptor()) is None
            assert (await own.pull(wide.descriptor(), "x", [1], [1], deadline_s=60)).reason == reason
            assert "cannot be read" in (await own.push(b"\x80garbage", "x", [1], [1], deadline_s=60)).reason

    asyncio.run(go())


def test_no_thread_free(peer: Peer, name: str) -> None:
    at = peer.make(name, "tcp", blocks=8, seed=1, dtype="float32", shared=False)

    async def go() -> None:
        async with endpoint(memory(8, seed=2), threads=1) as own:
            peer.signal(signal.SIGSTOP)
            try:
                first = asyncio.ensure_future(own.pull(at, "x", [1], [1], deadline_s=30))
                await asyncio.sleep(0.05)
                began = time.monotonic()
                second = await own.pull(at, "x", [1], [1], deadline_s=0.2)
                assert time.monotonic() - began < SOON_S and "no thread was free" in second.reason
            finally:
                peer.signal(signal.SIGCONT)
            await first

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_users_mistakes() -> None:
    kv = memory(8, seed=1)
    with pytest.raises(UsageError, match="cuda_ipc is for KV memory of a CUDA GPU, and this is on cpu"):
        endpoint(kv, "cuda_ipc", on_gpu=False)
    with pytest.raises(UsageError, match="set `advertise`"):
        endpoint(kv, host="0.0.0.0")
    with pytest.raises(UsageError, match="take auto, tcp, shm, cuda_ipc or nixl"):
        endpoint(kv, "rdma")

    async def go() -> None:
        async with endpoint(kv) as own:
            port = int(own.descriptor().split(b'"port":')[1].split(b"}")[0])
            with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
                await endpoint(kv, port=port).start()

    asyncio.run(go())
