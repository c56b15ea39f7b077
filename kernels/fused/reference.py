"""The small steps of a layer in plain PyTorch, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """As `pdlab.kernels.fused.rms_norm`."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `pdlab.kernels.fused.silu_and_mul`."""
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `pdlab.kernels.fused.rope`."""
    c, s = cos[positions][:, None], sin[positions][:, None]
    for x in (q, k):
        a, b = x.float().chunk(2, -1)
        x.copy_(torch.cat((a * c - b * s, b * c + a * s), -1))
