"""The keys of a config.json, each asked for by name: what is read, what the class's own default fills in, what nobody asked for.

A key that decides a figure and is missing is an error that names it. The exceptions are class defaults: what transformers fills in for a
`model_type` where the file says nothing. A nested text_config leaves out all that is its class's default; at the top level the sizes are
always written, so a missing one is a mistake there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pdlab.core.types import UsageError

# What sizes are called in one family or another.
HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "model_max_length")
HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim", "d_head")
FFN = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_inner")

MOST_LAYERS = 10_000
MOST = 10**9  # of anything: a larger size is a slip, and its products no longer fit a float

STATED = frozenset(
    {
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size", "n_embd",
        "n_layer", "n_head", "d_model", "n_layers", "n_heads", "num_layers", "num_heads", "ffn_dim", "moe_intermediate_size",
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok", "moe_topk", "moe_k", "head_dim",
        "kv_lora_rank", "sliding_window", "shared_expert_intermediate_size", "shared_intermediate_size", "num_kv_heads", "expansion_ratio",
        "max_position_embeddings", "n_positions", "max_seq_len",
    }
)  # fmt: skip

# What an unread key must not look like: a count of heads, experts or layers, a width, a window, a state.
DECIDES = re.compile(
    r"(^|_)(kv|gqa|mqa|heads?|experts?|moe|mlp|ffn|feed_forward|layers?|hidden_size|hidden_dim|intermediate|window|chunk|sliding|ssm|mamba|"
    r"conv|state|rank|lora|vocab|embedding_dim|embedding_size|dim|width|query_groups?|block_types?|block_configs?|attn_type|layer_type|"
    r"multi_query|topk|top_k)(_|$)"
)
# Keys that look so, and decide none of our figures: what is computed with the same weights, training, vision, prediction heads.
HARMLESS = re.compile(
    r"token|dropout|drop$|pdrop|_eps$|epsilon|initializ|init_|_std$|^output_|^rope|rope_|rotary|theta|_bias$|^bias|^use_bias|softcap|scal(e|ing)|"
    r"multiplier|factor|_act$|act_fn|activation|aux_loss|loss|jitter|norm|gating_|scoring|score|topk_method|n_group$|topk_group|num_expert_group|"
    r"nextn|mtp|^num_mtp|predict|vision|image|video|audio|visual|speech|pixel|patch|^mm_|projector|^_|cache|flash|kernels?$|impl|"
    r"precision|fp32|float32|_dtype$|^attn_implementation|temperature|tuning|parallel|pretraining|summary|"
    r"alpha|clip|cap$|capacity|beam|problem|labels?$|gradient|checkpoint|residual|mup|layerdrop|cls|classifier|finetun|freez|"
    r"chunk_size|time_step|sparsity_pattern|no_rope|nope_layer|qk_layernorm|logn|query_pre_attn|fused|router_|route_|routing|"
    r"attention_type|attention_mask|causal|bidirectional|prefix|world_size|max_batch|sequence|seqlen|seq_len|alibi|is_|position|pos_emb|num_logits|"
    r"return_dict|eos|bos|pad|adapter|ep_size|ep_|tp_|pp_|gradient|dense_attention|embeddings?_mul|altup|laurel|interval$|attn_temp|"
    r"^base_model|dim_model_base|slow_but|unk|sep_|mask_|tune|lm_head_|forget|gate_|safe_gate|lower_bound|renormalize|combine|mla_|v_norm|"
    r"sink|thinker|talker|encoder|emb_fraction|embedding_fraction|lambda|deepstack|qkv_bias|ignore|block_size|overlap|allow_neg|"
    r"^attn_config$|^ffn_config$|full_attn_idxs|init$|multiple_of|spatial|temporal"
)
TIES = re.compile(r"^(un)?tied?_|_tied?_emb")
NEVER = frozenset(
    {
        "n_ctx", "cross_attention_hidden_size", "head_dim", "qk_head_dim", "num_key_value_heads", "intermediate_size", "max_window_layers",
        "sliding_window", "layer_types", "sliding_window_pattern", "mlp_layer_types", "rotary_dim", "tie_encoder_decoder",
        "tie_word_embeddings", "sliding_window_size", "org_vocab_size", "use_cache_quantization",
        "top_k",  # of sampling: configs of old have generation's arguments
    }
)  # fmt: skip


class Keys:
    """`config` with its class's `defaults`. `nested`: it is a text_config. `where` begins each message."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str, *, nested: bool = False) -> None:
        self.config, self.defaults, self.where, self.nested = config, defaults, where, nested
        self.read: set[str] = set()
        self.filled: dict[str, Any] = {}

    def wrong(self, message: str) -> UsageError:
        return UsageError(f"{self.where}{message}")

    def lacks(self, name: str) -> UsageError:
        unread = [k for k, v in self.config.items() if v is not None and k not in self.read]
        near = get_close_matches(name, unread, n=1, cutoff=0.6)
        hint = f"; it has {near[0]!r}: if that is meant, spell it so" if near else ": add it, as the model's class has it"
        return self.wrong(f" lacks {name!r}{hint}")

    def get(self, *names: str) -> Any:
        """The first that is there; the class's default, unless the file says null; None. All of the names count as read."""
        self.read.update(names)
        for name in names:
            value = self.config.get(name)
            if value is not None:
                return value
        if any(name in self.config for name in names):
            return None
        for name in names:
            value = self.defaults.get(name)
            if value is not None and (self.nested or name not in STATED):
                self.filled[name] = value
                return value
        return None

    def states(self, name: str) -> bool:
        """Is it in the file, even as null?"""
        return name in self.config

    def whole(self, *names: str, otherwise: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`. Raises UsageError where it is missing and there is no `otherwise`."""
        value = self.get(*names)
        if value is None:
            if otherwise is None or self._left_out(names):
                raise self.lacks(names[0])
            return otherwise
        return self.check(names, value, least)

    def _left_out(self, names: Sequence[str]) -> bool:
        """Has the class a value of its own for what the file does not say?"""
        return not any(map(self.states, names)) and any(self.defaults.get(name) is not None for name in names)

    def check(self, names: Sequence[str], value: Any, least: int = 1) -> int:
        name = next((n for n in names if self.config.get(n) is not None), names[0])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(f" has a value of the wrong kind: {name} must be a whole number, not {value!r}")
        if value < least:
            kind = "positive" if least == 1 else f"at least {least}"
            raise self.wrong(f": {name} must be {kind}, not {value}: layers, hidden size, heads and widths must be positive")
        if name in LAYERS and value > MOST_LAYERS:
            raise self.wrong(f": {name} {value} is more than the {MOST_LAYERS} layers that are read")
        if value > MOST and name not in POSITIONS:
            raise self.wrong(f": {name} is more than {MOST:,}, which no model's is")
        return value

    def each(self, layers: int, *names: str, otherwise: int | None = None, least: int = 1) -> list[int]:
        """A number, or a list of one for each layer."""
        value = self.get(*names)
        if isinstance(value, list):
            if len(value) != layers:
                raise self.wrong(f": {names[0]} lists {len(value)} layers, and there are {layers}")
            return [self.check(names, one, least) for one in value]
        return [self.whole(*names, otherwise=otherwise, least=least)] * layers

    def flag(self, *names: str, otherwise: bool | None = None) -> bool:
        value = self.get(*names)
        if value is None:
            if otherwise is None:
                raise self.lacks(names[0])
            return otherwise
        if not isinstance(value, bool) and value not in (0, 1):
            raise self.wrong(f" has a value of the wrong kind: {names[0]} must be true or false, not {value!r}")
        return bool(value)

    def kinds(self, name: str, layers: int) -> list[str] | None:
        """A list of one word for each layer, such as layer_types."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
            raise self.wrong(f" has a value of the wrong kind: {name} must be a list of words")
        if len(value) < layers:
            raise self.wrong(f": {name} lists {len(value)} layers, and there are {layers}")
        return value[:layers]

    def part(self, name: str) -> Keys:
        """A mapping inside, such as DBRX's attn_config."""
        self.read.add(name)
        inner = self.config.get(name) or {}
        if not isinstance(inner, Mapping):
            raise self.wrong(f" has a value of the wrong kind: {name} must be a mapping")
        return Keys(inner, self.defaults.get(name) or {}, f"{self.where}: {name}", nested=self.nested)

    def ignored(self, unused: Collection[str] = ()) -> list[str]:
        """Keys that nobody asked for. Raises UsageError on one that looks as if it decided a figure, and is not known to be `unused`."""
        unread = [k for k, v in self.config.items() if k not in self.read and v not in (None, [], {}, "")]
        for key in unread:
            if key not in NEVER and key not in unused and _seems_to_decide(key, self.config[key]):
                near = get_close_matches(key, sorted(self.read), n=1, cutoff=0.5)
                meant = f", or spell it {near[0]!r} if that is meant" if near else ""
                raise self.wrong(f" has {key!r}, which looks as if it decided a figure and is not known here: remove it{meant}")
        return sorted(unread)


def _seems_to_decide(key: str, value: object) -> bool:
    """Zero is none of whatever it counts, and one expert is a plain feed-forward."""
    if isinstance(value, bool):
        return bool(TIES.search(key))
    if "quant" in key:
        return True
    if value == 0 or (value == 1 and re.search("expert|topk|top_k|freq", key)):
        return False
    return isinstance(value, int | list | Mapping) and bool(DECIDES.search(key)) and not HARMLESS.search(key)
