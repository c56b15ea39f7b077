"""Pieces of memory, each at an address of its own, copied and sent by a compiled loop in the calling thread: without the GIL, and without
OpenMP's pool, which belongs to the engine. Without a compiler numpy does the same, more slowly. Elements are converted likewise."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.kernels.cpu_build import library

Addresses = NDArray[np.int64]
FP8 = "float8_e4m3fn"
CONVERTS = {
    ("float32", "bfloat16"): "pdlab_to_bfloat16",
    ("bfloat16", "float32"): "pdlab_to_float32",
    ("float32", FP8): "pdlab_float32_to_fp8",
    ("bfloat16", FP8): "pdlab_bfloat16_to_fp8",
    (FP8, "float32"): "pdlab_fp8_to_float32",
    (FP8, "bfloat16"): "pdlab_fp8_to_bfloat16",
}


def copy_pieces(source: Addresses, target: Addresses, piece_bytes: int, *, read_next: bool = False) -> None:
    """Pieces of `piece_bytes` bytes from addresses to addresses. `read_next`: what is written is read at once, so it is left in the caches;
    else they are passed by."""
    source, target = _flat(source), _flat(target)
    assert len(source) == len(target)
    lib = _compiled()
    if lib is None:
        _copy(source, target, piece_bytes)
        return
    copy = lib.pdlab_copy_pieces if read_next else lib.pdlab_stream_pieces
    copy(source.ctypes.data, target.ctypes.data, len(source), piece_bytes)


def can_send() -> bool:
    """Is there a `send_pieces`?"""
    return _compiled() is not None


def send_pieces(fd: int, source: Addresses, piece_bytes: int, wait: Callable[[], None]) -> None:
    """Over a socket, in this order, from where they lie. `wait` returns when it takes more, or raises. OSError: it is broken."""
    lib, source, done = _compiled(), _flat(source), 0
    assert lib is not None
    while True:
        done = lib.pdlab_send_pieces(fd, source.ctypes.data, len(source), piece_bytes, done)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        if done == len(source) * piece_bytes:
            return
        wait()


def convert(source: int, target: int, count: int, kinds: tuple[str, str]) -> bool:
    """`count` elements of the first kind at address `source` to the second, rounded to the nearest, at `target`. False: there is no loop
    for these kinds."""
    lib, name = _compiled(), CONVERTS.get(kinds)
    if lib is None or name is None:
        return False
    getattr(lib, name)(source, target, count)
    return True


def _flat(addresses: Addresses) -> Addresses:
    return np.ascontiguousarray(addresses, np.int64).ravel()


def _copy(source: Addresses, target: Addresses, piece_bytes: int) -> None:
    if not len(source):
        return
    step = math.gcd(piece_bytes, *(int(np.gcd.reduce(ends - ends.min())) for ends in (source, target)))
    one = np.arange(piece_bytes // step)

    def steps(ends: Addresses) -> tuple[NDArray[np.uint8], Addresses]:
        """All that lies between them, [steps, bytes of a step], and which of it they are."""
        first = int(ends.min())
        memory = (ctypes.c_char * (int(ends.max()) + piece_bytes - first)).from_address(first)
        return np.frombuffer(memoryview(memory), np.uint8).reshape(-1, step), (ends[:, None] - first) // step + one

    there, here = steps(source), steps(target)
    here[0][here[1]] = there[0][there[1]]


@cache
def _compiled() -> Any:
    lib = library("kv_copy", Path(__file__).with_name("copy.cpp"))
    if lib is None:
        return None
    many = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    lib.pdlab_copy_pieces.argtypes = lib.pdlab_stream_pieces.argtypes = many
    lib.pdlab_copy_pieces.restype = lib.pdlab_stream_pieces.restype = None
    for name in CONVERTS.values():
        getattr(lib, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        getattr(lib, name).restype = None
    lib.pdlab_send_pieces.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    lib.pdlab_send_pieces.restype = ctypes.c_int64
    return lib
