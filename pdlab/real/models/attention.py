"""The first half of a layer: attention of a step's tokens over the paged KV, which takes theirs first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdlab.kernels.fused import rms_norm, rope
from pdlab.kernels.paged_attention import paged_attention, store_kv
from pdlab.real.models.config import LatentConfig
from pdlab.real.models.inputs import ChunkedInputs, Inputs
from pdlab.real.models.linear import Linear

Cache = tuple[Tensor, Tensor]
Stored = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """cos, sin float32 [positions, rotated dims / 2]."""

    cos: Tensor
    sin: Tensor


class AttentionPass(Protocol):
    """x [tokens, hidden], normed -> what the output projection takes, [tokens, heads * dim]. `stored` is called when the cache has this
    step's KV."""

    def __call__(self, x: Tensor, inputs: Inputs, cache: Cache, stored: Stored | None) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxPass:
    """Heads with keys and values of their own, or a group's. `sinks` float32 [heads]: a score of each head that takes its share of the
    softmax and brings no value. `in_chunks`: a token attends to those of its own chunk. `temper`: (scale, floor), by which queries grow
    with their position."""

    qkv: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    rotary: Rotary | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int
    sinks: Tensor | None = None
    in_chunks: bool = False
    temper: tuple[float, float] | None = None

    def __call__(self, x: Tensor, inputs: Inputs, cache: Cache, stored: Stored | None) -> Tensor:
        first_v, (k_cache, v_cache) = self.heads + self.kv_heads, cache
        qkv = self.qkv(x).view(-1, first_v + self.kv_heads, self.head_dim)
        q, k, v = qkv[:, : self.heads], qkv[:, self.heads : first_v], qkv[:, first_v:]
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q.reshape(-1, self.head_dim), self.q_norm, self.eps).view(q.shape)
            k = rms_norm(k.reshape(-1, self.head_dim), self.k_norm, self.eps).view(k.shape)
        if self.rotary is not None:
            rope(q, k, inputs.positions, self.rotary.cos, self.rotary.sin)
        if self.temper is not None:
            q = q * _tempered(inputs.positions, *self.temper).to(q.dtype)[:, None, None]
        store_kv(k, v, k_cache, v_cache, inputs.slots)
        if stored is not None:
            stored()
        within = inputs.chunked if self.in_chunks and inputs.chunked is not None else inputs
        return _attend(q, cache, within, self.scale, self.window, self.sinks).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class LatentPass:
    """MLA, absorbed: the cache has one head, each token's latent and rotated key together, and queries are brought into the latent space,
    so that neither keys nor values of the heads are ever made. Source: DeepSeek-V2 (2024), §2.1 and appendix.

    q_down, q_norm: None where queries are projected at once. to_latent [heads, nope_dim, latent]; from_latent [heads, latent, v_dim].
    """

    latent: LatentConfig
    heads: int
    scale: float
    eps: float
    rotary: Rotary
    q_down: Linear | None
    q_norm: Tensor | None
    q_up: Linear
    kv_down: Linear
    kv_norm: Tensor
    to_latent: Tensor
    from_latent: Tensor

    def __call__(self, x: Tensor, inputs: Inputs, cache: Cache, stored: Stored | None) -> Tensor:
        c, tokens = self.latent, len(x)
        low = x if self.q_down is None or self.q_norm is None else rms_norm(self.q_down(x), self.q_norm, self.eps)
        q = self.q_up(low).view(tokens, self.heads, c.nope_dim + c.rope_dim)
        entry = self.kv_down(x)
        entry[:, : c.rank] = rms_norm(entry[:, : c.rank], self.kv_norm, self.eps)
        entry = entry.view(tokens, 1, c.rank + c.rope_dim)
        rope(q[:, :, c.nope_dim :], entry[:, :, c.rank :], inputs.positions, self.rotary.cos, self.rotary.sin)
        store_kv(entry, entry, *cache, inputs.slots)
        if stored is not None:
            stored()
        query = torch.empty((tokens, self.heads, c.rank + c.rope_dim), dtype=x.dtype, device=x.device)
        query[:, :, : c.rank] = torch.bmm(q[:, :, : c.nope_dim].transpose(0, 1), self.to_latent).transpose(0, 1)
        query[:, :, c.rank :] = q[:, :, c.nope_dim :]
        attended = _attend(query, cache, inputs, self.scale, 0, None)[:, :, : c.rank]
        return torch.bmm(attended.transpose(0, 1), self.from_latent).transpose(0, 1).reshape(tokens, -1)


def _tempered(positions: Tensor, scale: float, floor: float) -> Tensor:
    """Float32 [tokens]. Source: Scalable-Softmax (Nakanishi, 2025), as Llama 4 has it."""
    return torch.log1p(((positions.float() + 1.0) / floor).floor()) * scale + 1.0


def _attend(q: Tensor, cache: Cache, inputs: Inputs | ChunkedInputs, scale: float, window: int, sinks: Tensor | None) -> Tensor:
    attended: Tensor = paged_attention(
        q,
        *cache,
        inputs.block_tables,
        inputs.query_starts,
        inputs.context_lens,
        scale=scale,
        window=window,
        max_queries=inputs.max_queries,
        sinks=sinks,
    )
    return attended


def in_halves(weight: Tensor, rows: int, rotated: int) -> Tensor:
    """`weight` [heads * rows, ...], of whose every head the last `rotated` rows are rotated in neighbouring pairs: reordered, so that the
    pairs are a row of the first half and one of the second. Queries and keys alike, so that their products stay."""
    heads, first = weight.view(-1, rows, *weight.shape[1:]), rows - rotated
    return torch.cat([heads[:, :first], heads[:, first::2], heads[:, first + 1 :: 2]], 1).flatten(0, 1)
