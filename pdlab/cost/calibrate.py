"""Fit the roofline's fractions and overheads to published steps of 2023's engine: python -m pdlab.cost.calibrate ../shared/data [--write]

*Single steps* (`profiles/splitwise-sim/perf_model.csv`, 2023's engine; the rows "pcap" are computed and left out): the prompt's step,
and the mean decode step over token_size tokens. Today's engines are fitted by `pdlab.search.board.fit`.

The fit minimises squared log errors by Levenberg-Marquardt over log parameters, held near a prior which only decides what the
data leave open. Fractions stay below 0.95. Errors are stated twice: of the fit to all rows, which is what ships, and of five fits that each
left out a fifth of the set-ups, on what they left out. Mean absolute relative error, fitted / held out:

    h100-2023      prefill, 44 set-ups      14.0 % / 15.0 %     decode, 75 set-ups    3.6 % / 3.9 %
    a100-2023      prefill, 44 set-ups      14.1 % / 14.8 %     decode, 75 set-ups    6.4 % / 6.6 %

Prefill misses most at tp 8, where time a token jumps by 40 % between 2048 and 4096 tokens (the all-reduce, perhaps), which no coefficient
here can follow.

*Closed loops* (`calibration/h100_llama8b_qwen32b_measured.csv`): mean TPOT of aggregated engines of 2025 with B requests in flight, an
older and smaller table than the board's. TPOT is predicted from step times by the formulas of `pdlab.cost.loops`. Rows without a
concurrency are left out. TensorRT-LLM's fp8 rows keep KV in fp8: only so do their 64 requests of 4096 tokens fit, and they did not queue.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import UsageError
from pdlab.cost.base import Cost
from pdlab.cost.capacity import kv_capacity_tokens
from pdlab.cost.catalogue import hardware, model
from pdlab.cost.hardware import Hardware
from pdlab.cost.roofline import Coefficients, Roofline, coefficients
from pdlab.cost.shapes import Model

Floats = NDArray[np.float64]
MOST_ACHIEVED = 0.95  # of any peak
LENGTH_SHARE = 0.9  # mean of lengths drawn from 0.8 to 1 of nominal
CLOSED_LOOP = "calibration/h100_llama8b_qwen32b_measured.csv"
STEPS = "profiles/splitwise-sim/perf_model.csv"
STEPS_SOURCE = "fitted to splitwise-sim's measured steps (llama-2-70b tp 2-8, bloom-176b tp 8)"
PRIOR_2023 = Coefficients(
    compute=0.6,
    compute_8bit=0.5,
    memory=0.75,
    attention_memory=0.6,
    attention_compute=0.4,
    collective=0.6,
    collective_latency=2.0,
    step_s=2e-3,
    layer_s=100e-6,
    sequence_s=50e-6,
)
FREE_2023 = (
    "compute",
    "memory",
    "attention_memory",
    "attention_compute",
    "collective",
    "collective_latency",
    "step_s",
    "layer_s",
    "sequence_s",
)
MOST_CONCURRENCY = 64  # above, most rows are short of KV or of steady state


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """One measured row of an aggregated engine under fixed concurrency."""

    engine: str
    model: Model
    hardware: Hardware
    tp: int
    dtype: str
    kv_dtype: str
    concurrency: int
    prompt_tokens: float
    output_tokens: float
    tpot_s: float

    def predict(self, achieved: Coefficients) -> float:
        """TPOT in seconds."""
        return closed_loop_tpot_s(
            Roofline(self.model, self.hardware, self.tp, achieved, self.dtype, self.kv_dtype),
            self.running,
            round(self.prompt_tokens),
            self.output_tokens,
            prefill_first=self.engine == "sglang",
        )

    @property
    def running(self) -> float:
        """Requests in flight that the KV cache has room for."""
        capacity = kv_capacity_tokens(self.model, self.hardware, self.tp, 0.9, self.dtype, self.kv_dtype)
        return min(float(self.concurrency), max(1.0, capacity / (self.prompt_tokens + self.output_tokens / 2)))

    @property
    def measured(self) -> float:
        return self.tpot_s

    @property
    def setup(self) -> str:
        """Rows of one set-up are held out together."""
        return f"{self.engine} {self.model.name} {self.dtype} tp{self.tp} {self.prompt_tokens:.0f}/{self.output_tokens:.0f}"


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One measured step: a prompt batch, or (`prefill` false) the mean decode step while `output_tokens` were made."""

    model: Model
    hardware: Hardware
    tp: int
    prefill: bool
    prompt_tokens: int
    batch: int
    output_tokens: int
    seconds: float

    def predict(self, achieved: Coefficients) -> float:
        cost = Roofline(self.model, self.hardware, self.tp, achieved)
        if self.prefill:
            return cost.prefill_s([(self.prompt_tokens, 0)] * self.batch)
        return cost.decode_s(self.batch, round(self.batch * (self.prompt_tokens + self.output_tokens / 2)))

    @property
    def measured(self) -> float:
        return self.seconds

    @property
    def setup(self) -> str:
        phase = "prefill" if self.prefill else "decode"
        return f"{self.model.name} tp{self.tp} {phase} {self.prompt_tokens}x{self.batch}/{self.output_tokens}"


