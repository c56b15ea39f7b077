"""Routed experts of a layer: a router that chooses a few for each token, and the experts.

Few tokens go through the grouped kernel, which reads the chosen experts only; many tokens meet all experts, one matrix product each.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from pdlab.kernels.experts import Activation, ExpertWeights, GroupedExperts
from pdlab.real.models.linear import FEW, PIECES, Linear, Make, Most
from pdlab.real.models.moe import ExpertNames, MoeConfig, names


class ExpertRouter:
    """`weight` [experts, hidden]."""

    def __init__(self, moe: MoeConfig, weight: Tensor) -> None:
        self.moe, self.weight = moe, weight

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(ids int64, weights float32), each [tokens, per_token], of x [tokens, hidden]."""
        scores = F.linear(x, self.weight).float().softmax(-1)
        weights, ids = scores.topk(self.moe.per_token, dim=-1)
        if self.moe.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights


class RoutedPass:
    """`gate_up` [2 * width, hidden] and `down` [hidden, width] of each expert."""

    def __init__(self, moe: MoeConfig, router: ExpertRouter, gate_up: list[Linear], down: list[Linear], activation: Activation) -> None:
        self.moe, self.router, self.gate_up, self.down, self.activation = moe, router, gate_up, down, activation
        each: list[ExpertWeights] = [((a.weight, a.bias), (b.weight, b.bias)) for a, b in zip(gate_up, down, strict=True)]
        self.grouped = GroupedExperts(each, router.weight.shape[1], moe.width, activation)

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self.router(x)
        counts = [] if len(x) <= FEW else torch.bincount(ids.flatten(), minlength=self.moe.experts).tolist()
        if not counts or (x.device.type == "cpu" and max(counts) <= FEW * PIECES):
            few: Tensor = self.grouped(x, ids, weights)
            return few
        return self._one_by_one(x, ids, weights, counts)

    def _one_by_one(self, x: Tensor, ids: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        tokens, shares = order // self.moe.per_token, weights.flatten()[order]
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        at = 0
        for expert, count in enumerate(counts):
            if count:
                rows = tokens[at : at + count]
                made = self.down[expert](self.activation(self.gate_up[expert](x.index_select(0, rows))))
                total.index_add_(0, rows, made.float() * shares[at : at + count, None])
                at += count
        return total.to(x.dtype)


class ExpertLoader:
    """Collects the experts' tensors by name; an expert's matrices are made when its last part is here. `most`: as of Make."""

    def __init__(self, moe: MoeConfig, family: str, device: torch.device, dtype: torch.dtype, make: Make, most: Most) -> None:
        self.moe, self.device, self.dtype, self.make, self.most = moe, device, dtype, make, most
        self.names: ExpertNames = names(family)
        self.pattern = re.compile(rf"model\.layers\.(\d+)\.{self.names.module}\.(?:experts\.(\d+)\.)?(\w+)\.weight")
        self.joined: dict[tuple[int, int], Tensor] = {}
        self.gate_up: dict[tuple[int, int], Linear] = {}
        self.down: dict[tuple[int, int], Linear] = {}
        self.routers: dict[int, Tensor] = {}

    def take(self, name: str, tensor: Tensor) -> bool:
        """False: it is nothing of the experts'."""
        found = self.pattern.fullmatch(name)
        if found is None or not self.moe.layers[int(found[1])]:
            return False
        layer = int(found[1])
        if found[2] is None:
            self.routers[layer] = tensor.to(self.device, self.dtype)
        else:
            self._part(layer, int(found[2]), self.names.parts.index(found[3]), tensor)
        return True

    def _part(self, layer: int, expert: int, part: int, tensor: Tensor) -> None:
        key, width = (layer, expert), self.moe.width
        if part == 2:
            self.down[key] = self.make(tensor.to(self.device, self.dtype).contiguous(), None, self.most)
            return
        first = key not in self.joined
        if first:
            self.joined[key] = torch.empty((2 * width, tensor.shape[1]), device=self.device, dtype=self.dtype)
        self.joined[key][part * width : (part + 1) * width] = tensor
        if not first:
            self.gate_up[key] = self.make(self.joined.pop(key), None)

    def layer(self, index: int) -> RoutedPass:
        every = [(index, expert) for expert in range(self.moe.experts)]
        gate_up, down = [self.gate_up.pop(key) for key in every], [self.down.pop(key) for key in every]
        return RoutedPass(self.moe, ExpertRouter(self.moe, self.routers[index]), gate_up, down, Activation())
