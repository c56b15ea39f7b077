"""How many KV tokens fit beside a model's weights."""

from __future__ import annotations

from pdlab.core.types import UsageError
from pdlab.cost.hardware import Hardware
from pdlab.cost.shapes import GIB, Model

RUNTIME_BYTES = GIB  # context, kernels, CUDA graphs, collectives' buffers


def activation_bytes(model: Model, tp: int, batch_tokens: int = 8192) -> int:
    """Bytes a rank keeps free for one step of `batch_tokens`: the widest feed-forward's two halves, four hidden states, in bf16."""
    widest = max(model.ffn, model.experts_per_token * model.expert_ffn + model.shared_ffn)
    return 2 * batch_tokens * (2 * widest // tp + 4 * model.hidden)


def kv_capacity_tokens(
    model: Model,
    hardware: Hardware,
    tp: int = 1,
    utilization: float = 0.9,
    weight_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    batch_tokens: int = 8192,
    max_seqs: int = 0,
) -> int:
    """KV tokens that an instance of `tp` accelerators holds: memory x utilization, less weights, runtime, one step's activations, and the
    states that `max_seqs` sequences have in recurrent layers; of measured hardware what it had. They are tokens of which every layer keeps
    KV: where some have windows, longer sequences take less.

    Raises UsageError when nothing is left, with the missing GB and the smallest tp that fits."""
    if not 0.0 < utilization <= 1.0:
        raise UsageError(f"memory utilization {utilization} must lie in (0, 1]")
    check_tp(model, tp)
    if hardware.profile is not None:
        hardware.profile.check(model, tp)
        return hardware.profile.kv_tokens()
    free = _free_bytes(model, hardware, tp, utilization, weight_dtype, batch_tokens, max_seqs)
    tokens = int(free // model.kv_bytes_per_token_per_rank(kv_dtype, tp)) if free > 0 else 0
    if tokens < 1:
        fits = [n for n in (2, 4, 8, 16, 32, 64) if n > tp and model.heads % n == 0]
        enough = next((n for n in fits if _free_bytes(model, hardware, n, utilization, weight_dtype, batch_tokens, max_seqs) > 0), None)
        remedy = f"the smallest tp that fits is {enough}" if enough else "no larger tp fits: use a smaller model or number format"
        missing = max(0.1, -free * tp / 1e9)
        states = max_seqs * model.state_bytes / 1e9
        beside = f", {states:.1f} GB of {max_seqs} sequences' states" if states else ""
        raise UsageError(
            f"{model.name} in {weight_dtype} does not fit {tp} x {hardware.name}: {missing:.1f} GB missing "
            f"({model.weights_bytes(weight_dtype) / 1e9:.1f} GB of weights{beside}); {remedy}"
        )
    return tokens


def kv_bytes_per_token(model: Model, hardware: Hardware, dtype: str = "bf16", tp: int = 1) -> int:
    """KV bytes of one token over all ranks; of measured hardware in the number format it was measured with."""
    return hardware.profile.model.kv_bytes_per_token if hardware.profile is not None else model.kv_bytes_per_token(dtype, tp)


def kv_windows(model: Model, hardware: Hardware, dtype: str = "bf16", tp: int = 1) -> tuple[tuple[int, int], ...]:
    """(KV bytes of one token over all ranks, tokens kept) of layers with a window; none of measured hardware, which has its own count."""
    if hardware.profile is not None:
        return ()
    return tuple((size, window) for window, size in model.kv_bytes_by_window(dtype, tp).items() if window)


def check_tp(model: Model, tp: int) -> None:
    """Raises UsageError unless the model's heads divide among `tp` ranks."""
    if tp < 1 or model.heads % tp:
        near = [n for n in range(1, 65) if model.heads % n == 0]
        raise UsageError(
            f"tp {tp} does not divide the {model.heads} attention heads of {model.name}: choose one of {', '.join(map(str, near))}"
        )


def _free_bytes(
    model: Model, hardware: Hardware, tp: int, utilization: float, weight_dtype: str, batch_tokens: int, max_seqs: int
) -> float:
    """Of one rank."""
    weights = model.weights_bytes(weight_dtype) / tp
    states = max_seqs * model.state_bytes / tp
    return hardware.hbm_bytes * utilization - weights - states - RUNTIME_BYTES - activation_bytes(model, tp, batch_tokens)
