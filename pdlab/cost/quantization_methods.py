"""The `quantization_config` of a config.json, as transformers, compressed-tensors, modelopt, fbgemm, bitsandbytes, quark, torchao,
auto-round, GPTQ, AWQ and others write it. What decides how many bytes a weight takes and is unknown or missing is an error that names it.

Bytes of a weight: its bits, and what a group of weights shares: a scale (16 bits; 8 in MX and NVFP4) and, where not symmetric, a zero
point. Scales of whole channels and of 128 x 128 blocks are left out: under 0.1 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pdlab.cost.dtypes import Format, plain
from pdlab.cost.quantization import Names, Quantization, Rule, unquantised
from pdlab.cost.shapes import Part
from pdlab.mistakes import nearest

Config = Mapping[str, Any]
IGNORED = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "exclude", "llm_int8_skip_modules", "skip_modules")
REFUSED = {
    "aqlm": "its codebooks' sizes are not in the config",
    "vptq": "its codebooks' sizes are not in the config",
    "spqr": "the number of its outliers is not in the config",
    "squeezellm": "the number of its outliers is not in the config",
    "gguf": "a GGUF file says itself how each tensor is stored",
    "exl2": "its bits differ from matrix to matrix, and are not in the config",
    "exl3": "its bits differ from matrix to matrix, and are not in the config",
}


class Mistake(ValueError):
    """Something in a quantization_config that decides a figure and is not understood; the reader adds which file."""


def read_quantization(config: Config | None, dtype: str) -> Quantization:
    """How the weights of a checkpoint in `dtype` are stored. Raises Mistake."""
    if not config:
        return unquantised(dtype)
    method = str(config.get("quant_method") or _method_by_its_keys(config)).lower().replace("_", "-")
    method = method.removeprefix("intel/")
    for suffix in ("-marlin", "-triton"):
        method = method.removesuffix(suffix)
    if method in REFUSED:
        raise Mistake(f"quant_method {method!r} is not supported: {REFUSED[method]}; set cost.weight_dtype and give the unquantised config")
    read = METHODS.get(method)
    if read is None:
        raise Mistake(
            f"unknown quant_method {config.get('quant_method')!r}{nearest(method, list(METHODS))}; "
            "or leave quantization_config out and set cost.weight_dtype"
        )
    return read(config, unquantised(dtype).wide, method)


def _method_by_its_keys(config: Config) -> str:
    """Older checkpoints leave quant_method out."""
    if config.get("quant_algo") or "quantization" in config or "quantized_layers" in config:
        return "modelopt"
    if any(key in config for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")):
        return "bitsandbytes"
    if "config_groups" in config:
        return "compressed-tensors"
    if "w_bit" in config:
        return "awq"
    if "bits" in config and "group_size" in config:
        return "gptq"
    raise Mistake("quantization_config lacks 'quant_method'")


def _whole(config: Config, *keys: str, where: str = "quantization_config") -> int:
    for key in keys:
        value = config.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise Mistake(f"{where}.{key} must be a whole number, not {value!r}")
            return value
    raise Mistake(f"{where} lacks {keys[0]!r}")


def integers(bits: int, group: int, *, zeros: bool = False, computes: str = "bf16", scale_bytes: float = 2.0) -> Format:
    """Integer weights of `bits`, a scale (and a zero point) for `group` of them; none or negative: for a whole channel."""
    if not 1 <= bits <= 8:
        raise Mistake(f"{bits} bits a weight are not one of 1 to 8")
    shared = (scale_bytes + (bits / 8 if zeros else 0.0)) / group if group > 0 else 0.0
    return Format("int8" if bits == 8 else f"wint{bits}", bits / 8 + shared, computes)


def floats(bits: int, group: int = 0, *, computes: str = "bf16", nv: bool = False, scale_bytes: float = 2.0) -> Format:
    """Floating-point weights: fp8, MX formats by their groups of 32, NVFP4 by its 16. Four bits are widened to bf16."""
    if bits == 4 and (nv or group == 16):
        return Format("nvfp4", 0.5 + 1 / 16, "bf16")
    if bits in (4, 6) and group in (0, 32):
        return plain(f"mxfp{bits}") if bits == 4 else Format("mxfp6", 0.75 + 1 / 32, "bf16")
    if bits == 8 and group == 32:
        return Format("mxfp8", 1.0 + 1 / 32, computes)
    if bits == 8:
        return Format("fp8", 1.0 + (scale_bytes / group if group > 0 else 0.0), computes)
    raise Mistake(f"floating-point weights of {bits} bits in groups of {group} are not known here")


def _names(config: Config, *more: str) -> list[str]:
    listed: list[str] = list(more)
    for key in IGNORED:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple):
            raise Mistake(f"quantization_config.{key} must be a list of modules, not {value!r}")
        listed += value
    return listed


def _left(config: Config, *more: str, regex: bool = False) -> tuple[Rule, ...]:
    """The modules that are left unquantised."""
    listed = _names(config, *more)
    try:
        return (Rule(Names(listed, regex=regex), None),) if listed else ()
    except ValueError as error:
        raise Mistake(f"quantization_config: {error}") from None


def _kv(config: Config) -> tuple[str, ...]:
    scheme = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo") or config.get("kv_cache_quant_method")
    if not scheme:
        return ()
    kind = f"{scheme.get('type')} {scheme.get('num_bits')} bits" if isinstance(scheme, Mapping) else str(scheme)
    return (f"scales for KV in {kind} are there; KV is counted in the number format of cost.kv_dtype",)


def _fp8(config: Config, wide: Format, method: str) -> Quantization:
    """transformers' and DeepSeek's fine-grained fp8, fbgemm's, and vLLM's."""
    weight_only = config.get("activation_scheme") in ("none", "weight_only")
    dtype = str(config.get("weight_dtype") or config.get("fmt") or config.get("dtype") or "e4m3").lower()
    if not any(known in dtype for known in ("e4m3", "e5m2", "fp8", "float8")):
        raise Mistake(f"quantization_config says 8-bit floats of an unknown kind {dtype!r}: e4m3 and e5m2 are known")
    return Quantization(method, floats(8, computes="bf16" if weight_only else "fp8"), wide, _left(config), remarks=_kv(config))


def _named_float(bits: int, nv: bool = False, only: frozenset[Part] | None = None) -> Callable[[Config, Format, str], Quantization]:
    def read(config: Config, wide: Format, method: str) -> Quantization:
        stored = floats(bits, 16 if nv else 32, nv=nv, computes="fp8" if bits == 8 else "bf16")
        return Quantization(method, stored, wide, _left(config), only=only)

    return read


ALWAYS_ZEROS = ("gptq", "gptqmodel", "auto-gptq", "auto-round", "autoround", "metal", "sinq")  # symmetric or not, they are stored


def _grouped(config: Config, wide: Format, method: str) -> Quantization:
    """GPTQ, AWQ, auto-round and others with bits and group_size, and other bits for some modules."""
    bits, group = _whole(config, "bits", "w_bit", "nbits", "num_bits"), _group(config)
    kind = str(config.get("data_type") or "int").lower()
    zeros = method in ALWAYS_ZEROS or bool(config.get("zero_point", config.get("zero_points", "awq" in method)))
    stored = _of_kind(kind, bits, group, zeros, _activations(config))
    rules = [*_left(config), *_dynamic(config, bits, group, zeros), *_extra(config, bits, group, zeros, kind)]
    return Quantization(method, stored, wide, tuple(rules), head=config.get("lm_head") is True or config.get("quant_lm_head") is True)


def _group(config: Config) -> int:
    value = config.get("group_size", config.get("q_group_size"))
    if value in ("channel", "per_channel"):
        return -1
    return _whole(config, "group_size", "q_group_size")


def _activations(config: Config) -> str:
    bits = config.get("act_bits", 16)
    if bits in (16, 32, None):
        return "bf16"
    if bits == 8:
        return "fp8" if "fp" in str(config.get("act_data_type", "")) else "int8"
    if bits == 4:
        return "bf16"
    raise Mistake(f"quantization_config.act_bits {bits!r} is not one of 4, 8, 16")


def _of_kind(kind: str, bits: int, group: int, zeros: bool, computes: str) -> Format:
    """auto-round's data_type; other methods have integers."""
    if kind.startswith(("int", "uint")):
        return integers(bits, group, zeros=zeros, computes=computes)
    if kind.startswith(("mx", "nv")):
        return floats(bits, group, nv=kind.startswith("nv"), computes="fp8" if bits == 8 else "bf16")
    if kind.startswith(("fp", "float")):
        return floats(bits, max(group, 0), computes=computes)
    raise Mistake(f"quantization_config.data_type {kind!r} is not one of int, mx_fp, nv_fp, fp")


