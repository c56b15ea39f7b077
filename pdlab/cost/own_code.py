"""Families whose code is published beside their weights and is not in transformers, with layers of a form of their own: Grok-2, Step-3,
MiMo-V2 and Ring-linear.

Sources: SGLang's models for the first three; "Step-3 is Large yet Affordable" (2025), 2.2; MiMo-V2-Flash's report (2025); Ring-linear's
report "Every Attention Matters" (2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdlab.cost.config_keys import HEADS, HIDDEN, KV_HEADS, LAYERS, Keys
from pdlab.cost.decoders import Decoder, attention, decoder, feed_forwards, outer, stack
from pdlab.cost.families import Family
from pdlab.cost.hybrids import lightning_attention, mixed
from pdlab.cost.layers import Layer, Matrix, Mixer, Mlp, Moe, Outer, Softmax
from pdlab.cost.shapes import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorizedSoftmax(Softmax):
    """Attention whose queries come through `q_rank` dimensions that all heads share."""

    q_rank: int

    def matrices(self, hidden: int) -> Iterator[Matrix]:
        query, *others = Softmax.matrices(self, hidden)
        yield query._replace(params=hidden * self.q_rank)
        yield Matrix("self_attn.wq", Part.ATTENTION, self.q_rank * self.heads * self.head_dim)
        yield from others


def grok2(keys: Keys, family: Family) -> Decoder:
    """Each layer has a feed-forward beside its experts."""
    window, every = keys.whole("sliding_window_size", otherwise=-1, least=-1), keys.whole("global_attn_every_n", otherwise=1)
    if window > 0 and every > 1:
        raise keys.wrong(f": sliding_window_size {window}, and which layers have it is not known: give -1 where none has")
    plain = decoder(keys, family)
    if not keys.flag("residual_moe"):
        return plain
    beside = Mlp(width=keys.whole("intermediate_size"))
    return replace(plain, layers=[Layer(layer.mixers, (*layer.feed_forwards, beside)) for layer in plain.layers])


def step3(keys: Keys, family: Family) -> Decoder:
    """Multi-matrix factorization attention: one key and one value a layer and token, as wide as a head."""
    hidden, layers = keys.whole(*HIDDEN), keys.whole(*LAYERS)
    mixer = FactorizedSoftmax(
        heads=keys.whole(*HEADS),
        kv_heads=keys.whole("num_attention_groups", *KV_HEADS),
        head_dim=keys.whole("head_dim"),
        q_rank=keys.whole("share_q_dim"),
    )
    moe = Moe(
        experts=keys.whole("moe_num_experts"),
        per_token=keys.whole("moe_top_k"),
        width=keys.whole("moe_intermediate_size"),
        shared=keys.whole("share_expert_dim", least=0),
    )
    sparse, dense = _enumerated(keys, layers), Mlp(width=keys.whole("intermediate_size"))
    keys.read.add("max_position_embedding")
    tied = keys.flag("tie_word_embeddings", otherwise=False)
    around = Outer(vocab=keys.whole("vocab_size"), tied=tied)
    return Decoder(hidden, stack([mixer] * layers, [moe if i in sparse else dense for i in range(layers)]), around)


def _enumerated(keys: Keys, layers: int) -> set[int]:
    """The layers that moe_layers_enum names, as a list or as "4,5,6"."""
    named = keys.get("moe_layers_enum")
    if named is None:
        raise keys.lacks("moe_layers_enum")
    found = named.split(",") if isinstance(named, str) else named
    if not isinstance(found, list) or not all(str(one).strip().isdecimal() and int(one) < layers for one in found):
        raise keys.wrong(f": moe_layers_enum must list layers below {layers}, not {str(named)[:60]!r}")
    return {int(one) for one in found}


def mimo_v2(keys: Keys, family: Family) -> Decoder:
    """Layers that attend to a window have heads of their own number and width; values may be narrower than keys."""
    hidden, layers = keys.whole(*HIDDEN), keys.whole(*LAYERS)
    full = Softmax(heads=keys.whole(*HEADS), kv_heads=keys.whole(*KV_HEADS), head_dim=keys.whole("head_dim"), v_dim=_v_dim(keys, ""))
    windowed = Softmax(
        heads=keys.whole("swa_num_attention_heads"),
        kv_heads=keys.whole("swa_num_key_value_heads"),
        head_dim=keys.whole("swa_head_dim"),
        v_dim=_v_dim(keys, "swa_"),
        window=keys.whole("sliding_window", "sliding_window_size"),
    )
    if keys.get("moe_layer_freq") is None and keys.get("mlp_layer_types") is None:
        raise keys.lacks("moe_layer_freq")
    mixers: list[Mixer] = [windowed if within else full for within in _windowed(keys, layers)]
    return Decoder(hidden, stack(mixers, feed_forwards(keys, family, layers, hidden)), outer(keys, family))


def _v_dim(keys: Keys, prefix: str) -> int:
    return keys.whole(f"{prefix}v_head_dim", otherwise=keys.whole(f"{prefix}head_dim"))


def _windowed(keys: Keys, layers: int) -> list[bool]:
    kinds = keys.kinds("layer_types", layers)
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise keys.wrong(f": layer_types has {unknown[0]!r}, which this model_type is not known to have")
        return [kind == "sliding_attention" for kind in kinds]
    if not isinstance(keys.get("hybrid_layer_pattern"), list):
        raise keys.lacks("hybrid_layer_pattern")
    return [within == 1 for within in keys.each(layers, "hybrid_layer_pattern", least=0)]


def ring_linear(keys: Keys, family: Family) -> Decoder:
    """Lightning attention, and softmax in the last layer of each group; in what is left beyond whole groups, too."""
    hidden, layers, every = keys.whole(*HIDDEN), keys.whole(*LAYERS), keys.whole("layer_group_size")
    softmax = attention(keys, hidden, family)
    if softmax.heads * softmax.head_dim != hidden:
        raise keys.wrong(f": {softmax.heads} heads of {softmax.head_dim} are not the hidden size {hidden}: its linear layers' are")
    linear = lightning_attention(hidden, softmax, "attention", ("query_key_value", "g_proj", "dense"))
    attend = [(i + 1) % every == 0 or i >= layers // every * every for i in range(layers)]
    plain = mixed(keys, family, attend, softmax, linear)
    shared = keys.whole("num_shared_experts", least=0) * keys.whole(
        "moe_shared_expert_intermediate_size", otherwise=keys.whole("moe_intermediate_size")
    )
    return replace(plain, layers=[_with_shared(layer, shared) for layer in plain.layers])


def _with_shared(layer: Layer, shared: int) -> Layer:
    return Layer(layer.mixers, tuple(replace(f, shared=shared) if isinstance(f, Moe) else f for f in layer.feed_forwards))
