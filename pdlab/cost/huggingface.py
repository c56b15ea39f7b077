"""A Hugging Face config.json, read into a Model, and what of it was understood.

The `model_type` says which family's rules hold (`pdlab.cost.families`). Unknown ones are errors: of a family that nobody has described,
neither the feed-forward's matrices nor which layers keep KV are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pdlab.core.file_kinds import MODEL_CONFIG, in_place_of, kind_by_keys
from pdlab.core.json_file import json_object
from pdlab.core.types import UsageError, nearest
from pdlab.cost import decoders, hybrids, own_code, special
from pdlab.cost.config_keys import HEADS, HIDDEN, LAYERS, POSITIONS, Keys
from pdlab.cost.decoders import Decoder
from pdlab.cost.families import FAMILIES, REFUSED, Family
from pdlab.cost.layers import assemble
from pdlab.cost.quantization import Quantization
from pdlab.cost.quantization_formats import Mistake
from pdlab.cost.quantization_methods import read_quantization
from pdlab.cost.shapes import Model

DTYPE = ("torch_dtype", "dtype")
QUANTIZATION = ("quantization_config", "compression_config", "quantization")
TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "text_model_config")
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
WIDTHS = {"float32": "fp32", "float": "fp32", "float16": "bf16", "half": "bf16", "bfloat16": "bf16", "auto": "bf16"}
BUILDERS: dict[str, Callable[[Keys, Family], Decoder]] = {
    function.__name__: function
    for function in (
        decoders.decoder, decoders.latent, special.chatglm, special.falcon, special.gpt_neo, special.mpt, special.dbrx, special.arctic,
        special.hunyuan, special.gated_attention, special.gemma3n, special.gemma4, hybrids.gated_delta, hybrids.jamba, hybrids.bamba,
        hybrids.falcon_h1, hybrids.granite_hybrid, hybrids.nemotron_h, hybrids.lightning, hybrids.kimi_linear, hybrids.short_conv,
        own_code.grok2, own_code.step3, own_code.mimo_v2, own_code.ring_linear,
    )
}  # fmt: skip
SIXTEEN = "16 bits a weight (no dtype is stated)"


@dataclass(frozen=True, slots=True)
class Understood:
    """A model, and how it was read: `decoder` has its layers, of which `model` is the sum; `filled` class defaults, `ignored` keys,
    `remarks` in words."""

    model: Model
    decoder: Decoder
    model_type: str = ""
    quantization: str = ""
    filled: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def read_config(path: Path) -> Model:
    """The model whose config.json lies at `path`. Raises UsageError when it can't be read, or a key that decides a figure is missing or not
    understood."""
    return understand(path).model


def understand(path: Path) -> Understood:
    """As `read_config`, with how it was read."""
    name = path.parent.name if path.name == "config.json" else path.stem
    return parse(config_at(path), name or "model", str(path))


def config_at(path: Path) -> dict[str, Any]:
    """What the file says, with the quantisation that a file beside it says. Raises UsageError."""
    config = json_object(path, "model config")
    if "model_type" not in config and (instead := in_place_of(path, kind_by_keys(config), MODEL_CONFIG)):
        raise UsageError(f"model: {instead}")
    if not (config.get("quantization_config") or config.get("compression_config")) and path.name == "config.json":
        beside = next((path.parent / name for name in QUANTIZATION_FILES if (path.parent / name).is_file()), None)
        if beside is not None:
            config = config | {"quantization_config": json_object(beside, "model config")}
    return config


def parse_config(config: Mapping[str, Any], name: str, source: str = "") -> Model:
    """The Model a config describes; a multi-modal one's text part. Raises UsageError as `read_config`."""
    return parse(config, name, source).model


def parse(config: Mapping[str, Any], name: str, source: str = "") -> Understood:
    where = f"model config {source or name}"
    try:
        return _parse(config, name, source, where)
    except Mistake as error:
        raise UsageError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise UsageError(f"{where} has a value of the wrong kind: {error}") from None


def _read_layers(config: Mapping[str, Any], kind: str, where: str, *, nested: bool = False) -> tuple[Decoder, Keys]:
    """The layers of a config of this model_type, and which of its keys were read. `where` begins each message."""
    family = _family(kind, where)
    keys = Keys(config, {**family.facts, **class_defaults().get(kind, {})}, where, nested=nested)
    if keys.flag("is_encoder_decoder", otherwise=False):
        raise UsageError(
            f"{where}: model_type {kind!r} is an encoder-decoder, whose cross-attention's KV is not modelled: give a decoder's"
        )
    keys.read.update((*QUANTIZATION, "model_type", "architectures", "auto_map", *POSITIONS, *DTYPE))
    read = BUILDERS[family.build](keys, family)
    keys.ignored(family.unused)
    return read, keys


