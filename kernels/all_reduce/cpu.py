"""The compiled all-reduce."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from ctypes import CDLL, CFUNCTYPE, Structure, byref, c_double, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library

SLOT_BYTES = 2 << 20  # a rank's, of which half is used at a time
MOST_RANKS = 64
PATIENCE_S = 0.1  # then it is asked whether the others live
Missing = CFUNCTYPE(c_int, c_int)


class SumStruct(Structure):
    _fields_ = [
        ("memory", c_void_p),
        *[(name, c_int64) for name in ("rank", "ranks", "slot_bytes")],
        ("missing", Missing),
        ("patience_s", c_double),
        ("turn", c_uint32),
    ]


@cache
def _library() -> CDLL | None:
    lib = library("all_reduce", Path(__file__).with_name("cpu.cpp"))
    if lib is not None:
        lib.pdlab_all_reduce_board_bytes.restype = c_int64
        lib.pdlab_all_reduce.argtypes = [c_void_p, c_void_p, c_int64, c_int]
        lib.pdlab_all_reduce.restype = c_int
        lib.pdlab_gather.argtypes = [c_void_p, c_void_p, c_int64, c_void_p]
        lib.pdlab_gather.restype = c_int
    return lib


def available() -> bool:
    """Is there a compiler?"""
    return _library() is not None


class _Asking:
    """Asks `missing` for the compiled side, which knows no exceptions: what it has raised is kept."""

    def __init__(self, missing: Callable[[int], None]) -> None:
        self.missing = missing
        self.raised: BaseException | None = None

    def __call__(self, rank: int) -> int:
        try:
            self.missing(rank)
        except BaseException as error:
            self.raised = error
            return 1
        return 0


class SharedSum:
    """Rank `rank` of `size`; `memory` is `bytes(size)` zeroed bytes that all of them map. `missing(rank)` is called while another rank is
    waited for: it raises where that rank will not come. All ranks make the same calls in the same order."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, missing: Callable[[int], None], slot_bytes: int = SLOT_BYTES) -> None:
        lib = _library()
        assert lib is not None and size <= MOST_RANKS
        self._lib, self._memory, self._rank, self._size = lib, np.frombuffer(memory, np.uint8), rank, size
        self._asking = _Asking(missing)
        self.function = lib.pdlab_all_reduce
        self.struct = SumStruct(self._memory.ctypes.data, rank, size, slot_bytes, Missing(self._asking), PATIENCE_S, 0)

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
        self.check(self._lib.pdlab_all_reduce(byref(self.struct), x.data_ptr(), x.numel(), x.dtype == torch.bfloat16))

    def gather(self, x: Tensor) -> Tensor:
        """Everybody's `x`, all of one shape and contiguous, at rank 0: [size, *x.shape]; elsewhere it is empty."""
        all_ = x.new_empty((self._size if self._rank == 0 else 0, *x.shape))
        self.check(self._lib.pdlab_gather(byref(self.struct), x.data_ptr(), x.nbytes, all_.data_ptr()))
        return all_

    def check(self, late: int) -> None:
        """Of a compiled function that adds up: raises what `missing` has where a rank has not come."""
        if late >= 0:
            assert self._asking.raised is not None, "else it would wait on"
            raise self._asking.raised
