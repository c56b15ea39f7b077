"""The compiled CPU kernels of paged attention; `available` says whether they can serve some tensors."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library

DTYPES = (torch.float32, torch.bfloat16)
LIKE_Q, FP8, BF16 = range(3)  # how KV is stored, as cpu.cpp numbers them


@cache
def _functions() -> tuple[Any, Any] | None:
    lib = library("paged_attention", Path(__file__).with_name("cpu.cpp"))
    if lib is None:
        return None
    attend, store = lib.pdlab_paged_attention, lib.pdlab_store_kv
    attend.argtypes = [c_int, c_int, *[c_void_p] * 7, *[c_int64] * 5, *[c_int] * 6, c_float, c_void_p, c_int]
    store.argtypes = [c_int, c_int, *[c_void_p] * 5, *[c_int64] * 5, *[c_int] * 4]
    attend.restype = store.restype = None
    return attend, store


def available(q: Tensor) -> bool:
    return q.dtype in DTYPES and _functions() is not None


def stored_as(q: torch.dtype, kv: torch.dtype) -> int:
    """How a cache is stored beside queries of that dtype."""
    if kv == q:
        return LIKE_Q
    assert kv == torch.float8_e4m3fn or (q, kv) == (torch.float32, torch.bfloat16), f"{kv} KV beside {q}"
    return FP8 if kv == torch.float8_e4m3fn else BF16


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    functions = _functions()
    assert functions is not None, "ask available() first"
    tokens, heads, dim = q.shape
    _, kv_heads, block_tokens, _ = k_cache.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype) if out is None else out
    q_token, q_head, q_last = q.stride()
    out_token, out_head, out_last = out.stride()
    assert q_last == 1 and out_last == 1, "a head's elements lie side by side"
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.dtype == v_cache.dtype and q.dtype == out.dtype
    assert block_tables.stride(1) == 1 and query_starts.is_contiguous() and context_lens.is_contiguous()
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous() and len(sinks) == heads)
    assert block_tables.dtype == query_starts.dtype == context_lens.dtype == torch.int32
    functions[0](
        q.dtype == torch.bfloat16,
        stored_as(q.dtype, k_cache.dtype),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        block_tables.data_ptr(),
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        q_token,
        q_head,
        out_token,
        out_head,
        block_tables.stride(0),
        context_lens.shape[0],
        heads,
        kv_heads,
        dim,
        block_tokens,
        window,
        scale,
        None if sinks is None else sinks.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    functions = _functions()
    assert functions is not None, "ask available() first"
    tokens, kv_heads, dim = k.shape
    size = k.element_size()
    k_token, k_head, k_last = k.stride()
    v_token, v_head, v_last = v.stride()
    assert k_last == 1 and v_last == 1 and slots.dtype == torch.int64 and slots.is_contiguous()
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k.dtype == v.dtype and k_cache.dtype == v_cache.dtype
    functions[1](
        k.dtype == torch.bfloat16,
        stored_as(k.dtype, k_cache.dtype),
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots.data_ptr(),
        tokens,
        k_token * size,
        k_head * size,
        v_token * size,
        v_head * size,
        kv_heads,
        k_cache.shape[2],
        dim,
        torch.get_num_threads(),
    )
