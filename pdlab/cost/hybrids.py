"""Layers that keep a state of fixed size in place of KV: Mamba and Mamba-2, gated delta rules, lightning attention, short convolutions.

Sources: Mamba (2023), Mamba-2 (2024), Gated DeltaNet (2024), Kimi Linear (2025), MiniMax-01 (2025); sizes as in transformers' code.
"""

from __future__ import annotations

from dataclasses import replace

from pdlab.cost.config_keys import HEADS, HIDDEN, KV_HEADS, LAYERS, Keys
from pdlab.cost.decoders import Decoder, attention, feed_forwards, latent_attention, outer
from pdlab.cost.families import Experts, Family
from pdlab.cost.layers import FeedForward, Layer, Mixer, Mlp, Moe, Recurrent, Softmax
from pdlab.cost.patterns import FULL, with_experts

LINEAR = ("linear_attention", "mamba", "recurrent", "conv", "short_conv", "hybrid")


def kinds_of(keys: Keys, layers: int, every: int, *, name: str = "layer_types") -> list[bool]:
    """Which layers attend: as listed, or the last of every `every`."""
    listed = keys.kinds(name, layers)
    if listed is None:
        return [(i + 1) % every == 0 for i in range(layers)]
    for index, kind in enumerate(listed):
        if kind not in FULL and kind not in LINEAR:
            raise keys.wrong(f": {name}[{index}] is {kind!r}, which this model_type is not known to have")
    return [kind in FULL for kind in listed]


def mixed(keys: Keys, family: Family, attend: list[bool], softmax: Mixer, other: Mixer, beside: list[FeedForward] | None = None) -> Decoder:
    """A decoder whose layers have one mixer or the other."""
    hidden = keys.whole(*HIDDEN)
    ffns = feed_forwards(keys, family, len(attend), hidden) if beside is None else beside
    layers = [Layer((softmax if a else other,), (f,)) for a, f in zip(attend, ffns, strict=True)]
    return Decoder(hidden, layers, outer(keys, family))


def mamba2(hidden: int, *, inner: int, heads: int, groups: int, state: int, width: int, module: str = "mamba") -> Recurrent:
    """One projection in (gate, x, B, C, dt), a convolution over x, B and C, one out; a state of inner x state."""
    mixed_dim = inner + 2 * groups * state
    return Recurrent(
        kind="Mamba-2",
        module=module,
        sizes=(("in_proj", hidden * (inner + mixed_dim + heads)), ("conv1d", mixed_dim * width), ("out_proj", inner * hidden)),
        state_values=inner * state,
        conv_values=mixed_dim * (width - 1),
        token_flops=6 * inner * state,
    )


def mamba(hidden: int, *, inner: int, state: int, width: int, rank: int) -> Recurrent:
    return Recurrent(
        kind="Mamba",
        module="mamba",
        sizes=(
            ("in_proj", hidden * 2 * inner),
            ("conv1d", inner * width),
            ("x_proj", inner * (rank + 2 * state)),
            ("dt_proj", rank * inner),
            ("A_log", inner * state),
            ("out_proj", inner * hidden),
        ),
        state_values=inner * state,
        conv_values=inner * (width - 1),
        token_flops=6 * inner * state,
    )


def gated_delta(keys: Keys, family: Family) -> Decoder:
    """Qwen3-Next, Qwen3.5 and OLMo Hybrid: gated delta rule in most layers, attention with a gate in the others."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    k_heads, v_heads = keys.whole("linear_num_key_heads"), keys.whole("linear_num_value_heads")
    k_dim, v_dim = keys.whole("linear_key_head_dim"), keys.whole("linear_value_head_dim")
    width, every = keys.whole("linear_conv_kernel_dim"), keys.whole("full_attention_interval", otherwise=family.pattern)
    key, value = k_heads * k_dim, v_heads * v_dim
    delta = Recurrent(
        kind="gated delta rule",
        module="linear_attn",
        sizes=(
            ("in_proj_qkvz", hidden * (2 * key + 2 * value)),
            ("in_proj_ba", hidden * 2 * v_heads),
            ("conv1d", (2 * key + value) * width),
            ("out_proj", value * hidden),
        ),
        state_values=v_heads * k_dim * v_dim,
        conv_values=(2 * key + value) * (width - 1),
        token_flops=8 * v_heads * k_dim * v_dim,
    )
    gated = "linear_a_log_min" not in keys.config and "olmo" not in str(keys.config.get("model_type"))
    softmax = replace(attention(keys, hidden, family), gated=gated)
    return mixed(keys, family, kinds_of(keys, layers, every), softmax, delta)


def jamba(keys: Keys, family: Family) -> Decoder:
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    every, after = keys.whole("attn_layer_period"), keys.whole("attn_layer_offset", least=0)
    rank = keys.get("mamba_dt_rank")
    recurrent = mamba(
        hidden,
        inner=keys.whole("mamba_expand") * hidden,
        state=keys.whole("mamba_d_state"),
        width=keys.whole("mamba_d_conv"),
        rank=-(-hidden // 16) if rank in (None, "auto") else keys.check(("mamba_dt_rank",), rank),
    )
    keys.read.update(("layer_types", "layers_block_type"))
    return mixed(keys, family, [i % every == after for i in range(layers)], attention(keys, hidden, family), recurrent)


def _mamba2_by_keys(keys: Keys, hidden: int) -> Recurrent:
    heads, dim = keys.whole("mamba_n_heads"), keys.get("mamba_d_head")
    expand = keys.whole("mamba_expand", otherwise=2)
    own = keys.whole("mamba_d_ssm", otherwise=0)
    inner = own or (expand * hidden if dim in (None, "auto") else heads * keys.check(("mamba_d_head",), dim))
    return mamba2(
        hidden,
        inner=inner,
        heads=heads,
        groups=keys.whole("mamba_n_groups"),
        state=keys.whole("mamba_d_state"),
        width=keys.whole("mamba_d_conv"),
    )


def bamba(keys: Keys, family: Family) -> Decoder:
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    listed = keys.get("attn_layer_indices")
    kinds = keys.kinds("layer_types", layers) or keys.kinds("layers_block_type", layers)
    attend = [i in (listed or ()) for i in range(layers)]
    if listed is None and kinds is None:
        raise keys.lacks("attn_layer_indices")
    if kinds is not None:
        attend = kinds_of(keys, layers, 1, name="layer_types" if keys.get("layer_types") else "layers_block_type")
    return mixed(keys, family, attend, attention(keys, hidden, family), _mamba2_by_keys(keys, hidden))


def falcon_h1(keys: Keys, family: Family) -> Decoder:
    """Attention and Mamba-2 beside one another in each layer."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    both = (attention(keys, hidden, family), _mamba2_by_keys(keys, hidden))
    keys.read.update(("layer_types", "attn_layer_indices"))
    return Decoder(hidden, [Layer(both, (f,)) for f in feed_forwards(keys, family, layers, hidden)], outer(keys, family))


