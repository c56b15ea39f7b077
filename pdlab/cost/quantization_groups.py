"""compressed-tensors and NVIDIA's modelopt: schemes for groups of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pdlab.core.types import nearest
from pdlab.cost.dtypes import Format
from pdlab.cost.quantization import Names, Quantization, Rule
from pdlab.cost.quantization_formats import Config, Mistake, beside, floats, integers, kv_remark, left_alone, whole

CLASSES = ("Linear", "Embedding", "Experts", "MoE", "ParallelLMHead")


def compressed_tensors(config: Config, wide: Format, method: str) -> Quantization:
    """Groups of modules by `targets`; a class's name (Linear) stands for all, head included, but for those in `ignore`."""
    sparsity = config.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise Mistake(f"quantization_config.sparsity_config.format {sparsity['format']!r}: sparse weights are not supported")
    packed = config.get("format")
    known = ("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
             "mxfp4-pack-quantized", "mxfp8-quantized", "mxfp8-pack-quantized", "mixed-precision", None)  # fmt: skip
    if packed not in known:
        raise Mistake(f"unknown quantization_config.format {packed!r}{nearest(str(packed), [k for k in known if k])}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise Mistake("quantization_config of compressed-tensors lacks 'config_groups'")
    rules, default, embedding = list(left_alone(config)), None, False
    for name, group in groups.items():
        if isinstance(group, list):
            group = {"targets": group} | _preset(name)  # short for a preset and what it is for
        elif not isinstance(group, Mapping) or "weights" not in group:
            raise Mistake(f"quantization_config.config_groups.{name} lacks 'weights'")
        stored = _scheme(group.get("weights"), group.get("input_activations"), f"config_groups.{name}", wide)
        targets = group.get("targets") or ["Linear"]
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise Mistake(f"quantization_config.config_groups.{name}.targets must be a list of modules or classes, not {targets!r}")
        classes = [t for t in targets if t[:1].isupper()]
        unknown = [c for c in classes if not any(part in c for part in CLASSES)]
        if unknown and stored.is_quantised:
            raise Mistake(f"config_groups.{name}.targets has an unknown class {unknown[0]!r}: Linear, Embedding and experts are known")
        embedding |= "Embedding" in classes
        if any("Linear" in c or "Experts" in c or "MoE" in c for c in classes):
            default = default or stored
        named = [t for t in targets if t not in classes]
        if named:
            rules.append(Rule(Names(named), stored))
    main = default or (rules[-1].format if rules else None) or wide
    if default is None:  # every group names its modules: the rest is wide
        rules.append(Rule(Names([".*"], regex=True), None))
    if packed == "dense":
        return Quantization(method, wide, wide, remarks=("format dense: quantised values, stored unquantised",))
    return Quantization(method, main, wide, tuple(rules), head=default is not None, embedding=embedding, remarks=kv_remark(config))


def _preset(name: str) -> dict[str, Any]:
    bits = {"num_bits": 8, "type": "float", "strategy": "channel"}, {"num_bits": 8, "type": "int", "strategy": "channel"}
    four = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    presets: dict[str, dict[str, Any]] = {
        "FP8": {"weights": bits[0], "input_activations": bits[0]},
        "FP8_DYNAMIC": {"weights": bits[0], "input_activations": bits[0]},
        "W8A8": {"weights": bits[1], "input_activations": bits[1]},
        "INT8": {"weights": bits[1], "input_activations": bits[1]},
        "W8A16": {"weights": bits[1]},
        "W4A16": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}},
        "NVFP4": {"weights": four, "input_activations": four},
        "NVFP4A16": {"weights": four},
    }
    if name not in presets:
        raise Mistake(f"quantization_config.config_groups.{name} is not a preset known here: {', '.join(presets)}")
    return presets[name]


def _scheme(weights: Config | None, inputs: Config | None, where: str, wide: Format) -> Format:
    """One scheme of compressed-tensors and of modelopt: num_bits, type, strategy, group_size, symmetric."""
    if not weights:
        return wide  # activations only, or KV
    bits, kind = whole(weights, "num_bits", where=where), str(weights.get("type", "int")).lower()
    strategy = weights.get("strategy")
    group = weights.get("group_size") or 0
    if strategy in ("group", "tensor_group"):
        group = whole(weights, "group_size", where=where)
        if group == 0 or group < -1:
            raise Mistake(f"{where}.group_size must be positive, or -1 for whole channels, not {group}")
    elif strategy not in (None, "channel", "tensor", "block", "token"):
        raise Mistake(f"{where}.weights.strategy {strategy!r} is not one of tensor, channel, group, tensor_group, block")
    elif strategy is not None:
        group = 0
    computes = _inputs(inputs)
    if kind == "float" and bits == 4:
        return beside(floats(bits, group, nv=strategy == "tensor_group"), _input_bits(inputs), computes)
    if kind == "float":
        return floats(bits, group, computes=computes)
    if kind == "int":
        return integers(bits, group, zeros=weights.get("symmetric") is False, computes=computes)
    raise Mistake(f"{where}.weights.type {kind!r} is not one of int, float")


