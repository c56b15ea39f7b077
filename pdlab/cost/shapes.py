"""What a cost model needs to know of a model: frozen facts and the arithmetic on them.

Linear weights count; norms and biases (under 0.1 %), vision towers and multi-token prediction heads do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil

from pdlab.cost.dtypes import FOUR_BIT, Format, dtype_bytes, plain

GIB = 2**30


class Part(StrEnum):
    """What weights are for."""

    ATTENTION = "attention"
    RECURRENT = "linear attention, SSM"
    MLP = "mlp"
    SHARED = "shared experts"
    ROUTER = "router"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    POSITIONS = "positions"
    HEAD = "head"


UNQUANTISED = frozenset({Part.ATTENTION, Part.RECURRENT, Part.ROUTER})  # by those who quantise experts to four bits
OUTER = frozenset({Part.EMBEDDING, Part.POSITIONS, Part.HEAD})  # looked up, or multiplied once a sequence


@dataclass(frozen=True, slots=True)
class Weights:
    """One part's matrices in one number format, over all layers. Of the `experts` of a layer a token meets `experts_per_token`."""

    part: Part
    params: int
    format: Format
    experts: int = 0
    experts_per_token: int = 0

    @property
    def bytes(self) -> float:
        return self.params * self.format.bytes_per_value

    @property
    def active_params(self) -> float:
        return self.params * self.experts_per_token / self.experts if self.experts else self.params


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """`layers` layers alike that attend to tokens before. `kv_layers` of them keep KV, the others read what an earlier one keeps. With
    `latent`, attention is MLA: a token's KV is one vector of latent + rope_dim, and a head's parts are nope_dim, rope_dim and v_dim.
    `index_dim`: of the one key a token has in a sparse attention's indexer. `window_tokens` 0: it attends to all."""

    layers: int
    kv_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    latent: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    index_dim: int = 0
    window_tokens: int = 0

    @property
    def kept_tokens(self) -> int:
        """The last tokens whose KV is kept; 0: all. A sparse attention (MLA) may choose any."""
        return 0 if self.latent or self.index_dim else self.window_tokens

    @property
    def shared_heads(self) -> int:
        """Into which KV is shared out among ranks: a latent vector is whole at each."""
        return 1 if self.latent else self.kv_heads

    def kv_values_per_rank(self, tp: int) -> int:
        """Of one token in one layer: at least one KV head on each rank, all of MLA's compressed vector."""
        if self.latent:
            return self.latent + self.rope_dim + self.index_dim
        return (self.head_dim + self.v_dim) * ceil(self.kv_heads / tp) + self.index_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """`layers` layers alike of linear attention, an SSM or a convolution: no KV, but a state of fixed size for each sequence, the same
    whatever its length. `state_values` are kept in `state_value_bytes` each, `conv_values` (last inputs) in the weights' 16 bits;
    `token_flops` update and read the state for one token, beside the matrices."""

    kind: str
    layers: int
    state_values: int
    conv_values: int
    token_flops: int
    state_value_bytes: int = 4

    @property
    def state_bytes(self) -> int:
        """Of one sequence, all layers."""
        return self.layers * (self.state_values * self.state_value_bytes + 2 * self.conv_values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder: its weights by part and number format, and what its layers keep of a sequence. `pdlab.cost.layers.assemble` makes it.
    Of `layers`, `dense_layers` have a feed-forward without experts where others have them."""

    name: str
    layers: int
    hidden: int
    vocab: int
    weights: tuple[Weights, ...]
    attention: tuple[Attention, ...]
    recurrence: tuple[Recurrence, ...] = ()
    head_params: int
    reductions: int  # all-reduces of a step under tensor parallelism: one after each mixer and each feed-forward
    ffn: int = 0  # the widest without experts
    gated: bool = True  # three feed-forward matrices (SwiGLU), not two
    tied: bool = False  # the head shares the embedding's weights
    max_positions: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # of all shared experts together
    moe_layers: int = 0
    weight_dtype: str = "bf16"  # of most weights, as published
    verified: bool = True
    source: str = ""

    @property
    def main(self) -> Attention:
        """The attention most is said of: that without a window, if there is one."""
        return min(self.attention, key=lambda a: a.window_tokens > 0)

    @property
    def heads(self) -> int:
        return self.main.heads

    @property
    def kv_heads(self) -> int:
        return self.main.kv_heads

    @property
    def head_dim(self) -> int:
        return self.main.head_dim

    @property
    def kv_lora_rank(self) -> int:
        return self.main.latent

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers if self.experts else 0

    @property
    def window_layers(self) -> int:
        return sum(a.layers for a in self.attention if a.window_tokens)

    @property
    def window_tokens(self) -> int:
        """The widest window; 0 where every layer attends to all."""
        return max((a.window_tokens for a in self.attention), default=0)

    def params(self, *parts: Part) -> int:
        """Parameters of these parts, or of all."""
        return sum(w.params for w in self.weights if not parts or w.part in parts)

    @property
    def expert_params(self) -> int:
        """Of one expert in one layer."""
        return self.params(Part.EXPERTS) // (self.moe_layers * self.experts) if self.experts else 0

    @property
    def dense_params(self) -> int:
        """Read for every token, all layers: attention, dense feed-forwards, shared experts, routers; not the head."""
        return sum(w.params for w in self.weights if w.part not in OUTER and w.part is not Part.EXPERTS)

    @property
    def embedding_params(self) -> int:
        """Embedding and positions, and the head where it is not tied to them."""
        return self.params(*OUTER)

    @property
    def total_params(self) -> int:
        return self.params()

    @property
    def active_params(self) -> int:
        """Multiplied for one token, embeddings counted as in `total_params`."""
        return round(sum(w.active_params for w in self.weights))

    def stored(self, dtype: str | None = None) -> tuple[Weights, ...]:
        """The weights as published, or all in `dtype`, where embedding and head stay in 16 bits, as published checkpoints have them. So do
        attention and routers of models with experts in nvfp4 and mxfp4."""
        if dtype is None or dtype == self.weight_dtype:
            return self.weights
        asked = plain(dtype)
        wide = plain("bf16") if asked.is_quantised else asked
        kept = OUTER | UNQUANTISED if self.experts and dtype in FOUR_BIT else OUTER
        return tuple(replace(w, format=wide if w.part in kept else asked) for w in self.weights)

    def weights_bytes(self, dtype: str | None = None) -> int:
        """All weights, once: as published, or in `dtype`."""
        return int(sum(w.bytes for w in self.stored(dtype)))

    def head_weights(self, dtype: str | None = None) -> Weights:
        """The head's matrix, which is the embedding's where the two are tied."""
        part = Part.EMBEDDING if self.tied else Part.HEAD
        return replace(next(w for w in self.stored(dtype) if w.part is part), params=self.head_params)

    def kv_bytes_per_token_per_rank(self, dtype: str = "bf16", tp: int = 1) -> int:
        """KV bytes that each of `tp` ranks keeps for one token while every layer's window holds it."""
        return int(sum(a.kv_layers * a.kv_values_per_rank(tp) for a in self.attention) * dtype_bytes(dtype))

    def kv_bytes_by_window(self, dtype: str = "bf16", tp: int = 1) -> dict[int, int]:
        """`kv_bytes_per_token`, by how many tokens of a sequence the layers keep; 0: all."""
        found: dict[int, float] = {}
        for a in self.attention:
            if a.kv_layers:
                values = tp * a.kv_layers * a.kv_values_per_rank(tp)
                found[a.kept_tokens] = found.get(a.kept_tokens, 0) + values * dtype_bytes(dtype)
        return {window: int(size) for window, size in sorted(found.items())}

    def kv_bytes_per_token(self, dtype: str = "bf16", tp: int = 1) -> int:
        """KV bytes of one token over all `tp` ranks, replicas counted: what a transfer between two such instances moves."""
        return tp * self.kv_bytes_per_token_per_rank(dtype, tp)

    @property
    def state_bytes(self) -> int:
        """Of one sequence's recurrent layers, whatever its length; 0 where there are none."""
        return sum(r.state_bytes for r in self.recurrence)

    def kv_bytes_per_sequence(self, tokens: int, dtype: str = "bf16") -> int:
        """What a sequence of `tokens` tokens needs: KV, of windowed layers of a window at most, and its state."""
        values = sum(a.kv_layers * a.kv_values_per_rank(1) * min(tokens, a.kept_tokens or tokens) for a in self.attention)
        return int(values * dtype_bytes(dtype)) + self.state_bytes
