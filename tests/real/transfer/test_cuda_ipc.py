"""GPU memory opened by another process: which pairs take that way, what is checked before, what happens where the driver will not. The GPU
is a fake one (gpu.py), except in the last test."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.types import UsageError
from pdlab.real.transfer import wire
from pdlab.real.transfer.blocks import Blocks
from pdlab.real.transfer.connection import PeerConnection, Self
from pdlab.real.transfer.cuda_ipc import HANDLE_BYTES, CudaIpc, Driver
from pdlab.real.transfer.descriptor import decode
from pdlab.real.transfer.result import TransferStopped
from tests.real.transfer import gpu
from tests.real.transfer.peer import LAYERS, Peer, endpoint, memory
from tests.real.transfer.test_intruders import FUZZ
from tests.real.transfer.test_moves import bits, moved, same

pytestmark = pytest.mark.skipif(gpu.fake() is None, reason="no C++ compiler for the fake CUDA driver")
GPU = {"on_gpu": True}


def made(peer: Peer, name: str, transport: str, *, shared: bool = False, **more: Any) -> bytes:
    return peer.make(name, transport, blocks=16, seed=1, dtype="float32", shared=shared, **more)


async def pulled(own: Any, peer: Peer, at: bytes, name: str, lease: str) -> tuple[str, str, str]:
    peer.ask("offer", name=name, lease=lease, blocks=[3])
    result = await own.pull(at, lease, [3], [5], deadline_s=60)
    return result.status, result.transport, result.reason


def test_auto_takes_it_between_gpus_of_one_host_and_shm_where_one_end_has_none(peer: Peer, name: str) -> None:
    on_gpu, on_cpu = made(peer, f"{name} gpu", "auto", **GPU), made(peer, f"{name} cpu", "auto", shared=True)
    elsewhere = on_gpu.replace(decode(on_gpu).host.encode(), b"elsewhere")

    async def go() -> None:
        here = memory(16, seed=2)
        async with endpoint(here, "auto", **GPU) as own, endpoint(memory(16, seed=3), "auto") as plain:
            assert await pulled(own, peer, on_gpu, f"{name} gpu", "a") == ("done", "cuda_ipc", "")
            assert same(here, moved(memory(16, seed=2), memory(16, seed=1), [3], [5]))
            assert await pulled(own, peer, on_cpu, f"{name} cpu", "b") == ("done", "shm", "")
            assert await pulled(plain, peer, on_gpu, f"{name} gpu", "c") == ("done", "shm", "")
            assert await pulled(own, peer, elsewhere, f"{name} gpu", "d") == ("done", "tcp", "")

    asyncio.run(go())


def test_memory_is_opened_once_and_let_go_with_the_last_connection(peer: Peer, name: str) -> None:
    at = made(peer, name, "cuda_ipc")

    async def go() -> None:
        before = gpu.opened()
        async with endpoint(memory(16, seed=2), "cuda_ipc") as own:
            for k in range(6):
                peer.ask("offer", name=name, lease=f"{k}", blocks=[k])
            results = await asyncio.gather(*(own.pull(at, f"{k}", [k], [k], deadline_s=60) for k in range(6)))
            assert {result.status for result in results} == {"done"}
            assert gpu.opened() == before + 1
        assert gpu.opened() == before

    asyncio.run(go())
    peer.ask("drop", name=name)


@pytest.mark.parametrize("who", ["here", "there"])
def test_where_the_driver_will_not_shm_is_taken_from_then_on(mortal: Peer, name: str, who: str, caplog: pytest.LogCaptureFixture) -> None:
    at = made(mortal, name, "auto", **GPU)
    alone = made(mortal, f"{name} alone", "cuda_ipc")

    async def go() -> None:
        async with endpoint(memory(16, seed=2), "auto", **GPU) as own, endpoint(memory(16, seed=3), "cuda_ipc") as other:
            for k in range(3):
                assert await pulled(own, mortal, at, name, f"{k}") == ("done", "shm", "")
            for k in range(2):
                status, _, reason = await pulled(other, mortal, alone, f"{name} alone", f"alone {k}")
                assert status == "failed" and "CUDA_ERROR_INVALID_HANDLE" in reason

    if who == "here":
        gpu.refuse(400)
    else:
        mortal.ask("refuse", code=400)
    try:
        asyncio.run(go())
    finally:
        gpu.refuse(0)
    assert sum(f"no cuda_ipc with {name}," in message for message in caplog.messages) == 1


def test_who_has_not_the_token_learns_no_handle(peer: Peer, name: str) -> None:
    at = made(peer, name, "cuda_ipc", token="secret")

    async def go() -> None:
        for token, status in (("", "failed"), ("guess", "failed"), ("secret", "done")):
            async with endpoint(memory(16, seed=2), "cuda_ipc", token=token) as own:
                found = await pulled(own, peer, at, name, f"{name} {token}")
                assert found[0] == status and ("token" in found[2]) == (status == "failed")

    asyncio.run(go())


def test_memory_that_the_driver_cannot_export_is_a_user_s_error_or_not_offered() -> None:
    class Cannot(Driver):
        def export(self, address: int, size: int) -> wire.CudaHandle:
            raise OSError("CUDA_ERROR_INVALID_VALUE")

    kv = memory(16, seed=1)
    driver = Cannot(0, gpu.driver(kv)._lib._name)

    async def go() -> None:
        with pytest.raises(UsageError, match="GPU memory cannot be shared here"):
            await endpoint(kv, "cuda_ipc", on_gpu=False, gpu=driver).start()
        async with endpoint(kv, "auto", gpu=driver) as own:
            found = decode(own.descriptor())
            assert found.cuda_ipc is None and found.shm is not None

    asyncio.run(go())


def test_memory_may_begin_within_its_allocation() -> None:
    whole = memory(16, seed=1)
    driver = gpu.driver(whole)
    layer = whole[1:2]
    told = driver.export(layer.data_ptr(), layer.nbytes)
    assert told.offset == layer.nbytes and told.size == layer.nbytes
    opened = CudaIpc(driver, told).open(told, layer.nbytes)
    copy = layer.clone().zero_()
    blocks = Blocks(copy)
    whole_of_it = blocks.whole(np.arange(16, dtype=np.int32))
    blocks.copy_from(opened.address, blocks.layout, whole_of_it, whole_of_it)
    assert same(copy, layer)
    with pytest.raises(OSError, match="not one allocation"):
        driver.export(layer.data_ptr(), whole.nbytes)


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "handle": st.binary(max_size=80) | st.binary(min_size=HANDLE_BYTES, max_size=HANDLE_BYTES),
            "offset": st.integers(-(2**63), 2**64 - 1) | st.integers(-4, 4).map(lambda n: 16 * n),
            "size": st.integers(-(2**63), 2**64 - 1),
        },
    )
)
def test_whatever_a_peer_tells_of_its_memory_is_opened_only_if_it_is_there(change: dict[str, Any]) -> None:
    kv = memory(4, seed=1)
    driver = gpu.driver(kv)
    told, before = driver.export(kv.data_ptr(), kv.nbytes), gpu.opened()
    ipc = CudaIpc(driver, told)
    changed = msgspec.structs.replace(told, **change)
    try:
        opened = ipc.open(changed, kv.nbytes)
    except TransferStopped:
        assert changed != told
    else:
        assert (changed.handle, changed.size, changed.offset) == (told.handle, told.size, 0)
        del opened
    assert gpu.opened() == before


def test_a_peer_that_tells_of_memory_it_has_not_is_refused(peer: Peer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = decode(made(peer, name, "auto", **GPU))
    before = peer.ask("opened")
    kv = memory(16, seed=2)
    blocks, driver = Blocks(kv), gpu.driver(kv)
    told = driver.export(kv.data_ptr(), kv.nbytes)
    own = msgspec.structs.replace(at, name="stranger")
    for wrong in ({"handle": b""}, {"handle": bytes(64)}, {"offset": 16}, {"offset": -16}, {"size": 2**62}, {"offset": 8}):
        ipc = CudaIpc(driver, msgspec.structs.replace(told, **wrong))  # type: ignore[arg-type]
        with pytest.raises(TransferStopped):
            PeerConnection.connect(at, Self(own, blocks, b"", None, False, ipc), way="cuda_ipc", deadline=time.monotonic() + 60)
        assert not ipc.works_with(*at.key)
    assert at.tcp is not None
    with socket.create_connection((at.tcp.host, at.tcp.port)) as sock:
        connection = PeerConnection(sock, Self(own, blocks, b"", None, False), time.monotonic() + 60)
        connection.send(wire.Hello(own.encode(), bytes(wire.NONCE_BYTES), cuda_ipc=True))
        connection.receive(wire.Welcome)
        connection.send(wire.Prove(b""))
        connection.receive(wire.Accepted)
        with pytest.raises(TransferStopped, match="no cuda_ipc here"):
            connection.receive(wire.CudaHandle)
    user = os.geteuid()
    with monkeypatch.context() as changed:
        changed.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(TransferStopped, match=f"run as users {user} and {user + 1}"):
            PeerConnection.connect(at, Self(own, blocks, b"", None, False, ipc), way="cuda_ipc", deadline=time.monotonic() + 60)
    sound = Self(own, blocks, b"", None, False, CudaIpc(driver, told))
    PeerConnection.connect(at, sound, way="cuda_ipc", deadline=time.monotonic() + 60).close()
    for _ in range(200):
        if peer.ask("opened") == before:
            break
        time.sleep(0.01)
    assert peer.ask("opened") == before


class Stream:
    """One of torch.cuda's."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def __enter__(self) -> None:
        self.asked.append("enter")

    def __exit__(self, *_: object) -> None:
        self.asked.append("exit")

    def wait_stream(self, other: object) -> None:
        self.asked.append("wait")

    def record_event(self) -> Stream:
        self.asked.append("record")
        return self

    def synchronize(self) -> None:
        self.asked.append("synchronize")


