"""A decode step in plain PyTorch: the layers one after the other, each of the other folders' references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdlab.kernels.fused.reference import rms_norm, rope, silu_and_mul
from pdlab.kernels.linear.reference import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Mxfp4Weight,
    NarrowWeight,
    dequantize_narrow,
    matvec,
    matvec_int4,
    matvec_int8,
)
from pdlab.kernels.paged_attention.reference import paged_attention, store_kv

Weight = Tensor | Int8Weight | Int4Weight | NarrowWeight
Linear = tuple[Weight, Tensor | None]
Layer = tuple[Sequence[Linear], Sequence[Tensor | None], tuple[Tensor, Tensor], int]


class PlainDecodeStep:
    """As `pdlab.kernels.decode.DecodeStep`."""

    def __init__(self, *, heads: int, kv_heads: int, head_dim: int, hidden: int, ffn: int, eps: float, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        self._layers: list[Layer] = []

    def add_layer(self, linears: Sequence[Linear], norms: Sequence[Tensor | None], cache: tuple[Tensor, Tensor], window: int) -> None:
        self._layers.append((linears, norms, cache, window))

    def __call__(
        self, residual: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, starts: Tensor, contexts: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        added: Tensor | None = None
        for (qkv, out, gate_up, down), (input_norm, post_norm, q_norm, k_norm), (k_cache, v_cache), window in self._layers:
            x = self._norm(residual, input_norm) if added is None else self._norm(added, input_norm, residual)
            fused = product(x, *qkv).unflatten(1, (-1, self.head_dim))
            q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = self._norm(q, q_norm), self._norm(k, k_norm)
            rope(q, k, positions, cos, sin)
            store_kv(k, v, k_cache, v_cache, slots)
            seen = paged_attention(q, k_cache, v_cache, tables, starts, contexts, scale=self.head_dim**-0.5, window=window)
            x = self._norm(product(seen.flatten(1), *out), post_norm, residual)
            added = product(silu_and_mul(product(x, *gate_up)), *down)
        assert added is not None, "a model has layers"
        return added

    def _norm(self, x: Tensor, weight: Tensor | None, residual: Tensor | None = None) -> Tensor:
        return x if weight is None else rms_norm(x, weight, self.eps, residual)


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [n, in] times weight [out, in] transposed, however that is stored, plus bias [out]."""
    if isinstance(weight, Int8Weight):
        return matvec_int8(x, weight, bias)
    if isinstance(weight, Int4Weight):
        return matvec_int4(x, weight, bias)
    if isinstance(weight, Fp8Weight | Mxfp4Weight):
        return matvec(x, dequantize_narrow(weight), bias)
    return matvec(x, weight, bias)
