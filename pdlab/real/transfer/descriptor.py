"""What an endpoint tells its peers about itself: JSON, so that it can travel in `kv_transfer_params` and a registry; never pickle."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from pdlab.real.transfer.result import TransferStopped

if TYPE_CHECKING:
    from torch import Tensor

Way = Literal["tcp", "shm", "cuda_ipc"]
PROTOCOL = 1
MAX_BLOCKS = 1 << 31
MAX_DESCRIPTOR_BYTES = 1 << 18  # NIXL's part is some KiB for each NIC


class Geometry(msgspec.Struct, frozen=True):
    """What must be equal at both ends. The number of blocks may differ. planes: keys and values, or (MLA) the one that both are made of."""

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    dtype: str
    model_hash: str
    protocol: int = PROTOCOL
    planes: int = 2


class Tcp(msgspec.Struct, frozen=True):
    host: str
    port: int


class Shm(msgspec.Struct, frozen=True):
    """`socket` is an abstract Unix address. `mapped`: peers can map the KV memory itself, else it passes through a staging buffer."""

    socket: str
    mapped: bool


class CudaIpcAddress(msgspec.Struct, frozen=True):
    """`socket` is an abstract Unix address, over which the handle of the KV memory is given to who has the token."""

    socket: str


class NixlAddress(msgspec.Struct, frozen=True):
    """`metadata` is NIXL's own blob (base64 in JSON). `address` is where the KV memory begins in the peer, `staging` where its `slots` of
    `slot_bytes` bytes do, into which it gathers scattered blocks; 0 slots: it does not."""

    agent: str
    metadata: bytes
    address: int
    device: int
    memory: str  # "DRAM" or "VRAM"
    rdma: bool
    staging: int = 0
    slots: int = 0
    slot_bytes: int = 0


class Descriptor(msgspec.Struct, frozen=True):
    """An endpoint of one incarnation of an instance, `blocks` KV blocks large. For operators: `nics` are the RDMA NICs that it uses, as UCX
    names them, `npu_address` is that of its NPU's own NIC."""

    name: str
    incarnation: str
    host: str
    geometry: Geometry
    blocks: int
    tcp: Tcp | None = None
    shm: Shm | None = None
    cuda_ipc: CudaIpcAddress | None = None
    nixl: NixlAddress | None = None
    nics: tuple[str, ...] = ()
    npu_address: str = ""
    ranks: tuple[bytes, ...] = ()  # of an instance of several: the descriptors of those from 1 on

    @property
    def key(self) -> tuple[str, str]:
        """Who it is."""
        return self.name, self.incarnation

    @property
    def ways(self) -> tuple[Way, ...]:
        """By which a connection to it can be made, from within its host."""
        found: tuple[tuple[Way, object], ...] = (("tcp", self.tcp), ("shm", self.shm), ("cuda_ipc", self.cuda_ipc))
        return tuple(way for way, there in found if there is not None)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


_read = msgspec.json.Decoder(Descriptor).decode  # made once, here: built by several threads at once it has crashed the process


def decode(text: bytes) -> Descriptor:
    """Raises Trouble where it is no descriptor, or one of another protocol."""
    if len(text) > MAX_DESCRIPTOR_BYTES:
        raise TransferStopped(f"the peer's descriptor has {len(text)} bytes; at most {MAX_DESCRIPTOR_BYTES}")
    try:
        found = _read(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransferStopped(f"the peer's descriptor cannot be read: {error}") from error
    if not 0 <= found.blocks <= MAX_BLOCKS or (found.tcp is not None and not 0 < found.tcp.port < 65536):
        raise TransferStopped("the peer's descriptor has figures out of range")
    if found.tcp is not None and "\0" in found.tcp.host:
        raise TransferStopped("the peer's descriptor has no address")
    return found


def incompatible(ours: bytes | Descriptor, theirs: bytes | Descriptor) -> str | None:
    """Why KV cannot pass between two endpoints: each field that differs, with both values. None: it can."""
    try:
        a, b = (decode(d) if isinstance(d, bytes) else d for d in (ours, theirs))
    except TransferStopped as trouble:
        return trouble.reason
    differing = [
        f"{field} {getattr(a.geometry, field)!r} at {a.name} and {getattr(b.geometry, field)!r} at {b.name}"
        for field in Geometry.__struct_fields__
        if getattr(a.geometry, field) != getattr(b.geometry, field)
    ]
    if len(a.ranks) != len(b.ranks):
        differing.append(f"tp {len(a.ranks) + 1} at {a.name} and tp {len(b.ranks) + 1} at {b.name}")
    return f"KV does not fit: {'; '.join(differing)}" if differing else None


def geometry(kv: Tensor, block_tokens: int, model_hash: str) -> Geometry:
    """Of a KV tensor [layers, planes, blocks, kv_heads, block_tokens, head_dim]."""
    assert kv.dim() == 6 and kv.shape[1] in (1, 2) and kv.shape[4] == block_tokens, (
        f"not KV blocks of {block_tokens} tokens: {tuple(kv.shape)}"
    )
    assert kv.is_contiguous(), "KV memory is contiguous"
    return Geometry(
        kv.shape[0], kv.shape[3], block_tokens, kv.shape[5], str(kv.dtype).removeprefix("torch."), model_hash, planes=kv.shape[1]
    )


def host_id() -> str:
    """Equal for two processes only if they can meet at an abstract Unix socket: one kernel, one network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"{platform.node()}/{os.getpid()}"  # nobody's equal
