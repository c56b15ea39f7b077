"""Step times from first principles: each part of a step takes as long as its operations or its bytes need, whichever is longer.

    step      = step_s + layers * layer_s + sequences * sequence_s + linear + attention + collectives
    linear    = hypot(2 * parameters * T / (peak * compute), weight bytes / (bandwidth * memory)), apart for the dense part and the experts;
                T counts the step's tokens. The head is apart too and sees one token of each sequence. T tokens, each with k of E experts,
                hit an expected E * (1 - (1 - k/E)^T) of them, which is what is read
    attention = of a chunk of n tokens after c:   max(2 * heads * (d_qk + d_v) * (n c + n (n+1) / 2) / (peak * attention_compute),
                                                      KV bytes of c / (bandwidth * attention_memory))
                of decodes with C tokens in all:  C * max(KV bytes of a token / (bandwidth * attention_memory), operations / (peak *
                                                          attention_compute))
    collectives = 2 all-reduces a layer of T * hidden in bf16 over tp ranks, each
                  ceil(log2 tp) * collective_latency_s + 2 (tp-1)/tp * bytes / (link * collective)

hypot is a maximum with a rounded corner: where operations and bytes take equally long, kernels reach neither peak. Grouped matrix products
of DeepSeek-V3's size on H800 follow it within 13 % from 32 to 2048 tokens an expert, and the calibration rows are met better by it.

All parts are of one rank: tp divides weights, heads and KV heads (of which each rank has at least one; MLA's compressed vector is on every
rank). MLA prefills with expanded heads and decodes absorbed, in kv_lora_rank + rope_dim wide queries. Experts are sharded by tp as
dense weights are; expert parallelism is not modelled. Windowed layers read at most a window of the batch's mean context, which makes
decode a line with one bend; every other model's is straight. The fractions and overheads are `Coefficients`, fitted by
`pdlab.cost.calibrate`.

Sources: the roofline itself, Williams, Waterman and Patterson (2009); absorbed MLA, DeepSeek-V2 (2024); ring all-reduce volume,
Patarasuk and Yuan (2009).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from math import ceil, hypot, inf, log2

from pdlab.cost.base import Cost
from pdlab.cost.capacity import check_tp
from pdlab.cost.dtypes import EIGHT_BIT, dtype_bytes
from pdlab.cost.shapes import Hardware, Model
from pdlab.types import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What a real engine achieves of an accelerator: fractions of peaks in (0, 1], overheads in seconds."""

    compute: float  # of peak operations, linear layers in bf16
    compute_8bit: float  # the same in fp8 and int8
    memory: float  # of memory bandwidth, reading weights
    attention_memory: float  # of memory bandwidth, reading KV
    attention_compute: float  # of bf16 peak, attention of prompts and absorbed MLA
    collective: float  # of link bandwidth
    collective_latency_s: float  # an all-reduce, a hop (log2 tp)
    step_s: float = 0.0
    layer_s: float = 0.0
    sequence_s: float = 0.0
    calibrated: bool = False
    source: str = ""


@cache
def coefficient_sets() -> dict[str, Coefficients]:
    """The shipped sets by name; see each one's `source` and `calibrated`."""
    raw = json.loads(resources.files("pdlab.cost").joinpath("coefficients.json").read_text(encoding="utf-8"))
    return {name: Coefficients(**values) for name, values in raw.items()}


def coefficients(name: str) -> Coefficients:
    """A shipped set. Raises UsageError naming the nearest."""
    known = coefficient_sets()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.0)
        raise UsageError(f"unknown roofline coefficients {name!r}: nearest are {', '.join(near)}")
    return known[name]


