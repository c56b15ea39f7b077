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
decode a line with a bend for each width of window; every other model's is straight. Recurrent layers read and write a state of fixed size
for each sequence. Weights count in the format each part is stored in. The fractions and overheads are `Coefficients`, fitted by
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

from pdlab.core.types import UsageError
from pdlab.cost.base import Cost
from pdlab.cost.capacity import check_tp
from pdlab.cost.dtypes import EIGHT_BIT, Format, dtype_bytes
from pdlab.cost.hardware import Hardware
from pdlab.cost.shapes import OUTER, Model, Part


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


def _flops_per_s(hardware: Hardware, k: Coefficients, stored: Format) -> float:
    """What matrices of this format are multiplied with."""
    eight_bit = stored.compute in EIGHT_BIT and hardware.fp8_flops > 0
    return hardware.flops(stored.compute) * (k.compute_8bit if eight_bit else k.compute)


def _replication(model: Model, tp: int) -> float:
    """How often attention's weights are there over all ranks, where KV heads are fewer than ranks and each rank has one."""
    more = sum(
        a.kv_layers * model.hidden * (a.head_dim + a.v_dim) * a.kv_heads * (max(1.0, tp / a.kv_heads) - 1.0)
        for a in model.attention
        if not a.latent
    )
    return 1.0 + more / model.params(Part.ATTENTION) if more else 1.0


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
        bytes_per_s = hardware.hbm_bytes_per_s * k.memory
        self._fixed_s = k.step_s + model.layers * k.layer_s
        self._sequence_s = k.sequence_s
        head = model.head_weights(weight_dtype)
        self._head_read_s = head.bytes / tp / bytes_per_s
        self._head_sequence_s = 2 * head.params / tp / (hardware.flops("bf16") * k.compute)
        self._dense_read_s = self._dense_token_s = 0.0
        self._experts: list[tuple[float, float, float]] = []  # (share of a layer's experts that a token does not meet, read_s, token_s)
        for w in model.stored(weight_dtype):
            if w.part in OUTER:
                continue
            flops_per_s = _flops_per_s(hardware, k, w.format)
            params = w.params * _replication(model, tp) / tp if w.part is Part.ATTENTION else w.params / tp
            read_s, token_s = params * w.format.bytes_per_value / bytes_per_s, 2 * params / flops_per_s
            if w.experts:
                met = w.experts_per_token / w.experts
                self._experts.append((1.0 - met, read_s, met * token_s))
            else:
                self._dense_read_s += read_s
                self._dense_token_s += token_s
        self._init_attention(model, hardware, tp, k, kv_dtype)
        self._init_recurrence(model, hardware, tp, k)
        if tp > 1:
            link = hardware.link_bytes_per_s(tp) * k.collective
            self._fixed_s += model.reductions * ceil(log2(tp)) * k.collective_latency_s
            self._token_s += model.reductions * 2 * (tp - 1) / tp * 2 * model.hidden / link
        self._decode_base: dict[int, float] = {}

    def _init_attention(self, model: Model, hardware: Hardware, tp: int, k: Coefficients, kv_dtype: str) -> None:
        """Seconds of one rank's attention: for each (query, key) pair of a prompt, and for each KV token read. What layers with a window
        take comes apart, for each width: (window, pair_s, read_s, context_s)."""
        flops_per_s = hardware.flops("bf16") * k.attention_compute
        bytes_per_s = hardware.hbm_bytes_per_s * k.attention_memory
        by_window: dict[int, list[float]] = {0: [0.0, 0.0, 0.0]}
        for a in model.attention:
            heads = a.heads / tp
            pair_flops = 2 * heads * (a.head_dim + a.v_dim)
            decode_flops = 2 * heads * (2 * a.latent + a.rope_dim) if a.latent else pair_flops
            read_s = a.layers * a.kv_values_per_rank(tp) * dtype_bytes(kv_dtype) / bytes_per_s
            sums = by_window.setdefault(a.window_tokens, [0.0, 0.0, 0.0])
            sums[0] += a.layers * pair_flops / flops_per_s
            sums[1] += read_s
            sums[2] += max(read_s, a.layers * decode_flops / flops_per_s)
        self._pair_s, self._read_s, self._context_s = by_window.pop(0)
        self._windows = [(window, *sums) for window, sums in sorted(by_window.items())]

    def _init_recurrence(self, model: Model, hardware: Hardware, tp: int, k: Coefficients) -> None:
        """Recurrent layers read and write a sequence's state once a step, and update it for each token."""
        self._state_s = 2 * model.state_bytes / tp / (hardware.hbm_bytes_per_s * k.attention_memory)
        flops = sum(r.layers * r.token_flops for r in model.recurrence) / tp
        self._token_s = flops / (hardware.flops("bf16") * k.attention_compute)
        self._sequence_s += self._state_s

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens, attention_s = 0, 0.0
        pair_s, read_s, windows = self._pair_s, self._read_s, self._windows
        for new, context in chunks:
            tokens += new
            by_flops, by_bytes = pair_s * new * (context + 0.5 * (new + 1)), read_s * context
            attention_s += by_flops if by_flops > by_bytes else by_bytes
            if windows:
                attention_s += self._window_prefill_s(new, context)
        return self._step_s(tokens, len(chunks), attention_s)

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        base_s = self._decode_base.get(batch)
        if base_s is None:
            base_s = self._decode_base[batch] = self._step_s(batch, batch, 0.0)
        slope, until = self._context_s, inf
        for window, _, _, context_s in self._windows:
            bend = batch * window
            if context_tokens < bend:
                slope += context_s
                until = min(until, bend)
            else:
                base_s += bend * context_s
        return base_s, slope, until

    def decode_is_compute_bound(self, batch: int) -> bool:
        arithmetic_s, read_s = batch * self._dense_token_s, self._dense_read_s
        for miss, expert_read_s, expert_token_s in self._experts:
            arithmetic_s += batch * expert_token_s
            read_s += expert_read_s * (1.0 - miss**batch)
        return arithmetic_s > read_s

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        tokens, attention_s = batch, self._context_s * context_tokens
        for window, _, _, context_s in self._windows:
            attention_s += context_s * min(context_tokens, batch * window)
        pair_s, read_s, windows = self._pair_s, self._read_s, self._windows
        for new, context in chunks:
            tokens += new
            by_flops, by_bytes = pair_s * new * (context + 0.5 * (new + 1)), read_s * context
            attention_s += by_flops if by_flops > by_bytes else by_bytes
            if windows:
                attention_s += self._window_prefill_s(new, context)
        return self._step_s(tokens, len(chunks) + batch, attention_s)

    def _window_prefill_s(self, new: int, context: int) -> float:
        """Attention of a chunk in the windowed layers: each token sees at most a window of those before it."""
        attention_s = 0.0
        for window, pair_s, read_s, _ in self._windows:
            growing = min(new, max(0, window - context))
            pairs = growing * (context + 0.5 * (growing + 1)) + (new - growing) * window
            attention_s += max(pair_s * pairs, read_s * min(context, window))
        return attention_s

    def _step_s(self, tokens: int, sequences: int, attention_s: float) -> float:
        linear_s = hypot(tokens * self._dense_token_s, self._dense_read_s)
        compute_s, read_s = sequences * self._head_sequence_s, self._head_read_s
        linear_s += compute_s if compute_s > read_s else read_s
        for miss, read_s, token_s in self._experts:
            linear_s += hypot(tokens * token_s, read_s * (1.0 - miss**tokens))
        return self._fixed_s + linear_s + attention_s + tokens * self._token_s + sequences * self._sequence_s
