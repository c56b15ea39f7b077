"""What each `model_type` is made of: facts about transformers' classes and about published models with code of their own, typed in.

A `Family` says how its feed-forward looks, which of its layers have experts or a window, and what is tied; `pdlab.cost.decoders` reads a
config by it. `class_defaults.json` has what the classes of transformers 5 fill in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Windows = Literal["none", "all", "qwen", "qwen-all", "pattern", "llama4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """By which keys a family says how many there are, how many a token meets, and how wide they are. `shared`: the key that counts
    shared experts of the same width; `shared_width`: the key of their width. `layers`: which layers have them. `optional`: without a count,
    or with one of 1 or 0, the model has none."""

    count: tuple[str, ...] = ("num_experts",)
    per_token: tuple[str, ...] = ("num_experts_per_tok",)
    width: tuple[str, ...] = ("moe_intermediate_size",)
    shared: tuple[str, ...] = ()
    shared_width: tuple[str, ...] = ()
    shared_count: int = 0
    layers: Literal["all", "sparse_step", "first_dense", "interleaved", "ernie", "period", "arctic", "num_dense", "skipped"] = "all"
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`pattern`: of that many layers the last attends to all; `mlp_factor`: width over hidden size where no key says it. `tied`: where no
    key says otherwise. `build` names the function that reads it, in `pdlab.cost.decoders`, `special` or `hybrids`."""

    gated: bool = True
    tied: bool = False
    experts: Experts | None = None
    windows: Windows = "none"
    pattern: int = 0
    mlp_factor: int = 0
    mlp_halved: bool = False  # the key counts gate and up together
    learned_positions: int = -1  # rows beyond the context; -1: none
    build: str = "decoder"
    unused: tuple[str, ...] = ()  # keys of its configs that look as if they decided a figure, and do not
    facts: Mapping[str, Any] = field(default_factory=dict)  # class defaults of models whose code is not in transformers


MIXTRAL = Experts(count=("num_local_experts",), width=("intermediate_size",))
GRANITE_SHARED = Experts(count=("num_local_experts",), width=("intermediate_size",), shared_width=("shared_intermediate_size",))
QWEN_MOE = Experts(count=("num_experts", "num_local_experts"), layers="sparse_step")
QWEN_SHARED = Experts(count=("num_experts", "num_local_experts"), layers="sparse_step", shared_width=("shared_expert_intermediate_size",))
DEEPSEEK = Experts(count=("n_routed_experts",), shared=("n_shared_experts",), layers="first_dense", optional=True)
DEEPSEEK_LIKE = Experts(count=("n_routed_experts", "num_local_experts"), shared=("n_shared_experts",), layers="first_dense")

UNTIED = {"tie_word_embeddings": False}  # by their classes, which are not in transformers, or leave it to the model around the text
LLAMA = Family()
MLA = Family(experts=DEEPSEEK, build="latent")
PLAIN_GELU = Family(gated=False)

