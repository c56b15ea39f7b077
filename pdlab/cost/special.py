"""Families whose configs or layers have a form of their own; what they share with the others is in `pdlab.cost.decoders`."""

from __future__ import annotations

from dataclasses import replace

from pdlab.cost.config_keys import HEADS, HIDDEN, KV_HEADS, LAYERS, Keys
from pdlab.cost.decoders import Decoder, attention, decoder, feed_forwards, outer, stack
from pdlab.cost.families import Family
from pdlab.cost.layers import FeedForward, Layer, Matrix, Mlp, Moe, Outer, Softmax
from pdlab.cost.patterns import windows
from pdlab.cost.shapes import Part


def chatglm(keys: Keys, family: Family) -> Decoder:
    """GLM-2 to GLM-4 with their own code: KV heads are groups, and there is a tied flag that their code does not heed."""
    hidden, layers, heads = keys.whole(*HIDDEN), keys.whole("num_layers", "num_hidden_layers"), keys.whole(*HEADS)
    groups = keys.flag("multi_query_attention")
    kv_heads = keys.whole("multi_query_group_num") if groups else heads
    keys.get("multi_query_group_num")
    mixer = Softmax(heads=heads, kv_heads=kv_heads, head_dim=keys.whole("kv_channels"))
    return Decoder(
        hidden, [Layer((mixer,), (Mlp(width=keys.whole("ffn_hidden_size")),))] * layers, replace(outer(keys, family), tied=False)
    )


def falcon(keys: Keys, family: Family) -> Decoder:
    """KV heads are the keys' only in the newer architecture; else one, or as many as heads."""
    hidden, layers, heads = keys.whole(*HIDDEN), keys.whole(*LAYERS), keys.whole(*HEADS)
    stated = keys.get("num_kv_heads", "n_head_kv", "num_key_value_heads")
    newer, one = keys.flag("new_decoder_architecture", otherwise=False), keys.flag("multi_query", otherwise=True)
    kv_heads = keys.check(("num_kv_heads",), heads if stated is None else stated) if newer else 1 if one else heads
    mixer = Softmax(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads)
    return Decoder(hidden, [Layer((mixer,), (f,)) for f in feed_forwards(keys, family, layers, hidden)], outer(keys, family))


def gpt_neo(keys: Keys, family: Family) -> Decoder:
    """Every other layer attends to a window, by attention_types: [[["global", "local"], 12]]."""
    hidden, layers = keys.whole(*HIDDEN), keys.whole(*LAYERS)
    kinds = keys.get("attention_layers")
    listed = keys.get("attention_types")
    if kinds is None:
        if listed is None:
            raise keys.lacks("attention_types")
        kinds = [kind for group, times in listed for _ in range(times) for kind in group]
    window = keys.whole("window_size")
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise keys.wrong(f": attention_types must say global or local for each of {layers} layers")
    like = attention(keys, hidden, family)
    mixers = [replace(like, window=window if kind == "local" else 0) for kind in kinds]
    return Decoder(hidden, stack(mixers, feed_forwards(keys, family, layers, hidden)), outer(keys, family))


def mpt(keys: Keys, family: Family) -> Decoder:
    """Its attention's kind is in attn_config, its width a ratio."""
    hidden, layers, heads = keys.whole("d_model"), keys.whole("n_layers"), keys.whole("n_heads")
    inner = keys.part("attn_config")
    kind = inner.get("attn_type") or "multihead_attention"
    counts = {"multihead_attention": heads, "multiquery_attention": 1}
    kv_heads = inner.whole("kv_n_heads") if kind in ("grouped_query_attention", "gqa") else counts.get(kind)
    if kv_heads is None:
        raise keys.wrong(f": attn_config.attn_type {kind!r} is not one of {', '.join(counts)}, grouped_query_attention")
    if inner.get("sliding_window_size") not in (None, -1):
        raise keys.wrong(": attn_config.sliding_window_size is not supported")
    ratio = keys.get("expansion_ratio")
    if not isinstance(ratio, int | float) or ratio <= 0:
        raise keys.lacks("expansion_ratio")
    learned = keys.flag("learned_pos_emb", otherwise=True) and not inner.flag("alibi", otherwise=True)
    positions = keys.whole("max_seq_len") if learned else 0
    keys.read.update(("max_seq_len", "ffn_config"))
    mixer, mlp = Softmax(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads), Mlp(width=int(ratio * hidden), gated=False)
    around = Outer(vocab=keys.whole("vocab_size"), tied=keys.flag("tie_word_embeddings", otherwise=True), positions=positions)
    return Decoder(hidden, [Layer((mixer,), (mlp,))] * layers, around)


