"""Table profiles from aiconfigurator-core's kernel data base: python -m pdlab.cost.aic --model NAME --system h100_sxm --out profile.json

The optional extra `aic` (aiconfigurator-core==0.12.0; no GPU needed) predicts step times from kernels measured on the accelerator. It takes
about 1.5 CPU seconds to open a model and 0.1 ms a query, so its answers are kept as a grid once; on a 9 x 8 decode grid bilinear
interpolation differs from asking it by 0.8 % in the mean. `--model` is the Hugging Face name of a model whose config it bundles (others it
would download), or a local folder; systems it knows include h100_sxm, h200_sxm, a100_sxm, l40s, b200_sxm and gb200.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.cost.table import DecodeGrid, PrefillGrid, Profile, save_profile

TOKENS = (1, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
CACHED = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
CONTEXTS = (1, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


def make_profile(
    model: str,
    system: str,
    backend: str = "vllm",
    tp: int = 1,
    tokens: Sequence[int] = TOKENS,
    cached: Sequence[int] = CACHED,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
) -> Profile:
    """Ask aiconfigurator at every grid point. Raises UsageError when it is not installed, or does not know the model or the system."""
    try:
        handle: Any = import_module("aiconfigurator_core.sdk.engine").EngineHandle
    except ImportError:
        raise UsageError("aiconfigurator-core is not installed: pip install aiconfigurator-core==0.12.0") from None
    try:
        engine: Any = handle.compile(model, system, backend, tp_size=tp, moe_tp_size=tp)
        prefill = [[engine.predict_prefill_latency(1, new + before, before) / 1e3 for before in cached] for new in tokens]
        decode = [[engine.decode_step_latency(batch, context, 2) / 1e3 for context in contexts] for batch in batches]
    except Exception as error:  # its exceptions share no base class
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"aiconfigurator has no answer for {model!r} on {system!r} with {backend!r} at tp {tp}: {reason}") from error
    return Profile(
        name=f"{model} on {tp} x {system}, {backend}",
        source="aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0)",
        prefill=PrefillGrid(tokens=tuple(tokens), cached=tuple(cached), seconds=_frozen(prefill)),
        decode=DecodeGrid(batch=tuple(batches), context=tuple(contexts), seconds=_frozen(decode)),
    )


def _frozen(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{value:.5g}") for value in row) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one profile."""
    parser = argparse.ArgumentParser(prog="python -m pdlab.cost.aic", description="Make a cost table from aiconfigurator-core.")
    parser.add_argument("--model", required=True, help="Hugging Face name, e.g. meta-llama/Meta-Llama-3.1-8B")
    parser.add_argument("--system", required=True, help="e.g. h100_sxm")
    parser.add_argument("--backend", default="vllm", help="vllm, sglang or trtllm (default %(default)s)")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="the profile's path")
    given = parser.parse_args(arguments)
    try:
        profile = make_profile(given.model, given.system, given.backend, given.tp)
    except UsageError as error:
        parser.error(str(error))
    save_profile(profile, given.out)


if __name__ == "__main__":
    main()
