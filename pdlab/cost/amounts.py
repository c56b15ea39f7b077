"""What one step of a model asks of one accelerator: operations, bytes and messages, before anything is known of what is achieved.

Everything is of the busiest rank of an instance. `Parallel` says how ranks share the model: attention's heads among tp / dp_attention
ranks, experts among ep groups of ranks, all else among tp. Of attention each rank has at least one KV head; MLA's compressed vector is on
every rank that shares a sequence. Under data-parallel attention a sequence's attention is done by its own group, so that a lone prompt
keeps one group busy and the others idle.

MLA prefills with expanded heads and decodes absorbed, in kv_lora_rank + rope_dim wide queries (DeepSeek-V2, 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

from pdlab.cost.collectives import Quantity, Ring, crossing_share, ring_of
from pdlab.cost.dtypes import dtype_bytes
from pdlab.cost.hardware import Hardware
from pdlab.cost.parallel import Parallel
from pdlab.cost.shapes import OUTER, Model, Part, Weights

CLASSES = ("16", "8", "4", "wide")  # bits that products are computed in; four-bit weights that are widened first
_OWN = frozenset({Part.ATTENTION, Part.RECURRENT})  # of a sequence's own ranks
_LARGEST = (0.0, 0.564, 1.029, 1.424, 1.766, 2.070, 2.343, 2.594, 2.826)  # of 1, 2, 4, ... 256
_ACTIVATION_BYTES = 2  # of one value between products
EXCHANGED_BYTES = 3.0  # of a value that goes to an expert and back: eight bits there, sixteen back


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWork:
    """Products with weights, over all layers: seconds of a token at each class's peak, and seconds to read all at full bandwidth."""

    token_s: tuple[Quantity, Quantity, Quantity, Quantity]
    read_s: Quantity  # of formats of eight bits and more
    read_four_s: Quantity  # of four-bit formats


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """Attention of layers with one width of window (0: all): seconds at peak of a (query, key) pair of a prompt, of a context token that a
    decode's query meets, and to read a KV token."""

    window: Quantity
    pair_s: Quantity
    context_s: Quantity
    read_s: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Seconds are at the accelerator's peaks."""

    layers: Quantity
    moe_layers: Quantity
    latent_layers: Quantity  # of MLA
    sparse_layers: Quantity  # whose indexer chooses what is attended to
    recurrent_layers: Quantity
    attention: LinearWork
    feed_forward: LinearWork
    experts: LinearWork  # token_s of a token with one expert; read_s of one expert, in all layers
    experts_held: Quantity  # by a rank, of a layer
    experts_met: Quantity  # by a token, of a layer
    miss: Quantity  # share of a layer's experts that a token does not meet
    spread: Quantity  # how far the busiest of ep groups lies above their mean, in standard deviations
    ep: Quantity
    head_token_s: Quantity
    head_read_s: Quantity
    activation_s: Quantity  # an own token's values between products, read and written, at full bandwidth
    expert_activation_s: Quantity  # of a token with one expert, likewise
    attended: tuple[Attended, ...]
    state_token_s: Quantity  # recurrent layers, a token
    state_read_s: Quantity  # recurrent layers, a sequence
    groups: Quantity  # of ranks, that attend to sequences of their own
    attention_ring: Ring
    ring: Ring
    attention_reductions: Quantity
    reductions: Quantity
    exchanges: Quantity  # layers whose experts' tokens go all to all
    hidden_bytes: Quantity  # a token's message of an all-reduce
    exchange_bytes: Quantity  # a token's of an all-to-all, of one rank
    stages: Quantity