def _dynamic(config: Config, bits: int, group: int, zeros: bool) -> list[Rule]:
    """GPTQModel's: regular expressions of modules, with - in front for those left alone, with + or none for other bits."""
    rules = []
    for pattern, other in (config.get("dynamic") or {}).items():
        name, skips = re.sub(r"^[+-]:", "", pattern), pattern.startswith("-:")
        stored = None if skips else integers(int(other.get("bits", bits)), int(other.get("group_size", group)), zeros=zeros)
        rules.append(Rule(Names([f".*(?:{name})"], regex=True), stored))
    return rules


def _extra(config: Config, bits: int, group: int, zeros: bool, kind: str) -> list[Rule]:
    """auto-round's: modules with other bits; 16 bits and more are none."""
    rules = []
    for name, other in (config.get("extra_config") or {}).items():
        own = int(other.get("bits", bits))
        kept = str(other.get("data_type") or kind)
        stored = None if own >= 16 else _of_kind(kept, own, int(other.get("group_size", group)), zeros, _activations(config | other))
        rules.append(Rule(Names([name]), stored))
    return rules


def _bitsandbytes(config: Config, wide: Format, method: str) -> Quantization:
    """NF4 and FP4 keep the largest of 64 weights as a float32, or as a byte when quantised again."""
    four = config.get("load_in_4bit", config.get("_load_in_4bit"))
    eight = config.get("load_in_8bit", config.get("_load_in_8bit"))
    if not four and not eight:
        raise Mistake("quantization_config of bitsandbytes says neither load_in_4bit nor load_in_8bit: set one to true")
    if eight:
        return Quantization(method, integers(8, 0, computes="int8"), wide, _left(config))
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise Mistake(f"quantization_config.bnb_4bit_quant_type {kind!r} is not one of nf4, fp4")
    shared = 1 / 64 + 4 / (64 * 256) if config.get("bnb_4bit_use_double_quant") else 4 / 64
    return Quantization(method, Format("wint4", 0.5 + shared, "bf16"), wide, _left(config), remarks=(f"4-bit weights are {kind}",))


