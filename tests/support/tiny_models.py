"""Random-weight models of each family, small enough for a CPU test, made by transformers: the reference of what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

transformers.utils.logging.disable_progress_bar()

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that logits differ by more than rounding
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLOW: dict[str, Any] = {  # a decode step takes milliseconds: what runs for hundreds of tokens still runs when a test acts on it
    "num_hidden_layers": 3,
    "hidden_size": 512,
    "intermediate_size": 4096,
}
ORIGINAL = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,  # of what is rotated
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}},
    ),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-tied-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn-windowed": (
        "Qwen2",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-shares-kept": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 4,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "ernie4_5": ("Ernie4_5", {}),
    "ernie4_5-moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_num_shared_experts": 2, "moe_layer_start_index": 1},
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, **ORIGINAL},
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}),
    "deepseek-v2-lite": ("DeepseekV2", {**MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **MLA,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.707, **ORIGINAL},
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 80,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 24,
            "no_rope_layers": [1, 1, 1, 0],
            "attn_scale": 0.4,
            "floor_scale": 12,
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20}),
}


def make(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A model of that family, saved in `folder` as a Hugging Face folder."""
    stem, extra = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **extra, **changes})
    model: PreTrainedModel = getattr(transformers, f"{stem.removesuffix('Text')}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """What transformers makes of a prompt, likeliest token by likeliest token."""
    found = list(prompt)
    for _ in range(tokens):
        found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(prompt) :]