Row = ClosedLoop | MeasuredStep


def closed_loop_tpot_s(cost: Cost, concurrency: float, prompt_tokens: int, output_tokens: float, prefill_first: bool = False) -> float:
    """Mean TPOT of an aggregated engine with that many requests always in flight (formulas: this module's head)."""
    steps = max(1.0, output_tokens - 1)
    chunk = [(prompt_tokens, 0)]
    decode_share, decode_s = 1.0, 0.0
    for _ in range(20):
        decoding = max(1.0, concurrency * decode_share)
        batch, context = round(decoding), round(decoding * (prompt_tokens + output_tokens / 2))
        step_s = cost.decode_s(batch, context)
        if prefill_first:
            added_s = cost.prefill_s(chunk)
            prefill_share = concurrency * added_s / (steps * step_s + concurrency * added_s)
            return step_s + (concurrency - 1) * (1.0 - prefill_share / 2) * added_s / steps
        mixed_s = cost.mixed_s(chunk, batch, context)
        decode_s = steps * step_s + (concurrency - 1) * decode_share * (mixed_s - step_s)
        share = decode_s / (decode_s + mixed_s)
        if abs(share - decode_share) < 1e-4:
            break
        decode_share = share
    return decode_s / steps


def read_closed_loop(path: Path) -> list[ClosedLoop]:
    """Rows of the calibration CSV, those with a concurrency. Raises UsageError when it can't be read."""
    rows = []
    for row in _read_csv(path):
        if not row["conc"]:
            continue
        dtype = row["gemm_quant_mode"] or "bf16"
        rows.append(
            ClosedLoop(
                engine=row["backend"],
                model=model(row["model_path"].rsplit("/", 1)[-1]),
                hardware=hardware(row["system"].replace("_", "-")),
                tp=int(float(row["tp_size"])),
                dtype=dtype,
                kv_dtype=dtype if row["backend"] == "trtllm" else "bf16",
                concurrency=round(float(row["conc"])),
                prompt_tokens=LENGTH_SHARE * float(row["isl"]),
                output_tokens=LENGTH_SHARE * float(row["osl"]),
                tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
            )
        )
    return rows


