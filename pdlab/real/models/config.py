"""What the engine must know of a model: a Hugging Face config.json of the Llama, Qwen2, Qwen3 or Mistral family, checked.

Shapes and windows are read as the simulator reads them (`pdlab.cost.huggingface`); norms, rotary positions and biases are the engine's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.cost import model_names
from pdlab.cost.catalogue import model as catalogue_model
from pdlab.cost.huggingface import read_layers
from pdlab.cost.layers import Softmax
from pdlab.real.models import gguf_file

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions. `scaling` is none, linear, llama3 or yarn; the rest are that one's parameters, under their usual names."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`windows` holds each layer's sliding window in tokens, 0 for none."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    dtype: str = "float32"  # of the stored weights

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def of(model: str, *, random: bool = False) -> ModelConfig:
    """The model of that name: a folder, a .gguf, or for random weights a name of the catalogue. Raises UsageError."""
    path = Path(model)
    if path.suffix == ".gguf":
        return parse(gguf_file.config(path), path.stem, str(path))
    if random and not path.exists() and model in model_names():
        return of_catalogue(model)
    if not path.exists():
        raise UsageError(
            f"--model {path}: no such folder or file; give a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf"
        )
    if not path.is_dir():
        raise UsageError(f"--model {path} is neither a folder nor a .gguf file")
    return read(path)


def read(folder: Path) -> ModelConfig:
    """The config.json in `folder`. Raises UsageError naming the file and what is wrong with it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"model {folder}: cannot read config.json: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"model file {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"model file {path} is not a JSON object")
    return parse(config, folder.resolve().name, str(path))


def of_catalogue(name: str) -> ModelConfig:
    """A model known by its shape only, for random weights; what the catalogue does not say is as Llama has it. Raises UsageError on experts
    and latent attention."""
    shape = catalogue_model(name)
    if shape.experts or shape.kv_lora_rank or shape.recurrence or not shape.gated:
        raise UsageError(f"model {name}: only dense models of the families {', '.join(FAMILIES)} run here")
    family = next((f for f in FAMILIES if name.startswith(f)), "llama")
    return ModelConfig(
        name=name,
        family=family,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        vocab=shape.vocab,
        max_positions=shape.max_positions or 8192,
        norm_eps=1e-6,
        rope=RopeConfig(),
        tied=shape.tied,
        qkv_bias=family == "qwen2",
        out_bias=False,
        mlp_bias=False,
        qk_norm=family == "qwen3",
        windows=(shape.window_tokens if shape.window_layers == shape.layers else 0,) * shape.layers,
        dtype="bfloat16",
    )


def parse(config: Mapping[str, Any], name: str, source: str) -> ModelConfig:
    """From a config.json's content. Raises UsageError after `source`."""
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise UsageError(f"model file {source}: model_type {family!r} is not one of {', '.join(FAMILIES)}")

    def number(key: str, default: float | None = None) -> float:
        value = config.get(key)
        if value is None:
            value = default
        if value is None:
            raise UsageError(f"model file {source} lacks {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UsageError(f"model file {source}: {key} must be a positive number, not {value!r}")
        return value

    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"):
        number(key)
    read, _ = read_layers(config, family, f"model file {source}")
    mixers = [mixer for layer in read.layers for mixer in layer.mixers if isinstance(mixer, Softmax)]
    heads, kv_heads, head_dim = mixers[0].heads, mixers[0].kv_heads, mixers[0].head_dim
    if heads % kv_heads:
        raise UsageError(f"model file {source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise UsageError(f"model file {source}: head_dim {head_dim} must be even")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UsageError(f"model file {source}: hidden_act {activation!r} is not supported, only silu")
    if config.get("quantization_config"):
        raise UsageError(
            f"model file {source}: weights quantised with {config['quantization_config'].get('quant_method', '?')} are not supported; "
            "load the original weights, with --quantization wint8 or wint4"
        )
    max_positions = int(number("max_position_embeddings"))
    attention_bias = bool(config.get("attention_bias", family == "qwen2"))
    return ModelConfig(
        name=name,
        family=family,
        layers=len(read.layers),
        hidden=read.hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=int(number("intermediate_size")),
        vocab=read.outer.vocab,
        max_positions=max_positions,
        norm_eps=float(number("rms_norm_eps", 1e-6)),
        rope=_rope(config, max_positions, source),
        tied=read.outer.tied,
        qkv_bias=True if family == "qwen2" else attention_bias,
        out_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=tuple(mixer.window for mixer in mixers),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _rope(config: Mapping[str, Any], max_positions: int, source: str) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind == "default":
        return RopeConfig(theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise UsageError(f"model file {source}: rope scaling {kind!r} is not one of linear, llama3, yarn")
    if float(config.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UsageError(f"model file {source}: partial_rotary_factor is not supported")
    try:
        factor = float(scaling.get("factor") or 1.0)
        original = int(scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or max_positions)
        if scaling.get("attention_factor") is not None:
            attention = float(scaling["attention_factor"])
        elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention = _mscale(factor, float(scaling["mscale"])) / _mscale(factor, float(scaling["mscale_all_dim"]))
        else:
            attention = _mscale(factor, 1.0)
        return RopeConfig(
            theta,
            kind,
            factor,
            original,
            float(scaling.get("low_freq_factor") or 1.0),
            float(scaling.get("high_freq_factor") or 4.0),
            float(scaling.get("beta_fast") or 32.0),
            float(scaling.get("beta_slow") or 1.0),
            attention if kind == "yarn" else 1.0,
            bool(scaling.get("truncate", True)),
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"model file {source}: rope scaling has a value of the wrong kind: {error}") from None


def _mscale(factor: float, mscale: float) -> float:
    """Source: YaRN, eq. 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
