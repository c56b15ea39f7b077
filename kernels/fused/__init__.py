"""The small steps of a transformer layer, each one pass over memory. Compiled on CPUs for float32 and bfloat16, Triton on CUDA, plain
PyTorch elsewhere."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pdlab.kernels.fused import cpu, reference

if torch.cuda.is_available():
    from pdlab.kernels.fused import cuda

__all__ = ["rms_norm", "rope", "silu_and_mul"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last of [tokens, dim]. With a `residual` [tokens, dim], it first takes in x
    (residual += x, in place), and the norm is of the sum. `weight` [dim] has x's dtype."""
    normed: Tensor = _of(x).rms_norm(x, weight, eps, residual)
    return normed


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [tokens, ffn], of [tokens, 2 * ffn] that holds gate, then up."""
    made: Tensor = _of(gate_up).silu_and_mul(gate_up)
    return made


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] in place, the halves of head_dim being the pairs
    (NeoX style). positions int64 [tokens]; cos, sin float32 [max_position, head_dim / 2]; q, k may be views of a fused qkv tensor."""
    _of(q).rope(q, k, positions, cos, sin)


def _of(x: Tensor) -> ModuleType:
    """Whose steps they are."""
    if x.device.type == "cpu" and cpu.available(x):
        return cpu
    return cuda if x.device.type == "cuda" and cuda.takes(x) else reference