def read_steps(path: Path, machine: str) -> list[MeasuredStep]:
    """Steps of splitwise's table on `machine` ("a100-80gb", "h100-80gb"), repeats replaced by their median. Prompt batches above 8192
    tokens are left out, and so are tp 2's at batch 64, which are shorter than at batch 8: the engine had no memory left for them."""
    groups: dict[tuple[str, int, int, int, int], list[tuple[float, float]]] = {}
    for row in _read_csv(path):
        if row["hardware"] == machine:
            key = (row["model"], int(row["tensor_parallel"]), int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"]))
            groups.setdefault(key, []).append((float(row["prompt_time"]) / 1e3, float(row["token_time"]) / 1e3))
    steps = []
    for (name, tp, prompt, batch, output), times in groups.items():
        if tp == 2 and batch == 64:
            continue
        prefill_s, decode_s = (float(np.median(column)) for column in zip(*times, strict=True))
        shape = (model(name), hardware(machine), tp)
        if prompt * batch <= 8192 and output == 128:
            steps.append(MeasuredStep(*shape, True, prompt, batch, output, prefill_s))
        steps.append(MeasuredStep(*shape, False, prompt, batch, output, decode_s))
    return steps


def errors(rows: Sequence[Row], achieved: Coefficients) -> Floats:
    """Relative errors, predicted / measured - 1, one a row."""
    return np.array([row.predict(achieved) / row.measured - 1.0 for row in rows])


def fit(rows: Sequence[Row], prior: Coefficients, free: Sequence[str], hold: float = 0.03, rounds: int = 30) -> Coefficients:
    """`prior` with its `free` fields fitted to `rows`. `hold` weighs the prior: an e-fold away from it costs as much as that log error in
    every row."""
    start = np.log([getattr(prior, name) for name in free])
    pull = hold * np.sqrt(len(rows))

    def unpack(x: Floats) -> Coefficients:
        values: dict[str, Any] = {name: _possible(name, float(np.exp(v))) for name, v in zip(free, x, strict=True)}
        return replace(prior, **values)

    def residuals(x: Floats) -> Floats:
        made = unpack(x)
        misses = np.array([np.log(row.predict(made) / row.measured) for row in rows])
        return np.concatenate([misses, pull * (x - start)])

    return unpack(_least_squares(residuals, start, rounds))


def _possible(name: str, value: float) -> float:
    return value if name == "collective_latency" else min(value, MOST_ACHIEVED)


def held_out(rows: Sequence[Row], prior: Coefficients, free: Sequence[str], folds: int = 5) -> Floats:
    """Relative errors of each row under coefficients fitted without its set-up."""
    setups = sorted({row.setup for row in rows})
    fold_of = {setup: i % folds for i, setup in enumerate(setups)}
    out = np.zeros(len(rows))
    for fold in range(folds):
        made = fit([r for r in rows if fold_of[r.setup] != fold], prior, free)
        for i, row in enumerate(rows):
            if fold_of[row.setup] == fold:
                out[i] = row.predict(made) / row.measured - 1.0
    return out


def _least_squares(residuals: Callable[[Floats], Floats], x: Floats, rounds: int) -> Floats:
    """Levenberg-Marquardt with a numerical Jacobian."""
    damping, now = 1e-2, residuals(x)
    for _ in range(rounds):
        jacobian = np.stack([(residuals(x + 1e-3 * unit) - now) / 1e-3 for unit in np.eye(len(x))], axis=1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ now
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
            tried = residuals(x + step)
            if tried @ tried < now @ now:
                break
            damping *= 4.0
        else:
            return x
        gain = 1.0 - (tried @ tried) / (now @ now)
        x, now, damping = x + step, tried, damping / 3.0
        if gain < 1e-6:
            break
    return x


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    except OSError as error:
        raise UsageError(f"measurements {path}: {error.strerror or error}") from None


def calibrate(folder: Path) -> dict[str, Coefficients]:
    """The sets of 2023's engine, fitted to the data folder. Raises UsageError when a file can't be read."""
    found = {}
    for family in ("h100", "a100"):
        steps = read_steps(folder / STEPS, f"{family}-80gb")
        found[f"{family}-2023"] = _named(fit(steps, PRIOR_2023, FREE_2023), steps)
    return found


def _named(made: Coefficients, steps: Sequence[Row]) -> Coefficients:
    """With four significant digits, its source and its error."""
    rounded: dict[str, Any] = {n: float(f"{v:.4g}") for n, v in asdict(made).items() if isinstance(v, float)}
    rounded["error"] = float(f"{np.quantile(np.abs(np.log1p(errors(steps, made))), 0.95):.3g}")
    return replace(made, **rounded, rows=len(steps), calibrated=True, source=STEPS_SOURCE)


def _summary(label: str, misses: Floats) -> str:
    size = np.abs(misses)
    return f"{label:44} mean {size.mean():6.1%}  p50 {np.median(size):6.1%}  p90 {np.percentile(size, 90):6.1%}  n {len(size)}"


def report(folder: Path, found: dict[str, Coefficients]) -> list[str]:
    """One line for each data set and phase: absolute relative error, fitted and held out."""
    loop = [r for r in read_closed_loop(folder / CLOSED_LOOP) if r.concurrency <= MOST_CONCURRENCY]
    lines = []
    for engine in ("trtllm", "vllm", "sglang"):
        own = [r for r in loop if r.engine == engine]
        lines.append(_summary(f"h100-{engine} TPOT on {engine}", errors(own, coefficients(f"h100-{engine}"))))
    for family in ("h100", "a100"):
        steps = read_steps(folder / STEPS, f"{family}-80gb")
        prefill = np.array([r.prefill for r in steps])
        for label, misses in (("fitted", errors(steps, found[f"{family}-2023"])), ("held out", held_out(steps, PRIOR_2023, FREE_2023))):
            lines.append(_summary(f"{family}-2023 prefill, {label}", misses[prefill]))
            lines.append(_summary(f"{family}-2023 decode, {label}", misses[~prefill]))
    return lines


def main() -> None:
    """Fit, print the errors and the sets; with --write replace the shipped ones."""
    parser = argparse.ArgumentParser(prog="python -m pdlab.cost.calibrate", description="Fit the roofline to published measurements.")
    parser.add_argument("folder", type=Path, help="the data folder, with calibration/ and profiles/")
    parser.add_argument("--write", action="store_true", help="replace the shipped coefficients.json")
    arguments = parser.parse_args()
    try:
        found = calibrate(arguments.folder)
        lines = report(arguments.folder, found)
    except UsageError as error:
        parser.error(str(error))
    print("\n".join(lines))
    if arguments.write:
        path = Path(__file__).with_name("coefficients.json")
        kept = json.loads(path.read_text(encoding="utf-8")) | {name: asdict(values) for name, values in found.items()}
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