def _compressed_tensors(config: Config, wide: Format, method: str) -> Quantization:
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
    rules, default, embedding = list(_left(config)), None, False
    for name, group in groups.items():
        if isinstance(group, list):
            group = {"targets": group} | _preset(name)  # short for a preset and what it is for
        elif "weights" not in group and "targets" not in group:
            raise Mistake(f"quantization_config.config_groups.{name} lacks 'weights'")
        stored = _scheme(group.get("weights"), group.get("input_activations"), f"config_groups.{name}", wide)
        targets = group.get("targets") or ["Linear"]
        classes = [t for t in targets if t[:1].isupper()]
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
    return Quantization(method, main, wide, tuple(rules), head=default is not None, embedding=embedding, remarks=_kv(config))


def _preset(name: str) -> dict[str, Any]:
    bits = {"num_bits": 8, "type": "float", "strategy": "channel"}, {"num_bits": 8, "type": "int", "strategy": "channel"}
    presets: dict[str, dict[str, Any]] = {
        "FP8": {"weights": bits[0], "input_activations": bits[0]},
        "FP8_DYNAMIC": {"weights": bits[0], "input_activations": bits[0]},
        "W8A8": {"weights": bits[1], "input_activations": bits[1]},
        "INT8": {"weights": bits[1], "input_activations": bits[1]},
        "W8A16": {"weights": bits[1]},
        "W4A16": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}},
        "NVFP4": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}},
    }
    if name not in presets:
        raise Mistake(f"quantization_config.config_groups.{name} is not a preset known here: {', '.join(presets)}")
    return presets[name]