def _parse(config: Mapping[str, Any], name: str, source: str, where: str) -> Understood:
    outside = str(config.get("model_type", "")).lower()
    if outside in REFUSED:
        _family(outside, where)
    text, nested = _text(config)
    kind = _model_type(text, config, where, nested)
    read, keys = _read_layers(text, kind, where, nested=nested)
    width = keys.get(*DTYPE)
    quantization = _quantization(keys, width, where)
    model = assemble(
        name=name,
        hidden=read.hidden,
        layers=read.layers,
        outer=read.outer,
        quantization=quantization,
        max_positions=_context(keys),
        source=source,
    )
    if quantization.default.is_quantised and not any(w.format.is_quantised for w in model.weights):
        raise UsageError(
            f"{where}: quantization_config says {quantization.dtype}, and names no module of this model: see its targets and exceptions"
        )
    if not model.attention:
        raise UsageError(f"{where}: no layer keeps KV, so that there is nothing to hand off token by token: give a config with attention")
    remarks = [*quantization.remarks, *(() if width else (SIXTEEN,))]
    if nested or config.get("vision_config"):
        remarks.append("of a model with more than text, only the text part is counted")
    ignored = tuple(keys.ignored(FAMILIES[kind].unused))
    return Understood(model, read, kind, _in_words(quantization), keys.filled, ignored, tuple(remarks))


def _context(keys: Keys) -> int:
    """0: not stated."""
    stated = keys.get(*POSITIONS)
    return 0 if stated is None else keys.check(POSITIONS, stated, least=0)


def _text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The part that generates text, with what the whole says of all: ties, quantisation, dtype."""
    for key in TEXT:
        inner = config.get(key)
        if isinstance(inner, Mapping) and inner:
            above = {k: config[k] for k in ("tie_word_embeddings", *QUANTIZATION, *DTYPE) if config.get(k) is not None}
            deeper, _ = _text({**above, **{k: v for k, v in inner.items() if v is not None or k not in above}})
            return deeper, True
    return config, False


def _model_type(text: Mapping[str, Any], config: Mapping[str, Any], where: str, nested: bool) -> str:
    kind = text.get("model_type")
    if not kind and nested:
        outside = str(config.get("model_type", "")).lower()
        kind = _by_class(text) or (f"{outside}_text" if f"{outside}_text" in FAMILIES else None)
        if kind is None and outside.startswith(("llava", "vipllava")):
            kind = "llama"
    if not kind:
        for key, value in text.items():  # something worse may be wrong with it
            if key in LAYERS + HIDDEN + HEADS:
                Keys(text, {}, where).check((key,), value)
        raise UsageError(f"{where} lacks 'model_type': add it, as the model's class has it")
    if kind == "git" and "Grok1ForCausalLM" in (text.get("architectures") or ()):
        return "grok-2"  # whose published config says so
    return str(kind).lower()


def _by_class(text: Mapping[str, Any]) -> str | None:
    """The model_type whose causal decoder `architectures` names: DeepseekV2ForCausalLM is deepseek_v2's."""
    names = [str(name).lower().removesuffix("forcausallm") for name in text.get("architectures") or ()]
    return next((kind for kind in FAMILIES for name in names if kind.replace("_", "").replace("-", "") == name), None)


def _family(kind: str, where: str) -> Family:
    if kind in REFUSED:
        raise UsageError(f"{where}: model_type {kind!r} {REFUSED[kind]}: give a decoder's config")
    family = FAMILIES.get(kind)
    if family is None:
        raise UsageError(
            f"{where}: unknown model_type {kind!r}{nearest(kind, list(FAMILIES))}; where it has the same matrices and keys as a known one, "
            "write that one's model_type"
        )
    return family


def _quantization(keys: Keys, width: object, where: str) -> Quantization:
    dtype = str(width or "bfloat16").removeprefix("torch.")
    if dtype not in WIDTHS:
        raise UsageError(f"{where}: unknown dtype {dtype!r}{nearest(dtype, list(WIDTHS))}")
    written, mlx = keys.get(*QUANTIZATION[:2]), keys.get(QUANTIZATION[2])
    if isinstance(mlx, Mapping):
        written = {"quant_method": "mlx"} | dict(mlx)
    if written is not None and not isinstance(written, Mapping):
        raise UsageError(f"{where} has a value of the wrong kind: quantization_config must be a mapping")
    if mlx is not None and not isinstance(mlx, Mapping):
        raise UsageError(f"{where}: quantization {mlx!r} says no bits: write a quantization_config with its quant_method")
    return read_quantization(written, WIDTHS[dtype])


def _in_words(quantization: Quantization) -> str:
    if quantization.method == "none":
        return "none"
    bits = 8 * quantization.default.bytes_per_value
    computed = f", computed in {quantization.default.compute}" if quantization.default.is_quantised else ""
    return f"{quantization.method}: {quantization.dtype}, {bits:.2f} bits a weight{computed}"


@cache
def class_defaults() -> dict[str, dict[str, Any]]:
    """What transformers' classes fill in, by model_type."""
    text = resources.files("pdlab.cost").joinpath("class_defaults.json").read_text(encoding="utf-8")
    defaults: dict[str, dict[str, Any]] = json.loads(text)
    return defaults
