"""Paged attention in Triton, for CUDA. Nothing waits for the device and the host knows every shape: a CUDA graph may capture the calls.

As on the CPU, the rows of a tile are (query, head of the group) pairs, which share the reading of K and V. Sequences with one query go
to split-K kernels (flash-decoding): a program per (sequence, kv head, split), then a merge. Sequences with more go to blocked flash
attention. Each kernel passes over the sequences of the other kind, so a mixed batch is two launches and a merge.

A head is cut in two where its width is no power of two: the largest one below it, and the rest. MLA's 576 are 512 and 64 so, not 1024;
there keys and values are one cache, and are read once. Caches narrower than the queries (float8_e4m3fn) are widened as they are loaded.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdlab.kernels.fp8 import E4M3

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    q,
    rest,
    k_cache,
    v_cache,
    table,
    head,
    position,
    first,
    last,
    low,
    scale,
    block_tokens,
    block_stride,
    head_stride,
    DIM: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE: tl.constexpr,
):
    """Online softmax of the rows q [M, D] and, where E, `rest` [M, E] at `position` [M] over the keys first <= key < last; gives (output
    [M, D], output [M, E], max, sum) unscaled. ONE: values are the keys."""
    d = tl.arange(0, D)
    e = D + tl.arange(0, E if E else 1)
    best = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    more = tl.zeros([M, E if E else 1], tl.float32)
    for start in range(first, last, N):
        key = start + tl.arange(0, N)
        there = key < last
        block = tl.load(table + key // block_tokens, mask=there, other=0).to(tl.int64)
        row = (block * block_stride + head * head_stride + (key % block_tokens) * DIM)[:, None]
        stored = there[:, None] & (d < DIM)[None, :]
        k = tl.load(k_cache + row + d[None, :], mask=stored, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if E:
            stored_e = there[:, None] & (e < DIM)[None, :]
            k_rest = tl.load(k_cache + row + e[None, :], mask=stored_e, other=0.0).to(q.dtype)
            scores += tl.dot(rest, tl.trans(k_rest), input_precision="ieee")
        scores = scores * (scale * LOG2E)
        seen = (key[None, :] <= position[:, None]) & there[None, :]
        if WINDOW:
            seen = seen & (key[None, :] >= low[:, None])
        scores = tl.where(seen, scores, -1e30)
        now = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - now[:, None]), 0.0)
        alpha = tl.exp2(best - now)
        total = total * alpha + tl.sum(weights, 1)
        if ONE:
            v = k
        else:
            v = tl.load(v_cache + row + d[None, :], mask=stored, other=0.0).to(q.dtype)
        out = out * alpha[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        if E:
            if ONE:
                v_rest = k_rest
            else:
                v_rest = tl.load(v_cache + row + e[None, :], mask=stored_e, other=0.0).to(q.dtype)
            more = more * alpha[:, None] + tl.dot(weights.to(v.dtype), v_rest, input_precision="ieee")
        best = now
    return out, more, best, total


@triton.jit
def _prefill(
    q,
    k_cache,
    v_cache,
    tables,
    starts,
    contexts,
    sinks,
    out,
    scale,
    q_token,
    q_head,
    out_token,
    out_head,
    table_stride,
    block_tokens,
    block_stride,
    head_stride,
    window,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE: tl.constexpr,
):
    seq, head = tl.program_id(2), tl.program_id(1)
    start = tl.load(starts + seq)
    queries = tl.load(starts + seq + 1) - start
    first_row = tl.program_id(0) * M
    if queries <= 1 or first_row >= queries * GROUP:
        return
    before = tl.load(contexts + seq) - queries
    row = first_row + tl.arange(0, M)
    real = row < queries * GROUP
    query = row // GROUP
    d, e = tl.arange(0, D), D + tl.arange(0, E if E else 1)
    token, q_at = (start + query).to(tl.int64), head * GROUP + row % GROUP
    mask, mask_e = real[:, None] & (d < DIM)[None, :], real[:, None] & (e < DIM)[None, :]
    at = (token * q_token + q_at * q_head)[:, None]
    rows = tl.load(q + at + d[None, :], mask=mask, other=0.0)
    rest = rows
    if E:
        rest = tl.load(q + at + e[None, :], mask=mask_e, other=0.0)
    position = before + query
    low = position - window + 1
    last = tl.minimum(before + (first_row + M - 1) // GROUP, before + queries - 1) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(0, before + first_row // GROUP - window + 1)
    result, more, best, total = _tile(
        rows,
        rest,
        k_cache,
        v_cache,
        tables + seq.to(tl.int64) * table_stride,
        head,
        position,
        first,
        last,
        low,
        scale,
        block_tokens,
        block_stride,
        head_stride,
        DIM,
        D,
        E,
        M,
        N,
        WINDOW,
        ONE,
    )
    weight = tl.full([M], 1.0, tl.float32)
    if SINKS:
        sink = tl.load(sinks + q_at, mask=real, other=0.0) * LOG2E
        most = tl.maximum(best, sink)
        weight = tl.exp2(best - most)
        total = total * weight + tl.exp2(sink - most)
    weight = weight / tl.where(real, total, 1.0)
    to = out + (token * out_token + q_at * out_head)[:, None]
    tl.store(to + d[None, :], (result * weight[:, None]).to(out.dtype.element_ty), mask=mask)
    if E:
        tl.store(to + e[None, :], (more * weight[:, None]).to(out.dtype.element_ty), mask=mask_e)


@triton.jit
def _decode(
    q,
    k_cache,
    v_cache,
    tables,
    starts,
    contexts,
    parts,
    maxima,
    sums,
    scale,
    q_token,
    q_head,
    table_stride,
    block_tokens,
    block_stride,
    head_stride,
    window,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE: tl.constexpr,
):
    """TILES programs share a group's heads, M each."""
    seq, head, split = tl.program_id(0), tl.program_id(1) // TILES, tl.program_id(2)
    start = tl.load(starts + seq)
    if tl.load(starts + seq + 1) - start != 1:
        return
    context = tl.load(contexts + seq)
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, context - window)
    span = tl.cdiv(tl.cdiv(context - begin, SPLITS), N) * N
    first = begin + split * span
    last = tl.minimum(first + span, context)
    row = tl.program_id(1) % TILES * M + tl.arange(0, M)
    d, e = tl.arange(0, D), D + tl.arange(0, E if E else 1)
    at = start.to(tl.int64) * q_token + ((head * GROUP + row) * q_head)[:, None]
    rows = tl.load(q + at + d[None, :], mask=(row < GROUP)[:, None] & (d < DIM)[None, :], other=0.0)
    rest = rows
    if E:
        rest = tl.load(q + at + e[None, :], mask=(row < GROUP)[:, None] & (e < DIM)[None, :], other=0.0)
    position = tl.zeros([M], tl.int32) + context - 1
    result, more, best, total = _tile(
        rows,
        rest,
        k_cache,
        v_cache,
        tables + seq.to(tl.int64) * table_stride,
        head,
        position,
        first,
        last,
        position - window + 1,
        scale,
        block_tokens,
        block_stride,
        head_stride,
        DIM,
        D,
        E,
        M,
        N,
        WINDOW,
        ONE,
    )
    heads = tl.num_programs(1) // TILES * GROUP
    part = (seq * heads + head * GROUP + row).to(tl.int64) * SPLITS + split
    to = parts + part[:, None] * (D + E)
    tl.store(to + d[None, :], result, mask=(row < GROUP)[:, None])
    if E:
        tl.store(to + e[None, :], more, mask=(row < GROUP)[:, None])
    tl.store(maxima + part, best, mask=row < GROUP)
    tl.store(sums + part, total, mask=row < GROUP)


