"""torchao, and AMD's quark: a config for all modules, and others by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pdlab.cost.dtypes import Format
from pdlab.cost.quantization import Names, Quantization, Rule
from pdlab.cost.quantization_formats import Config, Mistake, beside, floats, integers, kv_remark, left_alone, whole

QUARK = {
    "int2": 2, "uint2": 2, "int3": 3, "uint3": 3, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8,
}  # fmt: skip


def quark(config: Config, wide: Format, method: str) -> Quantization:
    """AMD's: one config for all, others by name, and by class."""
    every = config.get("global_quant_config")
    if not isinstance(every, Mapping):
        raise Mistake("quantization_config of quark lacks 'global_quant_config'")
    rules = list(left_alone(config))
    for name, other in (config.get("layer_quant_config") or {}).items():
        rules.append(Rule(Names([name]), _quark_format(other, wide)))
    return Quantization(method, _quark_format(every, wide), wide, tuple(rules), remarks=kv_remark(config.get("export") or {}))


def _quark_format(config: Config, wide: Format) -> Format:
    weight, inputs = config.get("weight"), config.get("input_tensors")
    weight = weight[-1] if isinstance(weight, list) else weight  # in two stages: the last is what is stored
    inputs = inputs[-1] if isinstance(inputs, list) and inputs else inputs
    if not weight:
        return wide
    dtype, scheme = str(weight.get("dtype")).lower(), weight.get("qscheme")
    group = whole(weight, "group_size", where="quark's weight") if scheme == "per_group" else 0
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
            stored = floats(bits, 16 if group == 16 else 32, computes=computes)
            own = 4 if "fp4" in str((inputs or {}).get("mx_element_dtype") or given) else 8 if computes != "bf16" else 16
            return beside(stored, own, computes) if bits == 4 else stored
    raise Mistake(f"unknown dtype {weight.get('dtype')!r} of quark's weight")


def torchao(config: Config, wide: Format, method: str) -> Quantization:
    """A name as of old, or a serialised torchao config; FqnToConfig has one for each module."""
    kind = config.get("quant_type")
    if isinstance(kind, Mapping):
        kind = kind.get("default", kind)
    if kind is None:
        raise Mistake("quantization_config of torchao lacks 'quant_type'")
    rules = list(left_alone(config))
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
        return beside(floats(4, 16, nv=True), 16 if "weightonly" in name.lower().replace("_", "") else 4, "bf16")
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
