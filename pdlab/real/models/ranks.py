"""Tensor parallel ranks: which part of a model each of them holds, and what they tell each other.

Attention is split by heads, and the feed-forward by its width, or routed experts by their number; both end in a product split along its
input, whose results are summed over the ranks (Megatron-LM, arXiv:1909.08053, §3). The vocabulary is split, too. KV heads that are fewer
than the ranks are held by several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pdlab.core.kv_plan import heads_of
from pdlab.kernels.all_reduce import SharedSum
from pdlab.kernels.decode import Weight
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.feed_forward import FeedForwardPass
from pdlab.real.models.linear import Linear
from pdlab.real.models.moe import MoeConfig, names


class Exchange(Protocol):
    """How the ranks of one instance add up and collect tensors: all of them make the same calls in the same order. `shared`: the sum by
    memory that they share, where there is such."""

    shared: SharedSum | None

    def sum(self, x: Tensor) -> None:
        """In place, over the ranks; every rank gets the same bits."""

    def most(self, x: Tensor) -> None:
        """The largest of each element, in place."""

    def gather(self, x: Tensor) -> Tensor:
        """Everybody's `x`, all of one shape, at rank 0: [ranks, *x.shape]; elsewhere it is empty."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank `rank` of `size` that hold each layer together. One alone needs no `exchange`. `ep` groups of them share the routed experts out;
    of a group's experts each of its ranks has its columns."""

    rank: int = 0
    size: int = 1
    exchange: Exchange | None = None
    ep: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, in place."""
        if self.exchange is not None and x.numel():
            self.exchange.sum(x)
        return x

    def most(self, x: Tensor) -> Tensor:
        """The largest over the ranks, in place."""
        if self.exchange is not None:
            self.exchange.most(x)
        return x

    def columns(self, x: Tensor, count: int) -> Tensor:
        """[rows, part] of each rank side by side, without what exceeds `count`; elsewhere than at rank 0 they are left out: [rows, 0]."""
        if self.exchange is None:
            return x
        parts = self.exchange.gather(x.contiguous())
        return parts.transpose(0, 1).reshape(len(x), -1)[:, :count] if len(parts) else x[:, :0]

    @property
    def shared(self) -> SharedSum | None:
        """The sum over the ranks by memory that they share, where all of them have it."""
        return None if self.exchange is None else self.exchange.shared

    def barrier(self, device: torch.device) -> None:
        """Until all have come here."""
        if self.exchange is not None:
            self.exchange.sum(torch.zeros(1, device=device))

    def kv_heads(self, config: ModelConfig) -> range:
        """Those that are held here."""
        return heads_of(config.kv_heads, self.size, self.rank)

    @property
    def expert_split(self) -> int:
        """Ranks that share the columns of an expert."""
        return self.size // self.ep

    @property
    def expert_rank(self) -> int:
        """Which of those this is."""
        return self.rank % self.expert_split

    def experts(self, moe: MoeConfig) -> range:
        """Those that are held here, whole or in part."""
        group = self.rank // self.expert_split
        return range(group * moe.experts // self.ep, (group + 1) * moe.experts // self.ep)

    def vocabulary(self, config: ModelConfig) -> int:
        """Rows of the embedding at each rank; the last ones of the last rank may be none's."""
        return -(-config.vocab // self.size)

    def share(self, config: ModelConfig) -> ModelConfig:
        """The model as one rank computes it: its heads, and its columns of the feed-forward. The vocabulary stays whole, and all experts
        count."""
        moe = config.moe and replace(config.moe, width=config.moe.width // self.expert_split, shared=config.moe.shared // self.size)
        return replace(config, heads=config.heads // self.size, kv_heads=len(self.kv_heads(config)), ffn=config.ffn // self.size, moe=moe)

    def part(self, name: str, config: ModelConfig) -> WeightPart | None:
        """What this rank holds of the weight of that Hugging Face name; None: all of it."""
        if self.size == 1:
            return None
        stem, _, kind = name.rpartition(".")
        layer = stem.rpartition(".")[2]
        if config.moe is not None and (".experts." in name or f".{names(config.family).shared}." in name):
            return self._of_experts(name, config, config.moe)
        if layer == "self_attn" and kind == "sinks":
            return self._slice(0, config.heads // self.size)
        if config.latent is not None and layer in ("q_proj", "q_b_proj", "kv_b_proj", "o_proj"):
            latent = config.latent
            each = {"kv_b_proj": latent.nope_dim + latent.v_dim, "o_proj": latent.v_dim}.get(layer, latent.nope_dim + latent.rope_dim)
            return self._slice(int(layer == "o_proj"), config.heads // self.size * each)
        if layer in ("embed_tokens", "lm_head"):
            return self._slice(0, self.vocabulary(config), config.vocab)
        if layer == "q_proj":
            return self._slice(0, config.heads // self.size * config.head_dim)
        if layer in ("k_proj", "v_proj"):
            heads = self.kv_heads(config)
            return WeightPart(0, heads.start * config.head_dim, len(heads) * config.head_dim)
        if layer in ("gate_proj", "up_proj"):
            return self._slice(0, config.ffn // self.size)
        if layer in ("o_proj", "down_proj"):
            if kind == "bias":  # it is added once
                return None if self.rank == 0 else WeightPart(0, 0, 0)
            return self._slice(1, (config.ffn if layer == "down_proj" else config.heads * config.head_dim) // self.size)
        return None

    def _of_experts(self, name: str, config: ModelConfig, moe: MoeConfig) -> WeightPart | None:
        stem, _, kind = name.rpartition(".")
        n = names(config.family)
        down = stem.rpartition(".")[2] == n.parts[2]
        if f".{n.shared}." in name:
            return self._slice(int(down), moe.shared // self.size)
        here, width = self.experts(moe), moe.width // self.expert_split

        def columns(dimension: int, each: int) -> WeightPart:
            return WeightPart(dimension, self.expert_rank * each, each)

        if not n.joined:
            return columns(int(down), width) if int(name.split(".experts.")[1].partition(".")[0]) in here else WeightPart(0, 0, 0)
        if kind == "down_proj_bias":  # it is added once
            own = WeightPart(1, 0, 0 if self.expert_rank else config.hidden)
        elif kind == "gate_up_proj" and not n.alternating:  # two pieces, which whoever loads it takes
            own = WeightPart(2, 0, 2 * moe.width)
        else:
            own = {"gate_up_proj": columns(2, 2 * width), "gate_up_proj_bias": columns(1, 2 * width)}.get(kind, columns(1, width))
        return replace(own, experts=here)

    def _slice(self, dimension: int, each: int, total: int | None = None) -> WeightPart:
        first = self.rank * each
        return WeightPart(dimension, first, each if total is None else max(0, min(each, total - first)))


@dataclass(frozen=True, slots=True)
class WeightPart:
    """`count` of a weight's rows (dimension 0) or columns (1), or along a third, from `first` on. `experts`: of which of its first
    dimension, where that is the experts'."""

    dimension: int
    first: int
    count: int
    experts: range | None = None

    @property
    def index(self) -> tuple[slice, ...]:
        """For a tensor, or a slice of a safetensors file."""
        before = [slice(None)] * self.dimension
        if self.experts is not None:
            before[0] = slice(self.experts.start, self.experts.stop)
        return (*before, slice(self.first, self.first + self.count))


class SummedLinear:
    """A product split along its input: each rank's columns of the weight, and the sum over the ranks."""

    def __init__(self, part: Linear, ranks: Ranks) -> None:
        self.part, self.ranks = part, ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.sum(self.part(x))

    @property
    def weight(self) -> Weight:
        return self.part.weight

    @property
    def bias(self) -> Tensor | None:
        return self.part.bias

    @property
    def weight_bytes(self) -> int:
        return self.part.weight_bytes


class SummedPass:
    """A feed-forward of which each rank has its columns, and the sum over the ranks."""

    def __init__(self, part: FeedForwardPass, ranks: Ranks) -> None:
        self.part, self.ranks = part, ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.sum(self.part(x))


class Embedding:
    """Token ids [tokens] to rows [tokens, hidden]: each rank looks up those of its part of the vocabulary."""

    def __init__(self, weight: Tensor, ranks: Ranks, each: int) -> None:
        self.weight, self.ranks, self.first = weight, ranks, ranks.rank * each

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.ranks.size == 1:
            return F.embedding(tokens, self.weight)
        here = tokens - self.first
        elsewhere = (here < 0) | (here >= len(self.weight))
        rows = F.embedding(here.masked_fill(elsewhere, 0), self.weight).masked_fill_(elsewhere.unsqueeze(1), 0)
        return self.ranks.sum(rows)


def filled(rows: Tensor, count: int) -> Tensor:
    """With rows of zeros up to `count`."""
    return rows if len(rows) == count else F.pad(rows, (0, 0, 0, count - len(rows)))