def accelerator(kv: torch.Tensor) -> tuple[Blocks, list[str]]:
    """Blocks that take the CPU for an accelerator, and what is asked of its runtime."""
    asked: list[str] = []
    stream = Stream(asked)
    blocks = Blocks(kv)
    blocks.on_cpu = False
    blocks._device = SimpleNamespace(
        Stream=lambda device: stream,
        default_stream=lambda device: stream,
        stream=lambda stream: stream,
        device=lambda device: stream,
        synchronize=lambda device: asked.append("synchronize"),
    )
    return blocks, asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerator_copies_mapped_blocks_on_a_stream_of_its_own_and_waits_for_it(dtype: torch.dtype) -> None:
    there, here = memory(20, dtype, seed=1), memory(9, dtype, seed=2)
    expected = moved(here, there, [19, 0, 7], [1, 8, 3], slice(1, 3))
    blocks, asked = accelerator(here)
    source, target = (one.whole(np.array(ids, np.int32), (1, 3)) for one, ids in ((Blocks(there), [19, 0, 7]), (blocks, [1, 8, 3])))
    blocks.copy_from(there.data_ptr(), Blocks(there).layout, source, target)
    assert same(here, expected)
    assert asked == ["wait", "enter", "synchronize", "exit"]
    assert blocks.per_copy(target) > Blocks(here).per_copy(target)


