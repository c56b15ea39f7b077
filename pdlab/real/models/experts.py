"""Routed experts of a layer: a router that chooses a few for each token, and the experts.

Few tokens go through the grouped kernel, which reads the chosen experts only, on CUDA many do, too; elsewhere many tokens meet all experts,
one matrix product each.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from pdlab.kernels.experts import Activation, ExpertWeights, GroupedExperts
from pdlab.kernels.linear import Mxfp4Weight, NarrowWeight, dequantize_narrow
from pdlab.real.models.feed_forward import FeedForwardPass, GatedPass
from pdlab.real.models.linear import FEW, PIECES, Linear, Make, Most, Narrow
from pdlab.real.models.moe import ExpertNames, MoeConfig, names
from pdlab.real.models.narrow import moved, rows_of, stacked


class ExpertRouter:
    """`weight` float32 [experts, hidden], `bias` and `correction` float32 [experts]."""

    def __init__(self, moe: MoeConfig, weight: Tensor, bias: Tensor | None = None, correction: Tensor | None = None) -> None:
        self.moe, self.weight, self.bias, self.correction = moe, weight, bias, correction

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(ids int64, weights float32), each [tokens, per_token], of x [tokens, hidden]."""
        moe = self.moe
        logits = F.linear(x.float(), self.weight, self.bias)
        if moe.scoring == "chosen":
            best, ids = logits.topk(moe.per_token, dim=-1)
            return ids, best.softmax(-1)
        if moe.scoring == "each":
            best, ids = logits.topk(moe.per_token, dim=-1)
            return ids, best.sigmoid()
        scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
        ids = self._eligible(scores if self.correction is None else scores + self.correction).topk(moe.per_token, dim=-1).indices
        weights = scores.gather(1, ids)
        if moe.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=moe.least_sum)
        return ids, weights * moe.scale

    def _eligible(self, choice: Tensor) -> Tensor:
        """Those outside of the best groups are out of the question."""
        moe = self.moe
        if moe.groups == 1:
            return choice
        by_group = choice.view(len(choice), moe.groups, -1)
        best = by_group.topk(moe.group_best, dim=-1).values.sum(-1).topk(moe.top_groups, dim=-1).indices
        out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
        return by_group.masked_fill(out[:, :, None], float("-inf")).flatten(1)


