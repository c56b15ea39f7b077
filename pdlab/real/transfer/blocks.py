"""Where the bytes of KV lie, and their packing into buffers for the wire: [runs, layers, planes, heads, tokens of a run, head_dim]; of
whole blocks that is as `pdlab.kernels.kv_blocks` packs them. CPU memory is copied piece by piece (`pieces`); other devices go through
`gather_blocks` and `scatter_blocks`. There the engine computes on the default stream.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdlab.core.kv_plan import KvLayout
from pdlab.kernels.fp8 import rounded
from pdlab.kernels.kv_blocks import gather_blocks, scatter_blocks
from pdlab.real.transfer.pair import CHUNK_BYTES
from pdlab.real.transfer.pieces import Addresses, can_send, convert, copy_pieces
from pdlab.real.transfer.shared import SEGMENT, Segment

Ids = NDArray[np.int32]
Layers = tuple[int, int]
SMALL_PIECE_BYTES = 2048
DEVICE_COPY_BYTES = 64 << 20  # within one device or between two; the packed copy takes as much of its memory
SLICE = 1 << 14  # elements converted in one call: fewer than torch shares out among threads, which are the engine's


@dataclass(frozen=True, slots=True, eq=False)
class KvPart:
    """What passes of a KV memory: `runs` of `unit` tokens (`kv_plan.runs_of`; where `unit` is its block size they are its blocks), of some
    of its heads, in layers first <= l < last."""

    runs: Ids
    unit: int
    heads: range
    layers: Layers

    def __len__(self) -> int:
        return len(self.runs)

    def some(self, start: int, count: int) -> KvPart:
        """Of its runs."""
        return KvPart(self.runs[start : start + count], self.unit, self.heads, self.layers)

    def blocks(self, block_tokens: int) -> Ids:
        """In which blocks it lies."""
        ratio = block_tokens // self.unit
        return self.runs if ratio == 1 else np.unique(self.runs // ratio)


class Blocks:
    """The KV memory [layers, planes, blocks, kv_heads, block_tokens, head_dim] as bytes, planes being keys and values, or (MLA) the one
    that both are made of. A piece is what lies together of a run in one plane of one layer."""

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv.detach() if kv.requires_grad else kv
        self.segment: Segment | None = getattr(kv, SEGMENT, None)
        self.address = kv.data_ptr()
        self.layers, self.planes, self.count, self.heads, self.block_tokens, self.head_dim = kv.shape
        self.layout = KvLayout(self.layers, self.planes, self.count, self.heads, self.block_tokens, self.head_dim * kv.element_size())
        self.bytes = kv.numel() * kv.element_size()
        self.on_cpu = kv.device.type == "cpu"
        self._device: Any = getattr(torch, kv.device.type)

    def whole(self, ids: Ids, layers: Layers | None = None) -> KvPart:
        """All of these blocks, in these layers."""
        return KvPart(ids, self.block_tokens, range(self.heads), layers or (0, self.layers))

    def run_bytes(self, part: KvPart) -> int:
        """Of one run in its layers."""
        return self.planes * (part.layers[1] - part.layers[0]) * len(part.heads) * part.unit * self.layout.token_bytes

    def per_chunk(self, part: KvPart, chunk_bytes: int = CHUNK_BYTES) -> int:
        """Runs that a chunk takes."""
        return max(1, chunk_bytes // self.run_bytes(part))

    def per_copy(self, part: KvPart) -> int:
        """Runs that are copied from mapped memory before it is asked again whether they may be."""
        return self.per_chunk(part, 4 * CHUNK_BYTES if self.on_cpu else DEVICE_COPY_BYTES)

    def synchronize(self) -> None:
        """What this process has queued for the device has run: the engine's streams may read what was written here."""
        self._device.synchronize(self.kv.device)

    def settle(self) -> None:
        """What the engine has queued for its device so far has run, so that others read what it wrote."""
        if not self.on_cpu:
            self._device.default_stream(self.kv.device).record_event().synchronize()

    def pack(self, part: KvPart, buffer: int) -> int:
        """Runs into the memory at address `buffer`. Bytes written."""
        if self.on_cpu:
            offsets, size = pieces_of(self.layout, part)
            copy_pieces(self.address + offsets, buffer + packed(self.layout, part), size, read_next=True)
        else:
            with self._device.device(self.kv.device):  # a kernel goes to the thread's own
                _tensor(buffer, self._packed(part), self.kv.dtype).copy_(self._gathered(self.kv, part))
        return len(part) * self.run_bytes(part)

    def pieces(self, part: KvPart) -> tuple[Addresses, int] | None:
        """Where what `pack` would write lies, in its order, and the bytes of a piece; None where a copy is quicker or needed."""
        if not self.on_cpu or not can_send():
            return None
        offsets, size = pieces_of(self.layout, part)
        if size < SMALL_PIECE_BYTES:
            return None
        return self.address + offsets.transpose(1, 0, 2), size

    def unpack(self, buffer: int, part: KvPart, dtype: torch.dtype | None = None) -> None:
        """What `pack` wrote, of elements of that `dtype` (None: of the same), into these runs."""
        if not self.on_cpu:
            with self._device.device(self.kv.device):
                self._scatter(_tensor(buffer, self._packed(part), dtype or self.kv.dtype).to(self.kv.device), part)
            self.synchronize()
            return
        ours = converted(buffer, self._packed(part).numel(), dtype, self.kv.dtype) if dtype not in (None, self.kv.dtype) else None
        offsets, size = pieces_of(self.layout, part)
        copy_pieces((buffer if ours is None else ours.data_ptr()) + packed(self.layout, part), self.address + offsets, size)

    def copy_from(
        self,
        other: int,
        layout: KvLayout,
        source: KvPart,
        target: KvPart,
        dtype: torch.dtype | None = None,
        see: Callable[[Tensor], None] = lambda values: None,
    ) -> None:
        """From the KV memory of a peer, of the same kind of device, mapped at `other`: its runs `source` into the runs `target`. Of
        elements of that `dtype` (None: of the same), which a CPU's must be. `see` is shown what comes to a device."""
        if self.on_cpu:
            assert dtype in (None, self.kv.dtype), "converted in a buffer"
            apart = layout.block_tokens != self.layout.block_tokens
            a, size = pieces_of(layout, source, apart=apart)
            b, _ = pieces_of(self.layout, target, apart=apart)
            copy_pieces(other + a, self.address + b, size)
            return
        there = self._at(other, layout, dtype or self.kv.dtype)
        stream = self._device.Stream(self.kv.device)
        stream.wait_stream(self._device.default_stream(self.kv.device))  # an earlier pass may still use the blocks' old content
        with self._device.stream(stream):
            values = self._gathered(there, source)
            see(values)
            self._scatter(values, target)
            stream.synchronize()

    def crc32(self, part: KvPart) -> int:
        """Of the packed runs, in their order."""
        found, per_chunk = 0, self.per_chunk(part)
        buffer = np.empty(min(len(part), per_chunk) * self.run_bytes(part), np.uint8)
        for start in range(0, len(part), per_chunk):
            size = self.pack(part.some(start, per_chunk), buffer.ctypes.data)
            found = zlib.crc32(buffer[:size].data, found)
        return found

    def put(self, values: Tensor, part: KvPart) -> None:
        """Packed elements [runs, layers, planes, heads, tokens, head_dim] on this device into these runs."""
        self._scatter(values, part)
        self.synchronize()

    def _at(self, address: int, layout: KvLayout, dtype: torch.dtype) -> Tensor:
        """A peer's KV memory, which this process's device reaches at `address`."""
        like = torch.empty(0, dtype=dtype, device=self.kv.device)
        shape = torch.Size((self.layers, self.planes, layout.blocks, layout.heads, layout.block_tokens, self.head_dim))
        return like.set_(torch._C._construct_storage_from_data_pointer(address, like.device, layout.bytes)).view(shape)

    def _packed(self, part: KvPart) -> torch.Size:
        return torch.Size((len(part), part.layers[1] - part.layers[0], self.planes, len(part.heads), part.unit, self.head_dim))

    @staticmethod
    def _gathered(kv: Tensor, part: KvPart) -> Tensor:
        """Packed runs of a KV memory on a device."""
        ids = torch.from_numpy(part.runs.astype(np.int64)).to(kv.device)
        found: Tensor
        if part.unit == kv.shape[4] and len(part.heads) == kv.shape[3]:
            found = gather_blocks(kv, ids, layers=part.layers)
        else:
            found = _runs_of(kv, part)[:, :, ids // (kv.shape[4] // part.unit), :, ids % (kv.shape[4] // part.unit)]
        return found

    def _scatter(self, values: Tensor, part: KvPart) -> None:
        """The other way round."""
        kv, values = self.kv, rounded(values, self.kv.dtype)
        ids = torch.from_numpy(part.runs.astype(np.int64)).to(kv.device)
        if part.unit == kv.shape[4] and len(part.heads) == kv.shape[3]:
            scatter_blocks(values.contiguous(), kv, ids, layers=part.layers)
        else:
            _runs_of(kv, part)[:, :, ids // (kv.shape[4] // part.unit), :, ids % (kv.shape[4] // part.unit)] = values


def _runs_of(kv: Tensor, part: KvPart) -> Tensor:
    """[layers, planes, blocks, heads, runs of a block, tokens, head_dim], of the part's layers and heads. Indexed by block and run, the
    index comes first: [n, layers, planes, heads, tokens, head_dim]."""
    runs = kv.view(*kv.shape[:4], kv.shape[4] // part.unit, part.unit, kv.shape[5])
    return runs[part.layers[0] : part.layers[1], :, :, part.heads.start : part.heads.stop]


def pieces_of(layout: KvLayout, part: KvPart, *, apart: bool | None = None) -> tuple[Addresses, int]:
    """Byte offset of each piece of it in a memory: [planes, runs, pieces], plane by plane, so that neighbouring blocks are neighbours; and
    their size. `apart`: a piece for each head; by default only where they lie apart."""
    apart = part.unit != layout.block_tokens if apart is None else apart
    offsets = layout.offsets(part.runs, part.unit, range(*part.layers), part.heads, apart=apart)
    return offsets, part.unit * layout.token_bytes * (1 if apart else len(part.heads))


def packed(layout: KvLayout, part: KvPart, *, apart: bool | None = None) -> Addresses:
    """Byte offset of the same pieces in a packed buffer."""
    planes, apart = layout.halves * (part.layers[1] - part.layers[0]), part.unit != layout.block_tokens if apart is None else apart
    head_bytes = part.unit * layout.token_bytes
    heads = np.arange(len(part.heads) if apart else 1, dtype=np.int64) * head_bytes
    plane_bytes = len(part.heads) * head_bytes
    at = np.arange(planes, dtype=np.int64)[:, None] + np.arange(len(part), dtype=np.int64)[None, :] * planes
    return (at * plane_bytes)[:, :, None] + heads


def pack_from(other: int, layout: KvLayout, source: KvPart, buffer: int) -> None:
    """From the KV memory of a peer, a CPU's, mapped at `other`: its runs `source` into the memory at address `buffer`."""
    offsets, size = pieces_of(layout, source)
    copy_pieces(other + offsets, buffer + packed(layout, source), size, read_next=True)


def _tensor(buffer: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory at address `buffer`."""
    memory = (ctypes.c_char * (shape.numel() * dtype.itemsize)).from_address(buffer)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def converted(buffer: int, count: int, source: torch.dtype, target: torch.dtype) -> Tensor:
    """`count` elements at address `buffer`, rounded to the nearest of another kind."""
    found = torch.empty(count, dtype=target)
    if convert(buffer, found.data_ptr(), count, (_name(source), _name(target))):
        return found
    values = _tensor(buffer, torch.Size((count,)), source)
    for start in range(0, count, SLICE):
        found[start : start + SLICE] = rounded(values[start : start + SLICE], target)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
