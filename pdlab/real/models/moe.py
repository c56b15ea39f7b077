"""What the engine must know of a model's routed experts: how many, how wide, in which layers, how a token's are chosen.

Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pdlab.core.types import UsageError
from pdlab.cost.layers import FeedForward, Mlp, Moe

MOE_FAMILIES = ("mixtral", "qwen3_moe", "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text")


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """`layers` says of each layer whether it has experts. A token goes to `per_token` of `experts`, each `width` wide, and to a
    shared one of width `shared` (0: none).

    scoring: what the router's logits become before experts are chosen, "softmax" or "sigmoid"; "chosen": a softmax over the chosen ones';
    "each": the sigmoid of each chosen one's. inward: weights multiply what goes into an expert, not what comes out.
    correction: a bias of each expert counts in the choice, not in its weight. Of `groups` of experts those of the `top_groups` best are
    eligible, a group being as good as the sum of its `group_best` best. renormalise: the chosen ones' weights are divided by their sum,
    at least `least_sum`; then all are multiplied by `scale`. biased: router and experts have biases, and the experts' activation is
    gpt-oss's, with `alpha` and `limit`.
    """

    layers: tuple[bool, ...]
    experts: int
    per_token: int
    width: int
    shared: int = 0
    scoring: Literal["softmax", "sigmoid", "chosen", "each"] = "softmax"
    renormalise: bool = True
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    least_sum: float = 1e-20
    scale: float = 1.0
    biased: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    inward: bool = False


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Of a layer's tensors in a file: the module, its router, the router's correction, the shared expert, and each expert's gate, up and
    down. joined: all experts' gates and ups are in one tensor, and downs in one, inputs before outputs; alternating: each gate is followed
    by its up, in place of all gates by all ups."""

    module: str = "mlp"
    router: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    joined: bool = False
    alternating: bool = False


NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", parts=("w1", "w3", "w2")),
    "ernie4_5_moe": ExpertNames(correction="moe_statics.e_score_correction_bias"),
    "gpt_oss": ExpertNames(router="router", joined=True, alternating=True),
    "llama4_text": ExpertNames("feed_forward", router="router", shared="shared_expert", joined=True),
}


def names(family: str) -> ExpertNames:
    return NAMES.get(family, ExpertNames())


def moe_of(family: str, config: Mapping[str, Any], feeds: Sequence[FeedForward], where: str) -> MoeConfig | None:
    """None: no layer has experts. `config` is {} for a model of the catalogue. Raises UsageError after `where` on what does not
    run here."""
    moes = {feed for feed in feeds if isinstance(feed, Moe)}
    if not moes:
        return None
    one = next(iter(moes))
    if family not in MOE_FAMILIES or len(moes) > 1 or not one.gated or one.latent or one.more:
        raise UsageError(f"{where}: routed experts run here for {', '.join(MOE_FAMILIES)} only, all layers' alike")
    layers = tuple(isinstance(feed, Moe) for feed in feeds)
    routing = ROUTING[family](config)
    found = MoeConfig(layers=layers, experts=one.experts, per_token=one.per_token, width=one.width, shared=one.shared, **routing)
    if found.experts % found.groups or not 0 < found.top_groups <= found.groups:
        raise UsageError(
            f"{where}: {found.experts} experts in n_group {found.groups}, of which topk_group {found.top_groups}: they do not fit"
        )
    if found.experts // found.groups * found.top_groups < found.per_token or found.experts // found.groups < found.group_best:
        raise UsageError(f"{where}: {found.top_groups} groups of {found.experts // found.groups} experts are too few for {found.per_token}")
    return found


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"renormalise": bool(config.get("norm_topk_prob", not config))}


def _ernie(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"correction": True, "least_sum": float(config.get("moe_norm_min") or 1e-12)}


def _deepseek_v2(config: Mapping[str, Any]) -> dict[str, Any]:
    """`norm_topk_prob` is not looked at, as in transformers' class."""
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UsageError(f"model config: topk_method {method!r} is not one of greedy, group_limited_greedy")
    groups = _groups(config) if method == "group_limited_greedy" else {}
    return {"renormalise": False, "scale": float(config.get("routed_scaling_factor") or 1.0), **groups}


def _deepseek_v3(config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"scoring": "sigmoid", "correction": True, "group_best": 2, "renormalise": bool(config.get("norm_topk_prob", True))}
    if not config:  # of the catalogue: V3's own
        return {**kinds, "groups": 8, "top_groups": 4, "scale": 2.5}
    return {**kinds, "scale": float(config.get("routed_scaling_factor") or 2.5), **_groups(config)}


def _groups(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"groups": int(config.get("n_group") or 1), "top_groups": int(config.get("topk_group") or 1)}


def _gpt_oss(config: Mapping[str, Any]) -> dict[str, Any]:
    alpha, limit = float(config.get("swiglu_alpha") or 1.702), float(config.get("swiglu_limit") or 7.0)
    return {"scoring": "chosen", "renormalise": False, "biased": True, "alpha": alpha, "limit": limit}


def _llama4(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"scoring": "each", "renormalise": False, "inward": True}


ROUTING: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen,
    "ernie4_5_moe": _ernie,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
}


def dense_width(feeds: Sequence[FeedForward]) -> int:
    """Of the layers without experts, if they are gated and alike; else, or without such layers, 0."""
    dense = {feed for feed in feeds if isinstance(feed, Mlp)}
    one = next(iter(dense), None)
    return one.width if one is not None and len(dense) == 1 and one.gated and not one.more else 0


def shapes(moe: MoeConfig, family: str, hidden: int, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a layer's experts: their Hugging Face names and shapes."""
    n = names(family)
    at = f"model.layers.{layer}.{n.module}"
    yield f"{at}.{n.router}.weight", (moe.experts, hidden)
    if moe.biased:
        yield f"{at}.{n.router}.bias", (moe.experts,)
    if moe.correction:
        yield f"{at}.{n.correction}", (1, moe.experts) if family == "ernie4_5_moe" else (moe.experts,)
    if n.joined:
        yield f"{at}.experts.gate_up_proj", (moe.experts, hidden, 2 * moe.width)
        yield f"{at}.experts.down_proj", (moe.experts, moe.width, hidden)
        if moe.biased:
            yield f"{at}.experts.gate_up_proj_bias", (moe.experts, 2 * moe.width)
            yield f"{at}.experts.down_proj_bias", (moe.experts, hidden)
    else:
        for expert in range(moe.experts):
            yield from _gated(f"{at}.experts.{expert}", n.parts, moe.width, hidden)
    if moe.shared:
        yield from _gated(f"{at}.{n.shared}", n.parts, moe.shared, hidden)


def _gated(at: str, parts: tuple[str, str, str], width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    gate, up, down = parts
    yield f"{at}.{gate}.weight", (width, hidden)
    yield f"{at}.{up}.weight", (width, hidden)
    yield f"{at}.{down}.weight", (hidden, width)
