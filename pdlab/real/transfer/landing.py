"""The end of a transfer: KV that comes, from buffers into our memory, converted where it must be."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from pdlab.real.transfer.blocks import Blocks, KvPart
from pdlab.real.transfer.pair import KvPair

Writing = Callable[[], AbstractContextManager[None]]  # raises Trouble once the transfer is over


class Landing:
    """Where a peer's KV goes: the runs of `target`, in whose order they come. `checked`: a checksum of it will be asked for, of what was
    sent: of elements that are converted here it is taken as they come."""

    def __init__(self, blocks: Blocks, pair: KvPair, target: KvPart, writing: Writing, *, checked: bool) -> None:
        self.blocks, self.pair, self.target, self.writing = blocks, pair, target, writing
        self.dtype: torch.dtype = getattr(torch, self.pair.dtypes[0])
        self.run_bytes = self.blocks.run_bytes(target) // self.blocks.kv.element_size() * self.dtype.itemsize  # as they come
        self._summed = checked and self.pair.converts
        self._crc32 = 0

    def put(self, buffer: int, start: int, count: int) -> None:
        """Packed runs in memory at address `buffer`, the first of them number `start`."""
        with self.writing():
            self.add(buffer, count)
            self.blocks.unpack(buffer, self.target.some(start, count), self.dtype)

    def add(self, buffer: int, count: int) -> None:
        """To the checksum."""
        if self._summed:
            self._crc32 = zlib.crc32((ctypes.c_char * (count * self.run_bytes)).from_address(buffer), self._crc32)

    def see(self, values: torch.Tensor) -> None:
        """The same of packed runs on a device."""
        if self._summed:
            host = values.cpu()
            self.add(host.data_ptr(), len(host))

    def crc32(self) -> int:
        """Of what was sent."""
        return self._crc32 if self._summed else self.blocks.crc32(self.target)