def _inputs(inputs: Config | None) -> str:
    if not inputs or _input_bits(inputs) != 8:
        return "bf16"
    return "fp8" if inputs.get("type") == "float" else "int8"


def _input_bits(inputs: Config | None) -> int:
    return whole({"num_bits": 16, **(inputs or {})}, "num_bits", where="input_activations")


def modelopt(config: Config, wide: Format, method: str) -> Quantization:
    """NVIDIA's: in config.json, or under `quantization` in hf_quant_config.json; MIXED_PRECISION lists each module."""
    inner = config.get("quantization")
    if isinstance(inner, Mapping):
        config = {**config, **inner}
    algorithm = config.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        return _modelopt_mixed(config, wide, method)
    if algorithm is None:
        if config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme"):
            return Quantization(method, wide, wide, remarks=kv_remark(config))
        if config.get("config_groups"):
            return replace(compressed_tensors({k: v for k, v in config.items() if k != "format"}, wide, method), head=False)
        raise Mistake("quantization_config of modelopt lacks 'quant_algo'")
    stored = _algorithm(algorithm, config)
    return Quantization(method, stored, wide, left_alone(config), remarks=kv_remark(config))


def _modelopt_mixed(config: Config, wide: Format, method: str) -> Quantization:
    listed = config.get("quantized_layers")
    if not isinstance(listed, Mapping) or not listed:
        raise Mistake("quantization_config of modelopt says MIXED_PRECISION and lacks 'quantized_layers'")
    by_format: dict[Format, list[str]] = {}
    for name, other in listed.items():
        by_format.setdefault(_algorithm(other.get("quant_algo"), other), []).append(name)
    most = max(by_format, key=lambda stored: len(by_format[stored]))
    rules = [
        *left_alone(config),
        *(Rule(Names(names), stored) for stored, names in by_format.items()),
        Rule(Names([".*"], regex=True), None),
    ]
    return Quantization(method, most, wide, tuple(rules), remarks=kv_remark(config))


def _algorithm(name: object, config: Config) -> Format:
    """modelopt's names of what is done to weights."""
    algorithm = str(name).upper()
    group = int(config.get("group_size") or 0)
    known: dict[str, Callable[[], Format]] = {
        "FP8": lambda: floats(8, computes="fp8"),
        "FP8_PER_CHANNEL_PER_TOKEN": lambda: floats(8, computes="fp8"),
        "FP8_PER_TENSOR": lambda: floats(8, computes="fp8"),
        "FP8_BLOCK_SCALES": lambda: floats(8, computes="fp8"),
        "FP8_PB_REAL": lambda: floats(8, computes="fp8"),
        "FP8_PB_WO": lambda: floats(8),
        "MXFP8": lambda: floats(8, 32, computes="fp8"),
        "MXFP4": lambda: floats(4, 32),
        "W4A8_MXFP4_FP8": lambda: floats(4, 32),
        "NVFP4": lambda: floats(4, 16, nv=True),
        "NVFP4_AWQ": lambda: floats(4, 16, nv=True),
        "NVFP4_SVDQUANT": lambda: floats(4, 16, nv=True),
        "W4A16_NVFP4": lambda: beside(floats(4, 16, nv=True), 16, "bf16"),
        "W4A8_NVFP4_FP8": lambda: beside(floats(4, 16, nv=True), 8, "fp8"),
        "INT8": lambda: integers(8, 0, computes="int8"),
        "INT8_SQ": lambda: integers(8, 0, computes="int8"),
        "W8A8_SQ_PER_CHANNEL": lambda: integers(8, 0, computes="int8"),
        "W8A16": lambda: integers(8, 0),
        "INT4_AWQ": lambda: integers(4, group or 128),
        "W4A16": lambda: integers(4, group or 128),
        "W4A16_AWQ": lambda: integers(4, group or 128),
        "W4A8_AWQ": lambda: integers(4, group or 128, computes="fp8"),
    }
    if algorithm not in known:
        raise Mistake(f"unknown quant_algo {name!r}{nearest(algorithm, list(known))}")
    return known[algorithm]()
