"""A roofline's step times as a table: what `pdlab costs make` writes.

The grid is a file that can be read, plotted, edited and compared with a measurement, and that costs the same with a later pdlab, whose
coefficients differ. Between its points it differs from the roofline by less than 1 % in the
mean, of 120 steps of each of five models. What the front end takes before a first token is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdlab.cost.error import cost_error
from pdlab.cost.hardware import Hardware
from pdlab.cost.parallel import Parallel, fitting
from pdlab.cost.shapes import Model
from pdlab.cost.spec import CostSpec, build
from pdlab.cost.table import DecodeGrid, PrefillGrid, Profile

TOKENS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536)
CACHED = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CONTEXTS = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def roofline_table(
    model: Model,
    hardware: Hardware,
    engine: str = "vllm",
    parallel: Parallel | int = 1,
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    tokens: Sequence[int] = TOKENS,
    cached: Sequence[int] = CACHED,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
) -> Profile:
    """Seconds of a prompt's step over (new tokens, tokens in KV), and of a decode step over (batch, context of one sequence). Raises
    UsageError where ranks do not divide the model."""
    spec = CostSpec(weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    cost = build(spec, model, hardware, parallel, like=engine)
    rests = cost_error(spec, hardware, engine)
    return Profile(
        name=f"{model.name} on {hardware.name}, {fitting(model, parallel)}, {engine}",
        source=f"pdlab's roofline: {rests.source}; {rests}" if rests is not None else "pdlab's roofline",
        prefill=PrefillGrid(
            tokens=tuple(tokens),
            cached=tuple(cached),
            seconds=tuple(tuple(_short(cost.prefill_s([(new, before)])) for before in cached) for new in tokens),
        ),
        decode=DecodeGrid(
            batch=tuple(batches),
            context=tuple(contexts),
            seconds=tuple(tuple(_short(cost.decode_s(batch, batch * each)) for each in contexts) for batch in batches),
        ),
    )


def _short(seconds: float) -> float:
    return float(f"{seconds:.6g}")
