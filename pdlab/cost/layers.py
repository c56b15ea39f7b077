"""A decoder as a list of layers, each of mixers (attention, recurrence) and feed-forwards that name their matrices; `assemble` adds them
up into a Model. Names are transformers', without what stands before: a quantisation may leave some of them alone.

Matrices count; norms and biases (about 0.1 %), vision towers and multi-token prediction heads do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pdlab.cost.dtypes import Format
from pdlab.cost.quantization import Quantization
from pdlab.cost.shapes import Attention, Model, Part, Recurrence, Weights


class Matrix(NamedTuple):
    """`params` of all experts together, where it is theirs."""

    name: str
    part: Part
    params: int
    experts: int = 0
    experts_per_token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """Attention with keys and values. `gated`: the query's projection makes a gate for the output, too. `shares_kv`: it reads what an
    earlier layer keeps, and makes neither keys nor values. `v_is_k`: values are the keys' projection."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int = 0
    window: int = 0
    gated: bool = False
    shares_kv: bool = False
    v_is_k: bool = False
    more: tuple[tuple[str, int], ...] = ()

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        v_dim = self.v_dim or self.head_dim
        yield Matrix("self_attn.q_proj", Part.ATTENTION, hidden * self.heads * self.head_dim * (2 if self.gated else 1))
        if not self.shares_kv:
            yield Matrix("self_attn.k_proj", Part.ATTENTION, hidden * self.kv_heads * self.head_dim)
            if not self.v_is_k:
                yield Matrix("self_attn.v_proj", Part.ATTENTION, hidden * self.kv_heads * v_dim)
        yield Matrix("self_attn.o_proj", Part.ATTENTION, self.heads * v_dim * hidden)
        for name, params in self.more:
            yield Matrix(f"self_attn.{name}", Part.ATTENTION, params)

    def attention(self, layers: int, kv_layers: int) -> Attention:
        return Attention(
            layers=layers,
            kv_layers=kv_layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            v_dim=self.v_dim or self.head_dim,
            window_tokens=self.window,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """MLA. Source: DeepSeek-V2 (2024). `top_k` of a sparse attention's indexer is taken for a window; its keys are KV of their own."""

    heads: int
    latent: int
    q_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    top_k: int = 0
    index_heads: int = 0
    index_dim: int = 0
    shares_kv: bool = False

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        query = self.heads * (self.nope_dim + self.rope_dim)
        if self.q_rank:
            yield Matrix("self_attn.q_a_proj", Part.ATTENTION, hidden * self.q_rank)
            yield Matrix("self_attn.q_b_proj", Part.ATTENTION, self.q_rank * query)
        else:
            yield Matrix("self_attn.q_proj", Part.ATTENTION, hidden * query)
        yield Matrix("self_attn.kv_a_proj_with_mqa", Part.ATTENTION, hidden * (self.latent + self.rope_dim))
        yield Matrix("self_attn.kv_b_proj", Part.ATTENTION, self.latent * self.heads * (self.nope_dim + self.v_dim))
        yield Matrix("self_attn.o_proj", Part.ATTENTION, self.heads * self.v_dim * hidden)
        if self.index_heads:
            yield Matrix("self_attn.indexer.wq_b", Part.ATTENTION, (self.q_rank or hidden) * self.index_heads * self.index_dim)
            yield Matrix("self_attn.indexer.wk", Part.ATTENTION, hidden * self.index_dim)
            yield Matrix("self_attn.indexer.weights_proj", Part.ATTENTION, hidden * self.index_heads)

    def attention(self, layers: int, kv_layers: int) -> Attention:
        return Attention(
            layers=layers,
            kv_layers=kv_layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.nope_dim + self.rope_dim,
            v_dim=self.v_dim,
            latent=self.latent,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            index_dim=self.index_dim,
            window_tokens=self.top_k,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrent:
    """A layer's linear attention, SSM or convolution, its matrices by name; sizes as in `Recurrence`."""

    kind: str
    module: str
    sizes: tuple[tuple[str, int], ...]
    state_values: int
    conv_values: int
    token_flops: int
    state_value_bytes: int = 4

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        for name, params in self.sizes:
            yield Matrix(f"{self.module}.{name}", Part.RECURRENT, params)

    def recurrence(self, layers: int) -> Recurrence:
        return Recurrence(
            kind=self.kind,
            layers=layers,
            state_values=self.state_values,
            conv_values=self.conv_values,
            token_flops=self.token_flops,
            state_value_bytes=self.state_value_bytes,
        )


Mixer = Softmax | Latent | Recurrent


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    width: int
    gated: bool = True
    module: str = "mlp"
    more: tuple[tuple[str, int], ...] = ()

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        if self.gated:
            yield Matrix(f"{self.module}.gate_proj", Part.MLP, hidden * self.width)
        yield Matrix(f"{self.module}.up_proj", Part.MLP, hidden * self.width)
        yield Matrix(f"{self.module}.down_proj", Part.MLP, hidden * self.width)
        for name, params in self.more:
            yield Matrix(name, Part.MLP, params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """`shared` is the width of all shared experts together. `outputs` of the router, where some stand for no expert; `latent`: experts
    work in that many dimensions, into which and back two matrices lead."""

    experts: int
    per_token: int
    width: int
    shared: int = 0
    gated: bool = True
    outputs: int = 0
    latent: int = 0
    more: tuple[tuple[str, int], ...] = ()

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        inner, matrices = self.latent or hidden, 3 if self.gated else 2
        yield Matrix("mlp.gate", Part.ROUTER, hidden * (self.outputs or self.experts))
        yield Matrix("mlp.experts", Part.EXPERTS, self.experts * matrices * inner * self.width, self.experts, self.per_token)
        if self.shared:
            yield from (
                m._replace(part=Part.SHARED) for m in Mlp(width=self.shared, gated=self.gated, module="mlp.shared_experts").matrices(hidden)
            )
        if self.latent:
            yield Matrix("mlp.latent_proj", Part.SHARED, 2 * hidden * self.latent)
        for name, params in self.more:
            yield Matrix(name, Part.SHARED, params)


FeedForward = Mlp | Moe


@dataclass(frozen=True, slots=True)
class Layer:
    mixers: tuple[Mixer, ...]
    feed_forwards: tuple[FeedForward, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """What is not in layers. `embedding_dim`: where it is not the hidden size (two projections lead to it); `more`: further matrices."""

    vocab: int
    tied: bool
    positions: int = 0  # rows of a learned position table
    embedding_dim: int = 0
    more: tuple[Matrix, ...] = ()

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        dim = self.embedding_dim or hidden
        yield Matrix("embed_tokens", Part.EMBEDDING, self.vocab * dim)
        if not self.tied:
            yield Matrix("lm_head", Part.HEAD, self.vocab * dim)
        if self.positions:
            yield Matrix("embed_positions", Part.POSITIONS, self.positions * hidden)
        if dim != hidden:
            yield Matrix("project_in_out", Part.MLP, 2 * dim * hidden)
        yield from self.more


def assemble(
    *,
    name: str,
    hidden: int,
    layers: Sequence[Layer],
    outer: Outer,
    quantization: Quantization,
    max_positions: int = 0,
    verified: bool = True,
    source: str = "",
) -> Model:
    """The Model of these layers."""
    moes = [f for layer in layers for f in layer.feed_forwards if isinstance(f, Moe)]
    mlps = [f for layer in layers for f in layer.feed_forwards if isinstance(f, Mlp)]
    mixers = [m for layer in layers for m in layer.mixers]
    most = max(moes, key=lambda m: m.per_token * m.width + m.shared, default=None)
    return Model(
        name=name.lower(),
        layers=len(layers),
        hidden=hidden,
        vocab=outer.vocab,
        weights=_weights(hidden, layers, outer, quantization),
        attention=_attention(mixers),
        recurrence=tuple(m.recurrence(n) for m, n in Counter(m for m in mixers if isinstance(m, Recurrent)).items()),
        head_params=outer.vocab * (outer.embedding_dim or hidden),
        reductions=sum(bool(layer.mixers) + bool(layer.feed_forwards) for layer in layers),
        ffn=max((m.width for m in mlps), default=0),
        gated=all(f.gated for f in mlps) and all(f.gated for f in moes),
        tied=outer.tied,
        max_positions=max_positions,
        experts=most.experts if most else 0,
        experts_per_token=most.per_token if most else 0,
        expert_ffn=most.width if most else 0,
        shared_ffn=most.shared if most else 0,
        moe_layers=len(moes),
        weight_dtype=quantization.dtype,
        verified=verified,
        source=source,
    )


def _weights(hidden: int, layers: Sequence[Layer], outer: Outer, quantization: Quantization) -> tuple[Weights, ...]:
    """Matrices of one part and format together, in the order of `Part`."""
    sums: Counter[tuple[Part, Format, int, int]] = Counter()
    for index, layer in enumerate(layers):
        for module in (*layer.mixers, *layer.feed_forwards):
            for matrix in module.matrices(hidden):
                stored = quantization.of(f"layers.{index}.{matrix.name}", matrix.part)
                sums[matrix.part, stored, matrix.experts, matrix.experts_per_token] += matrix.params
    for matrix in outer.matrices(hidden):
        sums[matrix.part, quantization.of(matrix.name, matrix.part), 0, 0] += matrix.params
    order = list(Part)
    weights = sorted((Weights(p, n, f, e, k) for (p, f, e, k), n in sums.items() if n), key=lambda w: order.index(w.part))
    return tuple(weights)


def _attention(mixers: Sequence[Mixer]) -> tuple[Attention, ...]:
    """Layers alike together, whether they keep KV or read another's."""
    all_layers: Counter[Attention] = Counter()
    keeping: Counter[Attention] = Counter()
    for mixer in mixers:
        if not isinstance(mixer, Recurrent):
            alike = mixer.attention(0, 0)
            all_layers[alike] += 1
            keeping[alike] += not mixer.shares_kv
    return tuple(replace(alike, layers=n, kv_layers=keeping[alike]) for alike, n in all_layers.items())
