"""The `quantization_config` of a config.json, as transformers, compressed-tensors, modelopt, fbgemm, bitsandbytes, quark, torchao,
auto-round, GPTQ, AWQ and others write it. What decides how many bytes a weight takes and is unknown or missing is an error that names it.

Bytes of a weight: its bits, and what a group of weights shares: a scale (16 bits; 8 in MX and NVFP4) and, where not symmetric, a zero
point. Scales of whole channels and of 128 x 128 blocks are left out: under 0.1 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from pdlab.core.types import nearest
from pdlab.cost.dtypes import Format
from pdlab.cost.quantization import Names, Quantization, Rule, unquantised
from pdlab.cost.quantization_formats import Config, Mistake, beside, floats, integers, kv_remark, left_alone, whole
from pdlab.cost.quantization_groups import compressed_tensors, modelopt
from pdlab.cost.quantization_torchao import quark, torchao
from pdlab.cost.shapes import Part

REFUSED = {
    "aqlm": "its codebooks' sizes are not in the config",
    "vptq": "its codebooks' sizes are not in the config",
    "spqr": "the number of its outliers is not in the config",
    "squeezellm": "the number of its outliers is not in the config",
    "gguf": "a GGUF file says itself how each tensor is stored",
    "exl2": "its bits differ from matrix to matrix, and are not in the config",
    "exl3": "its bits differ from matrix to matrix, and are not in the config",
}


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


LARGE_BLOCK = 4096


def _fp8(config: Config, wide: Format, method: str) -> Quantization:
    """transformers' and DeepSeek's fine-grained fp8, fbgemm's, and vLLM's."""
    weight_only = config.get("activation_scheme") in ("none", "weight_only")
    dtype = str(config.get("weight_dtype") or config.get("fmt") or config.get("dtype") or "e4m3").lower()
    if not any(known in dtype for known in ("e4m3", "e5m2", "fp8", "float8")):
        raise Mistake(f"quantization_config says 8-bit floats of an unknown kind {dtype!r}: e4m3 and e5m2 are known")
    scale_bytes = 1 if str(config.get("scale_fmt")).lower() == "ue8m0" else 4
    stored = floats(8, 0, computes="bf16" if weight_only else "fp8")
    stored = replace(stored, bytes_per_value=1 + scale_bytes / _block(config)) if _block(config) else stored
    return Quantization(method, stored, wide, left_alone(config), remarks=kv_remark(config))


def _block(config: Config) -> int:
    """Weights that share a scale; 0 where they are so many that scales do not count."""
    shape = config.get("weight_block_size")
    if shape is None:
        return 0
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise Mistake(f"quantization_config.weight_block_size must be two whole numbers, not {shape!r}")
    rows, columns = (whole({"weight_block_size": side}, "weight_block_size") for side in shape)
    if rows < 1 or columns < 1:
        raise Mistake(f"quantization_config.weight_block_size must be positive, not {shape!r}")
    return rows * columns if rows * columns < LARGE_BLOCK else 0


def _named_float(bits: int, nv: bool = False, only: frozenset[Part] | None = None) -> Callable[[Config, Format, str], Quantization]:
    def read(config: Config, wide: Format, method: str) -> Quantization:
        stored = floats(bits, 16 if nv else 32, nv=nv, computes="fp8" if bits == 8 else "bf16")
        return Quantization(method, stored, wide, left_alone(config), only=only)

    return read


ALWAYS_ZEROS = ("gptq", "gptqmodel", "auto-gptq", "auto-round", "autoround", "metal", "sinq")  # symmetric or not, they are stored


def _grouped(config: Config, wide: Format, method: str) -> Quantization:
    """GPTQ, AWQ, auto-round and others with bits and group_size, and other bits for some modules."""
    bits, group = whole(config, "bits", "w_bit", "nbits", "num_bits"), _group(config)
    kind = str(config.get("data_type") or "int").lower()
    zeros = method in ALWAYS_ZEROS or bool(config.get("zero_point", config.get("zero_points", "awq" in method)))
    stored = _of_kind(kind, bits, group, zeros, config)
    rules = [
        *left_alone(config),
        *_dynamic(config, bits, group, zeros),
        *_extra(config, bits, group, zeros, kind),
        *_inside(config, stored),
    ]
    return Quantization(method, stored, wide, tuple(rules), head=config.get("lm_head") is True or config.get("quant_lm_head") is True)


def _group(config: Config) -> int:
    value = config.get("group_size", config.get("q_group_size"))
    if value in ("channel", "per_channel"):
        return -1
    return whole(config, "group_size", "q_group_size")


def _activations(config: Config) -> str:
    bits = config.get("act_bits", 16)
    if bits in (16, 32, None):
        return "bf16"
    if bits == 8:
        return "fp8" if "fp" in str(config.get("act_data_type", "")) else "int8"
    if bits == 4:
        return "bf16"
    raise Mistake(f"quantization_config.act_bits {bits!r} is not one of 4, 8, 16")


def _of_kind(kind: str, bits: int, group: int, zeros: bool, config: Config) -> Format:
    """auto-round's data_type; other methods have integers."""
    computes = _activations(config)
    if kind.startswith(("int", "uint")):
        return integers(bits, group, zeros=zeros, computes=computes)
    if kind.startswith(("mx", "nv")) and bits == 4:
        return beside(floats(4, group, nv=kind.startswith("nv")), config.get("act_bits") or 16, computes)
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