FAMILIES: dict[str, Family] = {
    # Llama and those with its keys and matrices
    **dict.fromkeys(
        (
            "llama", "code_llama", "baichuan", "internlm3", "xverse", "orion", "aquila", "skywork", "solar",
            "olmo", "olmo2", "granite", "helium", "exaone", "glm", "glm4", "hunyuan_v1_dense",
            "seed_oss", "stablelm", "stablelm_epoch", "diffllama", "bitnet", "ministral3", "cwm", "iquestcoder",
            "telechat2", "hyperclovax", "granite_docling_text",
        ),
        LLAMA,
    ),
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "internlm", "internlm2", "yi"), Family(facts=UNTIED)),
    **dict.fromkeys(("mistral", "ministral", "phi3", "phi4mm", "phi4_multimodal", "phi3_v"), Family(windows="all")),
    **dict.fromkeys(
        (
            "qwen2", "qwen3", "smollm3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2_5_omni_text",
        ),
        Family(windows="qwen", facts=UNTIED),
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), Family(windows="qwen", facts={"num_key_value_heads": 8})),
    **dict.fromkeys(
        ("qwen2_audio_text", "minicpmv", "minicpmo"), Family(windows="qwen", facts=UNTIED | {"num_key_value_heads": 32})
    ),
    "mimo": Family(facts={"num_key_value_heads": 32}),
    "gemma": Family(tied=True),
    **dict.fromkeys(("gemma2", "vaultgemma"), Family(tied=True, windows="pattern", pattern=2)),
    "gemma3_text": Family(tied=True, windows="pattern", pattern=6),
    "gemma3n_text": Family(tied=True, windows="pattern", pattern=5, build="gemma3n"),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        Family(tied=True, windows="pattern", pattern=6, build="gemma4", facts={"global_head_dim": 512}),
    ),
    "cohere": Family(tied=True),
    "cohere2": Family(tied=True, windows="pattern", pattern=4),
    **dict.fromkeys(("olmo3", "exaone4", "granite_swa"), Family(windows="pattern", pattern=4)),
    "minicpm": Family(tied=True),
    "minicpm3": Family(tied=True, build="latent", facts={"v_head_dim": 64}),
    "youtu": Family(tied=True, build="latent"),
    "ernie4_5": Family(tied=True),
    "chatglm": Family(
        build="chatglm", facts={"multi_query_attention": False, "tie_word_embeddings": False}
    ),
    "qwen": Family(mlp_halved=True, facts={"tie_word_embeddings": False}),
    # Two feed-forward matrices
    **dict.fromkeys(("arcee", "apertus", "apertus1p5_text", "nemotron", "persimmon", "jais2", "nanochat", "phi", "gpt_neox"), PLAIN_GELU),
    "starcoder2": Family(gated=False, tied=True, windows="all"),
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_sw3", "openai-gpt"), Family(gated=False, tied=True, mlp_factor=4, learned_positions=0)),
    "gpt_bigcode": Family(gated=False, tied=True, mlp_factor=4, learned_positions=0, facts={"multi_query": True}),
    **dict.fromkeys(("gptj", "codegen"), Family(gated=False, mlp_factor=4)),
    "gpt_neo": Family(gated=False, tied=True, mlp_factor=4, learned_positions=0, build="gpt_neo"),
    "bloom": Family(gated=False, tied=True, mlp_factor=4),
    "opt": Family(gated=False, tied=True, learned_positions=2),
    "biogpt": Family(gated=False, tied=True, learned_positions=2),
    "xglm": Family(gated=False, tied=True),
    **dict.fromkeys(("falcon", "refinedweb", "refinedwebmodel"), Family(gated=False, tied=True, mlp_factor=4, build="falcon")),
    "mpt": Family(gated=False, tied=True, build="mpt"),
    # Experts
    **dict.fromkeys(("mixtral", "phimoe"), Family(experts=MIXTRAL, windows="all")),
    "minimax_m2": Family(experts=MIXTRAL, unused=("mlp_intermediate_size", "shared_intermediate_size")),
    "granitemoe": Family(experts=MIXTRAL),
    "granitemoeshared": Family(experts=GRANITE_SHARED),
    "granitemoe_swa": Family(experts=GRANITE_SHARED, windows="pattern", pattern=4),
    "mellum": Family(experts=Experts(count=("num_local_experts", "num_experts")), windows="pattern", pattern=4),
    "cohere2_moe": Family(
        tied=True, experts=Experts(width=("intermediate_size",), shared=("num_shared_experts",)), windows="pattern", pattern=4
    ),
    "gpt_oss": Family(
        experts=Experts(
            count=("num_local_experts", "num_experts"), per_token=("num_experts_per_tok", "experts_per_token"), width=("intermediate_size",)
        ),
        windows="pattern",
        pattern=2,
    ),
    **dict.fromkeys(("olmoe", "flex_olmo"), Family(experts=Experts(width=("intermediate_size",)))),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text"), Family(experts=QWEN_MOE, windows="qwen-all")),
    "qwen2_moe": Family(experts=QWEN_SHARED, windows="qwen"),
    "qwen3_next": Family(experts=QWEN_SHARED, build="gated_delta", pattern=4),
    "qwen3_5_text": Family(build="gated_delta", pattern=4),
    "qwen3_5_moe_text": Family(
        experts=Experts(count=("num_experts", "num_local_experts"), shared_width=("shared_expert_intermediate_size",)),
        build="gated_delta",
        pattern=4,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25", "axk1", "axk2", "mistral4"), MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "sarvam_mla"), MLA),
    "deepseek": Family(experts=DEEPSEEK, facts={"moe_layer_freq": 1, "first_k_dense_replace": 0, "tie_word_embeddings": False}),
    **dict.fromkeys(("glm4_moe", "glm4v_moe_text", "dots1", "sarvam_moe"), Family(experts=DEEPSEEK_LIKE)),
    "solar_open": Family(experts=Experts(count=("n_routed_experts",), shared=("n_shared_experts",))),
    "exaone_moe": Family(
        experts=Experts(count=("num_experts",), shared=("num_shared_experts",), layers="first_dense"), windows="pattern", pattern=4
    ),
    **dict.fromkeys(
        ("bailing_moe", "bailing_moe_v2"),
        Family(
            experts=Experts(shared=("num_shared_experts",), layers="first_dense"),
            facts={"first_k_dense_replace": 0, "num_shared_experts": 0, "tie_word_embeddings": False},
        ),
    ),
    "hy_v3": Family(experts=Experts(shared=("num_shared_experts",), layers="first_dense"), facts={"first_k_dense_replace": 1}),
    "afmoe": Family(experts=Experts(shared=("num_shared_experts",), layers="num_dense"), windows="pattern", build="gated_attention"),
    **dict.fromkeys(
        ("ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_moe_vl", "ernie4_5_vl_moe_text"),
        Family(
            tied=True,
            experts=Experts(count=("moe_num_experts",), per_token=("moe_k",), shared=("moe_num_shared_experts",), layers="ernie"),
        ),
    ),
    **dict.fromkeys(
        ("hunyuan_v1_moe", "hunyuan"),
        Family(
            experts=Experts(
                per_token=("moe_topk",),
                width=("moe_intermediate_size", "intermediate_size"),
                shared=("num_shared_expert",),
                layers="skipped",
            ),
            build="hunyuan",
            facts={"num_shared_expert": 1},
        ),
    ),
    **dict.fromkeys(
        ("llama4_text", "llama4"),
        Family(
            experts=Experts(count=("num_local_experts",), width=("intermediate_size",), shared_count=1, layers="interleaved"),
            windows="llama4",
            pattern=4,
            facts={"num_key_value_heads": 8},
        ),
    ),
    "aria_text": Family(
        experts=Experts(
            count=("moe_num_experts",), per_token=("moe_topk",), width=("intermediate_size",), shared=("moe_num_shared_experts",)
        )
    ),
    "arctic": Family(
        experts=Experts(count=("num_local_experts",), width=("intermediate_size",), layers="arctic"),
        build="arctic",
        facts={"tie_word_embeddings": False, "moe_layer_frequency": 2, "use_residual": True},
    ),
    "dbrx": Family(build="dbrx"),
    "grok-1": Family(
        tied=True, experts=Experts(width=("intermediate_size",)), facts={"num_key_value_heads": None}
    ),
    # With code of their own
    "grok-2": Family(
        experts=Experts(count=("num_local_experts",)), build="grok2", facts=UNTIED
    ),
    "step3_text": Family(build="step3"),
    **dict.fromkeys(
        ("mimo_v2_flash", "mimo_v2"),
        Family(
            experts=Experts(count=("n_routed_experts", "num_local_experts"), shared=("n_shared_experts",), layers="first_dense"),
            build="mimo_v2",
            facts={"first_k_dense_replace": 0, "n_shared_experts": 0, "tie_word_embeddings": False},
            unused=("hybrid_block_size", "attention_chunk_size"),
        ),
    ),
    **dict.fromkeys(
        ("bailing_moe_linear", "bailing_moe_linear_v2"),
        Family(experts=Experts(shared=("num_shared_experts",), layers="first_dense"), build="ring_linear", facts=UNTIED),
    ),
    # Recurrent layers beside attention
    "jamba": Family(experts=Experts(width=("intermediate_size",), layers="period", optional=True), build="jamba"),
    "bamba": Family(build="bamba"),
    "falcon_h1": Family(build="falcon_h1"),
    "granitemoehybrid": Family(
        experts=Experts(
            count=("num_local_experts",), width=("intermediate_size",), shared_width=("shared_intermediate_size",), optional=True
        ),
        build="granite_hybrid",
    ),
    "nemotron_h": Family(gated=False, build="nemotron_h"),
    **dict.fromkeys(
        ("minimax", "minimax_text_01", "minimax_m1"), Family(experts=MIXTRAL, build="lightning", facts={"num_key_value_heads": 8})
    ),
    "kimi_linear": Family(build="kimi_linear"),
    "lfm2": Family(tied=True, build="short_conv", unused=("block_dim", "conv_dim", "conv_dim_out")),
    "lfm2_moe": Family(tied=True, experts=Experts(layers="num_dense"), build="short_conv"),
    "olmo_hybrid": Family(build="gated_delta", pattern=4),
}  # fmt: skip

