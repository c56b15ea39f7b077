"""Attention over a paged KV cache in plain PyTorch: what the kernels must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from pdlab.kernels.fp8 import rounded


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
    """As `pdlab.kernels.paged_attention.paged_attention`: one sequence after the other, float32 inside."""
    heads, dim = q.shape[1:]
    kv_heads, block_tokens = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    for seq, context in enumerate(contexts):
        first, last = starts[seq], starts[seq + 1]
        if first == last:
            continue
        blocks = block_tables[seq, : -(-context // block_tokens)].long()
        # [blocks, kv_heads, block_tokens, dim] -> [kv_heads, 1, context, dim]
        k, v = (cache[blocks].float().transpose(0, 1).reshape(kv_heads, -1, dim)[:, None, :context] for cache in (k_cache, v_cache))
        grouped = q[first:last].float().reshape(last - first, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
        key = torch.arange(context, device=q.device)
        position = torch.arange(context - (last - first), context, device=q.device)[:, None]
        seen = key <= position
        if window:
            seen &= key > position - window
        scores = (grouped @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
        out[first:last] = (scores.softmax(-1)[..., :context] @ v).permute(2, 0, 1, 3).reshape(last - first, heads, dim).to(q.dtype)
    return out


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `pdlab.kernels.paged_attention.store_kv`."""
    kept = slots >= 0
    block, offset = slots[kept] // k_cache.shape[2], slots[kept] % k_cache.shape[2]
    k_cache[block, :, offset] = rounded(k[kept], k_cache.dtype)
    v_cache[block, :, offset] = rounded(v[kept], v_cache.dtype)
