"""What the engine must know of a model: a Hugging Face config.json of one of the families below, checked.

`pdlab.cost.huggingface` reads the config, for the simulator and for this; of what it has no use for, norms, rotary positions and biases are
read here. What it understands and the engine cannot run is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdlab.core.kv_plan import heads_fit
from pdlab.core.types import UsageError
from pdlab.cost import huggingface, model_names
from pdlab.cost.catalogue import understood
from pdlab.cost.huggingface import QUANTIZATION, Understood, config_at
from pdlab.cost.layers import FeedForward, Moe, Softmax
from pdlab.real.models import gguf_file
from pdlab.real.models.moe import MOE_FAMILIES, MoeConfig, dense_width, moe_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *MOE_FAMILIES)


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
    """`windows` holds each layer's sliding window in tokens, 0 for none. `ffn` is the width of the layers without experts; with none of
    those, 0."""

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
    moe: MoeConfig | None = None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and self.moe.layers[layer]

    @property
    def widest_feed_forward(self) -> int:
        """What a token fills between two matrices of a layer, all its experts' together."""
        return max(self.ffn, self.moe.width * self.moe.per_token if self.moe is not None else 0)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def check_tp(config: ModelConfig, tp: int) -> None:
    """Raises UsageError where a model cannot be split among so many ranks."""
    c = config
    experts = c.moe.width if c.moe is not None else 0
    fits = [n for n in range(1, 65) if c.heads % n == c.ffn % n == experts % n == 0 and heads_fit(c.kv_heads, n)]
    choose = f": choose one of {', '.join(map(str, fits))}"
    for count, what in ((c.heads, "attention heads"), (c.ffn, "columns of the feed-forward"), (experts, "columns of an expert")):
        if count % tp:
            raise UsageError(f"tp {tp} does not divide the {count} {what} of {c.name}{choose}")
    if tp not in fits:
        raise UsageError(f"tp {tp} neither divides the {c.kv_heads} KV heads of {c.name} nor is a multiple of them{choose}")


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
    return parse(config_at(path), folder.resolve().name, str(path))


def of_catalogue(name: str) -> ModelConfig:
    """A model known by its shape only, for random weights; what the catalogue does not say is as Llama has it. Raises UsageError on what
    does not run here."""
    known = understood(name)
    experts = any(isinstance(feed, Moe) for layer in known.decoder.layers for feed in layer.feed_forwards)
    named = (f for f in FAMILIES if (f in MOE_FAMILIES) == experts and name.startswith(f.removesuffix("_moe")))
    family = next(named, "llama")
    return _runnable(
        known,
        f"model {name}",
        {},
        name=name,
        family=family,
        max_positions=known.model.max_positions or 8192,
        norm_eps=1e-6,
        rope=RopeConfig(),
        qkv_bias=family == "qwen2",
        out_bias=False,
        mlp_bias=False,
        dtype="bfloat16",
    )


def parse(config: Mapping[str, Any], name: str, source: str) -> ModelConfig:
    """From a config.json's content. Raises UsageError after `source`."""
    where, family = f"model config {source}", str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise UsageError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    written = next((config[key] for key in QUANTIZATION if config.get(key)), None)
    if written:
        method = written.get("quant_method", "?") if isinstance(written, Mapping) else written
        raise UsageError(
            f"{where}: weights quantised with {method} are not supported; load the original weights, with --quantization wint8 or wint4"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UsageError(f"{where}: hidden_act {activation!r} is not supported, only silu")
    known = huggingface.parse(config, name, source)
    if not known.model.max_positions:
        raise UsageError(f"{where} lacks 'max_position_embeddings'")
    attention_bias = bool(config.get("attention_bias", family == "qwen2"))
    return _runnable(
        known,
        where,
        config,
        name=name,
        family=family,
        max_positions=known.model.max_positions,
        norm_eps=_epsilon(config.get("rms_norm_eps", 1e-6), where),
        rope=_rope(config, known.model.max_positions, source),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias and family in ("llama", "qwen3", "qwen3_moe"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def _runnable(known: Understood, where: str, config: Mapping[str, Any], *, family: str, **more: Any) -> ModelConfig:
    """What the cost models understand, where all layers are softmax attention with the same heads, and a gated feed-forward of one width or
    routed experts. Raises UsageError where they are not."""
    layers, outer = known.decoder.layers, known.decoder.outer
    mixers = [mixer for layer in layers for mixer in layer.mixers]
    feeds: list[FeedForward] = [feed for layer in layers for feed in layer.feed_forwards]
    first = mixers[0]
    moe = moe_of(family, config, feeds, where)
    ffn = dense_width(feeds)
    if (
        not isinstance(first, Softmax)
        or (not ffn and (moe is None or not all(moe.layers)))
        or any(not isinstance(mixer, Softmax) or replace(mixer, window=first.window) != first for mixer in mixers)
        or not len(mixers) == len(feeds) == len(layers)
    ):
        raise UsageError(f"{where}: only models of the families {', '.join(FAMILIES)} run here, all of whose layers are alike")
    if first.head_dim % 2:
        raise UsageError(f"{where}: head_dim {first.head_dim} must be even")
    return ModelConfig(
        family=family,
        layers=len(layers),
        hidden=known.decoder.hidden,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        ffn=ffn,
        vocab=outer.vocab,
        tied=outer.tied,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        windows=tuple(mixer.window for mixer in mixers if isinstance(mixer, Softmax)),
        moe=moe,
        **more,
    )


def _epsilon(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{where}: rms_norm_eps must be a positive number, not {value!r}")
    return float(value)


def _rope(config: Mapping[str, Any], max_positions: int, source: str) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind == "default":
        return RopeConfig(theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise UsageError(f"model config {source}: rope scaling {kind!r} is not one of linear, llama3, yarn")
    if float(config.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UsageError(f"model config {source}: partial_rotary_factor is not supported")
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
        raise UsageError(f"model config {source}: rope scaling has a value of the wrong kind: {error}") from None


def _mscale(factor: float, mscale: float) -> float:
    """Source: YaRN, eq. 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
