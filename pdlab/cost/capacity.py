"""How many KV tokens fit beside a model's weights."""

from __future__ import annotations

from pdlab.core.types import UsageError
from pdlab.cost.hardware import Hardware
from pdlab.cost.parallel import Parallel, fitting
from pdlab.cost.shapes import GIB, Model, Part

RUNTIME_BYTES = GIB  # context, kernels, CUDA graphs, collectives' buffers


def activation_bytes(model: Model, tp: int, batch_tokens: int = 8192) -> int:
    """Bytes a rank keeps free for one step of `batch_tokens`: the widest feed-forward's two halves, four hidden states, in bf16."""
    widest = max(model.ffn, model.experts_per_token * model.expert_ffn + model.shared_ffn)
    return 2 * batch_tokens * (2 * widest // tp + 4 * model.hidden)


def kv_capacity_tokens(
    model: Model,
    hardware: Hardware,
    parallel: Parallel | int = 1,
    utilization: float = 0.9,
    weight_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    batch_tokens: int = 8192,
    max_seqs: int = 0,
    drafts: Model | None = None,
) -> int:
    """KV tokens that an instance of so many accelerators holds (a number is a tp): memory x utilization, less weights, runtime, one step's
    activations, and the states that `max_seqs` sequences have in recurrent layers; of measured hardware what it had. They are tokens of
    which every layer keeps KV: where some have windows, longer sequences take less. A model that `drafts` has its weights and KV whole on
    one of the accelerators, by which all are bound.

    Raises UsageError when nothing is left, with the missing GB and the smallest tp that fits."""
    if not 0.0 < utilization <= 1.0:
        raise UsageError(f"memory utilization {utilization} must lie in (0, 1]")
    spread = fitting(model, parallel)
    if hardware.profile is not None:
        hardware.profile.check(model, spread.tp)
        return hardware.profile.kv_tokens()
    free = _free_bytes(model, hardware, spread, utilization, weight_dtype, batch_tokens, max_seqs)
    of_token = model.kv_bytes_per_token_per_rank(kv_dtype, spread.attention_tp) / spread.pp / spread.dp_attention
    if drafts is not None:
        free -= rank_weight_bytes(drafts, Parallel())
        of_token += drafts.kv_bytes_per_token_per_rank(kv_dtype, 1)
    tokens = int(free // of_token) if free > 0 else 0
    if tokens < 1:
        tp = spread.gpus
        wider = [Parallel(tp=n) for n in (2, 4, 8, 16, 32, 64) if n > tp and model.heads % n == 0]
        beside = 0.0 if drafts is None else rank_weight_bytes(drafts, Parallel())
        fits = (one.tp for one in wider if _free_bytes(model, hardware, one, utilization, weight_dtype, batch_tokens, max_seqs) > beside)
        enough = next(fits, None)
        remedy = f"the smallest tp that fits is {enough}" if enough else "no larger tp fits: use a smaller model or number format"
        missing = max(0.1, -free * tp / 1e9)
        states = max_seqs * model.state_bytes / 1e9
        others = f", {states:.1f} GB of {max_seqs} sequences' states" if states else ""
        others += f", {beside / 1e9:.1f} GB of {drafts.name} that drafts" if drafts is not None else ""
        raise UsageError(
            f"{model.name} in {weight_dtype} does not fit {tp} x {hardware.name}: {missing:.1f} GB missing "
            f"({model.weights_bytes(weight_dtype) / 1e9:.1f} GB of weights{others}); {remedy}"
        )
    return tokens


def kv_bytes_per_token(model: Model, hardware: Hardware, dtype: str = "bf16", parallel: Parallel | int = 1) -> int:
    """KV bytes of one token over all ranks that have it; of measured hardware in the number format it was measured with."""
    if hardware.profile is not None:
        return hardware.profile.model.kv_bytes_per_token
    return model.kv_bytes_per_token(dtype, fitting(model, parallel).attention_tp)


def kv_windows(model: Model, hardware: Hardware, dtype: str = "bf16", parallel: Parallel | int = 1) -> tuple[tuple[int, int], ...]:
    """(KV bytes of one token over all ranks that have it, tokens kept) of layers with a window; none of measured hardware, which has its
    own count."""
    if hardware.profile is not None:
        return ()
    ranks = fitting(model, parallel).attention_tp
    return tuple((size, window) for window, size in model.kv_bytes_by_window(dtype, ranks).items() if window)


def rank_weight_bytes(model: Model, parallel: Parallel, weight_dtype: str | None = None) -> float:
    """Of one rank: attention's are whole in each group that attends to sequences of its own."""
    shared, own = 0.0, 0.0
    for w in model.stored(weight_dtype):
        if w.part in (Part.ATTENTION, Part.RECURRENT):
            own += w.bytes
        else:
            shared += w.bytes
    return (own / parallel.attention_tp + shared / parallel.tp) / parallel.pp


def _free_bytes(
    model: Model, hardware: Hardware, parallel: Parallel, utilization: float, weight_dtype: str, batch_tokens: int, max_seqs: int
) -> float:
    """Of one rank."""
    states = max_seqs * model.state_bytes / parallel.gpus
    weights = rank_weight_bytes(model, parallel, weight_dtype)
    return (
        hardware.hbm_bytes * utilization
        - weights
        - states
        - RUNTIME_BYTES
        - activation_bytes(model, parallel.tp, batch_tokens // parallel.dp_attention)
    )
