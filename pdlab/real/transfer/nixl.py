"""One-sided READs by NIXL over UCX (optional: nixl_cu12 or nixl_cu13). Each endpoint has two agents, with names of their own for each
incarnation. Peers read from the one, with which the KV memory is registered once; its progress thread answers where no hardware does. The
other reads. It has no such thread, for whoever waits for a READ moves it on: two would take turns at UCX's lock, and one of them spin.

Blocks that lie scattered in small pieces are gathered at the source into registered slots, each of which is one READ: NIXL pays for every
piece, several times what copying one of 4 KiB costs.

A READ that was given up may still land, minutes later, wherever it was told to. So READs land in registered staging memory, from where this
process copies into the blocks that are still its own. Staging whose READ has not ended is not used again until NIXL says that it has.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import mmap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any

import numpy as np
import torch

from pdlab.real.transfer.blocks import Blocks, KvPart, packed, pieces_of
from pdlab.real.transfer.descriptor import ITEM_BYTES, NixlAddress
from pdlab.real.transfer.landing import Landing
from pdlab.real.transfer.pair import KvPair
from pdlab.real.transfer.pieces import Addresses, copy_pieces
from pdlab.real.transfer.rdma import Nic
from pdlab.real.transfer.result import TransferStopped

log = logging.getLogger(__name__)

STAGING_BYTES = 4 << 20
SCATTERED_BYTES = 16 << 10  # what lies together is less, on average: it is gathered
GATHERING = 4  # transfers at once; more wait
SLOTS = 4  # of each: some are filled while another is read
SLOT_BYTES = 2 << 20  # of one, which is one READ: what each costs beside its bytes counts for more than the second-level cache
MAX_STUCK = 16
PROGRESS_US = 10_000  # how long NIXL's thread waits for an event at most
SPIN_S = 2e-4  # polled without sleeping; a small READ takes 15 us


def api() -> Any:
    """NIXL's Python API, or None where it is not installed or does not load."""
    for package in ("nixl_cu12", "nixl_cu13"):
        with contextlib.suppress(ImportError, OSError):
            found = importlib.import_module(f"{package}._api")
            if not isinstance(found.nixlBind, _AtRest):
                found.nixlBind = _AtRest(found.nixlBind)  # type: ignore[attr-defined]
            return found
    return None


class _AtRest:
    """NIXL's bindings, whose progress thread sleeps until there is something to do. Its Python API tells that thread to wait 0 us, whereby
    an agent at rest takes a whole core, and offers no other figure."""

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgentConfig(self) -> Any:
        class Config(self._bindings.nixlAgentConfig):  # type: ignore[name-defined, misc]
            def __setattr__(self, name: str, value: object) -> None:
                super().__setattr__(name, PROGRESS_US if name == "pthrDelay" else value)

        return Config()


def use_nics(nics: Sequence[Nic], environ: MutableMapping[str, str]) -> None:
    """Before the first agent: UCX, which would take every NIC for any GPU, takes these, unless the user has said which."""
    if nics and "UCX_NET_DEVICES" not in environ:
        environ["UCX_NET_DEVICES"] = ",".join(nic.ucx_name for nic in nics)
        log.info("NIXL uses the RDMA NICs nearest to the GPU: UCX_NET_DEVICES=%s", environ["UCX_NET_DEVICES"])


class _Staging:
    def __init__(self, agent: Any, bytes: int, device: torch.device) -> None:
        self.tensor = (
            torch.frombuffer(mmap.mmap(-1, bytes), dtype=torch.uint8)
            if device.type == "cpu"
            else torch.empty(bytes, dtype=torch.uint8, device=device)
        )
        self.address = self.tensor.data_ptr()
        self.registered = agent.register_memory([(self.address, bytes, device.index or 0, "")], mem_type=_memory(device))


