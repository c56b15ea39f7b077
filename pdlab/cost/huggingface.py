"""A Hugging Face config.json, read into a Model. One reader for all families: what they share has common names, and where names differ
the first that is present counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdlab.cost.shapes import Model
from pdlab.types import UsageError

UNGATED = frozenset({"opt", "bloom", "gpt2", "gpt_neox", "gpt_bigcode", "falcon", "phi", "starcoder2"})
TIED_BY_DEFAULT = frozenset({"opt", "bloom", "gpt2", "gpt_bigcode", "falcon", "gemma", "gemma2", "gemma3_text", "starcoder2"})


def read_config(path: Path) -> Model:
    """The model whose config.json lies at `path`. Raises UsageError when it can't be read or lacks a needed key."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"model config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"model config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"model config {path} is not a JSON object")
    name = path.parent.name if path.name == "config.json" else path.stem
    try:
        return parse_config(config, name or "model", source=str(path))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model config {path} has a value of the wrong kind: {error}") from None


def parse_config(config: dict[str, Any], name: str, source: str = "") -> Model:
    """The Model a config describes; a multi-modal one's text part. Raises UsageError naming the missing key."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {"tie_word_embeddings": config.get("tie_word_embeddings"), "quantization_config": config.get("quantization_config")} | text

    def first(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value: Any = config.get(key)
            if isinstance(value, list):
                value = value[0] if value else None  # ERNIE's multi-modal configs list text experts first
            if value is not None:
                return int(value)
        if default is None:
            raise UsageError(f"model config {source or name} lacks {keys[0]!r}")
        return default

    kind = str(config.get("model_type", ""))
    layers = first("num_hidden_layers", "n_layer", "num_layers")
    hidden = first("hidden_size", "n_embd", "d_model")
    heads = first("num_attention_heads", "n_head", "num_heads")
    kv_heads = first("num_key_value_heads", "num_kv_heads", default=1 if config.get("multi_query") else heads)
    if min(layers, hidden, heads, kv_heads) < 1:
        raise UsageError(f"model config {source or name}: layers, hidden size and heads must be positive")
    max_positions = first("max_position_embeddings", "n_positions", "seq_length", default=0)
    kv_lora_rank = first("kv_lora_rank", default=0)
    experts = first("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", default=0)
    ffn, expert_ffn, shared_ffn = _widths(first, kind, hidden, experts, bool(config.get("use_moe_shared_expert", True)))
    windows = _windowed_layers(config, kind, layers)
    window_tokens = first("index_topk", "attention_chunk_size", "sliding_window", default=0)
    return Model(
        name=name.lower(),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=first("head_dim", default=hidden // heads),
        ffn=ffn,
        vocab=first("vocab_size"),
        gated=kind not in UNGATED,
        tied=bool(config["tie_word_embeddings"]) if config.get("tie_word_embeddings") is not None else kind in TIED_BY_DEFAULT,
        max_positions=max_positions,
        learned_positions=max_positions + 2 if kind == "opt" else max_positions if kind in ("gpt2", "gpt_bigcode") else 0,
        experts=experts,
        experts_per_token=first("num_experts_per_tok", "num_experts_per_token", "moe_k", default=0) if experts else 0,
        expert_ffn=expert_ffn,
        shared_ffn=shared_ffn,
        dense_layers=_dense_layers(config, layers) if experts else 0,
        kv_lora_rank=kv_lora_rank,
        q_lora_rank=first("q_lora_rank", default=0),
        nope_dim=first("qk_nope_head_dim", default=0),
        rope_dim=first("qk_rope_head_dim", default=0) if kv_lora_rank else 0,
        v_dim=first("v_head_dim", default=0),
        window_tokens=window_tokens if windows else 0,
        window_layers=windows if window_tokens else 0,
        weight_dtype=_weight_dtype(config),
        source=source,
    )


def _widths(first: Any, kind: str, hidden: int, experts: int, shares: bool) -> tuple[int, int, int]:
    """Feed-forward widths: dense, one expert's, all shared experts' together."""
    dense: int = first("intermediate_size_mlp", "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    if not experts:
        return dense, 0, 0
    expert: int = first("moe_intermediate_size", "intermediate_size")
    count: int = first("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=1 if kind.startswith("llama4") else 0)
    shared: int = first("shared_expert_intermediate_size", default=count * expert)
    return dense, expert, shared if shares else 0


def _dense_layers(config: dict[str, Any], layers: int) -> int:
    """How many layers have no experts: the first ones, every other one, or those listed."""
    for key in ("first_k_dense_replace", "moe_layer_start_index"):
        value = config.get(key)
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    for key in ("interleave_moe_layer_step", "decoder_sparse_step"):
        if config.get(key):
            return max(layers - layers // int(config[key]), len(config.get("mlp_only_layers") or ()))
    return len(config.get("mlp_only_layers") or ())


def _windowed_layers(config: dict[str, Any], kind: str, layers: int) -> int:
    """How many layers attend to a window (or chunk, or top-k) only."""
    if config.get("index_topk"):
        return layers
    types: Sequence[str] = config.get("layer_types") or ()
    if types:
        return sum(t in ("sliding_attention", "chunked_attention") for t in types)
    if config.get("attention_chunk_size"):
        return layers - layers // 4  # Llama 4: every fourth layer attends to all
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0
    if kind.startswith("qwen") and not config.get("use_sliding_window"):
        return 0
    return layers // 2 if kind == "gpt_oss" else layers


def _weight_dtype(config: dict[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", ""))
        bits = quantization.get("bits")
        if method in ("fp8", "mxfp4"):
            return method
        if bits in (4, 8):
            return "wint4" if bits == 4 else "int8"
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    return "fp32" if dtype == "float32" else "bf16"
