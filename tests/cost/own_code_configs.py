"""Configs, recalled, of published models whose code is not in transformers; totals in billions, KV in KiB a token, active in billions with
embeddings and head: Ring-linear's report counts 0.957 and 6.1 without."""

GROK_2 = {
    "architectures": ["Grok1ForCausalLM"], "attn_logit_softcapping": 30.0, "attn_temperature_len": 1024, "embedding_multiplier_scale":
    90.50966799187809, "final_logit_softcapping": 50, "global_attn_every_n": 1, "head_dim": 128, "hidden_size": 8192,
    "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "git", "moe_intermediate_size": 16384,
    "num_attention_heads": 64, "num_experts_per_tok": 2, "num_hidden_layers": 64, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_multiplier_scale": 0.5, "residual_moe": True, "rms_norm_eps": 1e-05, "rope_theta": 208533496, "rope_type": "original",
    "router_logit_softcapping": 30.0, "sliding_window_size": -1, "torch_dtype": "bfloat16", "vocab_size": 131072,
}  # fmt: skip
STEP_3 = {
    "architectures": ["Step3VLForConditionalGeneration"], "model_type": "step3_vl", "im_end_token": "<im_end>", "image_token_len": 169,
    "understand_projector_stride": 2, "projector_bias": False, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1792},
    "hidden_size": 7168, "max_position_embeddings": 65536, "text_config": {
        "architectures": ["Step3TextForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "max_seq_len": 65536, "vocab_size": 128815, "torch_dtype": "bfloat16", "norm_expert_weight": False, "num_attention_heads": 64,
        "num_attention_groups": 1, "head_dim": 256, "share_expert_dim": 5120, "share_q_dim": 2048, "moe_num_experts": 48, "moe_top_k": 3,
        "moe_intermediate_size": 5120, "moe_layers_enum": ",".join(map(str, range(4, 60))), "rms_norm_eps": 1e-05, "rope_theta": 500000,
        "model_type": "step3_text", "use_moe": True,
    },
}  # fmt: skip
MIMO_V2_FLASH = {
    "architectures": ["MiMoV2FlashForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attention_value_scale": 0.707,
    "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": True, "attention_chunk_size": 128, "head_dim": 192,
    "hidden_act": "silu", "hidden_size": 4096, "hybrid_block_size": None, "hybrid_layer_pattern":
    [0 if i == 0 or i % 6 == 5 else 1 for i in range(48)], "initializer_range": 0.02, "intermediate_size": 16384, "layernorm_epsilon":
    1e-05, "max_position_embeddings": 262144, "model_type": "mimo_v2_flash", "moe_intermediate_size": 2048, "moe_layer_freq":
    [0] + [1] * 47, "n_group": 1, "n_routed_experts": 256, "n_shared_experts": None, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "partial_rotary_factor": 0.334, "rope_theta": 5000000,
    "routed_scaling_factor": None, "scoring_func": "sigmoid", "sliding_window": 128, "sliding_window_size": 128, "swa_head_dim": 192,
    "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_rope_theta": 10000, "swa_v_head_dim": 128,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 152576, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method":
    "fp8", "weight_block_size": [128, 128], "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(48)]},
}  # fmt: skip
RING_MINI_LINEAR = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"], "attention_dropout": 0.0, "auto_map": {}, "embedding_dropout": 0.0,
    "eos_token_id": 156892, "first_k_dense_replace": 1, "group_norm_size": 4, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5120, "layer_group_size": 5, "linear_silu": False, "max_position_embeddings": 131072, "model_type":
    "bailing_moe_linear", "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size":
    512, "n_group": 8, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
    "num_hidden_layers": 20, "num_key_value_heads": 4, "num_nextn_predict_layers": 0, "num_shared_experts": 1, "output_dropout": 0.0,
    "pad_token_id": 156892, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000,
    "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_qk_norm": True, "use_qkv_bias": False, "use_rmsnorm": True,
    "vocab_size": 157184,
}  # fmt: skip
RING_FLASH_LINEAR = RING_MINI_LINEAR | {
    "hidden_size": 4096, "intermediate_size": 9216, "layer_group_size": 8, "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024, "num_attention_heads": 32, "num_hidden_layers": 32, "group_norm_size": 8,
}  # fmt: skip

OWN_CODE = {
    "grok-2": (GROK_2, 270, 256, 115),
    "step-3": (STEP_3, 316, 61, 38),
    "mimo-v2-flash": (MIMO_V2_FLASH, 309, (9 * 4 + 39 * 8) * 320 * 2 / 1024, 15),
    "ring-mini-linear": (RING_MINI_LINEAR, 16.4, 8, 1.6),
    "ring-flash-linear": (RING_FLASH_LINEAR, 104, 8, 7.44),
}
