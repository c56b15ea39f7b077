"""A config's layers, by its family: attention with or without a window, MLA, feed-forwards with or without experts, a table of positions.

Each function reads the `Keys` of a config and answers with a `Decoder`. Families with rules of their own are in
`pdlab.cost.special`, recurrent layers in `pdlab.cost.hybrids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdlab.cost.config_keys import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, POSITIONS, Keys
from pdlab.cost.families import Experts, Family
from pdlab.cost.layers import FeedForward, Latent, Layer, Mixer, Mlp, Moe, Outer, Softmax
from pdlab.cost.patterns import text_first, windows, with_experts


@dataclass(frozen=True, slots=True)
class Decoder:
    hidden: int
    layers: list[Layer]
    outer: Outer


def decoder(keys: Keys, family: Family) -> Decoder:
    """Softmax attention and a feed-forward in each layer."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    like = attention(keys, hidden, family)
    if not all(keys.get("attn_type_list") or ()):  # MiniMax's: 0 is linear attention
        raise keys.wrong(f": attn_type_list has layers of linear attention, which model_type {keys.config.get('model_type')!r} has not")
    mixers = [replace(like, window=window) for window in windows(keys, family, layers)]
    return Decoder(hidden, stack(mixers, feed_forwards(keys, family, layers, hidden)), outer(keys, family))


def stack(mixers: Sequence[Mixer], feeds: Sequence[FeedForward]) -> list[Layer]:
    """A layer of each mixer and feed-forward."""
    return [Layer((mixer,), (feed,)) for mixer, feed in zip(mixers, feeds, strict=True)]


def outer(keys: Keys, family: Family) -> Outer:
    positions = 0
    if family.learned_positions >= 0:
        positions = keys.whole(*POSITIONS) + family.learned_positions
    tied = keys.flag("tie_word_embeddings", otherwise=family.tied or None)
    vocab = keys.whole("padded_vocab_size", otherwise=0) or keys.whole("vocab_size")
    keys.read.add("vocab_size")
    return Outer(vocab=vocab, tied=tied, positions=positions, embedding_dim=keys.whole("word_embed_proj_dim", otherwise=0))


def attention(keys: Keys, hidden: int, family: Family) -> Softmax:
    heads = keys.whole(*HEADS)
    kv_heads = kv_heads_of(keys, heads)
    dim = keys.get(*HEAD_DIM)
    if dim is None:
        if hidden % heads:
            raise keys.wrong(f": hidden size {hidden} is no multiple of {heads} heads, and it lacks 'head_dim': add it")
        dim = hidden // heads
        if keys.defaults.get("head_dim") not in (None, dim) and not keys.states("head_dim"):
            raise keys.lacks("head_dim")
    dim = keys.check(HEAD_DIM, dim)
    if heads % kv_heads:
        raise keys.wrong(f": num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    values = keys.whole("v_head_dim", otherwise=dim, least=0) or dim
    if values != dim:
        raise keys.wrong(f": v_head_dim is {values} and head_dim {dim}: values of another width than keys are not known of this model_type")
    return Softmax(heads=heads, kv_heads=kv_heads, head_dim=dim)


def kv_heads_of(keys: Keys, heads: int) -> int:
    """As the config says; by multi_query; or, where the class says so, as many as heads."""
    if keys.get("multi_query") is not None and not any(keys.config.get(name) is not None for name in KV_HEADS):
        return 1 if keys.flag("multi_query") else heads
    return keys.whole(*KV_HEADS, otherwise=heads)


def feed_forwards(keys: Keys, family: Family, layers: int, hidden: int) -> list[FeedForward]:
    """One for each layer."""
    have = with_experts(keys, family.experts, layers) if family.experts else [False] * layers
    moes: Sequence[Moe | None] = moe_of(keys, family.experts, layers, family.gated) if family.experts and any(have) else [None] * layers
    dense: list[Mlp] = []
    if not all(have):
        widths = dense_widths(keys, family, layers, hidden)
        dense = [Mlp(width=width, gated=family.gated) for width in widths]
    elif family.experts:
        keys.read.update((*FFN, "intermediate_size_mlp"))
    chosen: list[FeedForward] = []
    for index, moe in enumerate(moes):
        chosen.append(moe if have[index] and moe is not None else dense[index])
    return chosen


def dense_widths(keys: Keys, family: Family, layers: int, hidden: int) -> list[int]:
    if family.experts and family.experts.layers == "interleaved":
        return keys.each(layers, "intermediate_size_mlp")
    value = keys.get(*FFN)
    if value is None and family.mlp_factor:
        return [family.mlp_factor * hidden] * layers
    widths = keys.each(layers, *FFN)
    return [width // 2 for width in widths] if family.mlp_halved else widths


def moe_of(keys: Keys, experts: Experts, layers: int, gated: bool) -> list[Moe]:
    """Of each layer, if it has experts; lists of a number for each layer are allowed, as Hunyuan's are."""

    def each(names: tuple[str, ...]) -> list[int]:
        return [text_first(keys, names[0])] * layers if experts.layers == "ernie" else keys.each(layers, *names)

    counts, per_token, widths = each(experts.count), each(experts.per_token), each(experts.width)
    shared = [experts.shared_count * width for width in widths]
    if experts.shared:
        none = 0 if any(keys.states(name) for name in experts.shared) else None  # null is none, missing is a mistake
        number = keys.each(layers, *experts.shared, otherwise=none, least=0)
        if keys.get("use_moe_shared_expert") is False or keys.get("use_shared_expert") is False:
            number = [0] * layers
        shared = [n * width for n, width in zip(number, widths, strict=True)]
    if experts.shared_width:
        shared = keys.each(layers, *experts.shared_width, least=0)
    for count, k in zip(counts, per_token, strict=True):
        if k > count:
            raise keys.wrong(f": a token meets {k} experts ({experts.per_token[0]}), and there are {count} ({experts.count[0]})")
    return [Moe(experts=counts[i], per_token=per_token[i], width=widths[i], shared=shared[i], gated=gated) for i in range(layers)]


def latent(keys: Keys, family: Family) -> Decoder:
    """MLA, with or without the indexer of sparse attention; plain attention where `use_mla` is false."""
    if not keys.flag("use_mla", otherwise=True):
        keys.read.update(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
        return decoder(keys, family)
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    mixers = [latent_attention(keys)] * layers
    keys.get(*KV_HEADS)
    keys.kinds("layer_types", layers)
    return Decoder(hidden, stack(mixers, feed_forwards(keys, family, layers, hidden)), outer(keys, family))


def latent_attention(keys: Keys) -> Latent:
    sparse = keys.whole("index_topk", otherwise=0, least=0)
    return Latent(
        heads=keys.whole(*HEADS),
        latent=keys.whole("kv_lora_rank"),
        q_rank=_query_rank(keys),
        nope_dim=keys.whole("qk_nope_head_dim"),
        rope_dim=keys.whole("qk_rope_head_dim"),
        v_dim=keys.whole("v_head_dim"),
        top_k=sparse,
        index_heads=keys.whole("index_n_heads") if sparse else 0,
        index_dim=keys.whole("index_head_dim") if sparse else 0,
    )


def _query_rank(keys: Keys) -> int:
    """Null: queries are projected at once."""
    rank = keys.get("q_lora_rank")
    if rank is None and not keys.states("q_lora_rank"):
        raise keys.lacks("q_lora_rank")
    return keys.check(("q_lora_rank",), rank or 0, least=0)
