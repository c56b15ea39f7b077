"""Routed experts in plain PyTorch: one expert after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdlab.kernels.decode.reference import Weight, product

ExpertWeights = tuple[tuple[Weight, Tensor | None], tuple[Weight, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Activation:
    """gate * sigmoid(alpha * gate) * (up + shift), gate being at most `limit` and up within it either way (0: no limit). SiLU times up, as
    most have it, is the default; gpt-oss has alpha 1.702, limit 7, shift 1."""

    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[tokens, width] of [tokens, 2 * width]."""
        gate, up = gate_up.float().chunk(2, -1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (gate * torch.sigmoid(self.alpha * gate) * (up + self.shift)).to(gate_up.dtype)


def experts(x: Tensor, ids: Tensor, weights: Tensor, each: Sequence[ExpertWeights], activation: Activation) -> Tensor:
    """As `pdlab.kernels.experts.GroupedExperts`."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        if not 0 <= expert < len(each):
            continue
        token, place = (ids == expert).nonzero(as_tuple=True)
        (gate_up, gate_up_bias), (down, down_bias) = each[expert]
        made = product(activation(product(x[token], gate_up, gate_up_bias)), down, down_bias)
        total.index_add_(0, token, made.float() * weights[token, place, None])
    return total.to(x.dtype)