def _scheme(weights: Config | None, inputs: Config | None, where: str, wide: Format) -> Format:
    """One scheme of compressed-tensors and of modelopt: num_bits, type, strategy, group_size, symmetric."""
    if not weights:
        return wide  # activations only, or KV
    bits, kind = _whole(weights, "num_bits", where=where), str(weights.get("type", "int")).lower()
    strategy = weights.get("strategy")
    group = weights.get("group_size") or 0
    if strategy in ("group", "tensor_group"):
        group = _whole(weights, "group_size", where=where)
    elif strategy not in (None, "channel", "tensor", "block", "token"):
        raise Mistake(f"{where}.weights.strategy {strategy!r} is not one of tensor, channel, group, tensor_group, block")
    elif strategy is not None:
        group = 0
    computes = _inputs(inputs)
    if kind == "float":
        return floats(bits, group, nv=bits == 4 and strategy == "tensor_group", computes=computes)
    if kind == "int":
        return integers(bits, group, zeros=weights.get("symmetric") is False, computes=computes)
    raise Mistake(f"{where}.weights.type {kind!r} is not one of int, float")


def _inputs(inputs: Config | None) -> str:
    if not inputs or int(inputs.get("num_bits", 16)) != 8:
        return "bf16"
    return "fp8" if inputs.get("type") == "float" else "int8"


def _modelopt(config: Config, wide: Format, method: str) -> Quantization:
    """NVIDIA's: in config.json, or under `quantization` in hf_quant_config.json; MIXED_PRECISION lists each module."""
    inner = config.get("quantization")
    if isinstance(inner, Mapping):
        config = {**config, **inner}
    algorithm = config.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        return _modelopt_mixed(config, wide, method)
    if algorithm is None:
        if config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme"):
            return Quantization(method, wide, wide, remarks=_kv(config))
        if config.get("config_groups"):
            return replace(_compressed_tensors({k: v for k, v in config.items() if k != "format"}, wide, method), head=False)
        raise Mistake("quantization_config of modelopt lacks 'quant_algo'")
    stored = _algorithm(algorithm, config)
    return Quantization(method, stored, wide, _left(config), remarks=_kv(config))


def _modelopt_mixed(config: Config, wide: Format, method: str) -> Quantization:
    listed = config.get("quantized_layers")
    if not isinstance(listed, Mapping) or not listed:
        raise Mistake("quantization_config of modelopt says MIXED_PRECISION and lacks 'quantized_layers'")
    by_format: dict[Format, list[str]] = {}
    for name, other in listed.items():
        by_format.setdefault(_algorithm(other.get("quant_algo"), other), []).append(name)
    most = max(by_format, key=lambda stored: len(by_format[stored]))
    rules = [*_left(config), *(Rule(Names(names), stored) for stored, names in by_format.items()), Rule(Names([".*"], regex=True), None)]
    return Quantization(method, most, wide, tuple(rules), remarks=_kv(config))


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
        "W4A16_NVFP4": lambda: floats(4, 16, nv=True),
        "W4A8_NVFP4_FP8": lambda: floats(4, 16, nv=True),
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


