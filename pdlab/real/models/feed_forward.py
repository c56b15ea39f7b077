"""The second half of a layer: what each token's vector goes through by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from pdlab.kernels.fused import silu_and_mul
from pdlab.real.models.config import Gate
from pdlab.real.models.linear import Linear


class FeedForwardPass(Protocol):
    """x [tokens, hidden] -> [tokens, hidden]."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class GatedPass:
    """The gate's activation times up, then down."""

    gate_up: Linear
    down: Linear
    activation: Gate = "silu"

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        return self.down(silu_and_mul(gate_up) if self.activation == "silu" else gelu_and_mul(gate_up))


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, by the tanh approximation, [tokens, ffn], of [tokens, 2 * ffn] that holds gate, then up."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up