def _inside(config: Config, stored: Format) -> list[Rule]:
    """GPTQ's modules_in_block_to_quantize: those and no others."""
    listed = config.get("modules_in_block_to_quantize") or config.get("inside_layer_modules")
    if not listed:
        return []
    names = [name for group in listed for name in (group if isinstance(group, list) else [group])]
    return [Rule(Names(names), stored), Rule(Names([".*"], regex=True), None)]


def _extra(config: Config, bits: int, group: int, zeros: bool, kind: str) -> list[Rule]:
    """auto-round's: modules with other bits; 16 bits and more are none."""
    rules = []
    for name, other in (config.get("extra_config") or {}).items():
        own = int(other.get("bits", bits))
        kept = str(other.get("data_type") or kind)
        stored = None if own >= 16 else _of_kind(kept, own, int(other.get("group_size", group)), zeros, config | other)
        rules.append(Rule(Names([name]), stored))
    return rules


def _bitsandbytes(config: Config, wide: Format, method: str) -> Quantization:
    """NF4 and FP4 keep the largest of 64 weights as a float32, or as a byte when quantised again."""
    four = config.get("load_in_4bit", config.get("_load_in_4bit"))
    eight = config.get("load_in_8bit", config.get("_load_in_8bit"))
    if not four and not eight:
        raise Mistake("quantization_config of bitsandbytes says neither load_in_4bit nor load_in_8bit: set one to true")
    if eight:
        return Quantization(method, integers(8, 0, computes="int8"), wide, left_alone(config))
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise Mistake(f"quantization_config.bnb_4bit_quant_type {kind!r} is not one of nf4, fp4")
    shared = 1 / 64 + 4 / (64 * 256) if config.get("bnb_4bit_use_double_quant") else 4 / 64
    return Quantization(method, Format("wint4", 0.5 + shared, "bf16"), wide, left_alone(config), remarks=(f"4-bit weights are {kind}",))


def _hqq(config: Config, wide: Format, method: str) -> Quantization:
    inner = config.get("quant_config")
    if not isinstance(inner, Mapping):
        raise Mistake("quantization_config of hqq lacks 'quant_config'")
    rules = list(left_alone(config))

    def stored(of: Config) -> Format:
        return integers(whole(of, "nbits", where="hqq"), int(of.get("group_size") or 0), zeros=True)

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
    return Quantization(method, formats[weights], wide, left_alone(config))


def _bitnet(config: Config, wide: Format, method: str) -> Quantization:
    if config.get("quantization_mode", "offline") == "online":
        return Quantization(method, wide, wide, remarks=("weights are made ternary while computing, and stored unquantised",))
    return Quantization(method, integers(2, 0, computes="int8"), wide, left_alone(config), remarks=("ternary weights, four in a byte",))


def _four_bit_float(config: Config, wide: Format, method: str) -> Quantization:
    """FPQuant and Four Over Six: nvfp4 or mxfp4 by name."""
    kind = config.get("forward_dtype") or config.get("weight_dtype") or config.get("dtype") or "nvfp4"
    if kind not in ("nvfp4", "mxfp4"):
        raise Mistake(f"quantization_config of {method} has an unknown format {kind!r}: nvfp4 and mxfp4 are known")
    return Quantization(method, floats(4, 16 if kind == "nvfp4" else 32, nv=kind == "nvfp4"), wide, left_alone(config, "lm_head"))


def _gemma(config: Config, wide: Format, method: str) -> Quantization:
    bits = whole(config, "num_bits")
    rules = list(left_alone(config))
    for pattern, other in (config.get("module_quant_configs") or {}).items():
        rules.append(Rule(Names([f".*?(?:{pattern})"], regex=True), integers(int(other.get("num_bits", bits)), 0)))
    return Quantization(method, integers(bits, 0), wide, tuple(rules), embedding=bool(config.get("quantize_embeddings")))


def _w8a8(kind: str) -> Callable[[Config, Format, str], Quantization]:
    def read(config: Config, wide: Format, method: str) -> Quantization:
        return Quantization(
            method, floats(8, computes="fp8") if kind == "fp8" else integers(8, 0, computes="int8"), wide, left_alone(config)
        )

    return read


def _mlx(config: Config, wide: Format, method: str) -> Quantization:
    """Apple's: a scale and a bias of 16 bits for each group, embedding and head too; modules by name, false for those left alone."""
    mode = config.get("mode", "affine")
    if mode != "affine":
        raise Mistake(f"quantization.mode {mode!r} of mlx is not supported: only affine is")

    def stored(of: Config) -> Format:
        bits, group = whole(of, "bits", where="quantization"), whole(of, "group_size", where="quantization")
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
    "bitsandbytes": _bitsandbytes, "compressed-tensors": compressed_tensors, "modelopt": modelopt, "modelopt-fp4": modelopt,
    "modelopt-fp8": modelopt, "modelopt-mxfp8": modelopt, "modelopt-mixed": modelopt, "quark": quark, "torchao": torchao, "hqq": _hqq,
    "quanto": _by_weights, "eetq": _by_weights, "bitnet": _bitnet, "fp-quant": _four_bit_float, "fouroversix": _four_bit_float,
    "gemma": _gemma, "mlx": _mlx,
}  # fmt: skip
