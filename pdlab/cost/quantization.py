"""How a checkpoint's weights are stored, module by module: one format for most, others for those its rules name.

`pdlab.cost.quantization_methods` reads the rules from a config's `quantization_config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate

from pdlab.cost.dtypes import Format, plain
from pdlab.cost.shapes import OUTER, Part

# What our names of modules are called elsewhere. A pattern holds for a module where it holds for one of its names.
ALIASES = (
    (
        "mlp.gate",
        ("mlp.router", "block_sparse_moe.gate", "feed_forward.router", "block_sparse_moe.router.layer", "mlp.gate.wg", "mixer.gate"),
    ),
    (
        "mlp.experts",
        (
            "mlp.experts.0.down_proj",
            "mlp.experts.0.up_proj",
            "mlp.experts.0.gate_proj",
            "block_sparse_moe.experts.0.w1",
            "feed_forward.experts.down_proj",
        ),
    ),
    ("mlp.shared_experts.", ("mlp.shared_expert.", "feed_forward.shared_expert.", "mixer.shared_experts.", "mlp.shared_mlp.")),
    ("self_attn.q_proj", ("self_attn.qkv_proj", "mixer.q_proj", "attention.query_key_value", "attn.c_attn")),
    ("self_attn.k_proj", ("self_attn.qkv_proj", "mixer.k_proj", "attention.query_key_value", "attn.c_attn")),
    ("self_attn.v_proj", ("self_attn.qkv_proj", "mixer.v_proj", "attention.query_key_value", "attn.c_attn")),
    ("self_attn.o_proj", ("self_attn.out_proj", "mixer.o_proj", "attention.dense", "attn.c_proj")),
    ("mlp.gate_proj", ("mlp.gate_up_proj", "feed_forward.gate_proj")),
    ("mlp.up_proj", ("mlp.gate_up_proj", "feed_forward.up_proj", "mixer.up_proj", "mlp.fc1")),
    ("mlp.down_proj", ("feed_forward.down_proj", "mixer.down_proj", "mlp.fc2")),
    ("mamba.", ("mixer.",)),
)
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
OUTER_PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def names_of(module: str) -> list[str]:
    """All names that `module` (ours: "layers.3.mlp.gate", "lm_head") goes by."""
    if not module.startswith("layers."):
        return [f"{prefix}{module}" for prefix in OUTER_PREFIXES]
    _, index, rest = module.split(".", 2)
    others = [
        rest.replace(ours, theirs, 1)
        for ours, named in ALIASES
        if rest == ours or (ours.endswith(".") and rest.startswith(ours))
        for theirs in named
    ]
    return [f"{prefix}layers.{index}.{name}" for name in (rest, *others) for prefix in PREFIXES]


class Names:
    """A set of modules, by the patterns that quantisers write: a regular expression from the start of the name, if `re:` or `.*` begins
    it; a glob; or plain words for a module, for what is in it, and for what ends so. Raises ValueError on a broken expression."""

    def __init__(self, patterns: Iterable[str], *, regex: bool = False) -> None:
        self.words: set[tuple[str, ...]] = set()
        self.regexes: list[re.Pattern[str]] = []
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ValueError(f"{pattern!r} is not a module's name")
            try:
                if regex or pattern.startswith(("re:", ".*")):
                    self.regexes.append(re.compile(pattern.removeprefix("re:")))
                elif any(c in pattern for c in "*?[^$|\\"):
                    self.regexes.append(re.compile(translate(pattern)))
                    self.regexes.append(re.compile(translate(f"{pattern}.*")))
                    if any(c in pattern for c in "^$|\\"):
                        self.regexes.append(re.compile(pattern))
                else:
                    self.words.add(tuple(pattern.strip(".").split(".")))
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        self.longest = max(map(len, self.words), default=0)

    def __contains__(self, module: str) -> bool:
        return any(self._holds(name) for name in names_of(module))

    def _holds(self, name: str) -> bool:
        if self.words:
            parts = tuple(name.split("."))
            for start in range(len(parts)):
                for end in range(start + 1, min(len(parts), start + self.longest) + 1):
                    if parts[start:end] in self.words:
                        return True
        return any(regex.match(name) for regex in self.regexes)


@dataclass(frozen=True, slots=True)
class Rule:
    """These modules are stored so; None: not quantised."""

    modules: Names
    format: Format | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """`default` is the format of the layers' matrices, of `only` some parts if said; `wide` of what is not quantised. The first rule that
    names a module counts. Embedding and head are wide unless `head`, `embedding` or a rule says otherwise. `remarks`: in words."""

    method: str
    default: Format
    wide: Format
    rules: tuple[Rule, ...] = ()
    only: frozenset[Part] | None = None
    head: bool = False
    embedding: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return self.default.dtype

    def of(self, module: str, part: Part) -> Format:
        for rule in self.rules:
            if module in rule.modules:
                return rule.format or self.wide
        if part in OUTER:
            asked = self.head if part is Part.HEAD else self.embedding
            return self.default if asked else self.wide
        if self.only is not None and part not in self.only:
            return self.wide
        return self.default


def unquantised(dtype: str) -> Quantization:
    return Quantization("none", plain(dtype), plain(dtype))


def published_as(dtype: str) -> Quantization:
    """As the checkpoints of a catalogue's model have it: mxfp4 is of experts only, as gpt-oss is; embedding and head are wide."""
    stored = plain(dtype)
    only = frozenset({Part.EXPERTS}) if dtype == "mxfp4" else None
    return Quantization(dtype, stored, plain("bf16") if stored.is_quantised else stored, only=only)
