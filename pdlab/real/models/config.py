"""What the engine must know of a model: a Hugging Face config.json of one of the families below, checked.

`pdlab.cost.huggingface` reads the config, for the simulator and for this; of what it has no use for, norms, rotary positions and biases are
read here. What it understands and the engine cannot run is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pdlab.core.kv_plan import heads_fit
from pdlab.core.types import UsageError
from pdlab.cost import huggingface, model_names
from pdlab.cost.catalogue import understood
from pdlab.cost.huggingface import QUANTIZATION, Understood, config_at
from pdlab.cost.layers import FeedForward, Latent, Mixer, Moe, Softmax
from pdlab.real.models import gguf_file
from pdlab.real.models.moe import MOE_FAMILIES, MoeConfig, dense_width, moe_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "ernie4_5", "gemma3_text", *MOE_FAMILIES)
QK_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
INTERLEAVED = ("ernie4_5", "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "llama4_text")
DENSE_NAMES = {"mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}  # how the catalogue's names begin
MOE_NAMES = {
    "mixtral": "mixtral",
    "qwen3": "qwen3_moe",
    "ernie-4.5": "ernie4_5_moe",
    "gpt-oss": "gpt_oss",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "deepseek-r1": "deepseek_v3",
    "kimi-k2": "deepseek_v3",
    "llama-4": "llama4_text",
}
ALIKE = {"kimi_k2": "deepseek_v3"}  # families of another name and the same structure
GELU = ("gelu_pytorch_tanh",)
EPSILON = {
    "mixtral": 1e-5,
    "gpt_oss": 1e-5,
    "ernie4_5": 1e-5,
    "ernie4_5_moe": 1e-5,
    "llama4_text": 1e-5,
}  # where a config says none, as its class has it
THETA = {"mixtral": 1e6, "gpt_oss": 150000.0, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "gemma3_text": 1e6, "llama4_text": 5e5}
Stored = Literal["wide", "fp8", "mxfp4"]
Gate = Literal["silu", "gelu_tanh"]


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
class LatentConfig:
    """MLA: `rank` of what is cached of a token beside its `rope_dim` rotated key dimensions; `q_rank` 0: queries are projected at once."""

    rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    q_rank: int


@dataclass(frozen=True, slots=True)
class ChunkedConfig:
    """Llama 4: windows are chunks that begin at their own multiples. `ropeless` says of each layer whether it has no rotary positions;
    there `temper`, (scale, floor), lets queries grow with their position. `unit_norm`: elsewhere queries and keys are normed, without
    weights."""

    ropeless: tuple[bool, ...]
    temper: tuple[float, float] | None
    unit_norm: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`windows` holds each layer's sliding window in tokens, 0 for none. `ffn` is the width of the layers without experts; with none of
    those, 0. With `latent`, the cache has one head of `head_dim` dimensions and no values beside its keys.

    scale: multiplies scores. interleaved: rotary pairs are neighbours in the file. sandwich: norms of what each half of a layer adds, too.
    rope_local: of the layers with a window, where it is not `rope`. norm_shift: added to norms' weights. sinks: a score of each head that
    stands for no token. stored: the form of the weights in their file; scale_block: rows and columns to which an FP8 scale belongs.
    """

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
    latent: LatentConfig | None = None
    scale: float = 1.0
    interleaved: bool = False
    activation: Gate = "silu"
    sandwich: bool = False
    embedding_scale: float = 1.0
    norm_shift: float = 0.0
    rope_local: RopeConfig | None = None
    sinks: bool = False
    chunked: ChunkedConfig | None = None
    stored: Stored = "wide"
    scale_block: tuple[int, int] = (0, 0)

    @property
    def kv_planes(self) -> int:
        """Of a block in a layer: keys and values, or what both are made of."""
        return 2 if self.latent is None else 1

    @property
    def rotated_dims(self) -> int:
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def plain(self) -> bool:
        """Are its layers what the Llama family's are?"""
        special = (self.moe, self.latent, self.rope_local, self.chunked)
        return special == (None, None, None, None) and self.activation == "silu" and not self.sinks and not self.sandwich

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and self.moe.layers[layer]

    @property
    def widest_feed_forward(self) -> int:
        """What a token fills between two matrices of a layer, all its experts' together."""
        return max(self.ffn, self.moe.width * self.moe.per_token if self.moe is not None else 0)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return self.kv_planes * self.layers * self.kv_heads * self.head_dim * itemsize


