"""Number formats of quantised weights, and which modules a quantiser leaves alone: what all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pdlab.cost.dtypes import Format, plain
from pdlab.cost.quantization import Names, Rule

Config = Mapping[str, Any]
IGNORED = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "exclude", "llm_int8_skip_modules", "skip_modules")


class Mistake(ValueError):
    """Something in a quantization_config that decides a figure and is not understood; the reader adds which file."""


def whole(config: Config, *keys: str, where: str = "quantization_config") -> int:
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
    """Floating-point weights: fp8, MX formats by their groups of 32, NVFP4 by its 16."""
    if bits == 4 and (nv or group == 16):
        return Format("nvfp4", 0.5 + 1 / 16, "nvfp4")
    if bits in (4, 6, 8) and group == 32:
        return plain("mxfp4") if bits == 4 else replace(plain(f"mxfp{bits}"), compute=computes if bits == 8 else "bf16")
    if bits == 8:
        return Format("fp8", 1.0 + (scale_bytes / group if group > 0 else 0.0), computes)
    raise Mistake(f"floating-point weights of {bits} bits in groups of {group} are not known here")


def beside(stored: Format, activation_bits: int, computes: str) -> Format:
    """Four-bit floats are multiplied in their own format where activations have four bits, too; else in the activations'."""
    return stored if activation_bits == 4 else replace(stored, compute=computes)


def listed_modules(config: Config, *more: str) -> list[str]:
    listed: list[str] = list(more)
    for key in IGNORED:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple):
            raise Mistake(f"quantization_config.{key} must be a list of modules, not {value!r}")
        listed += value
    return listed


def left_alone(config: Config, *more: str, regex: bool = False) -> tuple[Rule, ...]:
    """The modules that are left unquantised."""
    listed = listed_modules(config, *more)
    try:
        return (Rule(Names(listed, regex=regex), None),) if listed else ()
    except ValueError as error:
        raise Mistake(f"quantization_config: {error}") from None


def kv_remark(config: Config) -> tuple[str, ...]:
    scheme = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo") or config.get("kv_cache_quant_method")
    if not scheme:
        return ()
    kind = f"{scheme.get('type')} {scheme.get('num_bits')} bits" if isinstance(scheme, Mapping) else str(scheme)
    return (f"scales for KV in {kind} are there; KV is counted in the number format of cost.kv_dtype",)