def dbrx(keys: Keys, family: Family) -> Decoder:
    """Attention and experts have mappings of their own."""
    hidden, layers, heads = keys.whole("d_model"), keys.whole("n_layers"), keys.whole("n_heads")
    inner, ffn = keys.part("attn_config"), keys.part("ffn_config")
    keys.read.update(KV_HEADS)
    mixer = Softmax(heads=heads, kv_heads=inner.whole("kv_n_heads"), head_dim=hidden // heads)
    moe = Moe(experts=ffn.whole("moe_num_experts"), per_token=ffn.whole("moe_top_k"), width=ffn.whole("ffn_hidden_size"))
    return Decoder(hidden, [Layer((mixer,), (moe,))] * layers, outer(keys, family))


def arctic(keys: Keys, family: Family) -> Decoder:
    """Beside its experts a layer has a feed-forward as wide as the hidden size."""
    plain = decoder(keys, family)
    if not keys.flag("use_residual"):
        return plain
    beside = Mlp(width=plain.hidden, module="residual_mlp")
    layers = [Layer(a.mixers, (*a.feed_forwards, beside)) if isinstance(a.feed_forwards[0], Moe) else a for a in plain.layers]
    return replace(plain, layers=layers)


def hunyuan(keys: Keys, family: Family) -> Decoder:
    """With cross-layer attention, only every n-th layer makes keys and values."""
    plain = decoder(keys, family)
    if not keys.flag("use_cla", otherwise=False):
        keys.get("cla_share_factor")
        return plain
    every = keys.whole("cla_share_factor")
    layers = []
    for index, layer in enumerate(plain.layers):
        (mixer,) = layer.mixers
        assert isinstance(mixer, Softmax)
        layers.append(Layer((replace(mixer, shares_kv=index % every > 0),), layer.feed_forwards))
    return replace(plain, layers=layers)


def gated_attention(keys: Keys, family: Family) -> Decoder:
    """Attention whose output passes a gate with a matrix as large as the query's."""
    plain = decoder(keys, family)
    layers = []
    for layer in plain.layers:
        (mixer,) = layer.mixers
        assert isinstance(mixer, Softmax)
        layers.append(Layer((replace(mixer, gated=True),), layer.feed_forwards))
    return replace(plain, layers=layers)


def gemma3n(keys: Keys, family: Family) -> Decoder:
    """Gemma 3n: the last layers read earlier ones' KV; embeddings for each layer; AltUp and LAuReL beside."""
    plain = decoder(keys, family)
    hidden, number = plain.hidden, len(plain.layers)
    per_layer, rank = keys.whole("hidden_size_per_layer_input"), keys.whole("laurel_rank")
    streams, sharing = keys.whole("altup_num_inputs"), keys.whole("num_kv_shared_layers", least=0)
    beside = (
        ("laurel.linear", 2 * hidden * rank),
        ("per_layer", 2 * hidden * per_layer),
        ("altup", streams * (streams + streams**2 + hidden)),
    )
    layers = []
    for index, layer in enumerate(plain.layers):
        (mixer,), (mlp,) = layer.mixers, layer.feed_forwards
        assert isinstance(mixer, Softmax) and isinstance(mlp, Mlp)
        shares = replace(mixer, shares_kv=index >= number - sharing)
        layers.append(Layer((shares,), (replace(mlp, more=beside),)))
    rows = keys.whole("vocab_size_per_layer_input")
    more = (
        Matrix("embed_tokens_per_layer", Part.EMBEDDING, rows * number * per_layer),
        Matrix("per_layer_model_projection", Part.MLP, hidden * number * per_layer),
        Matrix("altup_projections", Part.MLP, 2 * (streams - 1) * hidden**2),
    )
    return Decoder(hidden, layers, replace(plain.outer, more=more))


def gemma4(keys: Keys, family: Family) -> Decoder:
    """Gemma 4: layers that attend to all have heads of their own width, and may take their keys for values; a feed-forward may stand beside
    experts; embeddings for each layer and shared KV as in Gemma 3n."""
    hidden, number = keys.whole(*HIDDEN), keys.whole(*LAYERS)
    like, spans = attention(keys, hidden, family), windows(keys, family, number)
    wide, few = keys.whole("global_head_dim", otherwise=like.head_dim), keys.whole("num_global_key_value_heads", otherwise=0)
    same, each = keys.flag("attention_k_eq_v", otherwise=False), keys.get("per_layer_config") or {}
    sharing, width = keys.whole("num_kv_shared_layers", otherwise=0, least=0), keys.whole("intermediate_size")
    factor = 2 if keys.flag("use_double_wide_mlp", otherwise=False) else 1
    per_layer = keys.whole("hidden_size_per_layer_input", otherwise=0, least=0)
    own = {int(index): Keys(value, {}, f"{keys.where}: per_layer_config.{index}") for index, value in each.items()}
    layers = []
    for index, window in enumerate(spans):
        shared, full, mine = index >= number - sharing, window == 0, own.get(index)
        dim, kv_heads = (wide if full and not own else like.head_dim), (few or like.kv_heads if full and same else like.kv_heads)
        if mine is not None:
            dim, kv_heads = mine.whole("head_dim", otherwise=dim), mine.whole("num_key_value_heads", otherwise=kv_heads)
        mixer = replace(like, head_dim=dim, kv_heads=kv_heads, window=window, shares_kv=shared, v_is_k=same and full)
        beside = (("per_layer", 2 * hidden * per_layer),) if per_layer else ()
        feed: tuple[FeedForward, ...] = (Mlp(width=width * (factor if shared else 1), more=beside),)
        if keys.flag("enable_moe_block", otherwise=False):
            moe = Moe(
                experts=keys.whole("num_experts"),
                per_token=keys.whole("top_k_experts", "num_experts_per_tok"),
                width=keys.whole("moe_intermediate_size", "expert_intermediate_size"),
            )
            feed = (*feed, moe)
        layers.append(Layer((mixer,), feed))
    more: tuple[Matrix, ...] = ()
    if per_layer:
        rows = keys.whole("vocab_size_per_layer_input")
        more = (
            Matrix("embed_tokens_per_layer", Part.EMBEDDING, rows * number * per_layer),
            Matrix("per_layer_model_projection", Part.MLP, hidden * number * per_layer),
        )
    keys.read.update(("num_experts", "top_k_experts", "moe_intermediate_size", "vocab_size_per_layer_input"))
    return Decoder(hidden, layers, replace(outer(keys, family), more=more))
