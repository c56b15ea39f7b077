"""`python -m pdlab.kernels.paged_attention.bench`: prefill and decode against torch's attention over dense K and V."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from pdlab.kernels.fp8 import E4M3, rounded
from pdlab.kernels.paged_attention import paged_attention
from pdlab.kernels.timing import best_s, row

SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3.1-8B": (32, 8, 128)}  # heads, kv_heads, head_dim


def paged(k: Tensor, block_tokens: int) -> Tensor:
    """[seqs, kv_heads, context, dim] as [blocks, kv_heads, block_tokens, dim], sequence after sequence."""
    return k.unflatten(2, (-1, block_tokens)).transpose(1, 2).flatten(0, 1).contiguous()


def compare(
    label: str,
    seqs: int,
    queries: int,
    context: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    stored: torch.dtype | None = None,
) -> None:
    """`stored`: of the paged K and V; torch's have `dtype`."""
    heads, kv_heads, dim = shape
    block_tokens = 16
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(seqs, heads, queries, dim, generator=rng).to(device, dtype)
    k, v = (torch.randn(seqs, kv_heads, context, dim, generator=rng).to(device, dtype) for _ in range(2))
    per_seq = context // block_tokens
    order = torch.randperm(seqs * per_seq, generator=rng).to(device)
    k_cache, v_cache = (torch.empty_like(paged(x, block_tokens)).index_copy_(0, order, paged(x, block_tokens)) for x in (k, v))
    k_cache, v_cache = (rounded(cache, stored or dtype) for cache in (k_cache, v_cache))
    tables = order.int().view(seqs, per_seq)
    starts = (torch.arange(seqs + 1) * queries).int().to(device)
    contexts = torch.full((seqs,), context, dtype=torch.int32, device=device)
    flat = q.transpose(1, 2).flatten(0, 1).contiguous()
    out = torch.empty_like(flat)
    ours = best_s(
        lambda: paged_attention(flat, k_cache, v_cache, tables, starts, contexts, scale=dim**-0.5, out=out, max_queries=queries),
        device=device,
    )
    causal = queries > 1
    assert not causal or queries == context
    theirs = best_s(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=dim**-0.5, enable_gqa=True), device=device
    )
    seen = seqs * (queries * (context - queries) + queries * (queries + 1) // 2)
    gflop, gbyte = 4 * seen * heads * dim / 1e9, (k.numel() + v.numel()) * k_cache.element_size() / 1e9
    rate = f"{gflop / ours:8.1f} GFLOP/s" if causal else f"{gbyte / ours:8.1f} GB/s"
    row(label, ours, rate, f"torch {theirs * 1e3:8.3f} ms", f"{theirs / ours:6.2f} x torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{chosen.device}, {chosen.threads} threads")
    for model, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{model} {str(dtype).removeprefix('torch.')}"
            for tokens in (128, 1024, 4096):
                if tokens == 4096 and shape[2] == 128 and chosen.device == "cpu":
                    continue
                compare(f"{name} prefill of {tokens}", 1, tokens, tokens, shape, dtype, chosen.device)
            for seqs, context in ((1, 1024), (1, 16384), (16, 1024), (64, 256)):
                for stored in (dtype, E4M3):
                    kept = " in fp8" if stored == E4M3 else ""
                    compare(f"{name} decode of {seqs} at {context}{kept}", seqs, 1, context, shape, dtype, chosen.device, stored)


if __name__ == "__main__":
    main()