def amounts(model: Model, hardware: Hardware, parallel: Parallel, weight_dtype: str | None = None, kv_dtype: str = "bf16") -> Amounts:
    """Of one rank."""
    tp, dp, ep = parallel.tp, parallel.dp_attention, parallel.ep
    weights = [w for w in model.stored(weight_dtype) if w.part not in OUTER]
    experts = [w for w in weights if w.experts]
    held = sum(w.params for w in experts) or 1
    count = model.experts or 1
    met = model.experts_per_token or 1
    miss = 1.0 - sum(w.params * w.experts_per_token / w.experts for w in experts) / held if experts else 1.0
    head = model.head_weights(weight_dtype)
    exchanged = dp > 1 and ep > 1
    states = sum(r.layers * r.token_flops for r in model.recurrence) / parallel.attention_tp
    return Amounts(
        layers=float(model.layers),
        moe_layers=float(model.moe_layers),
        latent_layers=float(sum(a.layers for a in model.attention if a.latent)),
        sparse_layers=float(sum(a.layers for a in model.attention if a.latent and a.window_tokens)),
        recurrent_layers=float(sum(r.layers for r in model.recurrence)),
        attention=_linear([w for w in weights if w.part in _OWN], hardware, _replication(model, parallel.attention_tp) * dp / tp),
        feed_forward=_linear([w for w in weights if w.part not in _OWN and not w.experts], hardware, 1.0 / tp),
        experts=_linear(experts, hardware, ep / tp / count),
        experts_held=float(count / ep),
        experts_met=float(met),
        miss=miss,
        spread=busiest_deviations(ep),
        ep=float(ep),
        head_token_s=2 * head.params / tp / hardware.flops("bf16"),
        head_read_s=head.bytes / tp / hardware.hbm_bytes_per_s,
        activation_s=_activation_bytes(model, tp) / hardware.hbm_bytes_per_s,
        expert_activation_s=_expert_activation_bytes(model, tp // ep) / hardware.hbm_bytes_per_s,
        attended=tuple(_attended(model, hardware, parallel, kv_dtype)),
        state_token_s=states / hardware.flops("bf16"),
        state_read_s=2 * model.state_bytes / parallel.attention_tp / dp / hardware.hbm_bytes_per_s,
        groups=float(dp),
        attention_ring=ring_of(hardware, parallel.attention_tp),
        ring=ring_of(hardware, tp),
        attention_reductions=float(model.reductions - model.layers if parallel.attention_tp > 1 else 0),
        reductions=float((model.layers - (model.moe_layers if exchanged else 0)) if tp > 1 else 0),
        exchanges=float(model.moe_layers if exchanged else 0),
        hidden_bytes=float(_ACTIVATION_BYTES * model.hidden),
        exchange_bytes=EXCHANGED_BYTES * model.hidden * other_ranks(met, tp) * crossing_share(hardware, tp) / tp,
        stages=float(parallel.pp),
    )


def busiest_deviations(groups: int) -> float:
    """The expected largest of so many standard normal variables; between powers of two linear in log2. Source: order statistics, Harter
    (1961)."""
    place = log2(max(1, groups))
    below = min(int(place), len(_LARGEST) - 2)
    return _LARGEST[below] + (place - below) * (_LARGEST[below + 1] - _LARGEST[below])


def other_ranks(met: int, ranks: int) -> float:
    """How many other ranks a token of `met` experts goes to in the mean, to each once: (r - 1) (1 - (1 - 1/r)^met)."""
    return (ranks - 1) * (1.0 - (1.0 - 1.0 / ranks) ** met)


def _linear(weights: list[Weights], hardware: Hardware, share: float) -> LinearWork:
    """Of a rank that has this share of the weights."""
    seconds = dict.fromkeys(CLASSES, 0.0)
    for w in weights:
        seconds[_class(w, hardware)] += 2 * w.params * share / hardware.flops(w.format.compute)
    four = sum(w.bytes for w in weights if w.format.bytes_per_value < 1.0)
    more = sum(w.bytes for w in weights) - four
    return LinearWork(
        token_s=(seconds["16"], seconds["8"], seconds["4"], seconds["wide"]),
        read_s=more * share / hardware.hbm_bytes_per_s,
        read_four_s=four * share / hardware.hbm_bytes_per_s,
    )


def _class(w: Weights, hardware: Hardware) -> str:
    """By the accelerator's peak that holds: formats that it does not compute in are widened."""
    peak = hardware.flops(w.format.compute)
    if hardware.fp8_flops and peak > hardware.fp8_flops:
        return "4"
    if peak > hardware.bf16_flops:
        return "8"
    return "wide" if w.format.bytes_per_value < 1.0 else "16"


def _replication(model: Model, ranks: int) -> float:
    """How often attention's weights are there over all ranks, where KV heads are fewer than ranks and each rank has one."""
    more = sum(
        a.kv_layers * model.hidden * (a.head_dim + a.v_dim) * a.kv_heads * (max(1.0, ranks / a.kv_heads) - 1.0)
        for a in model.attention
        if not a.latent
    )
    return 1.0 + more / model.params(Part.ATTENTION, Part.RECURRENT) if more else 1.0


def _activation_bytes(model: Model, tp: int) -> float:
    """Of a token: each layer reads and writes its hidden state about six times, and a feed-forward's inner values three times."""
    dense = model.layers - model.moe_layers
    inner = (model.ffn * dense + model.shared_ffn * model.moe_layers) / tp
    return _ACTIVATION_BYTES * (6 * model.hidden * model.layers + 3 * inner)


def _expert_activation_bytes(model: Model, ranks: int) -> float:
    """Of a token with one expert, in all layers: it is gathered and added up again, and has inner values."""
    return _ACTIVATION_BYTES * model.moe_layers * (4 * model.hidden + 3 * model.expert_ffn / ranks)


def _attended(model: Model, hardware: Hardware, parallel: Parallel, kv_dtype: str) -> Iterator[Attended]:
    """Layers without a window first, and those of each width."""
    ranks, peak = parallel.attention_tp, hardware.flops("bf16")
    for window in sorted({0, *(a.window_tokens for a in model.attention)}):
        pair, context, read = 0.0, 0.0, 0.0
        for a in model.attention:
            if a.window_tokens == window:
                pair_flops = 2 * a.heads / ranks * (a.head_dim + a.v_dim)
                pair += a.layers * pair_flops
                context += a.layers * (2 * a.heads / ranks * (2 * a.latent + a.rope_dim) if a.latent else pair_flops)
                read += a.layers * a.kv_values_per_rank(ranks) * dtype_bytes(kv_dtype)
        yield Attended(window=float(window), pair_s=pair / peak, context_s=context / peak, read_s=read / hardware.hbm_bytes_per_s)
