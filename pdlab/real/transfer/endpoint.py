"""What the engine calls: asyncio on this side, threads behind it. One Endpoint for each KV memory of an instance."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from torch import Tensor

from pdlab.core.kv_plan import heads_of, runs_of
from pdlab.core.types import UsageError
from pdlab.real.transfer import descriptor as descriptors
from pdlab.real.transfer import nixl, rdma
from pdlab.real.transfer.blocks import Blocks, Ids, Layers
from pdlab.real.transfer.client import ROUTES, TransferClient, TransferJob
from pdlab.real.transfer.connection import Self
from pdlab.real.transfer.cuda_ipc import CudaIpc, Driver, Memory
from pdlab.real.transfer.descriptor import CudaIpcAddress, Descriptor, Shm, Tcp, conversions, incompatible
from pdlab.real.transfer.leases import End, Leases
from pdlab.real.transfer.pair import KvPair, pair_of, ranks_of, sources_of, targets_of
from pdlab.real.transfer.pieces import copy_pieces
from pdlab.real.transfer.result import TransferResult, TransferStopped
from pdlab.real.transfer.server import TransferServer
from pdlab.real.transfer.tickets import Expected, Tickets
from pdlab.real.transfer.together import all_of

log = logging.getLogger(__name__)

GRACE_S = 0.25
LeaseRead = Callable[[str, list[int]], None]
LeasesRenewed = Callable[[list[str], float], None]


class KvEndpoint:
    """KV memory [layers, planes, blocks, kv_heads, block_tokens, head_dim] that peers may read from and push to.

    transport: "tcp", "shm" (same host), "cuda_ipc" (GPUs of one host), "nixl", or "auto", which offers what there is and takes for each
    peer on the same host cuda_ipc between GPUs, else shm; for others NIXL where both have an RDMA NIC, else TCP. `host` and `port` are
    listened on, `advertise` is told to peers. `token`: only who has the same may connect. `checksums`: every transfer compares CRC-32 of
    both ends. `lease_read(lease id, block ids)` is called in the event loop: a reader has had all, and the blocks are the engine's again.
    `leases_renewed(lease ids, seconds)` is called from any thread: readers want them for so long. How long they get is the engine's affair.
    `rank` of `tp`: whose memory it is, of a model of `kv_heads` KV heads (by default as many as there are here), of which that rank holds
    those of `kv_plan.heads_of`. `gpu`: what exports and opens GPU memory, where it is not the CUDA driver.

        async with Endpoint(kv, name="decode-0", incarnation="a1", block_tokens=16, model_hash="...") as endpoint:
            result = await endpoint.pull(descriptor, lease, [3, 9], [0, 7], deadline_s=5.0)
    """

    def __init__(
        self,
        kv: Tensor,
        *,
        name: str,
        incarnation: str,
        block_tokens: int,
        model_hash: str,
        transport: str = "auto",
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str = "",
        token: str = "",
        checksums: bool = False,
        threads: int = 8,
        lease_read: LeaseRead | None = None,
        leases_renewed: LeasesRenewed | None = None,
        gpu: Memory | None = None,
        rank: int = 0,
        tp: int = 1,
        kv_heads: int = 0,
    ) -> None:
        if transport not in ("auto", *ROUTES):
            raise UsageError(f"transport {transport!r} is unknown: take auto, tcp, shm, cuda_ipc or nixl")
        self._on_gpu = gpu is not None or kv.is_cuda
        if transport == "cuda_ipc" and not self._on_gpu:
            raise UsageError(f"transport cuda_ipc is for KV memory of a CUDA GPU, and this is on {kv.device}: take auto or shm")
        if transport == "nixl" and nixl.api() is None:
            raise UsageError("transport nixl needs NIXL: pip install nixl-cu12 (on CUDA 13 machines nixl-cu13), or take tcp")
        self._transport, self._gpu = transport, gpu
        if host in ("", "0.0.0.0") and not advertise:
            raise UsageError(f"an endpoint on {host!r} cannot be found by that name: set `advertise` to the address that peers reach it by")
        self._advertise = advertise or host
        self._geometry = descriptors.geometry(kv, block_tokens, model_hash, kv_heads or kv.shape[3])
        self._rank, self._tp = rank, tp
        assert len(heads_of(self._geometry.kv_heads, tp, rank)) == kv.shape[3], "the heads of its rank"
        self._blocks = Blocks(kv)
        self._name, self._incarnation, self._host, self._port = name, incarnation, host, port
        self._token, self._checksums = token.encode(), checksums
        self._lease_read, self._leases_renewed = lease_read, leases_renewed
        self._leases, self._tickets = Leases(), Tickets()
        self._size = threads
        self._own: Self
        self._client: TransferClient
        self._server: TransferServer
        self._threads: ThreadPoolExecutor
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[TransferJob] = set()
        self._told: set[tuple[str, str]] = set()  # of whose KV it was said how it is converted
        self._expected: dict[str, tuple[asyncio.Future[TransferResult], asyncio.TimerHandle]] = {}

    async def __aenter__(self) -> KvEndpoint:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen. UsageError: the address cannot be had."""
        assert self._loop is None, "started before"
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._open)
        except BaseException:
            self._loop = None
            raise

    async def close(self) -> None:
        """Ends every transfer under way, as failed, then everything else. Leases end without a callback."""
        if self._loop is None:
            return
        for job in self._jobs:
            job.abort()
        for ticket in list(self._expected):
            self._tickets.close(ticket, "failed", "the endpoint closed")
        await asyncio.to_thread(self._shut)
        await asyncio.sleep(0)  # futures resolved by threads
        self._loop = None

    def descriptor(self) -> bytes:
        """What peers need to know, as JSON."""
        return self._own.encoded

    def refusal(self, peer_descriptor: bytes) -> str | None:
        """Why no KV can pass between this endpoint and that one; None: it can."""
        return incompatible(self._own.descriptor, peer_descriptor)

    def offer(self, lease_id: str, block_ids: Iterable[int]) -> None:
        """Peers may read these blocks until they have, or it is released. A lease id is used once. May be called from any thread, like
        `holds` and `release`."""
        assert self._loop is not None, "start the endpoint first"
        if self._own.cuda_ipc is not None or self._own.nixl is not None:
            self._blocks.settle()
        self._leases.offer(lease_id, self._ids(block_ids))

    def holds(self, lease_id: str) -> bool:
        """Does that lease hold?"""
        return lease_id in self._leases

    def release(self, lease_id: str, how: End = "released") -> bool:
        """Ends it, without a callback: a read under way ends as expired. False: it had ended, and its callback came or comes."""
        return self._leases.end(lease_id, how)

    async def renew_at(self, peer_descriptor: bytes, lease_ids: Sequence[str], *, lease_s: float, deadline_s: float) -> list[str] | None:
        """A destination's heartbeat to the source, whose rank 0 speaks for all. Those of the leases that still hold; None: the peer cannot
        be asked."""
        job = TransferJob(time.monotonic() + deadline_s)
        known: list[str] = []
        if isinstance(peer := self._peer(peer_descriptor), TransferResult):
            return None
        result = await self._run(job, deadline_s, partial(self._client.renew, job, peer[0], list(lease_ids), lease_s, known))
        return known if result.status == "done" else None

    async def pull(
        self,
        peer_descriptor: bytes,
        lease_id: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        tokens: range | None = None,
        layers: Layers | None = None,
        deadline_s: float,
        release: bool | None = None,
    ) -> TransferResult:
        """A sequence's `tokens` (by default all) from the peer's blocks into ours, in layers first <= l < last: both lists begin with its
        first token, and `tokens` with a block of one of the two. The heads that this rank holds are read from those of the peer's ranks
        that have them. With `release` (default: if the last layer is among them) success ends the lease; so does pulling nothing at all,
        where all is here already. When this returns, or raises CancelledError, nothing of it writes any more."""
        if isinstance(peer := self._peer(peer_descriptor), TransferResult):
            return peer
        target, span = self._ids(dst_block_ids), self._span(layers)
        assert len(np.unique(target)) == len(target), "a block is written twice"
        pair = pair_of(peer[0], self._own.descriptor)
        try:
            there, here = _runs(pair, np.fromiter(src_block_ids, np.int32), target, tokens)
        except TransferStopped as trouble:
            return TransferResult("failed", reason=trouble.reason)
        end = span[1] == self._blocks.layers if release is None else release

        def pull(one: Descriptor, source: Ids, target: Ids, release: bool) -> Awaitable[TransferResult]:
            job = TransferJob(time.monotonic() + deadline_s)
            work = partial(self._client.pull, job, one, lease_id, source, target, pair.unit, span, release)
            return self._run(job, deadline_s, work)

        sources = sources_of(self._own.descriptor, peer) if len(here) else [peer[0]]
        alone = sources == [peer[0]]
        result = await all_of([pull(one, there, here, end and alone) for one in sources])
        if result.status == "done" and end and not alone:  # all have been read: the lease ends with rank 0's
            last = await pull(peer[0], there[:0], here[:0], True)
            return result if last.status == "done" else last
        return result

    async def push(
        self,
        peer_descriptor: bytes,
        ticket: str,
        src_block_ids: Iterable[int],
        dst_block_ids: Iterable[int],
        *,
        tokens: range | None = None,
        layers: Layers | None = None,
        deadline_s: float,
    ) -> TransferResult:
        """A part of what the peer expects under `ticket`: a sequence's `tokens`, as for `pull`. Each of the peer's ranks gets the heads
        that it is to have from this one. Our blocks must stay as they are until this returns."""
        if isinstance(peer := self._peer(peer_descriptor), TransferResult):
            return peer
        source, span = self._ids(src_block_ids), self._span(layers)
        pair = pair_of(self._own.descriptor, peer[0])
        try:
            here, there = _runs(pair, source, np.fromiter(dst_block_ids, np.int32), tokens)
        except TransferStopped as trouble:
            return TransferResult("failed", reason=trouble.reason)

        def push(one: Descriptor) -> Awaitable[TransferResult]:
            job = TransferJob(time.monotonic() + deadline_s)
            return self._run(job, deadline_s, partial(self._client.push, job, one, ticket, here, there, pair.unit, span))

        return await all_of([push(one) for one in targets_of(self._own.descriptor, peer)])

    def expect(
        self, ticket: str, dst_block_ids: Iterable[int], *, tokens: int | None = None, layers: Layers | None = None, deadline_s: float
    ) -> asyncio.Future[TransferResult]:
        """Peers may push a sequence's `tokens` (by default as many as fit) into these blocks under `ticket`, which is used once. Resolves
        when all heads and layers of them have come, or at the deadline, or when a peer that pushed has died; from then on nothing writes
        there."""
        assert self._loop is not None, "start the endpoint first"
        blocks, future = self._ids(dst_block_ids), self._loop.create_future()
        size = self._blocks.block_tokens
        expected = Expected(blocks, size, len(blocks) * size if tokens is None else tokens, self._span(layers), self._blocks.heads)
        timer = self._loop.call_later(deadline_s, self._tickets.close, ticket, "failed", f"not all had come after {deadline_s:g} s")
        self._expected[ticket] = future, timer
        try:
            self._tickets.open(ticket, expected, partial(self._from_thread, self._resolve, ticket))
        except BaseException:
            timer.cancel()
            del self._expected[ticket]
            raise
        return future

    def cancel(self, ticket: str, reason: str = "cancelled") -> bool:
        """Its future resolves as failed once nothing writes there. False: it had ended."""
        return self._tickets.close(ticket, "failed", reason)

    def _peer(self, encoded: bytes) -> tuple[Descriptor, ...] | TransferResult:
        """All ranks of a peer; or why nothing can pass."""
        try:
            peer = ranks_of(encoded)
        except TransferStopped as trouble:
            return TransferResult("failed", reason=trouble.reason)
        if (why := incompatible(self._own.descriptor, peer[0])) is not None:
            return TransferResult("failed", reason=why)
        if (rest := conversions(peer[0], self._own.descriptor)) and peer[0].key not in self._told:
            self._told.add(peer[0].key)
            log.info("KV from %s is converted as it comes to %s: %s", peer[0].name, self._name, rest)
        return peer

    def _ids(self, ids: Iterable[int]) -> Ids:
        found = np.fromiter(ids, np.int32)
        assert not len(found) or (found.min() >= 0 and found.max() < self._blocks.count), "no such block here"
        return found

    def _span(self, layers: Layers | None) -> Layers:
        span = layers or (0, self._blocks.layers)
        assert 0 <= span[0] < span[1] <= self._blocks.layers, f"layers {span} of {self._blocks.layers}"
        return span

    def _open(self) -> None:
        copy_pieces(np.zeros(0, np.int64), np.zeros(0, np.int64), 1)  # compiled now rather than within some transfer's deadline
        with contextlib.ExitStack() as opened:
            self._listen(opened)
            opened.pop_all()  # all went well: they stay open

    def _listen(self, opened: contextlib.ExitStack) -> None:
        way, listeners = self._transport, list[socket.socket]()
        gpu, nics = self._open_gpu()
        tcp = self._listen_tcp(opened, listeners) if way in ("auto", "nixl", "tcp") else None
        local = _listen_locally(opened, listeners) if way in ("auto", "shm", "cuda_ipc") else ""
        agent = None
        if way == "nixl" or (way == "auto" and nics and nixl.api() is not None):
            if self._on_gpu:
                nixl.use_nics(nics, os.environ)
            agent = nixl.Nixl(f"{self._name}-{self._incarnation}", self._blocks, rdma=bool(nics))
        device = self._blocks.kv.device
        own = Descriptor(
            self._name,
            self._incarnation,
            descriptors.host_id(),
            self._geometry,
            self._blocks.count,
            tcp=tcp,
            shm=Shm(local, self._blocks.segment is not None) if way in ("auto", "shm") else None,
            cuda_ipc=CudaIpcAddress(local) if gpu is not None else None,
            nixl=agent.address if agent is not None else None,
            nics=tuple(nic.ucx_name for nic in nics),
            npu_address=rdma.npu_address(device.index or 0, os.environ) if device.type == "npu" else "",
            rank=self._rank,
            tp=self._tp,
        )
        self._own = Self(own, self._blocks, self._token, agent, self._checksums, gpu)
        self._client = TransferClient(self._own, way)
        self._threads = ThreadPoolExecutor(self._size, thread_name_prefix="kv-transfer")
        self._server = TransferServer(self._own, self._leases, self._tickets, self._read_by_peer, self._renewed, listeners)

    def _listen_tcp(self, opened: contextlib.ExitStack, listeners: list[socket.socket]) -> Tcp:
        try:
            listener = opened.enter_context(socket.create_server((self._host, self._port), backlog=128))
        except OSError as error:
            raise UsageError(f"cannot listen on {self._host}:{self._port} for KV transfers: {error}") from error
        listeners.append(listener)
        return Tcp(self._advertise, listener.getsockname()[1])

    def _open_gpu(self) -> tuple[CudaIpc | None, list[rdma.Nic]]:
        """The GPU memory as others on this host may open it, where they may; and the RDMA NICs of use: those near the GPU, else all."""
        blocks, nics = self._blocks, [nic for nic in rdma.nics() if nic.active]
        if not self._on_gpu:
            return None, nics
        try:
            gpu = self._gpu or Driver(blocks.kv.device.index or 0)
            nics = rdma.nearest(gpu.pci)
            if self._transport not in ("auto", "cuda_ipc"):
                return None, nics
            return CudaIpc(gpu, gpu.export(blocks.address, blocks.bytes)), nics
        except OSError as error:
            if self._transport == "cuda_ipc":
                raise UsageError(
                    f"transport cuda_ipc: GPU memory cannot be shared here ({error}): take shm, or see docs/guides/cluster.md"
                ) from None
            log.warning("no cuda_ipc: GPU memory cannot be shared here (%s)", error)
            return None, nics

    def _shut(self) -> None:
        self._client.close()
        self._server.close()
        self._threads.shutdown(wait=True, cancel_futures=False)
        if self._own.nixl is not None:
            self._own.nixl.close()

    async def _run(self, job: TransferJob, deadline_s: float, work: Callable[[], TransferResult]) -> TransferResult:
        assert self._loop is not None, "start the endpoint first"
        future = self._loop.run_in_executor(self._threads, _begun, job, work)
        self._jobs.add(job)
        try:
            await asyncio.wait({future}, timeout=deadline_s)
            if not future.done():
                if job.drop():
                    return TransferResult("failed", 0, deadline_s, "the deadline has passed: no thread was free for it")
                await asyncio.wait({future}, timeout=GRACE_S)  # its own time-outs say what it was waiting for
                job.abort()
                await asyncio.wait({future})
            return future.result()
        except asyncio.CancelledError:
            job.abort()
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({future})
            raise
        finally:
            self._jobs.discard(job)

    def _read_by_peer(self, lease_id: str, blocks: frozenset[int]) -> None:
        if self._lease_read is not None:
            self._from_thread(self._lease_read, lease_id, sorted(blocks))

    def _renewed(self, leases: list[str], lease_s: float) -> None:
        if self._leases_renewed is not None:
            self._leases_renewed(leases, lease_s)

    def _resolve(self, ticket: str, result: TransferResult) -> None:
        future, timer = self._expected.pop(ticket)
        timer.cancel()
        if not future.done():
            future.set_result(result)

    def _from_thread(self, call: Callable[..., None], *args: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has gone
                self._loop.call_soon_threadsafe(call, *args)


def _runs(pair: KvPair, source: Ids, target: Ids, tokens: range | None) -> tuple[Ids, Ids]:
    """Where a sequence's tokens lie at either end, in runs that lie together at both; or Trouble."""
    sides = (source, pair.source.block_tokens), (target, pair.target.block_tokens)
    if tokens is None:
        a, b = (len(blocks) * size for blocks, size in sides)
        assert a == b, f"blocks of {a} tokens for {b}"
        tokens = range(a)
    if any(tokens.stop > len(blocks) * size for blocks, size in sides):
        raise TransferStopped(f"{len(source)} blocks of {sides[0][1]} tokens for {len(target)} of {sides[1][1]}: too few for {tokens.stop}")
    here, there = (runs_of(blocks, size, pair.unit, tokens).astype(np.int32) for blocks, size in sides)
    return here, there


def _begun(job: TransferJob, work: Callable[[], TransferResult]) -> TransferResult:
    return work() if job.begin() else TransferResult("failed", reason="cancelled before it began")


def _listen_locally(opened: contextlib.ExitStack, listeners: list[socket.socket]) -> str:
    """The abstract address of a Unix socket."""
    listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    name = f"pdlab-kv-{secrets.token_hex(12)}"
    listener.bind("\0" + name)
    listener.listen(128)
    listeners.append(listener)
    return name
