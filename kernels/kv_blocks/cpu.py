"""The compiled CPU copies of KV blocks."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library


@cache
def _copy() -> Any:
    lib = library("kv_blocks", Path(__file__).with_name("cpu.cpp"))
    if lib is None:
        return None
    lib.pdlab_copy_blocks.argtypes = [*[c_void_p] * 3, *[c_int64] * 4, c_int, c_int]
    lib.pdlab_copy_blocks.restype = None
    return lib.pdlab_copy_blocks


def available() -> bool:
    return _copy() is not None


def copy_blocks(kv: Tensor, buffer: Tensor, block_ids: Tensor, layers: tuple[int, int], into_buffer: bool) -> None:
    first, last = layers
    assert kv.is_contiguous() and buffer.is_contiguous() and buffer.dtype == kv.dtype
    assert buffer.shape == (block_ids.shape[0], last - first, *kv.shape[1:2], *kv.shape[3:])
    ids = block_ids.to(torch.int64).contiguous()
    piece = kv.shape[3] * kv.shape[4] * kv.shape[5] * kv.element_size()
    start = kv.data_ptr() + first * kv.shape[1] * kv.shape[2] * piece
    _copy()(
        start,
        buffer.data_ptr(),
        ids.data_ptr(),
        len(ids),
        kv.shape[2],
        kv.shape[1] * (last - first),
        piece,
        into_buffer,
        torch.get_num_threads(),
    )
