"""Paged attention in Triton, for CUDA. Nothing waits for the device and the host knows every shape: a CUDA graph may capture the calls.

As on the CPU, the rows of a tile are (query, head of the group) pairs, which share the reading of K and V. Sequences with one query go
to split-K kernels (flash-decoding): a program per (sequence, kv head, split), then a merge. Sequences with more go to blocked flash
attention. Each kernel passes over the sequences of the other kind, so a mixed batch is two launches and a merge.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    q,
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
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Online softmax of the rows q [M, D] at `position` [M] over the keys first <= key < last; gives (output, max, sum) unscaled."""
    d = tl.arange(0, D)
    best = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    for start in range(first, last, N):
        key = start + tl.arange(0, N)
        there = key < last
        block = tl.load(table + key // block_tokens, mask=there, other=0).to(tl.int64)
        at = (block * block_stride + head * head_stride + (key % block_tokens) * DIM)[:, None] + d[None, :]
        stored = there[:, None] & (d < DIM)[None, :]
        k = tl.load(k_cache + at, mask=stored, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        seen = (key[None, :] <= position[:, None]) & there[None, :]
        if WINDOW:
            seen = seen & (key[None, :] >= low[:, None])
        scores = tl.where(seen, scores, -1e30)
        now = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - now[:, None]), 0.0)
        alpha = tl.exp2(best - now)
        total = total * alpha + tl.sum(weights, 1)
        v = tl.load(v_cache + at, mask=stored, other=0.0)
        out = out * alpha[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = now
    return out, best, total


@triton.jit
def _prefill(
    q,
    k_cache,
    v_cache,
    tables,
    starts,
    contexts,
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
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
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
    d = tl.arange(0, D)
    token, q_at = (start + query).to(tl.int64), head * GROUP + row % GROUP
    mask = real[:, None] & (d < DIM)[None, :]
    rows = tl.load(q + (token * q_token + q_at * q_head)[:, None] + d[None, :], mask=mask, other=0.0)
    position = before + query
    low = position - window + 1
    last = tl.minimum(before + (first_row + M - 1) // GROUP, before + queries - 1) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(0, before + first_row // GROUP - window + 1)
    result, _best, total = _tile(
        rows,
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
        M,
        N,
        WINDOW,
    )
    total = tl.where(real, total, 1.0)
    tl.store(
        out + (token * out_token + q_at * out_head)[:, None] + d[None, :], (result / total[:, None]).to(out.dtype.element_ty), mask=mask
    )


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
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
):
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
    row, d = tl.program_id(1) % TILES * M + tl.arange(0, M), tl.arange(0, D)
    mask = (row < GROUP)[:, None] & (d < DIM)[None, :]
    rows = tl.load(q + start.to(tl.int64) * q_token + ((head * GROUP + row) * q_head)[:, None] + d[None, :], mask=mask, other=0.0)
    position = tl.zeros([M], tl.int32) + context - 1
    result, best, total = _tile(
        rows,
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
        M,
        N,
        WINDOW,
    )
    heads = tl.num_programs(1) // TILES * GROUP
    part = (seq * heads + head * GROUP + row).to(tl.int64) * SPLITS + split
    tl.store(parts + part[:, None] * D + d[None, :], result, mask=(row < GROUP)[:, None])
    tl.store(maxima + part, best, mask=row < GROUP)
    tl.store(sums + part, total, mask=row < GROUP)


@triton.jit
def _merge(
    parts, maxima, sums, starts, out, out_token, out_head, SPLITS: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr
):
    seq, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + seq)
    if tl.load(starts + seq + 1) - start != 1:
        return
    split, d = tl.arange(0, S), tl.arange(0, D)
    part = (seq * tl.num_programs(1) + head).to(tl.int64) * SPLITS + split
    best = tl.load(maxima + part, mask=split < SPLITS, other=-1e30)
    weight = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(sums + part, mask=split < SPLITS, other=0.0), 0)
    result = tl.sum(weight[:, None] * tl.load(parts + part[:, None] * D + d[None, :], mask=(split < SPLITS)[:, None], other=0.0), 0)
    result = result / tl.where(total == 0, 1.0, total)  # a padded sequence of no context gets zeros
    tl.store(out + start.to(tl.int64) * out_token + head * out_head + d, result.to(out.dtype.element_ty), mask=d < DIM)


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
    tl.store(k_cache + to, tl.load(k + token * k_token + (head * k_head)[:, None] + d[None, :], mask=mask), mask=mask)
    tl.store(v_cache + to, tl.load(v + token * v_token + (head * v_head)[:, None] + d[None, :], mask=mask), mask=mask)


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
) -> Tensor:
    """As `pdlab.kernels.paged_attention.paged_attention`."""
    tokens, heads, dim = q.shape
    _, kv_heads, block_tokens, _ = k_cache.shape
    seqs, group = context_lens.shape[0], heads // kv_heads
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    if tokens == 0 or seqs == 0:
        return out
    assert q.stride(2) == out.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(1) == 1
    padded = max(16, triton.next_power_of_2(dim))
    strides = (block_tables.stride(0), block_tokens, k_cache.stride(0), k_cache.stride(1), window)
    wide = q.element_size() == 4
    latent = padded > 256  # MLA's: what an H100 has of shared memory sets the tiles
    keys = 16 if latent and wide else 32 if wide or padded > 128 else 64
    stages = 1 if latent and wide else 2
    sizes = {"GROUP": group, "DIM": dim, "D": padded, "WINDOW": window > 0}
    most = max_queries or tokens
    if most > 1:
        m = 16 if latent else 32 if wide and padded > 64 else 64 if wide or padded > 128 else 128
        grid = (triton.cdiv(most * group, m), kv_heads, seqs)
        _prefill[grid](
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            out,
            scale,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            *strides,
            **sizes,
            M=m,
            N=keys,
            num_warps=8 if m == 128 else 4,
            num_stages=stages,
        )
    capacity = block_tables.shape[1] * block_tokens
    splits = max(1, min(2 * _processors(q.device) // (seqs * kv_heads), triton.cdiv(capacity, 256), 64))
    parts = torch.empty((seqs, heads, splits, padded), dtype=torch.float32, device=q.device)
    maxima, sums = (torch.empty((seqs, heads, splits), dtype=torch.float32, device=q.device) for _ in range(2))
    rows = 16 if latent else max(16, triton.next_power_of_2(group))
    tiles = triton.cdiv(group, rows)
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
        M=rows,
        N=keys,
        num_warps=4,
        num_stages=stages,
    )
    _merge[seqs, heads](
        parts,
        maxima,
        sums,
        query_starts,
        out,
        out.stride(0),
        out.stride(1),
        SPLITS=splits,
        S=triton.next_power_of_2(splits),
        DIM=dim,
        D=padded,
        num_warps=2,
    )
    return out


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `pdlab.kernels.paged_attention.store_kv`."""
    tokens, kv_heads, dim = k.shape
    if tokens == 0:
        return
    assert k.stride(2) == v.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous()
    _store[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.shape[2],
        HEADS=kv_heads,
        H=triton.next_power_of_2(kv_heads),
        DIM=dim,
        D=triton.next_power_of_2(dim),
    )
