"""Configs of further published models, recalled, and the totals of their cards."""

LLAMA4_MAVERICK = {
    "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index":
    200092, "model_type": "llama4", "text_config": {"_attn_implementation_autoset": True, "attention_bias": False,
    "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": True, "bos_token_id":
    200000, "cache_implementation": "hybrid", "eos_token_id": [200001, 200007, 200008], "floor_scale": 8192, "for_llm_compressor":
    False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "interleave_moe_layer_step": 2,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 1048576, "model_type": "llama4_text",
    "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
    "num_local_experts": 128, "output_router_logits": False, "pad_token_id": 200018, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "torch_dtype": "bfloat16", "use_cache": True,
    "use_qk_norm": False, "vocab_size": 202048}, "torch_dtype": "bfloat16", "transformers_version": "4.51.0.dev0", "vision_config":
    {"hidden_size": 1408},
}  # fmt: skip
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1,
    106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config":
    {"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text", "num_attention_heads": 32,
    "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type":
    "linear"}, "sliding_window": 1024}, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
}  # fmt: skip
GEMMA3_270M = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention"], "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers":
    18, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq":
    10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
    "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation":
    "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation":
    "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
    "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps":
    1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA_7B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "gelu", "hidden_activation":
    None, "hidden_size": 3072, "intermediate_size": 24576, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
PHI3_MINI_4K = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "auto_map": {}, "embd_pdrop": 0.0, "hidden_act": "silu",
    "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads":
    32, "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
PHI4_14B = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 17920, "max_position_embeddings": 16384, "model_type": "phi3", "num_attention_heads": 40,
    "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "pad_token_id": 100349,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 250000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
PHI3_5_MOE = {
    "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "auto_map": {}, "hidden_act": "silu",
    "hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02, "input_jitter_noise": 0.01, "intermediate_size": 6400,
    "lm_head_bias": True, "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
    "original_max_position_embeddings": 4096, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": {},
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
PHI_2 = {
    "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new", "hidden_size": 2560,
    "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm":
    False, "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16",
    "use_cache": True, "vocab_size": 51200,
}  # fmt: skip
QWEN2_5_VL_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
    "image_token_id": 151655, "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000,
    "max_window_layers": 28, "model_type": "qwen2_5_vl", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads":
    4, "rms_norm_eps": 1e-06, "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"}, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window":
    False, "video_token_id": 151656, "vision_config": {"depth": 32, "hidden_size": 1280}, "vision_end_token_id": 1,
    "vision_start_token_id": 2, "vision_token_id": 3, "vocab_size": 152064,
}  # fmt: skip
QWEN3_VL_235B = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl_moe", "text_config":
    {"attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1, "dtype": "bfloat16", "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 1536,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
    "rope_type": "default"}, "rope_theta": 5000000.0, "use_cache": True, "vocab_size": 151936}, "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0", "video_token_id": 1, "vision_config": {"deepstack_visual_indexes": [8, 16, 24], "depth":
    27, "hidden_size": 1152}, "vision_end_token_id": 1, "vision_start_token_id": 2,
}  # fmt: skip
QWEN3_VL_8B = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": {"attention_bias": False,
    "attention_dropout": 0.0, "dtype": "bfloat16", "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size":
    12288, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": {}, "rope_theta": 5000000.0, "use_cache": True, "vocab_size":
    151936}, "tie_word_embeddings": False, "vision_config": {},
}  # fmt: skip
QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False, "partial_rotary_factor": 0.25, "rms_norm_eps":
    1e-06, "rope_scaling": None, "rope_theta": 10000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_OMNI_30B = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "assistant_token_id": 77091, "code2wav_config": {"hidden_size":
    1024}, "dtype": "bfloat16", "enable_audio_output": True, "im_end_token_id": 1, "model_type": "qwen3_omni_moe",
    "system_token_id": 8948, "talker_config": {"text_config": {"hidden_size": 1024}}, "thinker_config": {"audio_config": {"d_model":
    1280}, "audio_end_token_id": 1, "dtype": "bfloat16", "model_type": "qwen3_omni_moe_thinker", "text_config": {"attention_bias":
    False, "attention_dropout": 0.0, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 768, "max_position_embeddings": 65536, "mlp_only_layers": [], "model_type": "qwen3_omni_moe_text",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": {}, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 0, "sliding_window": None, "tie_word_embeddings": False,
    "use_cache": True, "use_qk_norm": True, "use_sliding_window": False, "vocab_size": 152064, "output_router_logits": False,
    "initializer_range": 0.02}, "vision_config": {}}, "tts_bos_token_id": 1, "user_token_id": 872,
}  # fmt: skip
QWEN1_5_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type":
    "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps":
    1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {}, "aux_loss_alpha":
    0.001, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads":
    128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "factor": 40, "mscale": 1.0, "type": "yarn"}, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