def test_what_the_engine_has_queued_is_written_before_peers_may_read_it(peer: Peer, name: str) -> None:
    at = made(peer, name, "cuda_ipc")
    peer.ask("expect", name=name, ticket=name, blocks=[7], deadline_s=60)

    async def go() -> None:
        here = memory(16, seed=2)
        own = endpoint(here, "cuda_ipc")
        own._blocks, asked = accelerator(here)
        async with own:
            own.offer("lease", [1])
            assert asked == ["record", "synchronize"]
            assert (await own.push(at, name, [1], [7], deadline_s=60)).status == "done"
            assert asked == ["record", "synchronize"] * 2
            assert await pulled(own, peer, at, name, name) == ("done", "cuda_ipc", "")
            assert asked[4:] == ["wait", "enter", "synchronize", "exit"]
            assert same(here, moved(memory(16, seed=2), memory(16, seed=1), [3], [5]))

    asyncio.run(go())
    peer.ask("drop", name=name)


def test_an_accelerator_and_a_cpu_whose_memory_is_shared_exchange_kv_over_shm(peer: Peer, name: str) -> None:
    at = made(peer, name, "shm", shared=True)
    there = memory(16, seed=1)

    async def go() -> None:
        here = memory(16, seed=2)
        own = endpoint(here, "shm")
        own._blocks, _ = accelerator(here)
        async with own:
            assert await pulled(own, peer, at, name, name) == ("done", "shm", "")
            assert same(here, moved(memory(16, seed=2), there, [3], [5]))
            arriving = own.expect(name, [7], deadline_s=60)
            asked = {"ticket": name, "source": [4], "target": [7], "layers": None, "deadline_s": 60}
            to = base64.b64encode(own.descriptor()).decode()
            assert peer.ask("push", name=name, to=to, **asked)["status"] == "done"
            assert (await arriving).status == "done"
            assert same(here[:, :, 7], there[:, :, 4])

    asyncio.run(go())
    peer.ask("drop", name=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("transport", ["cuda_ipc", "auto"])
@pytest.mark.parametrize("checksums", [False, True])
def test_two_processes_on_gpus(peer: Peer, name: str, transport: str, checksums: bool) -> None:
    """On the same GPU, or on two where there are."""
    more = {"on_gpu": False, "checksums": checksums, "device": f"cuda:{torch.cuda.device_count() - 1}"}
    at = made(peer, name, transport, **more)
    there = memory(16, seed=1)

    async def go() -> None:
        here = memory(24, seed=2)
        mine = here.to("cuda:0")
        async with endpoint(mine, transport, on_gpu=False, checksums=checksums) as own:
            peer.ask("offer", name=name, lease=name, blocks=[1, 9, 4])
            result = await own.pull(at, name, [1, 9, 4], [20, 3, 0], deadline_s=60)
            assert (result.status, result.transport, result.reason) == ("done", "cuda_ipc", "")
            expected = moved(here, there, [1, 9, 4], [20, 3, 0])
            assert same(mine.cpu(), expected)
            peer.ask("expect", name=name, ticket=name, blocks=[2, 6], deadline_s=60)
            for layer in range(LAYERS):
                result = await own.push(at, name, [20, 21], [2, 6], layers=(layer, layer + 1), deadline_s=60)
                assert (result.status, result.reason) == ("done", "")
            assert peer.ask("arrived", ticket=name)["status"] == "done"
            assert same(bits(peer, name, there), moved(there, expected, [20, 21], [2, 6]))

    asyncio.run(go())
    peer.ask("drop", name=name)
