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
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20}),
}
ROUTED = ("qwen3-moe", "qwen3-moe-shares-kept", "mixtral")  # with experts


def make(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A model of that family, saved in `folder` as a Hugging Face folder."""
    stem, extra = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **extra, **changes})
    model: PreTrainedModel = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
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