class Nixl:
    """The agent of one endpoint. Threads may share it."""

    def __init__(self, name: str, blocks: Blocks, *, rdma: bool) -> None:
        nixl = api()
        assert nixl is not None
        device = blocks.kv.device
        self.blocks = blocks
        self.memory, self.device = _memory(device), device.index or 0
        self._lock = threading.Lock()
        own = f"{name}-{uuid.uuid4().hex}"
        self._source: Any = nixl.nixl_agent(own, nixl.nixl_agent_config(backends=["UCX"]))
        self._agent: Any = nixl.nixl_agent(f"{own}-reader", nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._registered = self._source.register_memory([(blocks.address, blocks.bytes, self.device, "")], mem_type=self.memory)
        self._remote: dict[str, str] = {}
        elements = blocks.kv[:, :, 0].numel()  # of a block
        self._staging_bytes = max(STAGING_BYTES, elements * max(ITEM_BYTES.values()))  # in whatever kind they come
        self._slot_bytes = max(SLOT_BYTES, elements * blocks.kv.element_size())  # no pair's chunk is larger
        self._free: list[_Staging] = []
        self._stuck: list[tuple[Any, _Staging]] = []
        self._gathered: _Staging | None = None
        self._lendable: Queue[int] = Queue()
        slots = 0
        if blocks.on_cpu:
            slots = GATHERING * SLOTS
            self._gathered = _Staging(self._source, slots * self._slot_bytes, device)
            for first in range(0, slots, SLOTS):
                self._lendable.put(first)
        metadata = self._source.get_agent_metadata()
        self.address = NixlAddress(
            str(self._source.name),
            bytes(metadata),
            blocks.address,
            self.device,
            self.memory,
            rdma,
            staging=0 if self._gathered is None else self._gathered.address,
            slots=slots,
            slot_bytes=self._slot_bytes,
        )

    def gathers(self, source: KvPart, pair: KvPair, there: NixlAddress) -> bool:
        """Are these runs of one end, which are to be read by the other, small pieces scattered in CPU memory? Both ends can say."""
        if self._gathered is None or not there.slots:
            return False
        first = source.layers[0]
        _, lengths = _stretches(pair, KvPart(source.runs, source.unit, source.heads, (first, first + 1)))
        return float(lengths.mean()) < SCATTERED_BYTES

    @staticmethod
    def chunk_bytes(pair: KvPair) -> int:
        """What is gathered at once at most: it fits a slot at the one end, and staging memory at the other."""
        return max(SLOT_BYTES, pair.chunk_bytes)

    @contextmanager
    def lent(self, deadline: float) -> Iterator[list[tuple[int, int]]]:
        """(number, address) of slots to gather into."""
        if self._gathered is None:
            raise TransferStopped("this endpoint gathers nothing for NIXL")
        try:
            first = self._lendable.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise TransferStopped("no slot came free before the deadline") from None
        try:
            yield [(slot, self._gathered.address + slot * self._slot_bytes) for slot in range(first, first + SLOTS)]
        finally:
            self._lendable.put(first)

    @contextmanager
    def fetched(self, there: NixlAddress, slot: int, bytes: int, gone: Callable[[], bool], deadline: float) -> Iterator[int]:
        """The first bytes of a peer's slot; the address where they are here."""
        if self._gathered is None:
            raise TransferStopped("this endpoint takes nothing gathered")
        if bytes > min(there.slot_bytes, self._staging_bytes):
            raise TransferStopped(f"{bytes} bytes in a slot of {there.slot_bytes}", broken=True)
        staging = self._take()
        self._fetch(there, np.array([there.staging + slot * there.slot_bytes]), np.array([bytes]), staging, gone, deadline)
        try:
            yield staging.address
        finally:
            with self._lock:
                self._free.append(staging)

    def read(self, there: NixlAddress, source: KvPart, landing: Landing, gone: Callable[[], bool], deadline: float) -> None:
        """A peer's runs. `gone` is asked now and then: has the peer hung up?"""
        per = max(1, self._staging_bytes // landing.run_bytes)
        for start in range(0, len(source), per):
            chunk = source.some(start, per)
            offsets, lengths = _stretches(landing.pair, chunk)
            staging = self._take()
            self._fetch(there, there.address + offsets, lengths, staging, gone, deadline)
            try:
                self._unpack(staging, landing, chunk, start)
            finally:
                with self._lock:
                    self._free.append(staging)

    def forget(self, agent: str) -> None:
        """A peer's agent that has gone."""
        with self._lock:
            self._drop(agent)

    def close(self) -> None:
        """Nobody may be reading."""
        with self._lock:
            for handle, staging in self._stuck:
                with contextlib.suppress(Exception):
                    handle.release()
                self._free.append(staging)
            for agent in list(self._remote):
                self._drop(agent)
            for staging in self._free:
                with contextlib.suppress(Exception):
                    self._agent.deregister_memory(staging.registered)
            for registered in (self._registered, *([] if self._gathered is None else [self._gathered.registered])):
                with contextlib.suppress(Exception):
                    self._source.deregister_memory(registered)
            self._stuck, self._free, self._gathered, self._agent, self._source = [], [], None, None, None

    def _fetch(
        self, there: NixlAddress, addresses: Addresses, lengths: Addresses, staging: _Staging, gone: Callable[[], bool], deadline: float
    ) -> None:
        """So many bytes from each address of the peer's, one after another. Where it raises, the staging memory has been put away."""
        handle: Any = None
        try:
            with self._lock:
                agent = self._known(there)
                here = staging.address + np.cumsum(lengths) - lengths
                local = self._descriptors(here, lengths, self.memory, self.device)
                remote = self._descriptors(addresses, lengths, there.memory, there.device)
                handle = self._agent.initialize_xfer("READ", local, remote, agent)
                state = self._agent.transfer(handle)
            began = time.monotonic()
            while state == "PROC":
                now = time.monotonic()
                if now >= deadline or gone():
                    with self._lock:
                        self._stuck.append((handle, staging))
                    raise TransferStopped(
                        "the READ did not end before the deadline" if now >= deadline else "the peer hung up", broken=True
                    )
                time.sleep(0 if now - began < SPIN_S else 5e-5)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
            with self._lock:
                handle.release()
            if state != "DONE":
                raise RuntimeError(state)
        except TransferStopped:
            raise
        except Exception as error:  # NIXL's own kinds; all of them end the READ
            with self._lock:
                if handle is not None:
                    with contextlib.suppress(Exception):
                        handle.release()
                self._free.append(staging)
                self._drop(there.agent)
            raise TransferStopped(f"NIXL: {type(error).__name__} {error}".rstrip(), broken=True) from error

    def _unpack(self, staging: _Staging, landing: Landing, source: KvPart, start: int) -> None:
        """From [layers, planes, runs, heads, tokens, head_dim]."""
        blocks, pair, target = self.blocks, landing.pair, landing.target.some(start, len(source))
        if not blocks.on_cpu:
            shape = target.layers[1] - target.layers[0], blocks.planes, len(target), len(target.heads), target.unit, blocks.head_dim
            values = (
                staging.tensor[: len(target) * landing.run_bytes].view(landing.dtype).view(shape).permute(2, 0, 1, 3, 4, 5).contiguous()
            )
            with landing.writing():
                landing.see(values)
                blocks.put(values, target)
        elif pair.converts:
            buffer = np.empty(len(source) * landing.run_bytes, np.uint8)
            offsets = packed(pair.source, source, apart=pair.apart)
            size = len(buffer) // offsets.size
            copy_pieces(staging.address + np.arange(offsets.size) * size, buffer.ctypes.data + offsets, size, read_next=True)
            landing.put(buffer.ctypes.data, start, len(source))
        else:
            offsets, size = pieces_of(pair.target, target, apart=pair.apart)
            with landing.writing():
                copy_pieces(staging.address + np.arange(offsets.size) * size, blocks.address + offsets, size)

    def _take(self) -> _Staging:
        with self._lock:
            still = []
            for handle, staging in self._stuck:
                if self._ended(handle):
                    self._free.append(staging)
                else:
                    still.append((handle, staging))
            self._stuck = still
            if len(still) >= MAX_STUCK:
                raise TransferStopped(f"{len(still)} READs have not ended since they were given up: NIXL is not used until they have")
            if not self._free:
                self._free.append(_Staging(self._agent, self._staging_bytes, self.blocks.kv.device))
            return self._free.pop()

    def _ended(self, handle: Any) -> bool:
        with contextlib.suppress(Exception):
            if self._agent.check_xfer_state(handle) == "PROC":
                return False
        with contextlib.suppress(Exception):
            handle.release()
        return True

    def _known(self, there: NixlAddress) -> str:
        if there.agent not in self._remote:
            name = self._agent.add_remote_agent(there.metadata)
            self._remote[there.agent] = name.decode() if isinstance(name, bytes) else str(name)
            if self._remote[there.agent] != there.agent:
                self._drop(there.agent)
                raise TransferStopped("the peer's NIXL metadata is that of another agent")
        return self._remote[there.agent]

    def _drop(self, agent: str) -> None:
        name = self._remote.pop(agent, None)
        if name is not None:
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(name)

    def _descriptors(self, addresses: Addresses, lengths: Addresses, memory: str, device: int) -> Any:
        rows = np.stack([addresses, lengths, np.full_like(lengths, device)], axis=1).astype(np.uint64)
        return self._agent.get_xfer_descs(rows, mem_type=memory)


def _memory(device: torch.device) -> str:
    return "DRAM" if device.type == "cpu" else "VRAM"


def _stretches(pair: KvPair, source: KvPart) -> tuple[Addresses, Addresses]:
    """Offset and bytes of what lies together at the source, in the order in which it is read: neighbours are read as one."""
    offsets, size = pieces_of(pair.source, source, apart=pair.apart)
    flat = offsets.ravel()
    begins = np.concatenate(([0], np.flatnonzero(np.diff(flat) != size) + 1))
    return flat[begins], np.diff(begins, append=len(flat)) * size