def granite_hybrid(keys: Keys, family: Family) -> Decoder:
    """Without experts the shared width is all the feed-forward there is."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    if keys.get("layer_types", "layers_block_type") is None:
        raise keys.lacks("layer_types")
    attend = kinds_of(keys, layers, 1, name="layer_types" if keys.get("layer_types") else "layers_block_type")
    assert family.experts is not None
    beside: list[FeedForward] | None = None
    if not any(with_experts(keys, family.experts, layers)):
        beside = [Mlp(width=keys.whole("shared_intermediate_size"), module="shared_mlp")] * layers
        keys.read.update(("intermediate_size", "num_experts_per_tok"))
    softmax = attention(keys, hidden, family)
    return mixed(keys, family, attend, softmax, softmax if all(attend) else _mamba2_by_keys(keys, hidden), beside)


NEMOTRON = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def nemotron_h(keys: Keys, family: Family) -> Decoder:
    """Each layer is one thing: Mamba-2, attention, a feed-forward or experts, as its pattern says."""
    hidden = keys.whole(*HIDDEN)
    pattern, stated = keys.get("hybrid_override_pattern"), keys.get(*LAYERS)
    kinds = keys.get("layers_block_type", "layer_types")
    if isinstance(pattern, str):
        unknown = sorted(set(pattern) - set(NEMOTRON))
        if unknown:
            raise keys.wrong(f": hybrid_override_pattern has an unknown {unknown[0]!r}: {', '.join(NEMOTRON)} are known")
        kinds = [NEMOTRON[one] for one in pattern]
    if not isinstance(kinds, list):
        raise keys.lacks("hybrid_override_pattern")
    if stated is not None and keys.check(LAYERS, stated) != len(kinds):
        raise keys.wrong(f": hybrid_override_pattern has {len(kinds)} layers, num_hidden_layers says {stated}")
    softmax = attention(keys, hidden, family)
    made: dict[str, Layer] = {"full_attention": Layer((softmax,), ())}
    if "linear_attention" in kinds or "mamba" in kinds:
        heads = keys.whole("mamba_num_heads")
        recurrent = mamba2(
            hidden,
            inner=heads * keys.whole("mamba_head_dim"),
            heads=heads,
            groups=keys.whole("n_groups", "mamba_n_groups"),
            state=keys.whole("ssm_state_size"),
            width=keys.whole("conv_kernel"),
            module="mixer",
        )
        made["linear_attention"] = made["mamba"] = Layer((recurrent,), ())
        keys.get("expand")
    if "mlp" in kinds:
        made["mlp"] = Layer((), (Mlp(width=keys.whole("intermediate_size"), gated=False),))
    if "moe" in kinds:
        made["moe"] = Layer((), (_nemotron_experts(keys),))
    else:
        keys.read.update(("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "moe_latent_size"))
        keys.read.add("moe_shared_expert_intermediate_size")
    for index, kind in enumerate(kinds):
        if kind not in made:
            raise keys.wrong(f": layer {index} is {kind!r}, which this model_type is not known to have")
    keys.read.update(("layer_types", "intermediate_size"))
    return Decoder(hidden, [made[kind] for kind in kinds], outer(keys, family))


def _nemotron_experts(keys: Keys) -> Moe:
    return Moe(
        experts=keys.whole("n_routed_experts"),
        per_token=keys.whole("num_experts_per_tok"),
        width=keys.whole("moe_intermediate_size"),
        shared=keys.whole("moe_shared_expert_intermediate_size") * min(1, keys.whole("n_shared_experts", otherwise=1, least=0)),
        gated=False,
        latent=keys.whole("moe_latent_size", otherwise=0, least=0),
    )


def lightning_attention(hidden: int, softmax: Softmax, module: str, names: tuple[str, str, str]) -> Recurrent:
    """Linear attention as wide as the `softmax` of the other layers; `names` are of the projections in, of the gate, and out."""
    inner, state = softmax.heads * softmax.head_dim, softmax.heads * softmax.head_dim**2
    sizes = (hidden * 3 * inner, hidden * inner, inner * hidden)
    return Recurrent(
        kind="lightning attention",
        module=module,
        sizes=tuple(zip(names, sizes, strict=True)),
        state_values=state,
        conv_values=0,
        token_flops=4 * state,
    )


def lightning(keys: Keys, family: Family) -> Decoder:
    """MiniMax-01: linear attention without KV in most layers, softmax in the others."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    softmax = attention(keys, hidden, family)
    linear = lightning_attention(hidden, softmax, "self_attn", ("qkv_proj", "output_gate", "out_proj"))
    numbers = keys.get("attn_type_list")
    shared = keys.get("shared_intermediate_size")
    if shared not in (None, 0):
        raise keys.wrong(f": shared_intermediate_size {shared} is not supported: only 0 is")
    if numbers is not None:
        attend = [bool(kind) for kind in keys.each(layers, "attn_type_list", least=0)]
    elif keys.get("layer_types") is not None:
        attend = kinds_of(keys, layers, 1)
    else:
        raise keys.lacks("layer_types")
    return mixed(keys, family, attend, softmax, linear)