class Roofline(Cost):
    """The roofline cost of `model` on `tp` x `hardware`. Raises UsageError when tp does not divide the heads."""

    def __init__(
        self,
        model: Model,
        hardware: Hardware,
        tp: int = 1,
        achieved: Coefficients | None = None,
        weight_dtype: str = "bf16",
        kv_dtype: str = "bf16",
    ) -> None:
        check_tp(model, tp)
        k = achieved if achieved is not None else coefficients(hardware.family)
        eight_bit = weight_dtype in EIGHT_BIT and hardware.fp8_flops > 0
        flops_per_s = hardware.flops(weight_dtype) * (k.compute_8bit if eight_bit else k.compute)
        bytes_per_s = hardware.hbm_bytes_per_s * k.memory
        weight_bytes, head_bytes = dtype_bytes(weight_dtype), max(2.0, dtype_bytes(weight_dtype))

        self._fixed_s = k.step_s + model.layers * k.layer_s
        self._sequence_s = k.sequence_s
        replicas = max(1.0, tp / model.kv_heads) if not model.kv_lora_rank else 1.0
        kv_projections = 0 if model.kv_lora_rank else 2 * model.hidden * model.head_dim * model.kv_heads * model.layers
        dense = (model.dense_params + kv_projections * (replicas - 1.0)) / tp
        self._dense_read_s = dense * weight_bytes / bytes_per_s
        self._head_read_s = model.head_params * head_bytes / tp / bytes_per_s
        self._head_sequence_s = 2 * model.head_params / tp / (hardware.flops("bf16") * k.compute)
        self._dense_token_s = 2 * dense / flops_per_s

        self._experts = model.experts
        self._expert_miss = 1.0 - model.experts_per_token / model.experts if model.experts else 1.0
        expert = model.moe_layers * model.expert_params / tp
        self._expert_read_s = model.experts * expert * weight_bytes / bytes_per_s
        self._expert_token_s = 2 * model.experts_per_token * expert / flops_per_s

        self._init_attention(model, hardware, tp, k, kv_dtype)
        self._token_s = 0.0
        if tp > 1:
            link = hardware.link_bytes_per_s(tp) * k.collective
            self._fixed_s += 2 * model.layers * ceil(log2(tp)) * k.collective_latency_s
            self._token_s = 2 * model.layers * 2 * (tp - 1) / tp * 2 * model.hidden / link
        self._decode_base: dict[int, float] = {}

    def _init_attention(self, model: Model, hardware: Hardware, tp: int, k: Coefficients, kv_dtype: str) -> None:
        """Seconds of one rank's attention: for each (query, key) pair of a prompt, and for each KV token read."""
        heads = model.heads / tp
        flops_per_s = hardware.flops("bf16") * k.attention_compute
        kv_bytes = model.kv_bytes_per_token_per_rank(kv_dtype, tp)
        if model.kv_lora_rank:
            pair_flops = 2 * heads * (model.nope_dim + model.rope_dim + model.v_dim)
            decode_flops = 2 * heads * (2 * model.kv_lora_rank + model.rope_dim)
        else:
            pair_flops = decode_flops = 2 * heads * 2 * model.head_dim
        read_s = kv_bytes / (hardware.hbm_bytes_per_s * k.attention_memory)
        decode_s = max(read_s, model.layers * decode_flops / flops_per_s)
        pair_s = model.layers * pair_flops / flops_per_s
        windowed = model.window_layers / model.layers if model.window_tokens else 0.0
        self._window = model.window_tokens if windowed else 0
        self._pair_s, self._pair_window_s = pair_s * (1 - windowed), pair_s * windowed
        self._read_s, self._read_window_s = read_s * (1 - windowed), read_s * windowed
        self._context_s, self._context_window_s = decode_s * (1 - windowed), decode_s * windowed

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens, attention_s = 0, 0.0
        pair_s, read_s, window = self._pair_s, self._read_s, self._window
        for new, context in chunks:
            tokens += new
            by_flops, by_bytes = pair_s * new * (context + 0.5 * (new + 1)), read_s * context
            attention_s += by_flops if by_flops > by_bytes else by_bytes
            if window:
                attention_s += self._window_prefill_s(new, context)
        return self._step_s(tokens, len(chunks), attention_s)

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        base_s = self._decode_base.get(batch)
        if base_s is None:
            base_s = self._decode_base[batch] = self._step_s(batch, batch, 0.0)
        slope, until = self._context_s, inf
        if self._window:
            bend = batch * self._window
            if context_tokens < bend:
                slope += self._context_window_s
                until = bend
            else:
                base_s += bend * self._context_window_s
        return base_s, slope, until

    def decode_is_compute_bound(self, batch: int) -> bool:
        arithmetic_s = batch * (self._dense_token_s + self._expert_token_s)
        read_s = self._dense_read_s
        if self._experts:
            read_s += self._expert_read_s * (1.0 - self._expert_miss**batch)
        return arithmetic_s > read_s

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        tokens, attention_s = batch, self._context_s * context_tokens
        if self._window:
            attention_s += self._context_window_s * min(context_tokens, batch * self._window)
        pair_s, read_s, window = self._pair_s, self._read_s, self._window
        for new, context in chunks:
            tokens += new
            by_flops, by_bytes = pair_s * new * (context + 0.5 * (new + 1)), read_s * context
            attention_s += by_flops if by_flops > by_bytes else by_bytes
            if window:
                attention_s += self._window_prefill_s(new, context)
        return self._step_s(tokens, len(chunks) + batch, attention_s)

    def _window_prefill_s(self, new: int, context: int) -> float:
        """Attention of a chunk in the windowed layers: each token sees at most a window of those before it."""
        window = self._window
        growing = min(new, max(0, window - context))
        pairs = growing * (context + 0.5 * (growing + 1)) + (new - growing) * window
        return max(self._pair_window_s * pairs, self._read_window_s * min(context, window))

    def _step_s(self, tokens: int, sequences: int, attention_s: float) -> float:
        linear_s = hypot(tokens * self._dense_token_s, self._dense_read_s)
        compute_s, read_s = sequences * self._head_sequence_s, self._head_read_s
        linear_s += compute_s if compute_s > read_s else read_s
        if self._experts:
            read_s = self._expert_read_s * (1.0 - self._expert_miss**tokens)
            linear_s += hypot(tokens * self._expert_token_s, read_s)
        return self._fixed_s + linear_s + attention_s + tokens * self._token_s + sequences * self._sequence_s