QUARK = {
    "int2": 2, "uint2": 2, "int3": 3, "uint3": 3, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8,
}  # fmt: skip


def _quark(config: Config, wide: Format, method: str) -> Quantization:
    """AMD's: one config for all, others by name, and by class."""
    every = config.get("global_quant_config")
    if not isinstance(every, Mapping):
        raise Mistake("quantization_config of quark lacks 'global_quant_config'")
    rules = list(_left(config))
    for name, other in (config.get("layer_quant_config") or {}).items():
        rules.append(Rule(Names([name]), _quark_format(other, wide)))
    return Quantization(method, _quark_format(every, wide), wide, tuple(rules), remarks=_kv(config.get("export") or {}))


def _quark_format(config: Config, wide: Format) -> Format:
    weight, inputs = config.get("weight"), config.get("input_tensors")
    weight = weight[-1] if isinstance(weight, list) else weight  # in two stages: the last is what is stored
    inputs = inputs[-1] if isinstance(inputs, list) and inputs else inputs
    if not weight:
        return wide
    dtype, scheme = str(weight.get("dtype")).lower(), weight.get("qscheme")
    group = _whole(weight, "group_size", where="quark's weight") if scheme == "per_group" else 0
    given = str((inputs or {}).get("dtype") or "").lower()
    computes = "fp8" if given.startswith("fp8") else "int8" if given in ("int8", "uint8") else "bf16"
    if dtype in ("bfloat16", "float16", "float32"):
        return wide
    if dtype in QUARK:
        return integers(QUARK[dtype], group, zeros=dtype.startswith("u") or weight.get("symmetric") is False, computes=computes)
    if dtype.startswith("fp8"):
        return floats(8, group, computes=computes)
    element = str(weight.get("mx_element_dtype") or dtype.removeprefix("mx")).lower()
    if dtype in ("mx", "fp4", "mxfp4", "mxfp6", "fp6", "mxfp8") or dtype.startswith(("fp4", "fp6", "mx_fp", "mxfp")):
        bits = next((b for b in (4, 6, 8) if f"fp{b}" in element), None)
        if bits is not None:
            return floats(bits, 16 if group == 16 else 32, computes=computes)
    raise Mistake(f"unknown dtype {weight.get('dtype')!r} of quark's weight")


def _torchao(config: Config, wide: Format, method: str) -> Quantization:
    """A name as of old, or a serialised torchao config; FqnToConfig has one for each module."""
    kind = config.get("quant_type")
    if isinstance(kind, Mapping):
        kind = kind.get("default", kind)
    if kind is None:
        raise Mistake("quantization_config of torchao lacks 'quant_type'")
    rules = list(_left(config))
    embedding = bool(config.get("include_input_output_embeddings") or config.get("include_embedding"))
    if isinstance(kind, str):
        return Quantization(
            method,
            _torchao_format(kind, config.get("quant_type_kwargs") or {}, wide),
            wide,
            tuple(rules),
            head=embedding,
            embedding=embedding,
        )
    name, fields = str(kind.get("_type")), kind.get("_data") or {}
    if name in ("ModuleFqnToConfig", "FqnToConfig"):
        by_name = fields.get("module_fqn_to_config") or fields.get("fqn_to_config") or {}
        default = wide
        for module, other in by_name.items():
            stored = _torchao_format(str(other.get("_type")), other.get("_data") or {}, wide) if other else None
            if module == "_default":
                default = stored or wide
            else:
                rules.append(Rule(Names([module]), stored))
        return Quantization(method, default, wide, tuple(rules), head=embedding, embedding=embedding)
    return Quantization(method, _torchao_format(name, fields, wide), wide, tuple(rules), head=embedding, embedding=embedding)