def kimi_linear(keys: Keys, family: Family) -> Decoder:
    """Kimi Delta Attention in three of four layers, MLA in the others."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    inner = keys.part("linear_attn_config")
    if inner.config:
        heads, dim, width = inner.whole("num_heads"), inner.whole("head_dim"), inner.whole("short_conv_kernel_size")
        full = inner.get("full_attn_layers")
        if not isinstance(full, list):
            raise inner.lacks("full_attn_layers")
        attend = [i + 1 in full for i in range(layers)]  # counted from 1
    else:
        heads, dim, width = keys.whole("linear_num_heads"), keys.whole("linear_head_dim"), keys.whole("linear_conv_kernel_dim")
        attend = kinds_of(keys, layers, 4)
    qkv = heads * dim
    delta = Recurrent(
        kind="Kimi delta attention",
        module="self_attn",
        sizes=(
            ("q_proj", hidden * qkv),
            ("k_proj", hidden * qkv),
            ("v_proj", hidden * qkv),
            ("conv1d", 3 * qkv * width),
            ("f_proj", hidden * dim + dim * qkv),
            ("g_proj", hidden * dim + dim * qkv),
            ("b_proj", hidden * heads),
            ("o_proj", qkv * hidden),
        ),
        state_values=heads * dim**2,
        conv_values=3 * qkv * (width - 1),
        token_flops=8 * heads * dim**2,
    )
    keys.read.update((*KV_HEADS, *HEADS))
    experts = Experts(per_token=("num_experts_per_token", "num_experts_per_tok"), shared=("num_shared_experts",), layers="first_dense")
    return mixed(keys, replace(family, experts=experts), attend, latent_attention(keys), delta)


def short_conv(keys: Keys, family: Family) -> Decoder:
    """LFM2: gated convolutions over three tokens, and attention in some layers. Its feed-forward's width is adjusted."""
    layers, hidden = keys.whole(*LAYERS), keys.whole(*HIDDEN)
    full = keys.get("full_attn_idxs")
    width = keys.whole("conv_L_cache")
    if full is None and keys.get("layer_types") is None:
        raise keys.lacks("layer_types")
    attend = kinds_of(keys, layers, 1) if keys.get("layer_types") is not None else [i in full for i in range(layers)]
    conv = Recurrent(
        kind="short convolution",
        module="conv",
        sizes=(("in_proj", hidden * 3 * hidden), ("conv", hidden * width), ("out_proj", hidden * hidden)),
        state_values=0,
        conv_values=hidden * (width - 1),
        token_flops=2 * hidden * width,
    )
    beside: list[FeedForward] | None = None
    if family.experts is None:
        wide = keys.whole("block_ff_dim", "intermediate_size")
        multiplier, multiple = keys.get("block_ffn_dim_multiplier"), keys.get("block_multiple_of")
        if keys.flag("block_auto_adjust_ff_dim", otherwise=True):
            wide = int(2 * wide / 3)
            if multiplier is not None:
                each = keys.check(("block_multiple_of",), multiple)
                wide = each * -(-int(multiplier * wide) // each)
        beside = [Mlp(width=wide, module="feed_forward")] * layers
    return mixed(keys, family, attend, attention(keys, hidden, family), conv, beside)
