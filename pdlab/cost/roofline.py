"""Step times from first principles: each part of a step takes as long as its operations or its bytes need, whichever is longer.

`pdlab.cost.amounts` counts what a step asks of the busiest accelerator, `pdlab.cost.step` has the formulas, `pdlab.cost.collectives` those
of messages. `Coefficients` say what an engine achieves of an accelerator's peaks; `pdlab.search.board.fit` and, for 2023's engine,
`pdlab.cost.calibrate` fit them.

Windowed layers read at most a window of the batch's mean context, which makes decode a line with a bend for each width of window; every
other model's is straight. Recurrent layers read and write a state of fixed size for each sequence. Weights count in the format each part
is stored in.

Speculative decoding (`Drafts`) verifies the drafted tokens with the one that is due: a step computes 1 + d tokens of each sequence, after d
passes of a draft layer and the head, and makes 1 + a + ... + a^d tokens in the mean, where each draft is accepted with probability a if
those before it are. A step makes one token here, so it takes that much less. Source: Leviathan, Kalman and Matias (2023), §3.3. A draft
model is whole on one accelerator of the instance: it takes d decode steps of its own, and computes a prompt anew where the sequence first
decodes, but what the engine takes of a step and of a sequence is not spent again.

Of `pp` stages each works on its part of the sequences: a decode step is one pass of a pp-th of them through all stages, and a prompt, cut
into pp chunks, takes (2 pp - 1) / pp^2 of what one accelerator with all layers would take. Nothing measured has pp, so that is theory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from math import inf

from pdlab.core.types import UsageError
from pdlab.cost.amounts import amounts
from pdlab.cost.base import Cost
from pdlab.cost.hardware import Hardware
from pdlab.cost.parallel import Parallel, fitting
from pdlab.cost.shapes import Model
from pdlab.cost.step import step_parts, without_attention_s

STAGE_HOP_S = 20e-6  # from one pipeline stage to the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What a real engine achieves of an accelerator: fractions of peaks in (0, 1], multiples of what is counted, overheads in seconds."""

    compute: float  # of peak operations, linear layers in bf16
    compute_8bit: float  # the same in fp8 and int8
    memory: float  # of memory bandwidth, reading weights
    attention_memory: float  # of memory bandwidth, reading KV
    attention_compute: float  # of bf16 peak, attention of prompts and absorbed MLA
    collective: float  # of link bandwidth
    collective_latency: float = 1.0  # times the latencies of `pdlab.cost.collectives`
    compute_4bit: float = 0.5  # of peak, where the accelerator computes in four bits
    compute_widened: float = 0.4  # of bf16 peak, where four-bit weights are widened first
    experts: float = 0.7  # of the linear layers' fractions, grouped products of experts
    experts_memory: float = 0.7  # of memory bandwidth, reading experts
    activations: float = 1.0  # times the bytes between products
    expert_activations: float = 1.0  # the same of tokens on their way to experts and back
    step_s: float = 0.0
    layer_s: float = 0.0
    expert_layer_s: float = 0.0  # more, of a layer with experts
    latent_layer_s: float = 0.0  # more, of MLA
    sparse_layer_s: float = 0.0  # more, where an indexer chooses what is attended to
    recurrent_layer_s: float = 0.0  # more, of linear attention and SSM
    four_bit_read: float = 1.0  # times as long as its bytes would say, reading four-bit weights
    diversity: float = 1.0  # how unlike a step's tokens choose their experts: 1 is by chance
    imbalance: float = 1.0  # times the spread of experts' load that chance brings
    sequence_s: float = 0.0
    request_s: float = 0.0  # of the front end, before a request's first token
    error: float = 0.5  # of TPOT: log(measured / computed) lies within it in 95 % of rows, of set-ups that were left out of the fit
    ttft_error: float = 1.0  # likewise of TTFT
    rows: int = 0  # measured, that it was fitted to
    calibrated: bool = False
    source: str = ""


