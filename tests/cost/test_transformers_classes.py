"""Parameters counted from a config against those of transformers' own model of it, on the meta device: nothing is allocated."""

import json

import pytest

from pdlab.cost.huggingface import class_defaults, parse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

H = {"hidden_size": 512, "vocab_size": 3000, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1408}
KV = H | {"num_key_value_heads": 2}
DIM = KV | {"head_dim": 96}
MOE = DIM | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 160}
ROUTED = DIM | {
    "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 160, "n_shared_experts": 2, "n_group": 1, "topk_group": 1
}  # fmt: skip
MIXTRAL = KV | {"num_local_experts": 8, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 96, "q_lora_rank": 160, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 40}
DEEPSEEK = H | MLA | {k: ROUTED[k] for k in ROUTED if "expert" in k or "group" in k or "moe" in k}
GPT = {"vocab_size": 3000, "n_embd": 512, "n_layer": 5, "n_head": 8, "n_positions": 700}
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_n_groups": 2, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_expand": 2}
DELTA = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 48, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip

CASES = {
    "llama": KV | {"tie_word_embeddings": True},
    "llama-heads": ("llama", H),
    "mistral": DIM,
    "ministral3": DIM,
    "qwen2": KV,
    "qwen3": DIM | {"tie_word_embeddings": True},
    "phi3": KV | {"pad_token_id": 0},
    "phi": H,
    "gemma": DIM,
    "gemma2": DIM,
    "gemma3_text": DIM,
    "gemma3n_text": DIM | {
        "num_hidden_layers": 10, "intermediate_size": [1024] * 10, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 2000, "laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 10,
    },
    "gemma4_text": DIM | {
        "num_hidden_layers": 12, "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 2000
    },
    "cohere": KV,
    "cohere2": DIM,
    "olmo": KV,
    "olmo2": KV,
    "olmo3": KV,
    "granite": KV,
    "glm": DIM | {"pad_token_id": 0},
    "glm4": DIM | {"pad_token_id": 0},
    "exaone": KV,
    "exaone4": DIM,
    "helium": KV | {"head_dim": 64},
    "smollm3": KV | {"pad_token_id": 0},
    "seed_oss": DIM,
    "ernie4_5": DIM,
    "hunyuan_v1_dense": DIM,
    "internlm3": DIM,
    "stablelm": KV,
    "apertus": KV,
    "arcee": KV,
    "nemotron": DIM,
    "persimmon": H,
    "starcoder2": KV,
    "gpt2": GPT,
    "gpt2-inner": ("gpt2", GPT | {"n_inner": 1000, "tie_word_embeddings": False}),
    "gpt_bigcode": GPT,
    "gpt_bigcode-many": ("gpt_bigcode", GPT | {"multi_query": False}),
    "gptj": GPT,
    "codegen": GPT,
    "gpt_neo": {"vocab_size": 3000, "hidden_size": 512, "num_layers": 4, "num_heads": 8, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": H,
    "bloom": {"vocab_size": 3000, "hidden_size": 512, "n_layer": 5, "n_head": 8},
    "opt": {k: H[k] for k in H if k != "intermediate_size"} | {"ffn_dim": 2000, "word_embed_proj_dim": 512},
    "opt-projected": ("opt", {k: H[k] for k in H if k != "intermediate_size"} | {"ffn_dim": 2000, "word_embed_proj_dim": 256}),
    "biogpt": H,
    "xglm": {"vocab_size": 3000, "d_model": 512, "ffn_dim": 1500, "num_layers": 5, "attention_heads": 8},
    "falcon": {"vocab_size": 3000, "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8},
    "falcon-new": (
        "falcon",
        {"vocab_size": 3000, "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "num_kv_heads": 2,
         "new_decoder_architecture": True},
    ),
    "falcon-many": (
        "falcon", {"vocab_size": 3000, "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "multi_query": False}
    ),
    "mpt": {"vocab_size": 3000, "d_model": 512, "n_layers": 5, "n_heads": 8, "expansion_ratio": 4},
    "mixtral": MIXTRAL | {"head_dim": 64},
    "phimoe": MIXTRAL,
    "minimax_m2": MIXTRAL | {"head_dim": 96},
    "granitemoe": MIXTRAL,
    "granitemoeshared": MIXTRAL | {"shared_intermediate_size": 300},
    "gpt_oss": MIXTRAL | {"head_dim": 96},
    "olmoe": KV | {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 300},
    "qwen2_moe": MOE | {"head_dim": 64, "shared_expert_intermediate_size": 400, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen3_moe": MOE | {"decoder_sparse_step": 3, "mlp_only_layers": [1]},
    "qwen3_next": MOE | DELTA | {"shared_expert_intermediate_size": 200, "num_hidden_layers": 8},
    "qwen3_5_text": DIM | DELTA | {"num_hidden_layers": 8},
    "qwen3_5_moe_text": MOE | DELTA | {"shared_expert_intermediate_size": 200},
    "olmo_hybrid": KV | DELTA | {"linear_num_key_heads": 8, "num_hidden_layers": 8, "pad_token_id": 0},
    "deepseek_v2": DEEPSEEK | {"first_k_dense_replace": 1, "q_lora_rank": None},
    "deepseek_v3": DEEPSEEK | {"first_k_dense_replace": 2},
    "deepseek_v32": DEEPSEEK | {"first_k_dense_replace": 1, "index_topk": 64, "index_head_dim": 32, "index_n_heads": 4},
    "glm4_moe_lite": DEEPSEEK,
    "minicpm3": H | MLA,
    "youtu": H | MLA,
    "glm4_moe": ROUTED | {"first_k_dense_replace": 1},
    "solar_open": ROUTED,
    "afmoe": MOE | {"num_shared_experts": 1, "num_dense_layers": 2},
    "exaone_moe": MOE | {"num_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": DIM | {"num_experts": 8, "moe_topk": 2},
    "ernie4_5_moe": DIM | {
        "moe_num_experts": 16, "moe_k": 4, "moe_intermediate_size": 160, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_layer_end_index": -1, "moe_layer_interval": 1,
    },
    "llama4_text": MIXTRAL | {"head_dim": 96, "intermediate_size_mlp": 900, "interleave_moe_layer_step": 2},
    "aria_text": KV | {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2},
    "jamba": KV | {
        "num_hidden_layers": 16, "num_experts": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 32
    },
    "bamba": KV | MAMBA | {"attn_layer_indices": [2, 5]},
    "falcon_h1": DIM | MAMBA | {"mamba_d_ssm": 1024},
    "granitemoehybrid": MIXTRAL | MAMBA | {
        "shared_intermediate_size": 300, "layer_types": ["mamba", "mamba", "attention", "mamba", "mamba", "attention"]
    },
    "granitemoehybrid-dense": ("granitemoehybrid", KV | MAMBA | {
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 1000, "layer_types": ["mamba", "attention"] * 3
    }),
    "nemotron_h": DIM | {
        "hybrid_override_pattern": "M-M*-ME", "num_hidden_layers": 7, "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 2,
        "ssm_state_size": 32, "n_routed_experts": 8, "moe_intermediate_size": 300, "moe_shared_expert_intermediate_size": 400,
    },
    "minimax": MIXTRAL | {"head_dim": 96, "layer_types": ["linear_attention", "full_attention"] * 3},
    "kimi_linear": H | MLA | {
        "moe_intermediate_size": 160, "num_experts": 16, "num_experts_per_token": 4, "num_shared_experts": 1, "q_lora_rank": None,
        "pad_token_id": 0,
    },
    "dots1": ROUTED | {"first_k_dense_replace": 1},
    "sarvam_moe": ROUTED | {"first_k_dense_replace": 1},
    "sarvam_mla": DEEPSEEK | {"first_k_dense_replace": 1, "q_lora_rank": None},
    "glm_moe_dsa": DEEPSEEK | {"index_topk": 64, "index_head_dim": 32, "index_n_heads": 4},
    "axk1": DEEPSEEK,
    "hy_v3": MOE | {"num_shared_experts": 1},
    "flex_olmo": KV | {"num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0},
    "mellum": MOE | {"num_local_experts": 16},
    "cohere2_moe": DIM | {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1},
    "granitemoe_swa": MIXTRAL | {"shared_intermediate_size": 300},
    "vaultgemma": DIM,
    "bitnet": KV,
    "cwm": DIM,
    "jais2": KV,
    "nanochat": KV,
    "lfm2_moe": MOE | {"layer_types": ["conv", "full_attention"] * 3, "num_dense_layers": 2},
    "lfm2": KV | {"layer_types": ["conv", "conv", "full_attention"] * 2, "block_multiple_of": 64},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_transformers_own_model(name):
    case = CASES[name]
    kind, values = case if isinstance(case, tuple) else (name, case)
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        own = transformers.AutoModelForCausalLM.from_config(config)
    written = json.loads(json.dumps(config.to_dict(), default=str))
    counted = parse(written, name).model.total_params
    assert counted == pytest.approx(sum(p.numel() for p in own.parameters()), rel=0.01)


def test_class_defaults_are_those_of_transformers():
    """The table that fills in what a text_config leaves out, against the classes that are installed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    compared = 0
    for kind, defaults in class_defaults().items():
        fields = getattr(CONFIG_MAPPING[kind], "__dataclass_fields__", {}) if kind in CONFIG_MAPPING else {}
        for key, value in defaults.items():
            if key in fields:
                assert fields[key].default == value, f"{kind}.{key}"
                compared += 1
    assert compared > 1000 or transformers.__version__.startswith("4.")
