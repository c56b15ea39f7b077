"""The compiled CPU products of a few vectors with a weight."""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library

MOST = 8  # vectors in one product; more of them are a matrix product's business
FLOAT, BF16, INT8, INT4 = range(4)


@cache
def _library() -> CDLL | None:
    lib = library("linear", Path(__file__).with_name("cpu.cpp"))
    if lib is not None:
        lib.pdlab_matvec.argtypes = [c_int, c_int, c_void_p, c_int64, c_int, *[c_void_p] * 5, *[c_int64] * 3, c_int]
        lib.pdlab_matvec.restype = None
        lib.pdlab_read.argtypes, lib.pdlab_read.restype = [c_void_p, c_int64, c_int], c_float
    return lib


def available(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dim() == 2
        and x.shape[0] <= MOST
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
        and _library() is not None
    )


def product(
    x: Tensor, weight: Tensor, kind: int, bias: Tensor | None, scale: Tensor | None = None, zero: Tensor | None = None, group: int = 0
) -> Tensor:
    lib = _library()
    assert lib is not None, "ask available() first"
    n, inputs = x.shape
    out = weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == (inputs // 2 if kind == INT4 else inputs)
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    y = torch.empty((n, out), dtype=x.dtype)
    lib.pdlab_matvec(
        x.dtype == torch.bfloat16,
        kind,
        x.data_ptr(),
        x.stride(0),
        n,
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        inputs,
        out,
        group,
        torch.get_num_threads(),
    )
    return y


def read(memory: Tensor) -> float:
    """Reads all of `memory` once, with torch's number of threads."""
    lib = _library()
    assert lib is not None, "needs a compiler"
    return float(lib.pdlab_read(memory.data_ptr(), memory.numel() * memory.element_size(), torch.get_num_threads()))
