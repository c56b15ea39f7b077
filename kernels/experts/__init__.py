"""A layer of routed experts: each token's vector goes through the gated feed-forwards of the few experts that were chosen for it.

Compiled on CPUs, Triton on CUDA: each chosen expert's weights are read once, as they are stored, for all the tokens that chose it: a
decode step reads no other expert. Plain PyTorch elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdlab.kernels.experts import cpu, reference
from pdlab.kernels.experts.reference import Activation, ExpertWeights

if torch.cuda.is_available():
    from pdlab.kernels.experts import cuda

__all__ = ["Activation", "ExpertWeights", "GroupedExperts"]


class GroupedExperts:
    """`experts` are each one's (gate_up, down): gate_up [2 * width, hidden] holds the rows of gate, then of up, down is [hidden, width];
    each with its bias or None, in float32, bfloat16, int8, int4, fp8 or mxfp4. They stay where they are. `any_number`: does a call with
    many tokens cost no more than one product for each expert?"""

    def __init__(self, experts: Sequence[ExpertWeights], hidden: int, width: int, activation: Activation = Activation()) -> None:  # noqa: B008 - frozen
        self.experts, self.hidden, self.width, self.activation = experts, hidden, width, activation
        self._table = cpu.ExpertTable(experts) if cpu.available(experts) else None
        self.any_number = torch.cuda.is_available() and cuda.available(experts)
        self._pointers = cuda.ExpertPointers(experts) if self.any_number else None

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what its experts make of each of x [tokens, hidden], in x's dtype. ids int64 [tokens, chosen], all different
        in a row, but for those of no expert here: others than 0 to the last, which add nothing. weights float32 [tokens, chosen]."""
        if self._table is not None and x.dtype in (torch.float32, torch.bfloat16):
            return cpu.experts(x, ids, weights, self._table, self.width, self.activation)
        if self._pointers is not None and self._pointers.takes(x):
            return cuda.experts(x, ids, weights, self._pointers, self.width, self.activation)
        return reference.experts(x, ids, weights, self.experts, self.activation)