@dataclass(frozen=True, slots=True)
class Drafts:
    """Speculative decoding: `tokens` drafted a step, each accepted with probability `acceptance` if those before it are: by another
    `model`; or, `layered`, by a layer of the model's own and its head; else they cost nothing."""

    tokens: int = 0
    acceptance: float = 0.0
    layered: bool = True
    model: Model | None = None

    @property
    def made(self) -> float:
        """Tokens of a step, in the mean."""
        return sum(self.acceptance**i for i in range(self.tokens + 1))


@cache
def coefficient_sets() -> dict[str, Coefficients]:
    """The shipped sets by name; see each one's `source` and `calibrated`."""
    raw = json.loads(resources.files("pdlab.cost").joinpath("coefficients.json").read_text(encoding="utf-8"))
    return {name: Coefficients(**values) for name, values in raw.items()}


def coefficients_of(hardware: Hardware, like: str) -> Coefficients:
    """Of an engine on an accelerator's generation; of the generation where that engine has none of its own."""
    known = coefficient_sets()
    return known.get(f"{hardware.family}-{like}") or coefficients(hardware.family)


def coefficients(name: str) -> Coefficients:
    """A shipped set. Raises UsageError naming the nearest."""
    known = coefficient_sets()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.0)
        raise UsageError(f"unknown roofline coefficients {name!r}: nearest are {', '.join(near)}")
    return known[name]


def _drafter(model: Model, hardware: Hardware, k: Coefficients, kv_dtype: str) -> Roofline:
    """The cost of a model that drafts."""
    return Roofline(model, hardware, 1, replace(k, step_s=0.0, sequence_s=0.0), model.weight_dtype, kv_dtype)


