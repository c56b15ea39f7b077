"""Where the bytes of KV blocks lie, and their packing into buffers for the wire: [n, layers, planes, kv_heads, block_tokens, head_dim], as
`pdlab.kernels.kv_blocks` packs them. CPU memory is copied piece by piece (`pieces`); other devices go through `gather_blocks` and
`scatter_blocks`. There the engine computes on the default stream.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdlab.kernels.kv_blocks import gather_blocks, scatter_blocks
from pdlab.real.transfer.pieces import Addresses, can_send, copy_pieces
from pdlab.real.transfer.shared import SEGMENT, Segment

Ids = NDArray[np.int32]
Layers = tuple[int, int]
SMALL_PIECE_BYTES = 2048
CHUNK_BYTES = 1 << 20  # fits the second-level cache, so that packing costs little beside the socket
DEVICE_COPY_BYTES = 64 << 20  # within one device or between two; the packed copy takes as much of its memory


class Blocks:
    """The KV memory [layers, planes, blocks, kv_heads, block_tokens, head_dim] as bytes, planes being keys and values, or (MLA) the one
    that both are made of. A piece is one block of one plane of one layer."""

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv.detach() if kv.requires_grad else kv
        self.segment: Segment | None = getattr(kv, SEGMENT, None)
        self.address = kv.data_ptr()
        self.count = kv.shape[2]
        self.layers, self.planes = kv.shape[:2]
        self.piece_bytes = kv.shape[3] * kv.shape[4] * kv.shape[5] * kv.element_size()
        self.bytes = kv.numel() * kv.element_size()
        self.on_cpu = kv.device.type == "cpu"
        self._device: Any = getattr(torch, kv.device.type)
        self.chunk_bytes = max(CHUNK_BYTES, self.block_bytes((0, self.layers)))

    def block_bytes(self, layers: Layers) -> int:
        """Of one block in these layers."""
        return self.planes * (layers[1] - layers[0]) * self.piece_bytes

    def per_chunk(self, layers: Layers) -> int:
        """Blocks that a chunk of the wire takes."""
        return max(1, self.chunk_bytes // self.block_bytes(layers))

    def per_copy(self, layers: Layers) -> int:
        """Blocks that are copied from mapped memory before it is asked again whether they may be."""
        return max(1, (4 * self.chunk_bytes if self.on_cpu else DEVICE_COPY_BYTES) // self.block_bytes(layers))

    def synchronize(self) -> None:
        """What this process has queued for the device has run: the engine's streams may read what was written here."""
        self._device.synchronize(self.kv.device)

    def settle(self) -> None:
        """What the engine has queued for its device so far has run, so that others read what it wrote."""
        if not self.on_cpu:
            self._device.default_stream(self.kv.device).record_event().synchronize()

    def offsets(self, ids: Ids, layers: Layers, count: int | None = None) -> Addresses:
        """Byte offset of each piece: [planes, n], plane by plane, so that neighbouring blocks are neighbours. `count`: of the blocks of
        the memory, where it is not this one."""
        planes = np.arange(self.planes * layers[0], self.planes * layers[1], dtype=np.int64)
        return (planes[:, None] * (self.count if count is None else count) + ids[None, :]) * self.piece_bytes

    def packed(self, n: int, layers: Layers) -> Addresses:
        """Byte offset of the same pieces in a packed buffer."""
        planes = self.planes * (layers[1] - layers[0])
        return (np.arange(planes, dtype=np.int64)[:, None] + np.arange(n, dtype=np.int64)[None, :] * planes) * self.piece_bytes

    def pack(self, ids: Ids, layers: Layers, buffer: int) -> int:
        """Blocks into the memory at address `buffer`. Bytes written."""
        if self.on_cpu:
            copy_pieces(self.address + self.offsets(ids, layers), buffer + self.packed(len(ids), layers), self.piece_bytes, read_next=True)
        else:
            with self._device.device(self.kv.device):  # a kernel goes to the thread's own
                self._host(buffer, len(ids), layers).copy_(gather_blocks(self.kv, self._ids(ids), layers=layers))
        return len(ids) * self.block_bytes(layers)

    def pieces(self, ids: Ids, layers: Layers) -> Addresses | None:
        """Where what `pack` would write lies, in its order; None where a copy is quicker or needed."""
        if not self.on_cpu or self.piece_bytes < SMALL_PIECE_BYTES or not can_send():
            return None
        return self.address + self.offsets(ids, layers).T

    def unpack(self, buffer: int, ids: Ids, layers: Layers) -> None:
        """What `pack` wrote, into these blocks."""
        if self.on_cpu:
            copy_pieces(buffer + self.packed(len(ids), layers), self.address + self.offsets(ids, layers), self.piece_bytes)
        else:
            with self._device.device(self.kv.device):
                scatter_blocks(self._host(buffer, len(ids), layers).to(self.kv.device), self.kv, self._ids(ids), layers=layers)
            self.synchronize()

    def pack_from(self, other: int, count: int, source: Ids, layers: Layers, buffer: int) -> None:
        """From a like KV memory of `count` blocks, a CPU's, mapped at `other`: its blocks `source` into the memory at address `buffer`."""
        copy_pieces(
            other + self.offsets(source, layers, count), buffer + self.packed(len(source), layers), self.piece_bytes, read_next=True
        )

    def copy_from(self, other: int, count: int, source: Ids, ids: Ids, layers: Layers) -> None:
        """From a like KV memory of `count` blocks, of the same kind of device, mapped at `other`: its blocks `source` into blocks `ids`."""
        if self.on_cpu:
            copy_pieces(other + self.offsets(source, layers, count), self.address + self.offsets(ids, layers), self.piece_bytes)
            return
        there = self._at(other, count)
        stream = self._device.Stream(self.kv.device)
        stream.wait_stream(self._device.default_stream(self.kv.device))  # an earlier pass may still use the blocks' old content
        with self._device.stream(stream):
            scatter_blocks(gather_blocks(there, self._ids(source), layers=layers), self.kv, self._ids(ids), layers=layers)
            stream.synchronize()

    def crc32(self, ids: Ids, layers: Layers) -> int:
        """Of the packed blocks, in the order of `ids`."""
        found, per_chunk = 0, self.per_chunk(layers)
        buffer = np.empty(min(len(ids), per_chunk) * self.block_bytes(layers), np.uint8)
        for start in range(0, len(ids), per_chunk):
            size = self.pack(ids[start : start + per_chunk], layers, buffer.ctypes.data)
            found = zlib.crc32(buffer[:size].data, found)
        return found

    def _at(self, address: int, count: int) -> Tensor:
        """A like KV memory of `count` blocks that this process's device reaches at `address`."""
        like = torch.empty(0, dtype=self.kv.dtype, device=self.kv.device)
        shape = torch.Size((self.layers, self.planes, count, *self.kv.shape[3:]))
        size = shape.numel() * like.element_size()
        return like.set_(torch._C._construct_storage_from_data_pointer(address, like.device, size)).view(shape)

    def _host(self, buffer: int, n: int, layers: Layers) -> Tensor:
        memory = (ctypes.c_char * (n * self.block_bytes(layers))).from_address(buffer)
        return torch.frombuffer(memory, dtype=self.kv.dtype).view(n, layers[1] - layers[0], *self.kv.shape[1:2], *self.kv.shape[3:])

    def _ids(self, ids: Ids) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.kv.device)