ENCODERS = (
    "albert", "bert", "big_bird", "camembert", "canine", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "eurobert", "flaubert", "fnet", "funnel", "ibert", "layoutlm", "longformer", "luke", "megatron-bert",
    "mobilebert", "modernbert", "mpnet", "mra", "nezha", "nomic_bert", "nystromformer", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso", "clip",
    "siglip", "siglip2", "vit", "dinov2", "wav2vec2", "hubert",
)  # fmt: skip
ENCODER_DECODERS = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "florence2", "fsmt", "led", "longt5",
    "m2m_100", "marian", "mbart", "moonshine", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "pop2piano",
    "prophetnet", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "switch_transformers", "t5", "t5gemma", "t5gemma2",
    "trocr", "udop", "umt5", "whisper", "xlm-prophetnet", "vision-encoder-decoder", "speech-encoder-decoder",
)  # fmt: skip
WITHOUT_KV = ("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm", "retnet")
REFUSED = {
    **dict.fromkeys(ENCODERS, "is an encoder, which generates nothing"),
    **dict.fromkeys(ENCODER_DECODERS, "is an encoder-decoder, whose cross-attention's KV is not modelled"),
    **dict.fromkeys(WITHOUT_KV, "keeps a state and no KV, so that there is nothing to hand off token by token"),
    **dict.fromkeys(("zamba", "zamba2"), "runs one attention layer's weights at many depths, which is not modelled"),
    **dict.fromkeys(("deci", "nemotron-nas", "openelm"), "has heads and widths of its own in each layer, which is not modelled"),
    **dict.fromkeys(("mllama", "moshi", "csm", "musicgen"), "has cross-attention or a second decoder, which is not modelled"),
    "jetmoe": "has experts in its attention, which is not modelled",
    "doge": "has a feed-forward of single-row experts, which is not modelled",
    "longcat_flash": "has two attentions in each layer and experts that do nothing, which is not modelled",
    "deepseek_v4": "compresses KV by layer, which is not modelled",
    "recurrent_gemma": "has RG-LRU layers, which are not modelled",
    "reformer": "has hashed attention, which is not modelled",
    "xlnet": "has two-stream attention, which is not modelled",
}