def check_tp(config: ModelConfig, tp: int, ep: int = 1) -> None:
    """Raises UsageError where a model cannot be split among so many ranks, of which `ep` groups share its experts out."""
    c = config
    if ep > 1 and c.moe is None:
        raise UsageError(f"ep {ep}: {c.name} has no routed experts to spread; remove it")
    if tp % ep:
        raise UsageError(f"ep {ep} does not divide tp {tp}: the groups that share the experts out are of as many ranks each")
    if c.moe is not None and ep > c.moe.experts:
        raise UsageError(f"ep {ep} exceeds the {c.moe.experts} experts of {c.name}")
    experts, shared = (0 if ep == tp else c.moe.width, c.moe.shared) if c.moe is not None else (0, 0)
    groups = 1 if ep == tp else ep
    fits = [
        n
        for n in range(groups, 65, groups)
        if c.heads % n == c.ffn % n == experts % (n // groups) == shared % n == 0 and heads_fit(c.kv_heads, n)
    ]
    choose = f": choose one of {', '.join(map(str, fits))}"
    for count, what, among in (
        (c.heads, "attention heads", tp),
        (c.ffn, "columns of the feed-forward", tp),
        (experts, "columns of an expert", tp // groups),
        (shared, "columns of the shared expert", tp),
    ):
        if count % among:
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
    family = next((f for begin, f in (MOE_NAMES if experts else DENSE_NAMES).items() if name.startswith(begin)), "llama")
    return _runnable(
        known,
        f"model {name}",
        {},
        name=name,
        family=family,
        max_positions=known.model.max_positions or 8192,
        norm_eps=1e-6,
        rope=RopeConfig(),
        qkv_bias=family in ("qwen2", "gpt_oss"),
        out_bias=family == "gpt_oss",
        mlp_bias=False,
        dtype="bfloat16",
    )


def parse(config: Mapping[str, Any], name: str, source: str) -> ModelConfig:
    """From a config.json's content. Raises UsageError after `source`."""
    where, family = f"model config {source}", str(config.get("model_type", ""))
    family = ALIKE.get(family, family)
    if family not in FAMILIES:
        raise UsageError(f"{where}: model_type {family!r} is not one of {', '.join([*FAMILIES, *ALIKE])}")
    stored, block = _stored(config, family, where)
    _refuse(config, family, where)
    known = huggingface.parse(config, name, source)
    if not known.model.max_positions:
        raise UsageError(f"{where} lacks 'max_position_embeddings'")
    attention_bias = bool(config.get("attention_bias", family in ("qwen2", "gpt_oss")))
    rope, local = _ropes(config, family, known.model.max_positions, source)
    return _runnable(
        known,
        where,
        config,
        name=name,
        family=family,
        max_positions=known.model.max_positions,
        norm_eps=_epsilon(config.get("rms_norm_eps", EPSILON.get(family, 1e-6)), where),
        rope=rope,
        rope_local=local,
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias and family in ("llama", "qwen3", "qwen3_moe", "gpt_oss"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        stored=stored,
        scale_block=block,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def _stored(config: Mapping[str, Any], family: str, where: str) -> tuple[Stored, tuple[int, int]]:
    """How the weights are in the file, and of FP8 the block of a scale. Raises UsageError where they are in a form that is not read."""
    written = next((config[key] for key in QUANTIZATION if config.get(key)), None)
    if not written:
        return "wide", (0, 0)
    method = written.get("quant_method", "?") if isinstance(written, Mapping) else written
    if method == "mxfp4" and family == "gpt_oss":
        return "mxfp4", (0, 0)
    block = written.get("weight_block_size") if isinstance(written, Mapping) else None
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return "fp8", (block[0], block[1])
    raise UsageError(
        f"{where}: weights quantised with {method} are not supported; load the original weights, with --quantization wint8 or wint4"
    )


def _refuse(config: Mapping[str, Any], family: str, where: str) -> None:
    """Raises UsageError on what a config of a known family may say and the engine does not do."""
    key, silent, wanted = ("hidden_activation", None, GELU) if family == "gemma3_text" else ("hidden_act", "silu", ("silu", "swish"))
    activation = config.get(key, silent) or config.get("hidden_act") or wanted[0]
    if activation not in wanted:
        raise UsageError(f"{where}: {key} {activation!r} is not supported, only {wanted[0]}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "use_bias"):
        if config.get(key):
            raise UsageError(f"{where}: {key} {config[key]!r} is not supported")
    if config.get("attention_bias") and family.startswith("deepseek"):
        raise UsageError(f"{where}: attention_bias is not supported for {family}")


def _runnable(known: Understood, where: str, config: Mapping[str, Any], *, family: str, **more: Any) -> ModelConfig:
    """What the cost models understand, where all layers have the same attention, softmax or MLA, and a gated feed-forward of one width or
    routed experts. Raises UsageError where they are not."""
    layers, outer = known.decoder.layers, known.decoder.outer
    mixers = [mixer for layer in layers for mixer in layer.mixers]
    feeds: list[FeedForward] = [feed for layer in layers for feed in layer.feed_forwards]
    moe = moe_of(family, config, feeds, where)
    ffn = dense_width(feeds)
    if (
        not (_alike_softmax(mixers) or _alike_latent(mixers))
        or (not ffn and (moe is None or not all(moe.layers)))
        or not len(mixers) == len(feeds) == len(layers)
    ):
        raise UsageError(f"{where}: only models of the families {', '.join(FAMILIES)} run here, all of whose layers are alike")
    shape = _attention(mixers[0], config, more["rope"])
    if shape["head_dim"] % 2:
        raise UsageError(f"{where}: head_dim {shape['head_dim']} must be even")
    gemma = family == "gemma3_text"
    return ModelConfig(
        family=family,
        layers=len(layers),
        hidden=known.decoder.hidden,
        ffn=ffn,
        vocab=outer.vocab,
        tied=outer.tied,
        qk_norm=family in QK_NORM,
        windows=tuple(getattr(mixer, "window", 0) for mixer in mixers),
        moe=moe,
        interleaved=family in INTERLEAVED and bool(config.get("rope_interleave", True)),
        activation="gelu_tanh" if gemma else "silu",
        sandwich=gemma,
        embedding_scale=known.decoder.hidden**0.5 if gemma else 1.0,
        norm_shift=1.0 if gemma else 0.0,
        sinks=family == "gpt_oss",
        chunked=_chunked(config, len(layers)) if family == "llama4_text" else None,
        **shape,
        **more,
    )


def _chunked(config: Mapping[str, Any], layers: int) -> ChunkedConfig:
    rotary = config.get("no_rope_layers") or [(i + 1) % int(config.get("no_rope_layer_interval") or 4) for i in range(layers)]
    tempered = bool(config.get("attn_temperature_tuning", True))
    temper = (float(config.get("attn_scale") or 0.1), float(config.get("floor_scale") or 8192)) if tempered else None
    return ChunkedConfig(tuple(not use for use in rotary), temper, bool(config.get("use_qk_norm", True)))


def _alike_softmax(mixers: Sequence[Mixer]) -> bool:
    first = mixers[0]
    return isinstance(first, Softmax) and all(isinstance(m, Softmax) and replace(m, window=first.window) == first for m in mixers)


def _alike_latent(mixers: Sequence[Mixer]) -> bool:
    """No indexer of a sparse attention among them."""
    first = mixers[0]
    return isinstance(first, Latent) and not first.top_k and not first.shares_kv and all(m == first for m in mixers)


def _attention(mixer: Mixer, config: Mapping[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """What its kind says of heads. Source of MLA's scale: DeepSeek-V2's YaRN, whose temperature is squared in the scores."""
    if isinstance(mixer, Latent):
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        temper = _mscale(rope.factor, float(scaling.get("mscale_all_dim") or 0.0)) if rope.scaling == "yarn" else 1.0
        return {
            "heads": mixer.heads,
            "kv_heads": 1,
            "head_dim": mixer.latent + mixer.rope_dim,
            "scale": (mixer.nope_dim + mixer.rope_dim) ** -0.5 * temper**2,
            "latent": LatentConfig(mixer.latent, mixer.rope_dim, mixer.nope_dim, mixer.v_dim, mixer.q_rank),
        }
    assert isinstance(mixer, Softmax)
    scalar = float(config.get("query_pre_attn_scalar") or mixer.head_dim)
    return {"heads": mixer.heads, "kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "scale": scalar**-0.5}


def _epsilon(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{where}: rms_norm_eps must be a positive number, not {value!r}")
    return float(value)


def _ropes(config: Mapping[str, Any], family: str, max_positions: int, source: str) -> tuple[RopeConfig, RopeConfig | None]:
    """Of all layers, and where they have another, of those with a window."""
    theta = THETA.get(family, 10000.0)
    if family != "gemma3_text":
        return _rope(config, max_positions, source, theta), None
    by_kind = config.get("rope_parameters") or {}
    if "full_attention" in by_kind:
        whole, local = (
            _rope({"rope_parameters": by_kind.get(kind)}, max_positions, source, base)
            for kind, base in (("full_attention", theta), ("sliding_attention", 10000.0))
        )
        return whole, local
    return _rope(config, max_positions, source, theta), RopeConfig(float(config.get("rope_local_base_freq") or 10000.0))


def _rope(config: Mapping[str, Any], max_positions: int, source: str, base: float) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`. `base`: where neither says theta."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or base)
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
