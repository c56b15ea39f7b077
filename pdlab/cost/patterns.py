"""Which layers of a decoder attend to a window only, and which have experts: as the config lists them, or by the family's rule."""

from __future__ import annotations

from collections.abc import Callable

from pdlab.cost.config_keys import Keys
from pdlab.cost.families import Experts, Family

FULL = ("full_attention", "attention", "global")
EVERY = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "layer_switch")
WHERE = ("first_k_dense_replace", "moe_layer_freq", "expert_layer_period", "expert_layer_offset")  # experts are, where there are some
SPARSE, DENSE = ("sparse", "moe"), ("dense", "mlp")


def windows(keys: Keys, family: Family, layers: int) -> list[int]:
    """Tokens that each layer attends to; 0: all."""
    kinds = keys.kinds("layer_types", layers)
    if kinds is None:
        return _by_rule(keys, family, layers)
    keys.read.update((*EVERY, "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size", "sliding_window", "max_window_layers"))
    return [_window_of(keys, kind, index) for index, kind in enumerate(kinds)]


def _window_of(keys: Keys, kind: str, layer: int) -> int:
    if kind in FULL:
        return 0
    if kind == "sliding_attention":
        return keys.whole("sliding_window")
    if kind == "chunked_attention":
        return keys.whole("attention_chunk_size")
    raise keys.wrong(f": layer_types[{layer}] is {kind!r}, which this model_type is not known to have")


def _by_rule(keys: Keys, family: Family, layers: int) -> list[int]:
    index = range(layers)
    if family.windows == "none":
        return [0] * layers
    if family.windows == "llama4":
        return _where_rotary(keys, family, layers)
    if family.windows == "all":
        unused = not keys.flag("use_sliding_window", otherwise=True)
        window = keys.whole("sliding_window", otherwise=0, least=0)
        return [0 if unused else window] * layers
    if family.windows == "pattern":
        return _by_pattern(keys, family, layers)
    if not keys.flag("use_sliding_window", otherwise=False):
        keys.read.update(("sliding_window", "max_window_layers"))
        return [0] * layers
    first = keys.whole("max_window_layers", least=0) if family.windows == "qwen" else 0
    return [keys.whole("sliding_window") if i >= first else 0 for i in index]


def _where_rotary(keys: Keys, family: Family, layers: int) -> list[int]:
    """Llama 4: layers with rotary positions attend to a chunk, every fourth has none and attends to all."""
    chunk = keys.whole("attention_chunk_size", otherwise=0, least=0)
    rotary = keys.get("no_rope_layers")
    if isinstance(rotary, list) and len(rotary) == layers:
        return [chunk if use else 0 for use in rotary]
    every = keys.whole("no_rope_layer_interval", otherwise=family.pattern)
    return [chunk if (i + 1) % every else 0 for i in range(layers)]


def _by_pattern(keys: Keys, family: Family, layers: int) -> list[int]:
    """The last of so many layers attends to all; or letters say it: LLLG."""
    if keys.states("sliding_window") and keys.config["sliding_window"] is None:
        keys.read.update((*EVERY, "sliding_window"))
        return [0] * layers
    window, pattern = keys.whole("sliding_window", least=0), keys.get(*EVERY)
    if isinstance(pattern, str):
        if not pattern or set(pattern) - {"L", "G"}:
            raise keys.wrong(f": sliding_window_pattern {pattern!r} is not made of L and G")
        return [window if pattern[i % len(pattern)] == "L" else 0 for i in range(layers)]
    every = family.pattern if pattern is None else keys.check(("sliding_window_pattern",), pattern)
    if not every:
        raise keys.lacks("sliding_window_pattern")
    return [window if (i + 1) % every else 0 for i in range(layers)]


def with_experts(keys: Keys, experts: Experts, layers: int) -> list[bool]:
    """Which layers have experts."""
    if experts.optional:
        count = keys.get(*experts.count)
        if count is None and not any(keys.states(name) for name in experts.count):
            raise keys.lacks(experts.count[0])
        if count is None or keys.check(experts.count, count, least=0) <= (1 if experts.layers == "period" else 0):
            keys.read.update((*experts.per_token, *experts.width[:1], *experts.shared, *WHERE))
            return [False] * layers
    kinds = keys.kinds("mlp_layer_types", layers)
    if kinds is None:
        return EXPERT_RULES[experts.layers](keys, layers)
    unknown = sorted(set(kinds) - {*SPARSE, *DENSE})
    if unknown:
        raise keys.wrong(f": mlp_layer_types has an unknown {unknown[0]!r}: dense and sparse are known")
    keys.read.update(("first_k_dense_replace", "moe_layer_freq", "num_dense_layers", "decoder_sparse_step", "mlp_only_layers"))
    return [kind in SPARSE for kind in kinds]


def _every_layer(keys: Keys, layers: int) -> list[bool]:
    return [True] * layers


def _sparse_step(keys: Keys, layers: int) -> list[bool]:
    step, without = keys.whole("decoder_sparse_step"), keys.get("mlp_only_layers") or []
    return [i not in without and (i + 1) % step == 0 for i in range(layers)]


def _first_dense(keys: Keys, layers: int) -> list[bool]:
    first, every = keys.whole("first_k_dense_replace", least=0), keys.each(layers, "moe_layer_freq", otherwise=1, least=0)
    return [i >= first and every[i] > 0 and i % every[i] == 0 for i in range(layers)]


def _num_dense(keys: Keys, layers: int) -> list[bool]:
    first = keys.whole("num_dense_layers", least=0)
    return [i >= first for i in range(layers)]


def _interleaved(keys: Keys, layers: int) -> list[bool]:
    step, listed = keys.whole("interleave_moe_layer_step"), keys.get("moe_layers")
    return [i in listed if listed else (i + 1) % step == 0 for i in range(layers)]


def _ernie(keys: Keys, layers: int) -> list[bool]:
    start, end = text_first(keys, "moe_layer_start_index", least=0), text_first(keys, "moe_layer_end_index", otherwise=-1, least=-1)
    every = keys.whole("moe_layer_interval", otherwise=1)
    return [start <= i <= (layers - 1 if end == -1 else end) and (i + 1) % every == 0 for i in range(layers)]


def _period(keys: Keys, layers: int) -> list[bool]:
    every, after = keys.whole("expert_layer_period"), keys.whole("expert_layer_offset", least=0)
    return [i % every == after for i in range(layers)]


def _arctic(keys: Keys, layers: int) -> list[bool]:
    every = keys.whole("moe_layer_frequency")
    return [(i + 1) % every == 0 for i in range(layers)]


def _skipped(keys: Keys, layers: int) -> list[bool]:
    first = keys.whole("moe_layer_num_skipped", otherwise=0, least=0)
    return [i >= first for i in range(layers)]


EXPERT_RULES: dict[str, Callable[[Keys, int], list[bool]]] = {
    "all": _every_layer,
    "sparse_step": _sparse_step,
    "first_dense": _first_dense,
    "num_dense": _num_dense,
    "interleaved": _interleaved,
    "ernie": _ernie,
    "period": _period,
    "arctic": _arctic,
    "skipped": _skipped,
}


def text_first(keys: Keys, name: str, otherwise: int | None = None, least: int = 1) -> int:
    """ERNIE's multi-modal configs list text experts first."""
    value = keys.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        if otherwise is None:
            raise keys.lacks(name)
        return otherwise
    return keys.check((name,), value, least)
