"""KV memory of a GPU that another process of the same host reads in place, by CUDA IPC: shm's way (see connection.py) with another mapping.

The driver is called itself (libcuda by ctypes) rather than through torch.multiprocessing's reductions. What those exchange names a file of
/dev/shm which the receiver opens for a reference count, and carries a handle whose kind and length torch's C++ believes, in a private form
that is meant for pickle. The driver's handle is 64 bytes that it checks itself, and how large the memory behind one is, is asked of the
driver, not of the peer.

CUDA cannot forbid writing through a mapping: that only a destination's own threads write its KV memory is kept by the peers, which have the
token and run as the same user. Nor does the driver say what becomes of a mapping whose owner frees the memory: an engine keeps its own
until its process ends, and readers let go of theirs with the last connection to it. Memory of torch's expandable segments, or of
cudaMallocAsync, has no handle.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from typing import Any, Protocol

from pdlab.real.transfer import wire
from pdlab.real.transfer.result import TransferStopped

log = logging.getLogger(__name__)

HANDLE_BYTES = 64
ALIGNMENT_BYTES = 16
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class Memory(Protocol):
    """What is asked of the driver about one GPU. OSError: it will not."""

    @property
    def pci(self) -> str:
        """The GPU's PCIe address, such as "0000:3b:00.0"."""

    def export(self, address: int, size: int) -> wire.CudaHandle: ...

    def open(self, handle: bytes) -> tuple[int, int]:
        """Where the peer's allocation is mapped in this process, and how many bytes it has."""

    def close(self, address: int) -> None: ...


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class Driver:
    """The CUDA driver, for the GPU that this process numbers `ordinal`. Calls may come from any thread."""

    def __init__(self, ordinal: int, library: str = "libcuda.so.1") -> None:
        self._lib = ctypes.CDLL(library)
        self._context = ctypes.c_void_p()
        self._device = ctypes.c_int()
        self._check("cuInit", ctypes.c_uint(0))
        self._check("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))

    @property
    def pci(self) -> str:
        found = ctypes.create_string_buffer(32)
        self._check("cuDeviceGetPCIBusId", found, ctypes.c_int(len(found)), self._device)
        return found.value.decode("ascii").lower()

    def export(self, address: int, size: int) -> wire.CudaHandle:
        base, bytes_there = self._range(address)
        if address + size > base + bytes_there:
            raise OSError("the KV memory is not one allocation")
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return wire.CudaHandle(bytes(handle.bytes), address - base, size)

    def open(self, handle: bytes) -> tuple[int, int]:
        mapped = ctypes.c_uint64()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(mapped), _Handle.from_buffer_copy(handle), ctypes.c_uint(LAZY_PEER_ACCESS))
        try:
            base, size = self._range(mapped.value)
        except OSError:
            self.close(mapped.value)
            raise
        return mapped.value, base + size - mapped.value

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _range(self, address: int) -> tuple[int, int]:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return base.value, size.value

    def _call(self, name: str, *arguments: Any) -> None:
        """In the GPU's primary context, which is torch's."""
        if not self._context:
            self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._check("cuCtxPushCurrent_v2", self._context)
        try:
            self._check(name, *arguments)
        finally:
            self._check("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _check(self, name: str, *arguments: Any) -> None:
        found = getattr(self._lib, name, None)
        if found is None:
            raise OSError(f"the CUDA driver lacks {name}")
        if code := found(*arguments):
            text = ctypes.c_char_p()
            self._lib.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'error %d' % code).decode('ascii', 'replace')}")


class Opened:
    """A peer's KV memory, at `address` in this process for as long as this object lives."""

    def __init__(self, memory: Memory, told: wire.CudaHandle) -> None:
        mapped, there = memory.open(told.handle)
        self.close = weakref.finalize(self, _close, memory, mapped)
        self.close.atexit = False  # the driver unmaps what an ending process leaves, and may be gone by then
        self.address = mapped + told.offset
        if told.offset + told.size > there:
            self.close()
            raise OSError(f"the peer's allocation has {there} bytes, and KV memory up to {told.offset + told.size}")


def _close(memory: Memory, address: int) -> None:
    try:
        memory.close(address)
    except OSError as error:
        log.warning("a peer's GPU memory stays mapped: %s", error)


class CudaIpc:
    """An endpoint's part in it: `exported` is what its peers are told, and each peer's memory is opened once, however many connections lead
    to it."""

    def __init__(self, memory: Memory, exported: wire.CudaHandle) -> None:
        self.exported = exported
        self._memory = memory
        self._refused: dict[str, str] = {}
        self._lock = threading.Lock()
        self._found: weakref.WeakValueDictionary[wire.CudaHandle, Opened] = weakref.WeakValueDictionary()

    def open(self, told: wire.CudaHandle, size: int) -> Opened:
        """What a peer has told of its KV memory, which must be `size` bytes. Trouble: it is not, or the driver will not."""
        if len(told.handle) != HANDLE_BYTES:
            raise TransferStopped(f"a CUDA handle of {len(told.handle)} bytes")
        if told.size != size or not 0 <= told.offset < 1 << 48 or told.offset % ALIGNMENT_BYTES:
            raise TransferStopped(f"{told.size} bytes of GPU memory from {told.offset} on, where {size} are to be")
        try:
            with self._lock:
                opened = self._found.get(told)
                if opened is None:
                    opened = self._found[told] = Opened(self._memory, told)
                return opened
        except OSError as error:
            raise TransferStopped(f"GPU memory cannot be opened: {error}") from error

    def give_up(self, name: str, incarnation: str, reason: str) -> None:
        """That peer's memory could not be opened here, or ours there: another way is taken from now on."""
        log.warning("no cuda_ipc with %s, another transport is used where there is one: %s", name, reason)
        self._refused[name] = incarnation

    def works_with(self, name: str, incarnation: str) -> bool:
        return self._refused.get(name) != incarnation
