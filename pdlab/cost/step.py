"""Seconds of a step's parts from amounts and what is achieved of peaks; of one instance, or of many at once as arrays.

    step        = step_s + layers * layer_s + (layers of a kind) * (that kind's more) + sequences * sequence_s
                  + linear + experts + head + attention + activations + collectives
    linear      = hypot(T / compute, weights / memory): of attention's matrices with the tokens of a rank's own sequences, of all else
                  with all T tokens of the step
    experts     = hypot(m / (compute * experts), hit * (an expert's weights) / experts_memory)
                  T tokens, each with k of E experts, hit an expected h = E / ep * (1 - (1 - k/E)^(1 + d (T - 1))) of a group's, where d
                  (`diversity`) says how unlike the tokens of a step choose; of ep groups the busiest
                  has h + z * sqrt(h (1 - h ep / E)) of them, and m = T k / ep + z * sqrt(T k / ep) tokens: z is the expected largest of ep
                  standard normal variables, times `imbalance`
    attention   = of a chunk of n tokens after c: max(pairs / attention_compute, KV of c / attention_memory)
                  of decodes with C tokens in all: C / groups * max(KV of a token / attention_memory, operations / attention_compute)
    collectives = this package's `collectives`

hypot is a maximum with a rounded corner: where operations and bytes take equally long, kernels reach neither peak. Sources: the
roofline, Williams, Waterman and Patterson (2009); the fractions, `Coefficients`, are fitted by `pdlab.cost.calibrate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pdlab.cost.amounts import Amounts, LinearWork
from pdlab.cost.collectives import Quantity, Ring, all_reduce_s, all_to_all_s, lesser


class Achieved(Protocol):
    """What `Coefficients` has, for one instance or, as arrays, for many."""

    @property
    def compute(self) -> Quantity: ...
    @property
    def compute_8bit(self) -> Quantity: ...
    @property
    def compute_4bit(self) -> Quantity: ...
    @property
    def experts(self) -> Quantity: ...
    @property
    def memory(self) -> Quantity: ...
    @property
    def experts_memory(self) -> Quantity: ...
    @property
    def attention_memory(self) -> Quantity: ...
    @property
    def attention_compute(self) -> Quantity: ...
    @property
    def activations(self) -> Quantity: ...
    @property
    def expert_activations(self) -> Quantity: ...
    @property
    def collective(self) -> Quantity: ...
    @property
    def collective_latency(self) -> Quantity: ...
    @property
    def step_s(self) -> Quantity: ...
    @property
    def layer_s(self) -> Quantity: ...
    @property
    def expert_layer_s(self) -> Quantity: ...
    @property
    def latent_layer_s(self) -> Quantity: ...
    @property
    def sparse_layer_s(self) -> Quantity: ...
    @property
    def recurrent_layer_s(self) -> Quantity: ...
    @property
    def compute_widened(self) -> Quantity: ...
    @property
    def four_bit_read(self) -> Quantity: ...
    @property
    def diversity(self) -> Quantity: ...
    @property
    def imbalance(self) -> Quantity: ...
    @property
    def sequence_s(self) -> Quantity: ...


@dataclass(frozen=True, slots=True)
class StepParts:
    """An instance's seconds with all that is achieved in them; what is left is how many tokens and sequences there are."""

    fixed_s: Quantity
    activation_s: Quantity
    expert_activation_s: Quantity
    sequence_s: Quantity
    own_token_s: Quantity
    own_read_s: Quantity
    shared_token_s: Quantity
    shared_read_s: Quantity
    expert_token_s: Quantity
    expert_read_s: Quantity
    head_token_s: Quantity
    head_read_s: Quantity
    experts_held: Quantity
    experts_met: Quantity
    miss: Quantity
    spread: Quantity
    diversity: Quantity
    ep: Quantity
    groups: Quantity
    attention_ring: Ring
    ring: Ring
    attention_reductions: Quantity
    reductions: Quantity
    exchanges: Quantity
    hidden_bytes: Quantity
    exchange_bytes: Quantity
    collective: Quantity
    collective_latency: Quantity
    alone: bool  # no instance has several ranks: collectives take no time
    dense: bool  # none has experts: nor do they