class Roofline(Cost):
    """The roofline cost of `model` on `parallel` (a tp, where it is a number) x `hardware`. Raises UsageError where ranks do not divide the
    model."""

    def __init__(
        self,
        model: Model,
        hardware: Hardware,
        parallel: Parallel | int = 1,
        achieved: Coefficients | None = None,
        weight_dtype: str | None = None,
        kv_dtype: str = "bf16",
        drafts: Drafts | None = None,
    ) -> None:
        spread = fitting(model, parallel)
        k = achieved if achieved is not None else coefficients(hardware.family)
        counted = amounts(model, hardware, spread, weight_dtype, kv_dtype)
        self._parts = step_parts(counted, k)
        self.request_s = k.request_s
        self._groups = float(spread.dp_attention)
        self._stages, self._hop_s = spread.pp, (spread.pp - 1) * STAGE_HOP_S
        self._overlap = (2 * spread.pp - 1) / spread.pp**2
        self._drafted, self._made = (drafts.tokens, drafts.made) if drafts is not None else (0, 1.0)
        self._layered = drafts is not None and drafts.layered
        self._drafter = None if drafts is None or drafts.model is None else _drafter(drafts.model, hardware, k, kv_dtype)
        self.joins = self._drafter is not None
        self._draft_layers = 1.0 + self._drafted / model.layers if self._layered else 1.0
        by_window = [
            (
                int(a.window),
                a.pair_s / k.attention_compute,
                a.read_s / k.attention_memory,
                max(a.read_s / k.attention_memory, a.context_s / k.attention_compute) / self._groups * self._draft_layers / self._made,
            )
            for a in counted.attended
        ]
        (_, self._pair_s, self._read_s, self._context_s), *self._windows = by_window
        self._decode_base: dict[int, float] = {}
        self._prompts_base: dict[tuple[int, float, int], float] = {}

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens, own, attention_s = self._prompts(chunks)
        size = tokens, own, len(chunks)
        base_s = self._prompts_base.get(size)
        if base_s is None:
            base_s = self._prompts_base[size] = without_attention_s(self._parts, *size)
        whole_s = base_s + attention_s
        return whole_s if self._stages == 1 else whole_s * self._overlap + self._hop_s

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        base_s = self._decode_base.get(batch)
        if base_s is None:
            base_s = self._decode_base[batch] = self._decode_base_s(batch)
        slope, until = self._context_s, inf
        for window, _, _, context_s in self._windows:
            bend = batch * window
            if context_tokens < bend:
                slope += context_s
                until = min(until, bend)
            else:
                base_s += bend * context_s / self._stages
        slope /= self._stages
        if self._drafter is not None:
            stages = self._stages
            own_base_s, own_slope, own_until = self._drafter.decode_line(-(-batch // stages), context_tokens // stages)
            times = self._drafted / self._made
            return base_s + times * own_base_s, slope + times * own_slope / stages, min(until, own_until * stages)
        return base_s, slope, until

    def join_s(self, prompts: Sequence[tuple[int, int]]) -> float:
        return 0.0 if self._drafter is None else self._drafter.prefill_s(prompts)

    def decode_is_compute_bound(self, batch: int) -> bool:
        p, tokens = self._parts, batch * (1 + self._drafted) / self._stages
        arithmetic_s = tokens / p.groups * p.own_token_s + tokens * (p.shared_token_s + p.experts_met / p.ep * p.expert_token_s)
        read_s = (
            p.own_read_s
            + p.shared_read_s
            + p.experts_held * (1.0 - p.miss ** (1.0 + max(0.0, tokens - 1.0) * p.diversity)) * p.expert_read_s
        )
        return bool(arithmetic_s > read_s)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        decode_s = self.decode_s(batch, context_tokens)
        tokens, own, attention_s = self._prompts(chunks)
        verified = batch * (1 + self._drafted) / self._stages
        sequences = batch / self._stages
        both_s = without_attention_s(self._parts, verified + tokens, verified / self._groups + own, sequences + len(chunks))
        alone_s = without_attention_s(self._parts, verified, verified / self._groups, sequences)
        added_s: float = both_s - alone_s + attention_s
        return decode_s + added_s * self._overlap

    def _decode_base_s(self, batch: int) -> float:
        """Of a decode step, less what grows with its context."""
        tokens = batch * (1 + self._drafted) / self._stages
        verify_s: float = without_attention_s(self._parts, tokens, tokens / self._groups, batch / self._stages)
        head = batch / self._stages * self._parts.head_token_s
        drafts_s = self._drafted * (head * head + self._parts.head_read_s**2) ** 0.5 if self._layered else 0.0
        seconds: float = (verify_s * self._draft_layers + drafts_s) / self._made
        return seconds + self._hop_s

    def _prompts(self, chunks: Sequence[tuple[int, int]]) -> tuple[int, float, float]:
        """All tokens, those of the busiest rank, and seconds of its attention."""
        tokens, attention_s, longest, longest_s = 0, 0.0, 0, 0.0
        pair_s, read_s, windows, grouped = self._pair_s, self._read_s, self._windows, self._groups > 1.0
        for new, context in chunks:
            tokens += new
            by_flops, by_bytes = pair_s * new * (context + 0.5 * (new + 1)), read_s * context
            own_s = by_flops if by_flops > by_bytes else by_bytes
            if windows:
                own_s += self._window_prefill_s(new, context)
            attention_s += own_s
            if grouped:
                longest, longest_s = max(longest, new), max(longest_s, own_s)
        if not grouped:
            return tokens, tokens, attention_s
        return tokens, max(longest, tokens / self._groups), max(longest_s, attention_s / self._groups)

    def _window_prefill_s(self, new: int, context: int) -> float:
        """Attention of a chunk in the windowed layers: each token sees at most a window of those before it."""
        attention_s = 0.0
        for window, pair_s, read_s, _ in self._windows:
            growing = min(new, max(0, window - context))
            pairs = growing * (context + 0.5 * (growing + 1)) + (new - growing) * window
            attention_s += max(pair_s * pairs, read_s * min(context, window))
        return attention_s