class RoutedPass:
    """`gate_up` [2 * width, hidden] and `down` [hidden, width] of each expert that is here, from number `first` on; `shared`: what every
    token goes through, too. A token whose experts are elsewhere gets nothing here."""

    def __init__(
        self,
        moe: MoeConfig,
        router: ExpertRouter,
        gate_up: list[Linear],
        down: list[Linear],
        shared: FeedForwardPass | None = None,
        first: int = 0,
    ) -> None:
        self.moe, self.router, self.gate_up, self.down, self.shared, self.first = moe, router, gate_up, down, shared, first
        self.activation = activation = Activation(moe.alpha, moe.limit, 1.0 if moe.biased else 0.0)
        each: list[ExpertWeights] = [((a.weight, a.bias), (b.weight, b.bias)) for a, b in zip(gate_up, down, strict=True)]
        self.grouped = GroupedExperts(each, router.weight.shape[1], moe.width, activation)

    def __call__(self, x: Tensor) -> Tensor:
        routed = self._routed(x)
        return routed if self.shared is None else routed + self.shared(x)

    def _routed(self, x: Tensor) -> Tensor:
        ids, weights = self.router(x)
        if self.moe.inward:  # each choice is a row of its own
            x = (x.repeat_interleave(self.moe.per_token, 0) * weights.flatten()[:, None]).to(x.dtype)
            made = self._chosen(x, ids.view(-1, 1), torch.ones_like(weights).view(-1, 1))
            return made.view(len(ids), self.moe.per_token, -1).sum(1)
        return self._chosen(x, ids, weights)

    def _chosen(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what they make of each row."""
        here = len(self.gate_up)
        if here < self.moe.experts:
            ids = ids - self.first
            ids = ids.masked_fill((ids < 0) | (ids >= here), here)
        counts = [] if len(x) <= FEW or self.grouped.any_number else torch.bincount(ids.flatten(), minlength=here).tolist()[:here]
        if not counts or (x.device.type == "cpu" and max(counts) <= FEW * PIECES):
            few: Tensor = self.grouped(x, ids, weights)
            return few
        return self._one_by_one(x, ids, weights, counts)

    def _one_by_one(self, x: Tensor, ids: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        tokens, shares = order // ids.shape[1], weights.flatten()[order]
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
    """Collects the experts' tensors by name; a matrix is made when its last part is here. The shared expert is number -1. `most`: as of
    Make, where each rank has its columns of each matrix. `here`: the experts that are; `first_column`: of gates and ups that come whole."""

    def __init__(
        self,
        moe: MoeConfig,
        family: str,
        device: torch.device,
        dtype: torch.dtype,
        make: Make,
        most: Most,
        here: range | None = None,
        first_column: int = 0,
    ) -> None:
        self.moe, self.device, self.dtype, self.make, self.most = moe, device, dtype, make, most
        self.here, self.first_column = range(moe.experts) if here is None else here, first_column
        self.most_routed = most if len(self.here) == moe.experts else None
        self.names: ExpertNames = names(family)
        self.pattern = re.compile(rf"model\.layers\.(\d+)\.{self.names.module}\.(.+)")
        self.part = re.compile(rf"(?:experts\.(\d+)|{self.names.shared})\.({'|'.join(self.names.parts)})\.weight")
        self.halves: dict[tuple[int, int], Tensor] = {}
        self.narrow_halves: dict[tuple[int, int], dict[int, NarrowWeight]] = {}
        self.gate_up: dict[tuple[int, int], Linear] = {}
        self.down: dict[tuple[int, int], Linear] = {}
        self.small: dict[tuple[int, str], Tensor] = {}  # routers', in float32
        self.waiting: dict[tuple[int, str], Tensor | NarrowWeight] = {}  # a joined matrix without its bias, or the bias without it

    def take(self, name: str, tensor: Tensor | NarrowWeight) -> bool:
        """False: it is nothing of the experts'. Routed experts' may be narrow, and stay so."""
        found = self.pattern.fullmatch(name)
        if found is None or not self.moe.layers[int(found[1])]:
            return False
        layer, rest = int(found[1]), found[2]
        part = self.part.fullmatch(rest)
        if part is not None:
            self._part(layer, int(part[1]) if part[1] else -1, self.names.parts.index(part[2]), tensor)
        elif rest.startswith("experts."):
            self._joined(layer, rest.removeprefix("experts."), tensor)
        else:
            assert isinstance(tensor, Tensor), "routers are wide"
            self.small[layer, rest] = tensor.to(self.device, torch.float32)
        return True

    def _part(self, layer: int, expert: int, part: int, tensor: Tensor | NarrowWeight) -> None:
        if expert >= 0 and expert not in self.here:
            return
        key = layer, expert
        if not isinstance(tensor, Tensor):
            self._narrow_part(key, part, moved(tensor, self.device))
            return
        width = self.moe.shared if expert < 0 else self.moe.width
        if part == 2:
            self.down[key] = self.make(tensor.to(self.device, self.dtype).contiguous(), None, self.most if expert < 0 else self.most_routed)
            return
        first = key not in self.halves
        if first:
            self.halves[key] = torch.empty((2 * width, tensor.shape[1]), device=self.device, dtype=self.dtype)
        self.halves[key][part * width : (part + 1) * width] = tensor
        if not first:
            self.gate_up[key] = self.make(self.halves.pop(key), None)

    def _narrow_part(self, key: tuple[int, int], part: int, weight: NarrowWeight) -> None:
        if part == 2:
            self.down[key] = Narrow(weight, None, self.dtype)
            return
        halves = self.narrow_halves.setdefault(key, {})
        halves[part] = weight
        if len(halves) == 2:
            del self.narrow_halves[key]
            if (both := stacked(halves[0], halves[1])) is not None:
                self.gate_up[key] = Narrow(both, None, self.dtype)
            else:
                wide = torch.cat([dequantize_narrow(halves[half]) for half in range(2)])
                self.gate_up[key] = self.make(wide.to(self.dtype), None)

    def _joined(self, layer: int, name: str, tensor: Tensor | NarrowWeight) -> None:
        """The `gate_up_proj` [experts, hidden, 2 * width] or `down_proj` of all that are here, or its bias, which is one rank's where each
        has columns."""
        weights, biases = tensor, torch.empty((len(self.here), 0))
        if self.moe.biased:
            other = name.removesuffix("_bias") if name.endswith("_bias") else f"{name}_bias"
            if (layer, other) not in self.waiting:
                self.waiting[layer, name] = tensor
                return
            beside = self.waiting.pop((layer, other))
            weights, added = (beside, tensor) if name.endswith("_bias") else (tensor, beside)
            assert isinstance(added, Tensor), "biases are wide"
            biases = added
        gates = name.startswith("gate_up")
        for at, (expert, bias) in enumerate(zip(self.here, biases, strict=True)):
            beside_it = bias.to(self.device, self.dtype)
            if gates and self.names.alternating:
                beside_it = torch.cat([beside_it[0::2], beside_it[1::2]])
            kept = beside_it.contiguous() if len(beside_it) else None
            linears = self.gate_up if gates else self.down
            linears[layer, expert] = self._of_joined(weights, at, kept, gates=gates)

    def _of_joined(self, weights: Tensor | NarrowWeight, at: int, bias: Tensor | None, *, gates: bool) -> Linear:
        """Expert number `at` of those that are here."""
        if isinstance(weights, Tensor):
            rows = weights[at].t()
            rows = rows[self._order(len(rows))] if gates else rows
            return self.make(rows.to(self.device, self.dtype).contiguous(), bias, None if gates else self.most_routed)
        assert isinstance(weights, Mxfp4Weight), "joined matrices are not in fp8"
        one: NarrowWeight = Mxfp4Weight(weights.packed[at], weights.scale[at])
        return Narrow(moved(rows_of(one, self._order(len(weights.packed[at]))) if gates else one, self.device), bias, self.dtype)

    def _order(self, rows: int) -> Tensor:
        """Those of a joined gate and up that are kept here, gates first."""
        if self.names.alternating:
            return torch.arange(rows).view(-1, 2).t().flatten()
        return torch.cat([half[self.first_column : self.first_column + self.moe.width] for half in torch.arange(rows).chunk(2)])

    def layer(self, index: int) -> RoutedPass:
        n, every = self.names, [(index, expert) for expert in self.here]
        correction = self.small.get((index, n.correction))
        router = ExpertRouter(
            self.moe,
            self.small[index, f"{n.router}.weight"],
            self.small.get((index, f"{n.router}.bias")),
            None if correction is None else correction.flatten(),
        )
        shared = GatedPass(self.gate_up.pop((index, -1)), self.down.pop((index, -1))) if self.moe.shared else None
        gate_up, down = [self.gate_up.pop(key) for key in every], [self.down.pop(key) for key in every]
        return RoutedPass(self.moe, router, gate_up, down, shared, self.here.start)