def step_parts(a: Amounts, k: Achieved) -> StepParts:
    """What an instance's steps are made of."""
    return StepParts(
        fixed_s=fixed_s(a, k),
        activation_s=a.activation_s * k.activations / k.memory + a.state_token_s / k.attention_compute,
        expert_activation_s=a.expert_activation_s * k.expert_activations / k.memory,
        sequence_s=k.sequence_s / a.groups + a.state_read_s / k.attention_memory,
        own_token_s=_token_s(a.attention, k),
        own_read_s=_read_s(a.attention, k) / k.memory,
        shared_token_s=_token_s(a.feed_forward, k),
        shared_read_s=_read_s(a.feed_forward, k) / k.memory,
        expert_token_s=_token_s(a.experts, k) / k.experts,
        expert_read_s=_read_s(a.experts, k) / k.experts_memory,
        head_token_s=a.head_token_s / k.compute,
        head_read_s=a.head_read_s / k.memory,
        experts_held=a.experts_held,
        experts_met=a.experts_met,
        miss=a.miss,
        spread=a.spread * k.imbalance,
        diversity=k.diversity,
        ep=a.ep,
        groups=a.groups,
        attention_ring=a.attention_ring,
        ring=a.ring,
        attention_reductions=a.attention_reductions,
        reductions=a.reductions,
        exchanges=a.exchanges,
        hidden_bytes=a.hidden_bytes,
        exchange_bytes=a.exchange_bytes,
        collective=k.collective,
        collective_latency=k.collective_latency,
        alone=not np.any(a.ring.ranks > 1.0) and not np.any(a.attention_ring.ranks > 1.0),
        dense=not np.any(a.moe_layers),
    )


def fixed_s(a: Amounts, k: Achieved) -> Quantity:
    """What a step takes whatever it computes: its kernels' launches and latencies."""
    layers_s = a.layers * k.layer_s + a.moe_layers * k.expert_layer_s
    return (
        k.step_s
        + layers_s
        + a.latent_layers * k.latent_layer_s
        + a.sparse_layers * k.sparse_layer_s
        + a.recurrent_layers * k.recurrent_layer_s
    )


def _read_s(linear: LinearWork, k: Achieved) -> Quantity:
    return linear.read_s + linear.read_four_s * k.four_bit_read


def _token_s(linear: LinearWork, k: Achieved) -> Quantity:
    sixteen, eight, four, widened = linear.token_s
    return sixteen / k.compute + eight / k.compute_8bit + four / k.compute_4bit + widened / k.compute_widened


def without_attention_s(p: StepParts, tokens: Quantity, own_tokens: Quantity, sequences: Quantity) -> Quantity:
    """Seconds of a step of so many tokens, of which a rank's own sequences have `own_tokens`, less attention."""
    own, shared = own_tokens * p.own_token_s, tokens * p.shared_token_s
    seconds = (own * own + p.own_read_s * p.own_read_s) ** 0.5 + (shared * shared + p.shared_read_s * p.shared_read_s) ** 0.5
    head = sequences * p.head_token_s
    seconds += (head * head + p.head_read_s * p.head_read_s) ** 0.5
    others_s = p.fixed_s + own_tokens * p.activation_s + sequences * p.sequence_s
    if not p.alone:
        others_s += collectives_s(p, tokens, own_tokens)
    seconds += others_s
    return seconds if p.dense else seconds + experts_s(p, tokens)


def experts_s(p: StepParts, tokens: Quantity) -> Quantity:
    """Of the busiest group; nothing where there are no experts (their seconds are nothing, then)."""
    missed = p.miss ** (1.0 + (tokens - 1.0) * p.diversity)
    hit = p.experts_held * (1.0 - missed)
    busiest = hit + p.spread * (hit * missed) ** 0.5
    mean = tokens * p.experts_met / p.ep
    most = mean + p.spread * mean**0.5
    compute, read = most * p.expert_token_s, lesser(busiest, p.experts_held) * p.expert_read_s
    return (compute * compute + read * read) ** 0.5 + most * p.expert_activation_s


def collectives_s(p: StepParts, tokens: Quantity, own_tokens: Quantity) -> Quantity:
    """All-reduces after attention among its ranks, after feed-forwards among all; or, of experts, all-to-alls."""
    own_size, size = own_tokens * p.hidden_bytes, tokens * p.hidden_bytes
    seconds = p.attention_reductions * all_reduce_s(p.attention_ring, own_size, p.collective, p.collective_latency)
    seconds += p.reductions * all_reduce_s(p.ring, size, p.collective, p.collective_latency)
    return seconds + p.exchanges * all_to_all_s(p.ring, tokens * p.exchange_bytes, p.collective, p.collective_latency)
