"""What an endpoint tells its peers about itself: JSON, so that it can travel in `kv_transfer_params` and a registry; never pickle."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from pdlab.core.kv_plan import heads_fit, heads_of
from pdlab.real.transfer.result import TransferStopped

if TYPE_CHECKING:
    from torch import Tensor

Way = Literal["tcp", "shm", "cuda_ipc"]
PROTOCOL = 2
MAX_BLOCKS = 1 << 31
MAX_RANKS = 1 << 10
MAX_DESCRIPTOR_BYTES = 1 << 18  # NIXL's part is some KiB for each NIC
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
CONVERTIBLE = ("dtype", "block_tokens")


class Geometry(msgspec.Struct, frozen=True):
    """What KV memory is like. The reader converts the dtype, and blocks whose sizes differ by a whole factor; all else must be equal at
    both ends. `kv_heads`: of the model, whichever rank has them. planes: keys and values, or (MLA) the one that both are made of."""

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
    rank: int = 0  # of the `tp` that hold each layer together
    tp: int = 1
    ranks: tuple[bytes, ...] = ()  # where it speaks for an instance of several: the descriptors of those from 1 on

    @property
    def heads(self) -> range:
        """The KV heads that its rank holds."""
        return heads_of(self.geometry.kv_heads, self.tp, self.rank)

    @property
    def alone(self) -> Descriptor:
        """Without those that it speaks for."""
        return msgspec.structs.replace(self, ranks=()) if self.ranks else self

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


@lru_cache(maxsize=4096)
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
    shape = found.geometry
    if not 0 <= found.rank < found.tp <= MAX_RANKS or min(shape.kv_heads, shape.block_tokens, shape.layers) < 1 or shape.head_dim < 1:
        raise TransferStopped("the peer's descriptor has figures out of range")
    if found.ranks and len(found.ranks) != found.tp - 1:
        raise TransferStopped(f"the peer's descriptor is of tp {found.tp}, and has {len(found.ranks) + 1} ranks")
    if found.tcp is not None and "\0" in found.tcp.host:
        raise TransferStopped("the peer's descriptor has no address")
    return found


def incompatible(ours: bytes | Descriptor, theirs: bytes | Descriptor) -> str | None:
    """Why KV cannot pass between two endpoints: each field that differs and cannot be converted, with both values. None: it can."""
    try:
        a, b = (decode(d) if isinstance(d, bytes) else d for d in (ours, theirs))
    except TransferStopped as trouble:
        return trouble.reason

    def both(field: str, why: str = "") -> str:
        return f"{field} {getattr(a.geometry, field)!r} at {a.name} and {getattr(b.geometry, field)!r} at {b.name}{why}"

    if a.geometry.protocol != b.geometry.protocol:
        return f"KV does not fit: {both('protocol')}: run the same version of pdlab everywhere"
    differing = [
        both(field)
        for field in Geometry.__struct_fields__
        if field not in CONVERTIBLE and getattr(a.geometry, field) != getattr(b.geometry, field)
    ]
    convertible = [field for field in CONVERTIBLE if getattr(a.geometry, field) != getattr(b.geometry, field)]
    small, large = sorted((a.geometry.block_tokens, b.geometry.block_tokens))
    if large % small:
        convertible.remove("block_tokens")
        differing.append(both("block_tokens", ": one must be a multiple of the other"))
    if unknown := sorted({a.geometry.dtype, b.geometry.dtype} - set(ITEM_BYTES)):
        convertible = [field for field in convertible if field != "dtype"]
        differing.append(both("dtype", f": {', '.join(unknown)} is unknown"))
    differing += [
        f"tp {one.tp} at {one.name}, which shares out no {one.geometry.kv_heads} KV heads"
        for one in (a, b)
        if not heads_fit(one.geometry.kv_heads, one.tp)
    ]
    if not differing:
        return None
    rest = f" ({', '.join(convertible)} would be converted)" if convertible else ""
    return f"KV does not fit: {'; '.join(differing)}{rest}"


def conversions(a: Descriptor, b: Descriptor) -> str:
    """What is converted on the way from `a` to `b`, where KV can pass between them; "": it passes as it is."""
    found = []
    if a.geometry.dtype != b.geometry.dtype:
        found.append(f"{a.geometry.dtype} to {b.geometry.dtype}")
    if a.geometry.block_tokens != b.geometry.block_tokens:
        found.append(f"blocks of {a.geometry.block_tokens} tokens to blocks of {b.geometry.block_tokens}")
    if a.tp != b.tp:
        found.append(f"tp {a.tp} to tp {b.tp}")
    return ", ".join(found)


def geometry(kv: Tensor, block_tokens: int, model_hash: str, kv_heads: int) -> Geometry:
    """Of a KV tensor [layers, planes, blocks, heads, block_tokens, head_dim], whose heads are some of the model's `kv_heads`."""
    assert kv.dim() == 6 and kv.shape[1] in (1, 2) and kv.shape[4] == block_tokens, (
        f"not KV blocks of {block_tokens} tokens: {tuple(kv.shape)}"
    )
    assert kv.is_contiguous(), "KV memory is contiguous"
    return Geometry(kv.shape[0], kv_heads, block_tokens, kv.shape[5], str(kv.dtype).removeprefix("torch."), model_hash, planes=kv.shape[1])


def host_id() -> str:
    """Equal for two processes only if they can meet at an abstract Unix socket: one kernel, one network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"{platform.node()}/{os.getpid()}"  # nobody's equal
