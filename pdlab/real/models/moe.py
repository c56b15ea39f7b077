"""What the engine must know of a model's routed experts: how many, how wide, in which layers, how a token's are chosen.

Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pdlab.core.types import UsageError
from pdlab.cost.layers import FeedForward, Mlp, Moe

MOE_FAMILIES = ("mixtral", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """`layers` says of each layer whether it has experts. A token goes to `per_token` of `experts`, each `width` wide.

    scoring: what the router's logits become, "softmax" or "sigmoid", before experts are chosen. renormalise: the chosen ones' weights add
    up to 1.
    """

    layers: tuple[bool, ...]
    experts: int
    per_token: int
    width: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Of a layer's tensors in a file: the module, its router, and each expert's gate, up and down."""

    module: str = "mlp"
    router: str = "gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


NAMES = {"mixtral": ExpertNames("block_sparse_moe", "gate", ("w1", "w3", "w2"))}


def names(family: str) -> ExpertNames:
    return NAMES.get(family, ExpertNames())


def moe_of(family: str, config: Mapping[str, Any], feeds: Sequence[FeedForward], where: str) -> MoeConfig | None:
    """None: no layer has experts. `config` is {} for a model of the catalogue. Raises UsageError after `where` on what does not
    run here."""
    moes = {feed for feed in feeds if isinstance(feed, Moe)}
    if not moes:
        return None
    one = next(iter(moes))
    if family not in MOE_FAMILIES or len(moes) > 1 or not one.gated or one.shared or one.latent or one.more:
        raise UsageError(f"{where}: routed experts run here for {', '.join(MOE_FAMILIES)} only, all layers' alike")
    renormalise = family == "mixtral" or bool(config.get("norm_topk_prob", not config))
    return MoeConfig(
        layers=tuple(isinstance(feed, Moe) for feed in feeds),
        experts=one.experts,
        per_token=one.per_token,
        width=one.width,
        renormalise=renormalise,
    )


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
    gate, up, down = n.parts
    for expert in range(moe.experts):
        for name, shape in ((gate, (moe.width, hidden)), (up, (moe.width, hidden)), (down, (hidden, moe.width))):
            yield f"{at}.experts.{expert}.{name}.weight", shape