DEEPSEEK_V3_2 = {
    "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {},
    "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type":
    "deepseek_v32", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts":
    1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads":
    128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "factor": 40, "mscale": 1.0, "type":
    "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings":
    False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
}  # fmt: skip
DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {}, "aux_loss_alpha":
    0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads":
    128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": None, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "factor": 40, "mscale": 1.0, "type":
    "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings":
    False, "topk_group": 3, "topk_method": "group_limited_greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_MOE_16B = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "auto_map": {}, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "max_position_embeddings":
    4096, "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts":
    2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads":
    16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux":
    True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 102400,
}  # fmt: skip
JANUS_PRO = {
    "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "n_embed": 4096}}, "architectures": ["MultiModalityCausalLM"],
    "gen_aligner_config": {}, "gen_head_config": {}, "gen_vision_config": {}, "language_config": {"max_position_embeddings": 16384,
    "model_type": "llama", "num_hidden_layers": 30, "torch_dtype": "bfloat16", "vocab_size": 102400}, "model_type":
    "multi_modality", "torch_dtype": "bfloat16", "vision_config": {},
}  # fmt: skip
DEEPSEEK_VL2 = {
    "architectures": ["DeepseekVLV2ForCausalLM"], "candidate_resolutions": [[384, 384]], "global_view_pos": "head",
    "language_config": {"architectures": ["DeepseekV2ForCausalLM"], "auto_map": {}, "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 1, "hidden_size": 2560, "intermediate_size": 12288, "kv_lora_rank": 512, "lm_head": True,
    "max_position_embeddings": 4096, "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 72, "n_shared_experts": 2,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 30, "num_key_value_heads": 32,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rm_head": False, "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid", "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_mla": True, "v_head_dim":
    128, "vocab_size": 129280}, "model_type": "deepseek_vl_v2", "projector_config": {}, "tile_tag": "2D", "torch_dtype": "bfloat16",
    "vision_config": {},
}  # fmt: skip
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {}, "aux_loss_alpha":
    0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "factor": 40, "mscale": 1.0, "type": "yarn"}, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
KIMI_K2_THINKING = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {}, "aux_loss_alpha":
    0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"config_groups": {"group_0": {"input_activations": None, "output_activations": None, "targets":
    ["Linear"], "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}}}, "format":
    "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
    "quantization_status": "compressed"}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "factor": 40, "mscale": 1.0,
    "type": "yarn"}, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
