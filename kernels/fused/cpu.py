"""The compiled CPU kernels of a layer's small steps."""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library


@cache
def _library() -> CDLL | None:
    lib = library("fused", Path(__file__).with_name("cpu.cpp"))
    if lib is not None:
        lib.pdlab_rms_norm.argtypes = [c_int, *[c_void_p] * 4, *[c_int64] * 3, c_float, c_int]
        lib.pdlab_silu_and_mul.argtypes = [c_int, *[c_void_p] * 2, *[c_int64] * 3, c_int]
        lib.pdlab_rope.argtypes = [c_int, *[c_void_p] * 5, c_int64, *[c_int] * 3, *[c_int64] * 4, c_int]
        lib.pdlab_rms_norm.restype = lib.pdlab_silu_and_mul.restype = lib.pdlab_rope.restype = None
    return lib


def available(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16) and _library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    lib = _library()
    assert lib is not None, "ask available() first"
    dim = x.shape[-1]
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, dim).contiguous()
    assert weight.is_contiguous() and weight.dtype == x.dtype
    assert residual is None or (residual.is_contiguous() and residual.dtype == x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    into = 0 if residual is None else residual.data_ptr()
    lib.pdlab_rms_norm(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        into,
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        dim,
        x.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    lib = _library()
    assert lib is not None, "ask available() first"
    tokens, twice = gate_up.shape
    assert gate_up.stride(1) == 1
    out = torch.empty((tokens, twice // 2), dtype=gate_up.dtype)
    lib.pdlab_silu_and_mul(
        gate_up.dtype == torch.bfloat16, gate_up.data_ptr(), out.data_ptr(), tokens, twice // 2, gate_up.stride(0), torch.get_num_threads()
    )
    return out


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    lib = _library()
    assert lib is not None, "ask available() first"
    tokens, heads, dim = q.shape
    q_token, q_head, q_last = q.stride()
    k_token, k_head, k_last = k.stride()
    assert q_last == 1 and k_last == 1 and k.dtype == q.dtype and positions.dtype == torch.int64 and positions.is_contiguous()
    assert cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous() and cos.shape[1] == dim // 2
    lib.pdlab_rope(
        q.dtype == torch.bfloat16,
        q.data_ptr(),
        k.data_ptr(),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        heads,
        k.shape[1],
        dim // 2,
        q_token,
        q_head,
        k_token,
        k_head,
        torch.get_num_threads(),
    )
