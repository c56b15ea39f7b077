"""The compiled all-reduce."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from ctypes import CDLL, c_double, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library

SLOT_BYTES = 2 << 20  # a rank's, of which half is used at a time
MOST_RANKS = 64
PATIENCE_S = 0.1  # then it is asked whether the others live


@cache
def _library() -> CDLL | None:
    lib = library("all_reduce", Path(__file__).with_name("cpu.cpp"))
    if lib is not None:
        lib.pdlab_all_reduce_board_bytes.restype = c_int64
        lib.pdlab_all_reduce_put.argtypes = [c_void_p, c_int, c_int64, c_uint32, c_void_p, c_int64]
        lib.pdlab_all_reduce_put.restype = None
        lib.pdlab_all_reduce_take.argtypes = [c_void_p, c_int, c_int, c_int64, c_uint32, c_void_p, c_int64, c_int, c_double]
        lib.pdlab_all_reduce_take.restype = c_int
    return lib


def available() -> bool:
    """Is there a compiler?"""
    return _library() is not None


class SharedSum:
    """Rank `rank` of `size`; `memory` is `bytes(size)` zeroed bytes that all of them map. `missing(rank)` is called while another rank is
    waited for: it raises where that rank will not come. All ranks make the same calls in the same order."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, missing: Callable[[int], None], slot_bytes: int = SLOT_BYTES) -> None:
        lib = _library()
        assert lib is not None and size <= MOST_RANKS
        self._lib, self._memory, self._rank, self._size = lib, np.frombuffer(memory, np.uint8), rank, size
        self._address = self._memory.ctypes.data
        self._slot_bytes, self._turn, self._missing = slot_bytes, 0, missing

    @staticmethod
    def bytes(size: int, slot_bytes: int = SLOT_BYTES) -> int:
        """What `size` ranks share."""
        lib = _library()
        assert lib is not None
        return int(lib.pdlab_all_reduce_board_bytes()) + size * slot_bytes

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Is it a tensor that can be summed so?"""
        return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()

    def __call__(self, x: Tensor) -> None:
        """In place: the float32 sum in the order of the ranks, rounded once; every rank gets the same bits."""
        width, most = x.element_size(), self._slot_bytes // 2
        for start in range(0, x.numel(), most // width):
            self._some(x.data_ptr() + start * width, min(most // width, x.numel() - start), width)

    def _some(self, address: int, count: int, width: int) -> None:
        self._turn = (self._turn + 1) & 0xFFFFFFFF
        place = self._address, self._rank
        self._lib.pdlab_all_reduce_put(*place, self._slot_bytes, self._turn, address, count * width)
        while True:
            late = self._lib.pdlab_all_reduce_take(*place, self._size, self._slot_bytes, self._turn, address, count, width == 2, PATIENCE_S)
            if late < 0:
                return
            self._missing(late)