GLM_4_5 = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329,
    "eos_token_id": [151329], "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "partial_rotary_factor": 0.5,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 131072, "model_type": "glm4_moe",
    "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 160, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8, "first_k_dense_replace":
    3, "num_hidden_layers": 92, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0",
    "use_cache": True, "use_qk_norm": True, "vocab_size": 151552,
}  # fmt: skip
GLM_4_6_FP8 = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329,
    "eos_token_id": [151329], "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "partial_rotary_factor": 0.5,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 202752, "model_type": "glm4_moe",
    "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 160, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8, "first_k_dense_replace":
    3, "num_hidden_layers": 92, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0",
    "use_cache": True, "use_qk_norm": True, "vocab_size": 151552, "quantization_config": {"config_groups": {"group_0": {"format":
    "float-quantized", "input_activations": {"actorder": None, "block_structure": None, "dynamic": True, "group_size": None,
    "num_bits": 8, "observer": None, "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "float"},
    "output_activations": None, "targets": ["Linear"], "weights": {"actorder": None, "block_structure": None, "dynamic": False,
    "group_size": None, "num_bits": 8, "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
    "type": "float"}}}, "format": "float-quantized", "global_compression_ratio": None, "ignore": ["lm_head",
    "model.layers.0.mlp.gate", "re:.*mlp\\.gate$", "re:.*embed_tokens.*"], "kv_cache_scheme": None, "quant_method":
    "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.11.1"},
}  # fmt: skip
GLM_5 = {
    "architectures": ["GlmMoeDsaForCausalLM"], "attention_bias": False, "dtype": "bfloat16", "first_k_dense_replace": 3,
    "hidden_act": "silu", "head_dim": 64, "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048,
    "indexer_rope_interleave": True, "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 202752,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "model_type": "glm_moe_dsa", "n_group": 1, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 78,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 1, "q_lora_rank": 2048, "qk_head_dim": 256, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_interleave": True, "rope_parameters": {"rope_theta": 1000000.0,
    "rope_type": "default"}, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
MINIMAX_M1 = {
    "architectures": ["MiniMaxM1ForCausalLM"], "attention_dropout": 0.0, "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0,
    0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
    0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], "auto_map": {}, "bos_token_id": None, "eos_token_id":
    None, "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.55, "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_alpha": 3.55,
    "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha": 3.55, "layernorm_mlp_beta": 1.0, "max_position_embeddings":
    10240000, "max_model_len": 10240000, "model_type": "minimax_m1", "num_attention_heads": 64, "num_experts_per_tok": 2,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "postnorm": True,
    "rms_norm_eps": 1e-05, "rope_theta": 10000000, "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.45.2", "use_cache": True, "vocab_size": 200064,
}  # fmt: skip
ERNIE_300B = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 8192,
    "intermediate_size": 28672, "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 54, "pad_token_id": 0, "rms_norm_eps": 1e-05, "use_cache": False, "vocab_size":
    103424, "rope_theta": 500000, "use_bias": False, "moe_num_experts": 64, "moe_layer_start_index": 3, "moe_layer_end_index": 53,
    "moe_intermediate_size": 3584, "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_k": 8, "moe_layer_interval": 1,
    "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "moe_num_shared_experts": 0,
}  # fmt: skip
ERNIE_VL_28B = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "attention_probs_dropout_prob": 0.0, "auto_map": {},
    "bos_token_id": 1, "eos_token_id": 2, "freq_allocation": 20, "hidden_act": "silu", "hidden_dropout_prob": 0.0, "hidden_size":
    2560, "im_patch_id": 100295, "intermediate_size": 12288, "max_position_embeddings": 131072, "model_type": "ernie4_5_moe_vl",
    "moe_capacity": [128, 128, 128], "moe_gate": "topk", "moe_intermediate_size": [1536, 512], "moe_k": 6, "moe_layer_end_index":
    [29, 28], "moe_layer_interval": 1, "moe_layer_start_index": [1, 1], "moe_multimodal_dispatch_use_allgather":
    "v2-alltoall-unpad-text", "moe_num_experts": [64, 64], "moe_num_shared_experts": 2, "moe_use_aux_free": True,
    "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "pad_token_id": 0, "pixel_hidden_size": 1280,
    "rms_norm_eps": 1e-05, "rope_3d": True, "rope_theta": 500000, "spatial_conv_size": 2, "temporal_conv_size": 2,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_rmsnorm": True, "vision_config": {},
    "vocab_size": 103424,
}  # fmt: skip
ERNIE_0_3B = {
    "architectures": ["Ernie4_5ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 131072, "model_type": "ernie4_5", "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 18, "pad_token_id": 0, "rms_norm_eps": 1e-05, "use_cache":
    False, "vocab_size": 103424, "rope_theta": 500000, "use_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
HUNYUAN_LARGE = {
    "architectures": ["HunYuanForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "auto_map": {}, "bos_token_id": 1,
    "capacity_factor": 1.0, "cla_share_factor": 2, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 6400,
    "initializer_range": 0.02, "intermediate_size": 18304, "max_position_embeddings": 131072, "mlp_bias": False, "model_type":
    "hunyuan", "moe_topk": 1, "num_attention_heads": 80, "num_experts": 16, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "num_shared_expert": 1, "pad_token_id": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"alpha": 1000.0,
    "factor": 1.0, "type": "dynamic"}, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache":
    True, "use_cla": True, "use_mixed_mlp_moe": True, "use_qk_norm": True, "vocab_size": 129024,
}  # fmt: skip
GRANITE4_H_SMALL = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier":
    0.0078125, "bos_token_id": 1, "embedding_multiplier": 12, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 4096,
    "init_method": "mup", "initializer_range": 0.1, "intermediate_size": 768, "layer_types": ["mamba", "mamba", "mamba", "mamba",
    "mamba", "attention", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba",
    "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "mamba",
    "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "mamba"], "logits_scaling": 16,
    "logits_to_keep": 1, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state":
    128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False, "max_position_embeddings": 131072,
    "model_type": "granitemoehybrid", "normalization_function": "rmsnorm", "num_attention_heads": 32, "num_experts_per_tok": 10,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 72, "output_router_logits": False,
    "position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta":
    10000, "router_aux_loss_coef": 0.0, "shared_intermediate_size": 1536, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
GRANITE4_H_MICRO = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier":
    0.015625, "bos_token_id": 1, "embedding_multiplier": 12, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 2048,
    "init_method": "mup", "initializer_range": 0.1, "intermediate_size": 8192, "layer_types": ["mamba", "mamba", "mamba", "mamba",
    "mamba", "attention", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba",
    "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "mamba",
    "mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "mamba"], "logits_scaling": 16,
    "logits_to_keep": 1, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state":
    128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 64, "mamba_proj_bias": False, "max_position_embeddings": 131072,
    "model_type": "granitemoehybrid", "normalization_function": "rmsnorm", "num_attention_heads": 32, "num_experts_per_tok": 0,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 0, "output_router_logits": False,
    "position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta":
    10000, "router_aux_loss_coef": 0.0, "shared_intermediate_size": 8192, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
NEMOTRON_NANO_9B_V2 = {
    "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attention_head_dim": 128,
    "auto_map": {}, "chunk_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "initializer_range": 0.02,
    "intermediate_size": 15680, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 80, "mamba_hidden_act": "silu", "mamba_num_heads":
    128, "mamba_proj_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "mlp_hidden_act": "relu2", "model_type":
    "nemotron_h", "n_groups": 8, "num_attention_heads": 40, "num_hidden_layers": 56, "num_key_value_heads": 8, "num_logits_to_keep":
    1, "rescale_prenorm_residual": True, "residual_in_fp32": False, "rms_norm_eps": 1e-05, "sliding_window": None, "ssm_state_size":
    128, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "use_mamba_kernels": True, "vocab_size": 131072, "time_step_floor": 0.0001, "time_step_limit": [0.0, 1000000000.0],
    "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
}  # fmt: skip
NEMOTRON_3_NANO_30B = {
    "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {}, "chunk_size": 128,
    "conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688, "hybrid_override_pattern":
    "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "initializer_range": 0.02, "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": False, "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_group": 1,
    "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads":
    32, "num_experts_per_tok": 6, "num_hidden_layers": 52, "num_key_value_heads": 2, "num_logits_to_keep": 1,
    "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True, "residual_in_fp32": False, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor":
    0.0001, "topk_group": 1, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "use_mamba_kernels": True, "vocab_size": 131072,
}  # fmt: skip
NEMOTRON_4_MINITRON = {
    "architectures": ["NemotronForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act":
    "relu2", "hidden_size": 3072, "initializer_range": 0.0134, "intermediate_size": 9216, "max_position_embeddings": 4096,
    "mlp_bias": False, "model_type": "nemotron", "norm_eps": 1e-05, "num_attention_heads": 24, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype":
    "bfloat16", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
JAMBA_LARGE = {
    "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4, "attn_layer_period": 8,
    "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 24576,
    "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 512, "mamba_expand": 2, "mamba_proj_bias":
    False, "max_position_embeddings": 262144, "model_type": "jamba", "num_attention_heads": 64, "num_experts": 16,
    "num_experts_per_tok": 2, "num_hidden_layers": 72, "num_key_value_heads": 8, "num_logits_to_keep": 1, "output_router_logits":
    False, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_mamba_kernels": True, "vocab_size": 65536,
}  # fmt: skip
JAMBA_REASONING_3B = {
    "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 13, "attn_layer_period": 14,
    "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 8192,
    "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 160, "mamba_expand": 2, "mamba_proj_bias":
    False, "max_position_embeddings": 262144, "model_type": "jamba", "num_attention_heads": 20, "num_experts": 1,
    "num_experts_per_tok": 1, "num_hidden_layers": 28, "num_key_value_heads": 1, "tie_word_embeddings": True, "torch_dtype":
    "bfloat16", "use_cache": True, "vocab_size": 65536,
}  # fmt: skip
FALCON_H1_7B = {
    "architectures": ["FalconH1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.3, "embedding_multiplier": 5.6, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 12288, "key_multiplier": 0.3, "lm_head_multiplier": 0.03, "mamba_chunk_size":
    256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 128, "mamba_d_ssm": 3072, "mamba_d_state": 256, "mamba_expand":
    2, "mamba_n_groups": 1, "mamba_n_heads": 24, "mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_rms_norm": False,
    "mamba_use_mlp": True, "max_position_embeddings": 262144, "mlp_bias": False, "mlp_expansion_factor": 8, "mlp_multipliers": [0.8,
    0.2], "model_type": "falcon_h1", "num_attention_heads": 12, "num_hidden_layers": 44, "num_key_value_heads": 2,
    "num_logits_to_keep": 1, "projectors_bias": False, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000000000.0,
    "ssm_in_multiplier": 1.0, "ssm_multipliers": [0.3, 0.2, 0.1, 0.5, 0.3], "ssm_out_multiplier": 0.2, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 130049, "time_step_floor": 0.0001, "time_step_limit": [0.0,
    1000000000.0],
}  # fmt: skip
BAMBA_9B = {
    "architectures": ["BambaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_layer_indices": [9, 18, 27],
    "attn_rotary_emb": 64, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_n_heads": 128, "mamba_proj_bias": False, "max_position_embeddings": 262144, "mlp_bias": False, "model_type": "bamba",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_logits_to_keep": 1, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
COMMAND_R_PLUS = {
    "architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id":
    255001, "hidden_act": "silu", "hidden_size": 12288, "initializer_range": 0.02, "intermediate_size": 33792, "layer_norm_eps":
    1e-05, "logit_scale": 0.8333333333333334, "max_position_embeddings": 131072, "model_type": "cohere", "num_attention_heads": 96,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 75000000.0, "torch_dtype": "float16",
    "use_cache": True, "use_qk_norm": True, "vocab_size": 256000,
}  # fmt: skip
COMMAND_A = {
    "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "cache_implementation": "hybrid",
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 12288, "intermediate_size": 36864, "layer_norm_eps": 1e-05, "logit_scale":
    0.25, "max_position_embeddings": 131072, "model_type": "cohere2", "num_attention_heads": 96, "num_hidden_layers": 64,
    "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
    "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16", "use_cache": True, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block":
    True, "use_parallel_embedding": True, "use_qk_norm": False, "vocab_size": 256000,
}  # fmt: skip
MIXTRAL_8X22B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 65536, "model_type":
    "mixtral", "num_attention_heads": 48, "num_experts_per_tok": 2, "num_hidden_layers": 56, "num_key_value_heads": 8,
    "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "router_aux_loss_coef":
    0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
OLMO2_32B = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size":
    5120, "initializer_range": 0.02, "intermediate_size": 27648, "max_position_embeddings": 4096, "model_type": "olmo2",
    "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": False, "vocab_size": 100352,
}  # fmt: skip
OLMO3_7B = {
    "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size":
    4096, "intermediate_size": 11008, "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
    "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
    "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention"], "max_position_embeddings":
    65536, "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps":
    1e-06, "rope_scaling": {}, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype":
    "bfloat16", "use_cache": False, "vocab_size": 100278,
}  # fmt: skip
SEED_OSS_36B = {
    "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1, "attention_out_bias": False,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 27648, "max_position_embeddings": 524288,
    "mlp_bias": False, "model_type": "seed_oss", "num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "residual_dropout": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": {}, "rope_theta": 10000000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 155136,
}  # fmt: skip
EXAONE4_32B = {
    "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 27392, "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 40, "num_hidden_layers": 64,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": {}, "rope_theta": 1000000, "sliding_window": 4096,
    "sliding_window_pattern": "LLLG", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size":
    102400,
}  # fmt: skip
EXAONE3_5_7_8B = {
    "architectures": ["ExaoneForCausalLM"], "activation_function": "silu", "attention_dropout": 0.0, "auto_map": {},
    "embed_dropout": 0.0, "head_dim": 128, "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "layer_norm_epsilon": 1e-05, "max_position_embeddings": 32768, "model_type": "exaone", "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_layers": 32, "rope_scaling": {}, "rope_theta": 1000000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 102400,
}  # fmt: skip
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size":
    2048, "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention", "full_attention",
    "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
    "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
    "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
    "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
    "full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention"],
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval":
    4, "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1,
    0], "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "use_cache": False,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
LING_LITE = {
    "architectures": ["BailingMoeForCausalLM"], "attention_dropout": 0.0, "auto_map": {}, "embedding_dropout": 0.0,
    "first_k_dense_replace": 0, "head_dim": None, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.006,
    "intermediate_size": 5632, "max_position_embeddings": 16384, "max_window_layers": 28, "model_type": "bailing_moe",
    "moe_intermediate_size": 1408, "norm_head": True, "norm_softmax": False, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 6, "num_hidden_layers": 28, "num_key_value_heads": 4, "num_shared_experts": 2,
    "output_dropout": 0.0, "output_router_logits": False, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 600000, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype":
    "bfloat16", "use_bias": False, "use_cache": True, "use_qkv_bias": False, "use_sliding_window": False, "vocab_size": 126464,
}  # fmt: skip
LING_FLASH_2 = {
    "architectures": ["BailingMoeV2ForCausalLM"], "attention_dropout": 0.0, "auto_map": {}, "first_k_dense_replace": 1, "head_dim":
    128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.006, "intermediate_size": 9216,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "bailing_moe", "moe_intermediate_size": 1024,
    "moe_router_enable_expert_bias": True, "n_group": 8, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 256,
    "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_key_value_heads": 4, "num_nextn_predict_layers": 0,
    "num_shared_experts": 1, "output_router_logits": False, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_scaling":
    None, "rope_theta": 600000, "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_qk_norm":
    True, "use_qkv_bias": False, "use_rmsnorm": True, "vocab_size": 157184,
}  # fmt: skip
DOTS_LLM1 = {
    "architectures": ["Dots1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_implementation": "x",
    "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 10944, "max_position_embeddings": 32768, "max_window_layers": 62, "model_type": "dots1",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 2,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 62, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc", "seq_aux": True, "sliding_window": None, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "v_head_dim": 128,
    "qk_nope_head_dim": None, "qk_rope_head_dim": None, "vocab_size": 152064,
}  # fmt: skip
INTERNLM2_5_20B = {
    "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager", "auto_map": {}, "bias": False, "hidden_act": "silu",
    "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 32768, "model_type": "internlm2",
    "num_attention_heads": 48, "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": {"factor":
    2.5, "type": "dynamic"}, "rope_theta": 50000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 92544,
}  # fmt: skip
INTERNVL3_8B = {
    "architectures": ["InternVLChatModel"], "auto_map": {}, "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size":
    448, "hidden_size": 3584, "image_fold": None, "llm_config": {"_attn_implementation_autoset": True, "_name_or_path": "x",
    "add_cross_attention": False, "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bad_words_ids": None,
    "begin_suppress_tokens": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id":
    None, "diversity_penalty": 0.0, "do_sample": False, "finetuning_task": None, "forced_bos_token_id": None, "hidden_act": "silu",
    "hidden_size": 3584, "id2label": {"0": "a"}, "initializer_range": 0.02, "intermediate_size": 18944, "is_decoder": False,
    "is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "max_position_embeddings": 32768, "max_window_layers": 70,
    "min_length": 0, "model_type": "qwen2", "moe_config": None, "no_repeat_ngram_size": 0, "num_attention_heads": 28,
    "num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 28, "num_key_value_heads": 4, "num_return_sequences": 1,
    "repetition_penalty": 1.0, "rms_norm_eps": 1e-06, "rope_scaling": {}, "rope_theta": 1000000.0, "sliding_window": None,
    "temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": False, "top_k": 50, "top_p": 1.0, "torch_dtype":
    "bfloat16", "use_bfloat16": True, "use_cache": False, "use_sliding_window": False, "vocab_size": 151674}, "max_dynamic_patch":
    12, "model_type": "internvl_chat", "pad2square": False, "ps_version": "v2", "select_layer": -1, "system_message": None,
    "template": "internvl2_5", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0,
    "use_thumbnail": True, "vision_config": {},
}  # fmt: skip
BAICHUAN_7B = {
    "architectures": ["BaiChuanForCausalLM"], "auto_map": {}, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type":
    "baichuan", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings":
    False, "torch_dtype": "float16", "use_cache": True, "vocab_size": 64000,
}  # fmt: skip
MPT_7B = {
    "architectures": ["MPTForCausalLM"], "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
    "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False,
    "softmax_scale": None}, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_config": {},
    "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32,
    "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "tokenizer_name": "x", "torch_dtype":
    "bfloat16", "use_cache": False, "verbose": 0, "vocab_size": 50432,
}  # fmt: skip
FALCON_180B = {
    "alibi": False, "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False, "hidden_dropout": 0.0,
    "hidden_size": 14848, "model_type": "falcon", "new_decoder_architecture": True, "num_attention_heads": 232, "num_hidden_layers":
    80, "num_kv_heads": 8, "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 65024,
}  # fmt: skip
FALCON3_7B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 23040, "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "llama", "num_attention_heads":
    12, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000042, "tie_word_embeddings":
    False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 131072,
}  # fmt: skip
FALCON_11B = {
    "activation": "gelu", "alibi": False, "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False,
    "ff_factor": 4, "ffn_hidden_size": 16384, "hidden_dropout": 0.0, "hidden_size": 4096, "max_position_embeddings": 8192,
    "model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 32, "num_hidden_layers":
    60, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1, "parallel_attn": True, "rope_scaling": None, "rope_theta": 500000.42,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 65024,
}  # fmt: skip
BLOOM_176B = {
    "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"], "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112,
    "pretraining_tp": 4, "slow_but_exact": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 250880,
}  # fmt: skip
OPT_66B = {
    "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "do_layer_norm_before": True,
    "dropout": 0.1, "ffn_dim": 36864, "hidden_size": 9216, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
    "model_type": "opt", "num_attention_heads": 72, "num_hidden_layers": 64, "prefix": "</s>", "torch_dtype": "float16",
    "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 9216, "_remove_final_layer_norm": False,
}  # fmt: skip
GPT_NEOX_20B = {
    "architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0,
    "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 24576, "layer_norm_eps": 1e-05, "max_position_embeddings":
    2048, "model_type": "gpt_neox", "num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct":
    0.25, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "vocab_size": 50432,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop":
    0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
MISTRAL_NEMO = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 131072,
}  # fmt: skip
PIXTRAL_12B = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_seq_length": 1, "image_token_index": 10,
    "model_type": "llava", "projector_hidden_act": "gelu", "text_config": {"hidden_size": 5120, "head_dim": 128,
    "intermediate_size": 14336, "is_composition": True, "max_position_embeddings": 1024000, "model_type": "mistral",
    "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None,
    "vocab_size": 131072}, "torch_dtype": "bfloat16", "vision_config": {}, "vision_feature_layer": -1,
}  # fmt: skip
MINICPM_2B = {
    "architectures": ["MiniCPMForCausalLM"], "auto_map": {}, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2304, "intermediate_size": 5760, "max_position_embeddings": 4096, "model_type": "minicpm", "num_attention_heads":
    36, "num_hidden_layers": 40, "num_key_value_heads": 36, "rms_norm_eps": 1e-05, "rope_scaling": None, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 122753, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
}  # fmt: skip
MINICPM3_4B = {
    "architectures": ["MiniCPM3ForCausalLM"], "auto_map": {}, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.1, "hidden_size": 2560, "num_hidden_layers": 62, "intermediate_size": 6400, "max_position_embeddings":
    32768, "model_type": "minicpm3", "num_attention_heads": 40, "num_key_value_heads": 40, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "q_lora_rank": 768, "kv_lora_rank": 256, "rms_norm_eps": 1e-05, "rope_scaling": {}, "torch_dtype":
    "bfloat16", "use_cache": True, "vocab_size": 73448, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
}  # fmt: skip
SOLAR_PRO = {
    "architectures": ["SolarForCausalLM"], "attention_bias": False, "bskcn_1": [12, 20, 32, 44], "bskcn_2": [20, 32], "bskcn_3":
    [16, 24, 36, 48], "bskcn_4": [28, 40], "bskcn_tv": [0.9, 0.8], "hidden_act": "silu", "hidden_size": 5120, "intermediate_size":
    17920, "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "solar", "num_attention_heads": 40,
    "num_hidden_layers": 64, "num_key_value_heads": 10, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000, "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
YI_34B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 20480, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 56, "num_hidden_layers": 60, "num_key_value_heads": 8, "pad_token_id": 0, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 64000,
}  # fmt: skip
MIMO_7B = {
    "architectures": ["MiMoForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "auto_map": {}, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 32768, "max_window_layers":
    36, "model_type": "mimo", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_theta": 640000, "sliding_window": None, "tie_word_embeddings":
    False, "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151680,
}  # fmt: skip
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "hidden_act":
    "silu", "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe",
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
STABLELM_2_12B = {
    "architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size":
    5120, "intermediate_size": 13824, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "partial_rotary_factor": 0.25, "qk_layernorm":
    True, "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_parallel_residual": True, "use_qkv_bias": False, "vocab_size": 100352,
}  # fmt: skip

RECALLED = {  # billions of parameters, KiB of KV a token, billions active, GB of weights
    "llama4-maverick": (LLAMA4_MAVERICK, 400.7, 192, 17.2, None),
    "gemma3-27b": (GEMMA3_27B, 27.0, 496, None, None),
    "gemma3-270m": (GEMMA3_270M, 0.268, 18, None, None),
    "gemma2-2b": (GEMMA2_2B, 2.61, 104, None, None),
    "gemma-7b": (GEMMA_7B, 8.54, 448, None, None),
    "phi3-mini-4k": (PHI3_MINI_4K, 3.82, 384, None, None),
    "phi4-14b": (PHI4_14B, 14.66, 200, None, None),
    "phi3.5-moe": (PHI3_5_MOE, 41.87, 128, 6.6, None),
    "phi-2": (PHI_2, 2.78, 320, None, None),
    "qwen2.5-vl-7b": (QWEN2_5_VL_7B, 7.62, 56, None, None),
    "qwen3-vl-235b": (QWEN3_VL_235B, 235.1, 188, 22, None),
    "qwen3-vl-8b": (QWEN3_VL_8B, 8.19, 144, None, None),
    "qwen3-next-80b": (QWEN3_NEXT_80B, 79.67, 24, 3.9, None),
    "qwen3-omni-30b": (QWEN3_OMNI_30B, 30.53, 96, 3.3, None),
    "qwen1.5-moe": (QWEN1_5_MOE, 14.32, 192, 2.7, None),
    "deepseek-v3": (DEEPSEEK_V3, 671.0, 68.625, 37.5, 672.9),
    "deepseek-v3.2": (DEEPSEEK_V3_2, 671.8, 83.875, None, None),
    "deepseek-v2": (DEEPSEEK_V2, 235.7, 67.5, 21.4, None),
    "deepseek-moe-16b": (DEEPSEEK_MOE_16B, 16.38, 224, None, None),
    "janus-pro": (JANUS_PRO, 6.91, 480, None, None),
    "deepseek-vl2": (DEEPSEEK_VL2, 27.1, 33.75, None, None),
    "kimi-k2": (KIMI_K2, 1026, 68.625, 32.9, None),
    "kimi-k2-thinking": (KIMI_K2_THINKING, 1026, 68.625, None, 594),
    "glm-4.5": (GLM_4_5, 352.8, 368, 33.6, None),
    "glm-4.6-fp8": (GLM_4_6_FP8, 352.8, 368, None, 354.4),
    "glm-5": (GLM_5, 744, 107.25, 40.5, None),
    "minimax-m1": (MINIMAX_M1, 456, 40, None, None),
    "ernie-300b": (ERNIE_300B, 299.5, 216, 47, None),
    "ernie-vl-28b": (ERNIE_VL_28B, 21.8, 56, None, None),
    "ernie-0.3b": (ERNIE_0_3B, 0.36, 18, None, None),
    "hunyuan-large": (HUNYUAN_LARGE, 389, 80, 52, None),
    "granite4-h-small": (GRANITE4_H_SMALL, 32.2, 16, 9, None),
    "granite4-h-micro": (GRANITE4_H_MICRO, 3.19, 8, None, None),
    "nemotron-nano-9b-v2": (NEMOTRON_NANO_9B_V2, 8.89, 16, None, None),
    "nemotron-3-nano-30b": (NEMOTRON_3_NANO_30B, 31.6, 6, 3.6, None),
    "nemotron-4-minitron": (NEMOTRON_4_MINITRON, 4.19, 128, None, None),
    "jamba-large": (JAMBA_LARGE, 398, 36, 94, None),
    "jamba-reasoning-3b": (JAMBA_REASONING_3B, 3.0, 1, None, None),
    "falcon-h1-7b": (FALCON_H1_7B, 7.59, 44, None, None),
    "bamba-9b": (BAMBA_9B, 9.78, 12, None, None),
    "command-r-plus": (COMMAND_R_PLUS, 103.8, 256, None, None),
    "command-a": (COMMAND_A, 111.1, 256, None, None),
    "mixtral-8x22b": (MIXTRAL_8X22B, 140.6, 224, 39, None),
    "olmo2-32b": (OLMO2_32B, 32.2, 256, None, None),
    "olmo3-7b": (OLMO3_7B, 7.3, 512, None, None),
    "seed-oss-36b": (SEED_OSS_36B, 36.15, 256, None, None),
    "exaone4-32b": (EXAONE4_32B, 32.0, 256, None, None),
    "exaone3.5-7.8b": (EXAONE3_5_7_8B, 7.82, 128, None, None),
    "smollm3-3b": (SMOLLM3_3B, 3.08, 72, None, None),
    "ling-lite": (LING_LITE, 16.8, 56, None, None),
    "ling-flash-2": (LING_FLASH_2, 103, 64, None, None),
    "dots.llm1": (DOTS_LLM1, 142.8, 992, 14, None),
    "internlm2.5-20b": (INTERNLM2_5_20B, 19.86, 192, None, None),
    "internvl3-8b": (INTERNVL3_8B, 7.61, 56, None, None),
    "baichuan-7b": (BAICHUAN_7B, 7.0, 512, None, None),
    "mpt-7b": (MPT_7B, 6.65, 512, None, None),
    "falcon-180b": (FALCON_180B, 179.5, 160, None, None),
    "falcon3-7b": (FALCON3_7B, 7.46, 112, None, None),
    "falcon-11b": (FALCON_11B, 11.1, 240, None, None),
    "bloom-176b": (BLOOM_176B, 176.2, 3920, None, None),
    "opt-66b": (OPT_66B, 65.7, 2304, None, None),
    "gpt-neox-20b": (GPT_NEOX_20B, 20.55, 1056, None, None),
    "gpt2": (GPT2, 0.124, 36, None, None),
    "mistral-nemo": (MISTRAL_NEMO, 12.25, 160, None, None),
    "pixtral-12b": (PIXTRAL_12B, 12.25, 160, None, None),
    "minicpm-2b": (MINICPM_2B, 2.72, 360, None, None),
    "minicpm3-4b": (MINICPM3_4B, 4.07, 34.875, None, None),
    "solar-pro": (SOLAR_PRO, 22.1, 320, None, None),
    "yi-34b": (YI_34B, 34.4, 240, None, None),
    "mimo-7b": (MIMO_7B, 7.61, 144, None, None),
    "olmoe": (OLMOE, 6.92, 128, 1.3, None),
    "stablelm-2-12b": (STABLELM_2_12B, 12.14, 200, None, None),
}  # fmt: skip
