"""Attention over a paged KV cache: decode, chunked prefill, and both in one call.

Compiled on CPUs (float32, bfloat16), Triton on CUDA, plain PyTorch elsewhere.
A layer's k_cache and v_cache are [blocks, kv_heads, block_tokens, head_dim], contiguous, blocks counted from 0; of the queries' dtype, or
float8_e4m3fn, or bfloat16 beside float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdlab.kernels.paged_attention import cpu, reference

if torch.cuda.is_available():
    from pdlab.kernels.paged_attention import cuda

__all__ = ["paged_attention", "store_kv"]


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
    """Causal attention of the new tokens of several sequences, [tokens, heads, head_dim] as `q` is.

    q             [tokens, heads, head_dim]; a view into a fused qkv tensor will do, the last dimension side by side
    block_tables  int32 [seqs, max_blocks], a sequence's blocks in order; what lies beyond its context is not read
    query_starts  int32 [seqs + 1]; sequence s has the rows query_starts[s]:query_starts[s + 1] of q
    context_lens  int32 [seqs], KV tokens of the sequence with these queries' own, which are stored already
    scale         above 0; multiplies the scores
    window        0, or how many tokens back a query sees, itself among them
    max_queries   CUDA only: at least the queries of any one sequence, so that the launch need not ask the device; pass 1 for pure decode.
                  (0: as many as there are tokens, right but with idle programs)
    sinks         float32 [heads] or None: a score of each head that takes its share of the softmax and brings no value

    Query i of sequence s is at context_lens[s] - queries + i, and sees the positions up to its own.
    """
    if q.device.type == "cpu" and cpu.available(q):
        return cpu.paged_attention(
            q, k_cache, v_cache, block_tables, query_starts, context_lens, scale=scale, window=window, out=out, sinks=sinks
        )
    if q.device.type == "cuda":
        return cuda.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            scale=scale,
            window=window,
            out=out,
            max_queries=max_queries,
            sinks=sinks,
        )
    return reference.paged_attention(
        q, k_cache, v_cache, block_tables, query_starts, context_lens, scale=scale, window=window, out=out, sinks=sinks
    )


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes k, v [tokens, kv_heads, head_dim] to their slots, int64 [tokens] = block * block_tokens + offset; slot -1 is skipped.
    They are rounded to the caches' dtype; beyond the largest float8 (448) they are that."""
    if k.device.type == "cpu" and cpu.available(k):
        cpu.store_kv(k, v, k_cache, v_cache, slots)
    elif k.device.type == "cuda":
        cuda.store_kv(k, v, k_cache, v_cache, slots)
    else:
        reference.store_kv(k, v, k_cache, v_cache, slots)