def _torchao_format(name: str, fields: Config, wide: Format) -> Format:
    """By what its name says of weights and activations: Int8DynamicActivationInt4WeightConfig, int4_weight_only, ..."""
    flat = name.lower().replace("_", "").removesuffix("config").removesuffix("weightonly").removesuffix("weight")
    activation, _, weight = flat.rpartition("activation")
    granularity = fields.get("weight_granularity") or fields.get("granularity") or {}
    inner = granularity.get("_data") or {} if isinstance(granularity, Mapping) else {}
    group = fields.get("group_size", inner.get("group_size"))
    computes = next((to for of, to in (("float8", "fp8"), ("int8", "int8")) if of in activation), "bf16")
    if "nvfp4" in weight:
        return floats(4, 16, nv=True)
    if weight.startswith("mx"):
        element = str(fields.get("weight_dtype") or fields.get("elem_dtype") or "")
        bits = next((b for b in (4, 6, 8) if f"float{b}" in element or f"fp{b}" in element or f"fp{b}" in weight), None)
        if bits is None:
            raise Mistake(f"torchao's {name} lacks 'weight_dtype'")
        return floats(bits, 32, computes="fp8" if bits == 8 else "bf16")
    if weight in ("float8", "float8dynamic"):
        return floats(8, computes=computes)
    if weight.startswith("intx") or weight in ("int", "uintx", "gemliteuintx"):
        asked = fields.get("weight_dtype") or fields.get("dtype") or fields.get("bit_width")
        asked = asked.get("_data") if isinstance(asked, Mapping) else asked
        digits = re.search(r"\d+", str(asked))
        if not digits:
            raise Mistake(f"torchao's {name} lacks 'weight_dtype'")
        return integers(int(digits[0]), int(group or 0), zeros=True, computes=computes)
    sized = re.fullmatch(r"u?int(\d)(?:dynamic)?", weight)
    if sized:
        bits = int(sized[1])
        default = {4: 32 if computes == "int8" else 128}.get(bits, 0)  # torchao's own, which it leaves out
        return integers(bits, int(group if group is not None else default), zeros=bits < 8 and computes == "bf16", computes=computes)
    raise Mistake(f"unknown quant_type {name!r} of torchao")


def _hqq(config: Config, wide: Format, method: str) -> Quantization:
    inner = config.get("quant_config")
    if not isinstance(inner, Mapping):
        raise Mistake("quantization_config of hqq lacks 'quant_config'")
    rules = list(_left(config))

    def stored(of: Config) -> Format:
        return integers(_whole(of, "nbits", where="hqq"), int(of.get("group_size") or 0), zeros=True)

    if isinstance(inner.get("weight_quant_params"), Mapping):
        return Quantization(method, stored(inner["weight_quant_params"]), wide, tuple(rules))
    formats = {name: stored(of.get("weight_quant_params") or of) for name, of in inner.items() if isinstance(of, Mapping)}
    if not formats:
        raise Mistake("quantization_config of hqq lacks 'weight_quant_params'")
    rules += [Rule(Names([name]), of) for name, of in formats.items()]
    return Quantization(method, next(iter(formats.values())), wide, (*rules, Rule(Names([".*"], regex=True), None)))


def _by_weights(config: Config, wide: Format, method: str) -> Quantization:
    """quanto and eetq: `weights` is a name."""
    weights = config.get("weights", "int8" if method == "eetq" else None)
    computes = {"int8": "int8", "float8": "fp8"}.get(str(config.get("activations")), "bf16")
    formats = {"int8": integers(8, 0, computes=computes), "int4": integers(4, 128, zeros=True), "int2": integers(2, 128, zeros=True),
               "float8": floats(8, computes=computes)}  # fmt: skip
    if weights not in formats:
        raise Mistake(f"quantization_config.weights {weights!r} is not one of {', '.join(formats)}")
    return Quantization(method, formats[weights], wide, _left(config))


def _bitnet(config: Config, wide: Format, method: str) -> Quantization:
    if config.get("quantization_mode", "offline") == "online":
        return Quantization(method, wide, wide, remarks=("weights are made ternary while computing, and stored unquantised",))
    return Quantization(method, integers(2, 0, computes="int8"), wide, _left(config), remarks=("ternary weights, four in a byte",))