@triton.jit
def _merge(
    parts,
    maxima,
    sums,
    starts,
    sinks,
    out,
    out_token,
    out_head,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    DIM: tl.constexpr,
    STORED: tl.constexpr,
    D: tl.constexpr,
):
    """A program has D of a head's STORED numbers."""
    seq, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + seq)
    if tl.load(starts + seq + 1) - start != 1:
        return
    split, d = tl.arange(0, S), tl.program_id(2) * D + tl.arange(0, D)
    part = (seq * tl.num_programs(1) + head).to(tl.int64) * SPLITS + split
    maximum = tl.load(maxima + part, mask=split < SPLITS, other=-1e30)
    most = tl.max(maximum, 0)
    if SINKS:
        sink = tl.load(sinks + head) * LOG2E
        most = tl.maximum(most, sink)
    weight = tl.exp2(maximum - most)
    total = tl.sum(weight * tl.load(sums + part, mask=split < SPLITS, other=0.0), 0)
    if SINKS:
        total += tl.exp2(sink - most)
    read = (split < SPLITS)[:, None] & (d < DIM)[None, :]
    result = tl.sum(weight[:, None] * tl.load(parts + part[:, None] * STORED + d[None, :], mask=read, other=0.0), 0)
    result = result / tl.where(total == 0, 1.0, total)  # a padded sequence of no context gets zeros
    tl.store(out + start.to(tl.int64) * out_token + head * out_head + d, result.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit
def _narrowed(x):
    """The bits of the nearest float8_e4m3fn, as fp8.h has them: Triton's own cast is another in its interpreter."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    kept = tl.minimum(size, 0x43E00000)
    large = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - 960
    small = (tl.where(kept < 0x3C800000, kept, 0).to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    number = tl.where(kept < 0x3C800000, small, large)
    return (tl.where(size > 0x7F800000, 0x7F, number) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_token,
    k_head,
    v_token,
    v_head,
    block_tokens,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head, d = tl.arange(0, H), tl.arange(0, D)
    mask = (head < HEADS)[:, None] & (d < DIM)[None, :]
    to = ((slot // block_tokens * HEADS + head) * block_tokens + slot % block_tokens)[:, None] * DIM + d[None, :]
    from_k = tl.load(k + token * k_token + (head * k_head)[:, None] + d[None, :], mask=mask)
    from_v = tl.load(v + token * v_token + (head * v_head)[:, None] + d[None, :], mask=mask)
    if FP8:
        from_k, from_v = _narrowed(from_k), _narrowed(from_v)
    tl.store(k_cache + to, from_k.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_cache + to, from_v.to(v_cache.dtype.element_ty), mask=mask)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


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
    max_queries: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `pdlab.kernels.paged_attention.paged_attention`."""
    tokens, heads, dim = q.shape
    _, kv_heads, block_tokens, _ = k_cache.shape
    seqs, group = context_lens.shape[0], heads // kv_heads
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    if tokens == 0 or seqs == 0:
        return out
    assert q.stride(2) == out.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(1) == 1
    first, rest = _halves(dim)
    strides = (block_tables.stride(0), block_tokens, k_cache.stride(0), k_cache.stride(1), window)
    wide, wider = q.element_size() == 4, first + rest > 128
    sizes = {"GROUP": group, "DIM": dim, "D": first, "E": rest, "WINDOW": window > 0, "ONE": k_cache.data_ptr() == v_cache.data_ptr()}
    sizes["N"] = 16 if first >= 512 and wide else 32 if wide or wider else 64
    given = q if sinks is None else sinks
    most = max_queries or tokens
    if most > 1:
        m = 16 if first >= 512 and wide else 32 if first >= 512 or wide else 64 if wider else 128
        grid = (triton.cdiv(most * group, m), kv_heads, seqs)
        _prefill[grid](
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            given,
            out,
            scale,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            *strides,
            SINKS=sinks is not None,
            **sizes,
            M=m,
            num_warps=8 if m == 128 or first >= 512 else 4,
            num_stages=2,
        )
    m = max(16, min(triton.next_power_of_2(group), 16 if wide else 32 if first >= 512 else 128))
    tiles = triton.cdiv(group, m)
    capacity = block_tables.shape[1] * block_tokens
    splits = max(1, min(2 * _processors(q.device) // (seqs * kv_heads * tiles), triton.cdiv(capacity, 256), 64))
    parts = torch.empty((seqs, heads, splits, first + rest), dtype=torch.float32, device=q.device)
    maxima, sums = (torch.empty((seqs, heads, splits), dtype=torch.float32, device=q.device) for _ in range(2))
    _decode[seqs, kv_heads * tiles, splits](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        parts,
        maxima,
        sums,
        scale,
        q.stride(0),
        q.stride(1),
        *strides,
        SPLITS=splits,
        TILES=tiles,
        **sizes,
        M=m,
        num_warps=8 if first >= 512 else 4,
        num_stages=2,
    )
    d = min(128, first)
    _merge[seqs, heads, triton.cdiv(dim, d)](
        parts,
        maxima,
        sums,
        query_starts,
        given,
        out,
        out.stride(0),
        out.stride(1),
        SINKS=sinks is not None,
        SPLITS=splits,
        S=triton.next_power_of_2(splits),
        DIM=dim,
        STORED=first + rest,
        D=d,
        num_warps=2,
    )
    return out


def _halves(dim: int) -> tuple[int, int]:
    """Powers of two that together hold a head: the second is 0 where one does. A matrix product has sides of 16 at least."""
    whole = max(16, triton.next_power_of_2(dim))
    if whole == dim or dim < 32:
        return whole, 0
    rest = max(16, triton.next_power_of_2(dim - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `pdlab.kernels.paged_attention.store_kv`."""
    tokens, kv_heads, dim = k.shape
    if tokens == 0:
        return
    assert k.stride(2) == v.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous()
    fp8 = k_cache.dtype == E4M3
    _store[(tokens,)](
        k,
        v,
        k_cache.view(torch.uint8) if fp8 else k_cache,
        v_cache.view(torch.uint8) if fp8 else v_cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.shape[2],
        FP8=fp8,
        HEADS=kv_heads,
        H=triton.next_power_of_2(kv_heads),
        DIM=dim,
        D=triton.next_power_of_2(dim),
    )
