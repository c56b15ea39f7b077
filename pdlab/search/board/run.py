"""A measured row as an experiment, and what its simulation says of the row's figures.

A row was measured in a closed loop of `concurrency` requests, ten times as many in all, whose lengths are drawn from 0.8 to 1 of nominal;
so it is simulated. Its means hold the start, in which all arrive at once, and the end, where fewer and fewer are left. Fewer waves would
not do: the requests that began together stay together for several of them, and four waves miss TTFT by a quarter.

How an engine runs is said by its backend: SGLang computes prompts before anything else, the others mix them with decodes. A disaggregated
row's servers are on hosts of their own, and its first token comes from decode, which the table's proxies wait for, and which stalls no
decode. TensorRT-LLM's take as many requests at once as `pdlab.cost.launches` knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pdlab.core.types import UsageError
from pdlab.cost.launches import MAX_BATCH_TOKENS, decode_slots, delay, front_share, waves
from pdlab.cost.measurements import SHORTEST_SHARE, MeasuredRow, Side, throughput_per_gpu
from pdlab.cost.parallel import fitting
from pdlab.experiment.experiment import Experiment
from pdlab.report.result import Result
from pdlab.search.pool import Scalar, SimulationTask, TaskPool

BATCHING = {"sglang": "prefill_first"}


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A measured row and what was simulated; without a figure, why."""

    row: MeasuredRow
    ttft_s: float = float("nan")
    tpot_s: float = float("nan")
    failure: str = ""
    cpu_s: float = 0.0

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return throughput_per_gpu(self.row, self.ttft_s, self.tpot_s)

    @property
    def errors(self) -> dict[str, float]:
        """Relative, simulated / measured - 1."""
        row = self.row
        return {
            "tpot": self.tpot_s / row.tpot_s - 1.0,
            "ttft": self.ttft_s / row.ttft_s - 1.0,
            "throughput": self.tokens_per_s_per_gpu / row.tokens_per_s_per_gpu - 1.0,
        }


def experiment_of(row: MeasuredRow, seed: int = 0) -> Experiment:
    """Raises UsageError where the row's model does not fit, or its tp does not divide."""
    return Experiment.parse(_mapping(row, seed), row.id)


def _mapping(row: MeasuredRow, seed: int) -> dict[str, Any]:
    return {
        "name": "board",
        "seed": seed,
        "model": row.model_name,
        "workload": {
            "source": "synthetic",
            "requests": waves(row) * row.concurrency,
            "prompt": _lengths(row.prompt_tokens),
            "output": _lengths(row.output_tokens),
            "arrival": {"process": "closed", "concurrency": row.concurrency},
        },
        "cluster": {"instances": [_instance(row, side) for side in row.sides]},
        "engine": {
            "max_seqs": max(256, min(1 << 16, row.concurrency)),
            "max_batch_tokens": MAX_BATCH_TOKENS,
            "like": row.engine,
            "batching": _batching(row),
            "prefix_cache": False,
            **({"speculation": {"tokens": row.mtp_tokens}} if row.mtp_tokens else {}),
        },
        "cost": {"weight_dtype": row.weight_dtype, "kv_dtype": row.kv_dtype, "factors": {"front": front_share(row)}},
        "transfer": {"first_token": "decode"},
        "limits": {"request_timeout_s": 1e7},
        "policy": "least_loaded",
    }


def _batching(row: MeasuredRow) -> str | dict[str, Any]:
    plain = BATCHING.get(row.engine, "chunked")
    held = None if row.disaggregated else delay(row)
    return plain if held is None else {"name": "delayed", **asdict(held), "prompts_first": plain == "prefill_first"}


def _lengths(nominal: int) -> dict[str, list[int]]:
    return {"uniform": [max(1, round(SHORTEST_SHARE * nominal)), nominal]}


def _instance(row: MeasuredRow, side: Side) -> dict[str, Any]:
    p = side.parallel
    made: dict[str, Any] = {"role": side.role, "count": side.workers, "hardware": row.hardware_name}
    made |= {"tp": p.tp, "dp_attention": p.dp_attention, "ep": p.ep, "pp": p.pp}
    groups = fitting(row.model(), p).dp_attention
    own: dict[str, Any] = {}
    if groups > 1:  # each group has a batch of its own
        own["max_batch_tokens"] = MAX_BATCH_TOKENS * groups
    if side.role == "decode":
        held = delay(row)  # nobody stalls decodes for a first token whose KV has come
        own["batching"] = "chunked" if held is None else {"name": "delayed", **asdict(held)}
        if (slots := decode_slots(row)) is not None:
            own["max_seqs"] = slots
    if own:
        made["engine"] = own
    return made


def closed_loop_means(result: Result) -> dict[str, Scalar]:
    """Mean TTFT and TPOT of a run, in seconds; or how many requests were not served."""
    if unserved := result.summary["requests"] - result.summary["completed"]:
        return {"unserved": unserved}
    return {
        "ttft_s": float(result.requests["ttft_s"].mean()),
        "tpot_s": float(result.requests["tpot_s"].mean()),
    }


def score(rows: Sequence[MeasuredRow], pool: TaskPool) -> Iterator[ScoredRow]:
    """Each row's figures, as they come. What cannot be simulated is a failure, with its reason."""
    tasks, by_key = [], {}
    for index, row in enumerate(rows):
        key = str(index)
        try:
            tasks.append(SimulationTask(key, experiment_of(row), figures=closed_loop_means))
            by_key[key] = row
        except UsageError as error:
            yield ScoredRow(row, failure=str(error).splitlines()[0])
    tasks.sort(key=lambda task: task.experiment.workload.requests or 0, reverse=True)  # so that no process is alone at the end
    for done in pool.run(tasks):
        yield _scored(by_key[done.key], done.figures, done.failure, done.cpu_s)


def _scored(row: MeasuredRow, figures: Mapping[str, Scalar], failure: str, cpu_s: float) -> ScoredRow:
    if not failure and "unserved" in figures:
        failure = f"{figures['unserved']} requests were not served"
    if failure:
        return ScoredRow(row, failure=failure, cpu_s=cpu_s)
    ttft_s, tpot_s = figures["ttft_s"], figures["tpot_s"]
    assert isinstance(ttft_s, float)
    assert isinstance(tpot_s, float)
    return ScoredRow(row, ttft_s, tpot_s, cpu_s=cpu_s)