def _four_bit_float(config: Config, wide: Format, method: str) -> Quantization:
    """FPQuant and Four Over Six: nvfp4 or mxfp4 by name."""
    kind = config.get("forward_dtype") or config.get("weight_dtype") or config.get("dtype") or "nvfp4"
    if kind not in ("nvfp4", "mxfp4"):
        raise Mistake(f"quantization_config of {method} has an unknown format {kind!r}: nvfp4 and mxfp4 are known")
    return Quantization(method, floats(4, 16 if kind == "nvfp4" else 32, nv=kind == "nvfp4"), wide, _left(config, "lm_head"))


def _gemma(config: Config, wide: Format, method: str) -> Quantization:
    bits = _whole(config, "num_bits")
    rules = list(_left(config))
    for pattern, other in (config.get("module_quant_configs") or {}).items():
        rules.append(Rule(Names([f".*?(?:{pattern})"], regex=True), integers(int(other.get("num_bits", bits)), 0)))
    return Quantization(method, integers(bits, 0), wide, tuple(rules), embedding=bool(config.get("quantize_embeddings")))


def _w8a8(kind: str) -> Callable[[Config, Format, str], Quantization]:
    def read(config: Config, wide: Format, method: str) -> Quantization:
        return Quantization(method, floats(8, computes="fp8") if kind == "fp8" else integers(8, 0, computes="int8"), wide, _left(config))

    return read


def _mlx(config: Config, wide: Format, method: str) -> Quantization:
    """Apple's: a scale and a bias of 16 bits for each group, embedding and head too; modules by name, false for those left alone."""
    mode = config.get("mode", "affine")
    if mode != "affine":
        raise Mistake(f"quantization.mode {mode!r} of mlx is not supported: only affine is")

    def stored(of: Config) -> Format:
        bits, group = _whole(of, "bits", where="quantization"), _whole(of, "group_size", where="quantization")
        return Format("int8" if bits == 8 else f"wint{bits}", bits / 8 + 4 / group, "bf16")

    own = {name: of for name, of in config.items() if isinstance(of, Mapping) or (of is False and "." in name)}
    rules = tuple(Rule(Names([name]), stored(of) if of else None) for name, of in own.items())
    return Quantization(method, stored(config), wide, rules, head=True, embedding=True)


def _experts_int8(config: Config, wide: Format, method: str) -> Quantization:
    return Quantization(method, integers(8, 0), wide, only=frozenset({Part.EXPERTS}))


EXPERTS = frozenset({Part.EXPERTS})
METHODS: dict[str, Callable[[Config, Format, str], Quantization]] = {
    "fp8": _fp8, "fbgemm-fp8": _fp8, "finegrained-fp8": _fp8, "w8a8-fp8": _w8a8("fp8"), "w8a8-int8": _w8a8("int8"),
    "mxfp4": _named_float(4, only=EXPERTS), "mxfp8": _named_float(8), "nvfp4": _named_float(4, nv=True), "experts-int8": _experts_int8,
    "gptq": _grouped, "gptqmodel": _grouped, "awq": _grouped, "auto-round": _grouped, "autoround": _grouped, "auto-awq": _grouped,
    "moe-wna16": _grouped, "metal": _grouped, "sinq": _grouped, "higgs": _grouped, "auto-gptq": _grouped,
    "bitsandbytes": _bitsandbytes, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "modelopt-fp4": _modelopt,
    "modelopt-fp8": _modelopt, "modelopt-mxfp8": _modelopt, "modelopt-mixed": _modelopt, "quark": _quark, "torchao": _torchao, "hqq": _hqq,
    "quanto": _by_weights, "eetq": _by_weights, "bitnet": _bitnet, "fp-quant": _four_bit_float, "fouroversix": _four_bit_float,
    "gemma": _gemma, "mlx": _mlx,
}  # fmt: skip
