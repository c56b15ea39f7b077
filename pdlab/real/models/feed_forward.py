"""The second half of a layer: what each token's vector goes through by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdlab.kernels.fused import silu_and_mul
from pdlab.real.models.linear import Linear


class FeedForwardPass(Protocol):
    """x [tokens, hidden] -> [tokens, hidden]."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class GatedPass:
    """silu(gate) times up, then down."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))
